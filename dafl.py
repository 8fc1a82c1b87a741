# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4.1", "torchvision>=0.19.1"]
# ///
"""Data-Free Learning of Student Networks, in one file.

Hanting Chen, Yunhe Wang, Chang Xu, Zhaohui Yang, Chuanjian Liu, Boxin Shi, Chunjing Xu, Chao Xu, Qi Tian.
ICCV 2019, https://arxiv.org/abs/1904.01186

A trained classifier, the teacher, is all that is left; its training data are gone. A generator learns to draw images
that the fixed teacher takes for its own data: it is sure of each (L_oh), its features answer strongly (L_a), and a
batch covers all classes evenly (L_ie). A smaller student learns to give the teacher's outputs on those images (L_KD).
Then it is tested on real images, from which it has learnt nothing.

    python dafl.py                     # MNIST: trains the teacher, then the student without data
    python dafl.py --images noise      # a baseline: the student learns on noise instead
    python dafl.py --help              # every flag with its defaults
"""

import argparse
import csv
import math
import os
import re
import sys
import time
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, MultiStepLR
from torchvision import datasets
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import make_grid, save_image

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# === The method: down to the next double line, it needs only PyTorch =================================================

# --- Section 3.1: teacher and student, each giving (logits, features), and the loss between them ---------------------


class LeNet5(nn.Module):
    """LeNet-5 of Table 1: the teacher at width 1 (61,706 parameters), the student at width 0.5 (15,738).

    Images (N, 1, 32, 32) to logits (N, 10) and features (N, 120 * width), the input of the fully connected layers.
    """

    def __init__(self, width=1.0):
        super().__init__()
        c1, c2, c3, hidden = (round(width * channels) for channels in (6, 16, 120, 84))
        self.conv1 = nn.Conv2d(1, c1, 5)
        self.conv2 = nn.Conv2d(c1, c2, 5)
        self.conv3 = nn.Conv2d(c2, c3, 5)
        self.fc1 = nn.Linear(c3, hidden)
        self.fc2 = nn.Linear(hidden, 10)

    def forward(self, images):  # (N, 1, 32, 32)
        x = F.max_pool2d(self.conv1(images), 2).relu()  # (N, 6, 14, 14)
        x = F.max_pool2d(self.conv2(x), 2).relu()  # (N, 16, 5, 5)
        features = self.conv3(x).relu().flatten(1)  # (N, 120)
        return self.fc2(self.fc1(features).relu()), features


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al., CVPR 2016): (N, C, H, W) to (N, C', H / stride, W / stride)."""

    def __init__(self, in_channels, channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x):
        out = self.bn1(self.conv1(x)).relu()
        return (self.bn2(self.conv2(out)) + self.shortcut(x)).relu()


class ResNet(nn.Module):
    """ResNet in its CIFAR form: a 3x3 stem and no max-pooling, four stages of `blocks` basic blocks.

    Images (N, 3, 32, 32) to logits (N, num_classes) and features (N, 512 * width), the input of the last layer.
    """

    def __init__(self, blocks, num_classes=10, width=1.0):
        super().__init__()
        widths = [round(width * channels) for channels in (64, 128, 256, 512)]
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        stages, in_channels = [], widths[0]
        for channels, count, stride in zip(widths, blocks, (1, 2, 2, 2)):
            for block in range(count):
                stages.append(BasicBlock(in_channels, channels, stride if block == 0 else 1))
                in_channels = channels
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(in_channels, num_classes)

    def forward(self, images):  # (N, 3, 32, 32)
        x = self.bn1(self.conv1(images)).relu()  # (N, 64, 32, 32)
        features = self.stages(x).mean((2, 3))  # (N, 512, 4, 4) averaged to (N, 512)
        return self.fc(features), features


resnet34 = partial(ResNet, (3, 4, 6, 3))  # the CIFAR teacher of Tables 3 and 4
resnet18 = partial(ResNet, (2, 2, 2, 2))  # the CIFAR student of Tables 3 and 4


def kd_loss(student_logits, teacher_logits, temperature=1.0):
    """L_KD, Eq. 1 less the teacher's own entropy: KL(teacher || student) in nats, batch mean; both logits (N, K).

    So its gradient is that of Eq. 1, and it is 0 when both agree. A temperature above 1 shows how the teacher ranks the
    classes that it rules out; its square keeps the size of the gradient (Hinton et al., 2015). Raises ValueError.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(f"shapes differ: student {[*student_logits.shape]}, teacher {[*teacher_logits.shape]}")
    log_q, p = (student_logits / temperature).log_softmax(1), (teacher_logits / temperature).softmax(1)
    return temperature**2 * F.kl_div(log_q, p, reduction="batchmean")


# --- Section 3.2: the generator and its three losses -----------------------------------------------------------------


class UpsampleConv2d(nn.Conv2d):
    """nn.Upsample(scale_factor=2) and a 3x3 nn.Conv2d in one: the same numbers for 2.25 times fewer products."""

    def forward(self, x):
        # A pixel repeated over 2x2 meets the sum of four shifted kernels, which is 4 times their average.
        kernel = 4 * F.avg_pool2d(F.pad(self.weight.flip(2, 3), (1, 1, 1, 1)), 2, stride=1).transpose(0, 1)
        layout = torch.contiguous_format if x.device.type == "mps" else torch.channels_last  # see to_device
        return F.conv_transpose2d(x, kernel.contiguous(memory_format=layout), self.bias, stride=2, padding=1)


class Generator(nn.Module):
    """G, as released: noise z (N, latent_dim) to images (N, channels, image_size, image_size); 4 divides image_size.

    The last BatchNorm has no parameters: over a batch each channel has mean 0 and variance 1, as normalised data have.
    Two others have an eps of 0.8, as in the released code. Beyond the paper, pixels can be cut to a `pixel_range`: the
    losses do not mind which sign a stroke has, and on some seeds a generator of digits draws black on white without it.
    """

    def __init__(self, latent_dim=100, channels=1, image_size=32, pixel_range=(-math.inf, math.inf)):
        if image_size % 4:
            raise ValueError(f"image_size must be a multiple of 4, not {image_size}")
        super().__init__()
        self.latent_dim, self.start_size, self.pixel_range = latent_dim, image_size // 4, pixel_range
        self.linear = nn.Linear(latent_dim, 128 * self.start_size**2)
        self.layers = nn.Sequential(  # (N, 128, 8, 8)
            nn.BatchNorm2d(128),
            UpsampleConv2d(128, 128, 3),  # (N, 128, 16, 16)
            nn.BatchNorm2d(128, eps=0.8),
            nn.LeakyReLU(0.2),
            UpsampleConv2d(128, 64, 3),  # (N, 64, 32, 32)
            nn.BatchNorm2d(64, eps=0.8),
            nn.LeakyReLU(0.2),
            nn.Conv2d(64, channels, 3, padding=1),  # (N, channels, 32, 32)
            nn.Tanh(),
            nn.BatchNorm2d(channels, affine=False),
        )

    def forward(self, z):
        x = self.linear(z).unflatten(1, (128, self.start_size, self.start_size))
        return self.layers(x).clamp(*self.pixel_range)


def one_hot_loss(logits):
    """L_oh, Eq. 4: cross-entropy of the teacher's logits (N, K) against their own argmax; low when it is sure."""
    return F.cross_entropy(logits, logits.argmax(1))


def activation_loss(features):
    """L_a, Eq. 5: minus the mean absolute feature (N, D) of the teacher; low when its filters answer strongly.

    The mean is over N and D, as in the released code, to whose scale alpha belongs; Eq. 5 sums over D.
    """
    return -features.abs().mean()


def information_entropy_loss(logits):
    """L_ie, Eq. 6: minus the entropy of the mean prediction; lowest when a batch covers all classes evenly.

    Logits (N, K) to sum p log10 p, from -log10 K to 0, with p the mean softmax and 0 log 0 = 0. Eq. 6 has a factor 1/K
    besides; this is the released code's scale, to which beta belongs.
    """
    p = logits.softmax(1).mean(0)
    return (p * p.clamp_min(torch.finfo(p.dtype).tiny).log10()).sum()


# --- Algorithm 1 -----------------------------------------------------------------------------------------------------


def classify(network, images):
    """Logits (N, K) and features (N, D) of images (N, C, H, W). Raises ValueError for anything else."""
    outputs = network(images)
    if not isinstance(outputs, (tuple, list)) or len(outputs) != 2:
        raise ValueError("teacher and student must return (logits, features); features are the last layers' input")
    return outputs


def update(optimizer, loss):
    """One step of the optimizer along the loss's gradient."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def distill_step(
    teacher, student, generator, optimizer_g, optimizer_s, *, batch_size=64, oh=1, alpha=0.1, beta=5, temperature=1
):
    """One step of Algorithm 1: one update of the generator, then one of the student, both in place.

    Teacher and student return (logits, features); the teacher is frozen. The generator has a latent_dim. oh, alpha and
    beta weigh the generator's losses; the paper has oh 1 on MNIST. Returns the losses l_oh, l_a, l_ie and l_kd by name
    and the images (N, C, H, W), all detached.
    """
    teacher.eval().requires_grad_(False)
    student.train()
    generator.train()

    # Module 1: the generator
    z = torch.randn(batch_size, generator.latent_dim, device=next(generator.parameters()).device)
    images = generator(z)
    logits, features = classify(teacher, images)
    l_oh, l_a, l_ie = one_hot_loss(logits), activation_loss(features), information_entropy_loss(logits)
    update(optimizer_g, oh * l_oh + alpha * l_a + beta * l_ie)  # L_Total, Eq. 7

    # Module 2: the student, on the same images as in the released code; the paper draws a second batch
    images = images.detach()
    l_kd = kd_loss(classify(student, images)[0], logits.detach(), temperature)
    update(optimizer_s, l_kd)
    return {"l_oh": l_oh.detach(), "l_a": l_a.detach(), "l_ie": l_ie.detach(), "l_kd": l_kd.detach()}, images


def kd_step(teacher, student, optimizer_s, images, temperature=1.0):
    """One update of the student, in place, on given images (N, C, H, W). Returns its loss by name: l_kd, detached."""
    teacher.eval().requires_grad_(False)
    student.train()
    logits = classify(teacher, images)[0]
    l_kd = kd_loss(classify(student, images)[0], logits, temperature)
    update(optimizer_s, l_kd)
    return {"l_kd": l_kd.detach()}


# --- Beyond the paper: a generated image takes long to make and not long to learn from, so past ones come again ------


class ReplayBuffer(nn.Module):
    """The latest `capacity` images of shape (C, H, W), in half precision; a module, to move and to be saved as one."""

    def __init__(self, capacity, image_shape):
        super().__init__()
        self.register_buffer("added", torch.tensor(0))  # a tensor, so that nothing waits for a GPU
        self.register_buffer("images", torch.zeros(capacity, *image_shape, dtype=torch.float16))

    def add(self, images):
        """Put images (N, C, H, W) in the place of the oldest."""
        slots = (self.added + torch.arange(len(images), device=images.device)) % len(self.images)
        self.images[slots] = images.half()
        self.added += len(images)

    def sample(self, n):
        """Images (n, C, H, W), drawn with replacement from those added so far."""
        filled = self.added.clamp(max=len(self.images))
        return self.images[(torch.rand(n, device=filled.device) * filled).long()].float()


def cutmix(images):
    """CutMix (Yun et al., ICCV 2019) by half-planes: beyond a random line each image (N, C, H, W) shows another one.

    There are no labels to mix: the teacher says what it sees.
    """
    n, _, height, width = images.shape
    turns, offset = torch.rand(2, n, 1, 1, 1, device=images.device)
    angle = 2 * math.pi * turns
    y = torch.linspace(-1, 1, height, device=images.device)[:, None]
    x = torch.linspace(-1, 1, width, device=images.device)
    keep = x * angle.cos() + y * angle.sin() > offset - 0.5
    return torch.where(keep, images, images[torch.randperm(n, device=images.device)])


# === The experiments of Section 4: from here on there are data sets, files and flags =================================

DATASETS = {  # torchvision's class, number of classes, mean and std of each channel on a scale of 0 to 1
    "mnist": (datasets.MNIST, 10, (0.1307,), (0.3081,)),
    "cifar10": (datasets.CIFAR10, 10, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": (datasets.CIFAR100, 100, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
}
# fmt: off
HYPERPARAMETERS = {  # type, least, greatest, help
    "steps":          (int, 1, 10**9, "steps of Algorithm 1"),
    "batch_size":     (int, 2, 10**5, "images in a batch of the student's"),
    "latent_dim":     (int, 1, 10**5, "length of the generator's noise z"),
    "lr_g":           (float, 0, 1e6, "learning rate of the generator"),
    "lr_s":           (float, 0, 1e6, "learning rate of the student"),
    "oh":             (float, 0, 1e6, "weight of the one-hot loss, Eq. 4"),
    "alpha":          (float, 0, 1e6, "weight of the activation loss, Eq. 5"),
    "beta":           (float, 0, 1e6, "weight of the information entropy loss, Eq. 6"),
    "temperature":    (float, 1e-3, 1e3, "temperature of L_KD; the paper has 1"),
    "replay":         (int, 0, 1000, "student updates a step on past images; the paper has 0"),
    "width":          (float, 0.2, 10, "width multiplier of teacher and student"),
    "teacher_epochs": (int, 1, 10**5, "epochs of the teacher's training"),
    "teacher_batch":  (int, 2, 10**5, "images in a batch of the teacher's"),
    "teacher_lr":     (float, 0, 1e6, "learning rate of the teacher"),
}
RECIPES = {  # "released" has the authors' values; a column a hyperparameter, in the same order, the teacher's last
    #                          steps  batch latent  lr_g    lr_s    oh  alpha  beta   T replay width epochs batch lr
    ("mnist", "fast"):        (400,       64,  100,  0.01,  2.5e-3, 1.0,  0.1,  5.0, 4.0, 24, 1.0,    9, 256, 1e-3),
    ("mnist", "released"):    (24_000,   512,  100,  0.2,   2.0e-3, 1.0,  0.1,  5.0, 1.0,  0, 1.0,    9, 256, 1e-3),
    ("cifar10", "fast"):      (4_000,    128,  256,  0.001, 0.1,    1.0,  0.01, 5.0, 4.0,  4, 0.25,  40, 128, 0.1),
    ("cifar10", "released"):  (240_000, 1024, 1000,  0.02,  0.1,    0.05, 0.01, 5.0, 1.0,  0, 1.0,  199, 128, 0.1),
    ("cifar100", "fast"):     (4_000,    128,  256,  0.001, 0.1,    0.5,  0.1, 20.0, 4.0,  4, 0.25,  40, 128, 0.1),
    ("cifar100", "released"): (240_000, 1024, 1000,  0.02,  0.1,    0.5,  0.1, 20.0, 1.0,  0, 1.0,  199, 128, 0.1),
}
# fmt: on
LOG_COLUMNS = ["stage", "step", "seconds", "loss", "l_oh", "l_a", "l_ie", "l_kd", "accuracy"]
CHECKPOINT_SECONDS = 60
BAD_FILE = OSError, RuntimeError, ValueError, TypeError, LookupError, EOFError, AssertionError, UnpicklingError


class UserError(Exception):
    """Something that only the user can put right, told in one sentence."""


@contextmanager
def reading(source):
    """Turn what a missing, damaged or foreign file raises into a UserError that names the source."""
    try:
        yield
    except BAD_FILE as error:
        raise UserError(f"cannot use {source}: {' '.join(str(error).split())[:200] or 'it is damaged'}") from error


def load_dataset(name, split, data_dir=Path(__file__).parent / "data", device="cpu"):
    """The whole "train" or "test" split on the device: normalised images (N, C, 32, 32) and labels (N,).

    Downloads to data_dir what is not there. Raises ValueError for another name or split, UserError without the data.
    """
    if name not in DATASETS or split not in ("train", "test"):
        raise ValueError(f"no {split!r} split of {name!r}: there are 'train' and 'test' of {', '.join(DATASETS)}")
    source, _, mean, std = DATASETS[name]
    with reading(f"{name} in {data_dir} (damaged files there must be deleted)"):
        dataset = source(data_dir, split == "train", download=True)
    images = torch.as_tensor(dataset.data)  # uint8 (N, 28, 28) or (N, 32, 32, 3)
    images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2)
    images = TF.to_dtype(TF.resize(images, [32, 32]).to(device), torch.float32, scale=True)
    return TF.normalize(images, mean, std, inplace=True), torch.as_tensor(dataset.targets, device=device)


def crop_and_flip(images):
    """CIFAR's augmentation: shift each image (N, C, H, W) by up to 4 pixels, mirror each with probability 1/2."""
    n, _, height, width = images.shape
    shifted = F.pad(images, (4, 4, 4, 4)).unfold(2, height, 1).unfold(3, width, 1)  # (N, C, 9, 9, H, W)
    row, column = torch.randint(9, (2, n), device=images.device)
    images = shifted[torch.arange(n, device=images.device), :, row, column]
    return torch.where(torch.rand(n, 1, 1, 1, device=images.device) < 0.5, images, images.flip(3))


def classifier_step(network, optimizer, images, labels):
    """One update of a classifier, in place, on images (N, C, H, W) with labels (N,). Returns its loss, detached."""
    network.train()
    loss = F.cross_entropy(classify(network, images)[0], labels)
    update(optimizer, loss)
    return {"loss": loss.detach()}


@torch.no_grad()
def evaluate(model, images, labels):
    """Accuracy in [0, 1] of a classifier on normalised images (N, C, H, W) with labels (N,)."""
    model.eval()
    batches = zip(images.split(500), labels.split(500))
    correct = sum((classify(model, x)[0].argmax(1) == y).sum() for x, y in batches)
    return correct.item() / len(labels)


def has_fast_bf16(device):
    """Whether the device is faster in bf16: GPUs that have it, CPUs with AMX, AMD's since Zen 4."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpu = getattr(torch.cpu, "get_capabilities", dict)() if device == "cpu" else {}
    return cpu.get("amx_bf16", False) or (cpu.get("avx512_bf16", False) and "AMD" in cpu.get("cpu_name", ""))


def to_device(network, device, bf16):
    """Move a network, in place, in its fastest layout there; with bf16, all but a LeNet5 compute under autocast."""
    # On Apple GPUs BatchNorm's gradient is wrong in channels_last (github.com/pytorch/pytorch/issues/175189).
    network.to(device, memory_format=torch.preserve_format if device == "mps" else torch.channels_last)
    if bf16 and not isinstance(network, LeNet5):
        forward = network.forward

        def autocast_forward(x):
            with torch.autocast(device, torch.bfloat16):
                outputs = forward(x)
            return outputs.float() if torch.is_tensor(outputs) else tuple(output.float() for output in outputs)

        network.forward = autocast_forward
    return network


def make_optimizer(network, lr, steps, recipe, milestones):
    """Adam for a LeNet5, SGD for a ResNet; and the schedule of its learning rate.

    In the fast recipe the rate rises for a sixth of the steps and then falls to 0. In the released one a LeNet5's is
    constant, and a ResNet's falls to a tenth at each milestone, a share of the steps.
    """
    if isinstance(network, LeNet5):
        optimizer, milestones = torch.optim.Adam(network.parameters(), lr), ()
    else:
        optimizer = torch.optim.SGD(network.parameters(), lr, momentum=0.9, weight_decay=5e-4)
    if recipe == "fast":
        return optimizer, LambdaLR(optimizer, lambda step: min(6 * (step + 1) / steps, 1.2 * (1 - step / steps)))
    return optimizer, MultiStepLR(optimizer, [round(share * steps) for share in milestones])


# --- A run and its files ---------------------------------------------------------------------------------------------


@contextmanager
def run_folder(name, resume=None):
    """The folder to resume, or a new one: runs/NAME, runs/NAME-2 and so on; locked, where the system has locks."""
    folder, number = Path(resume or "runs"), 1
    if not resume:
        Path("runs").mkdir(exist_ok=True)
    while not resume:
        try:
            folder = Path("runs", name if number == 1 else f"{name}-{number}")
            folder.mkdir()
            break
        except FileExistsError:
            number += 1
    lock = os.open(folder, os.O_RDONLY) if fcntl else None
    try:
        if fcntl:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"the run in {folder} is still going on") from None
        yield folder
    finally:
        if fcntl:
            os.close(lock)
        with suppress(OSError):
            folder.rmdir()  # if it is empty


def save(content, path):
    """torch.save, but whole or not at all. Raises OSError."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        torch.save(content, temporary)
    except RuntimeError as error:  # a full disk
        raise OSError(f"cannot write {path}: {error}") from error
    os.replace(temporary, path)


def fit(stage, train_step, steps, parts, state, folder, test_set, draw=None):
    """The training loop of both stages, "teacher" and "student": train_step() `steps` times, reports, checkpoints.

    train_step() makes one update and returns its losses by name. parts are what has a state_dict, by name: parts[stage]
    is the network to test, "schedule" that of its learning rate. state is the rest of a checkpoint. Each of some eleven
    reports is a line on the screen and in log.csv and, if draw is given, a draw() more in state["film"].
    """
    device = test_set[0].device
    rng = torch if device.type == "cpu" else torch.get_device_module(device)
    # The random state is a part as well: a resumed run draws what an unbroken one does.
    parts["random"] = SimpleNamespace(state_dict=rng.get_rng_state, load_state_dict=rng.set_rng_state)
    if state["stage"] == stage:
        with reading(folder / "checkpoint.pt"):
            if state["step"] > steps:
                raise ValueError(f"step {state['step']} of {steps}")
            for name, part in parts.items():
                part.load_state_dict(state["parts"].pop(name))
    else:
        state |= {"stage": stage, "step": 0, "seconds": 0.0}
    started_at, saved_at = time.monotonic() - state["seconds"], -math.inf
    for step in range(state["step"] + 1, steps + 1):
        losses = train_step()
        parts["schedule"].step()
        if step == state["step"] + 1:
            print(f"\n{stage:>8}" + "".join(f"{name:>9}" for name in losses) + "  accuracy    left")
        seconds = time.monotonic() - started_at
        report = step == 1 or 10 * step % steps < 10  # each tenth
        due = seconds - saved_at >= CHECKPOINT_SECONDS
        if not (report or due):
            continue
        networks = [part for part in parts.values() if isinstance(part, nn.Module)]
        tensors = [*losses.values(), *(parameter for network in networks for parameter in network.parameters())]
        if not all(tensor.isfinite().all() for tensor in tensors):
            raise UserError(f"step {step:,} of the {stage} is not finite: a damaged teacher, or too high a rate")
        if report:
            accuracy = evaluate(parts[stage], *test_set)
            row = {"stage": stage, "step": step, "seconds": round(seconds, 2), "accuracy": accuracy}
            state["log"].append(row | {name: loss.item() for name, loss in losses.items()})
            with open(folder / "log.csv", "w", newline="") as file:
                writer = csv.DictWriter(file, LOG_COLUMNS)
                writer.writeheader()
                writer.writerows(state["log"])
            minutes, rest = divmod(round(seconds / step * (steps - step)), 60)
            columns = "".join(f"{loss:9.3f}" for loss in losses.values())
            print(f"{step:8,}{columns}{accuracy:10.2%}{minutes:5}:{rest:02}")
            if draw:
                state["film"].append(draw())
        if due:
            states = {name: part.state_dict() for name, part in parts.items()}
            save(state | {"step": step, "seconds": seconds, "parts": states}, folder / "checkpoint.pt")
            saved_at = seconds


@torch.no_grad()
def save_pictures(folder, generator, teacher, num_classes, test_set, film):
    """Write class_means.png, which is Figure 2, and samples.gif.

    Figure 2: the mean of the generated images that the teacher classifies as each class (top), and of the real test
    images (bottom). The film is what one batch of noise became in the course of training, in the order of the classes
    in the end. The generator draws in train mode, as it learnt to: by BatchNorm's running statistics it draws others.
    """

    def grid(images):
        return make_grid(images.float(), 10, normalize=True, scale_each=True, pad_value=0.5)

    noise = torch.randn(num_classes // 5, 500, generator.latent_dim, device=test_set[0].device)  # 100 images a class
    images = torch.cat([generator(z) for z in noise])
    classes = torch.cat([classify(teacher, batch)[0].argmax(1) for batch in images.split(500)])
    pairs = (images, classes), test_set
    means = torch.stack([x[y == k].mean(0).nan_to_num() for x, y in pairs for k in range(num_classes)])
    save_image(grid(means), folder / "class_means.png")
    order = classify(teacher, film[-1].to(images))[0].argmax(1).argsort().cpu()
    first, *others = [TF.to_pil_image(grid(frame[order])) for frame in film]
    durations = [300] * len(others) + [2000]
    first.save(folder / "samples.gif", save_all=True, append_images=others, duration=durations, loop=0)


# --- Command line ----------------------------------------------------------------------------------------------------


def parse_args(argv=None):
    """The command line as a namespace, with the recipe's hyperparameters and a name. Exits with 2 on a mistake."""
    about = "Data-Free Learning of Student Networks (ICCV 2019)"
    style = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(
        "dafl.py", "dafl.py [--flag value ...]", about, formatter_class=style, allow_abbrev=False
    )
    add = parser.add_argument
    devices = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    images = ("generator", "noise", "real", "labels")
    add("--dataset", help="what the teacher knows", choices=DATASETS, default="mnist")
    add("--recipe", help="where the hyperparameters come from", choices=("fast", "released"), default="fast")
    add("--images", help="what the student learns from (Table 1)", choices=images, default="generator")
    add("--teacher", help="state dict of a teacher, so that none is trained", metavar="FILE")
    add("--seed", help="seed of everything random", type=int, default=0, metavar="INT")
    add("--device", help="where to compute", choices=devices, default=devices[0])
    add("--resume", help="go on with the stopped run in this folder, by its own flags", metavar="FOLDER")
    columns = ", ".join(" ".join(recipe) for recipe in RECIPES)
    group = parser.add_argument_group("hyperparameters", f"in brackets the defaults of {columns}")
    for i, (name, (kind, _, _, text)) in enumerate(HYPERPARAMETERS.items()):
        text = f"{text} ({', '.join(f'{recipe[i]:g}' for recipe in RECIPES.values())})"
        flag, metavar = "--" + name.replace("_", "-"), kind.__name__.upper()
        group.add_argument(flag, help=text, type=kind, default=argparse.SUPPRESS, metavar=metavar)

    given = vars(parser.parse_args(argv))
    defaults = {name: parser.get_default(name) for name in given}
    defaults |= zip(HYPERPARAMETERS, RECIPES[given["dataset"], given["recipe"]])
    args = argparse.Namespace(**defaults | given)
    limits = {name: row[1:3] for name, row in HYPERPARAMETERS.items()} | {"seed": (0, 2**63 - 1)}
    for name, (least, greatest) in limits.items():
        if not least <= getattr(args, name) <= greatest:
            flag = "--" + name.replace("_", "-")
            parser.error(f"argument {flag}: must be from {least:,} to {greatest:,}, not {getattr(args, name)}")
    changed = [f"{name}-{value}".removesuffix(".0") for name, value in sorted(given.items()) if value != defaults[name]]
    if args.resume and len(changed) > 1:
        parser.error("--resume goes by the flags of the stopped run: give no others")
    args.name = re.sub(r"[^A-Za-z0-9.-]+", "-", "-".join(changed))[:100] or "mnist"
    return args


def run(args, folder, state):
    """Train the teacher, if need be, and the student, and fill the folder. Returns the accuracy of both by name."""
    device, mnist = args.device, args.dataset == "mnist"
    _, num_classes, mean, std = DATASETS[args.dataset]
    bf16 = args.recipe == "fast" and has_fast_bf16(device)
    augment = nn.Identity() if mnist else crop_and_flip
    from_data = args.images in ("real", "labels")
    torch.manual_seed(args.seed)
    teacher = LeNet5(args.width) if mnist else resnet34(num_classes, args.width)
    teacher_file = folder / "teacher.pt" if state["stage"] == "student" else args.teacher
    if teacher_file:
        with reading(teacher_file):
            teacher.load_state_dict(torch.load(teacher_file, map_location="cpu", weights_only=True))
    to_device(teacher, device, bf16)
    test_set = load_dataset(args.dataset, "test", device=device)
    train_set = load_dataset(args.dataset, "train", device=device) if from_data or not teacher_file else None
    print(f"DAFL on {args.dataset}: {args.recipe} recipe, seed {args.seed}, on {device}; results in {folder}")
    run_stage = partial(fit, state=state, folder=folder, test_set=test_set)

    def real_batch(n):
        images, labels = train_set
        picked = torch.randint(len(images), (n,), device=device)
        return augment(images[picked]), labels[picked]

    # 1. The teacher
    if not teacher_file:
        steps = args.teacher_epochs * math.ceil(len(train_set[0]) / args.teacher_batch)
        optimizer, schedule = make_optimizer(teacher, args.teacher_lr, steps, args.recipe, (79 / 199, 119 / 199))
        parts = {"teacher": teacher, "optimizer": optimizer, "schedule": schedule}

        def teacher_step():
            return classifier_step(teacher, optimizer, *real_batch(args.teacher_batch))

        run_stage("teacher", teacher_step, steps, parts)
    if not from_data:
        train_set = None  # gone
    save(teacher.state_dict(), folder / "teacher.pt")
    teacher_accuracy = evaluate(teacher, *test_set)
    print(f"\nteacher accuracy   {teacher_accuracy:.2%}")

    # 2. The student and, in the last row of Table 1, the generator
    torch.manual_seed(args.seed)  # again: the same student whether its teacher was trained, read or resumed
    student = to_device(LeNet5(args.width / 2) if mnist else resnet18(num_classes, args.width), device, bf16)
    steps = args.steps if args.images == "generator" else args.steps * (1 + args.replay)  # as many student updates
    optimizer_s, schedule = make_optimizer(student, args.lr_s, steps, args.recipe, (0.4, 0.8))
    parts = {"student": student, "optimizer_s": optimizer_s, "schedule": schedule}
    image_shape, draw = test_set[0].shape[1:], None
    if args.images == "generator":
        generator = Generator(args.latent_dim, image_shape[0])
        if mnist and args.recipe == "fast":
            generator.pixel_range = (0 - mean[0]) / std[0], (1 - mean[0]) / std[0]  # black to white
        to_device(generator, device, bf16)
        optimizer_g = torch.optim.Adam(generator.parameters(), args.lr_g)
        buffer = ReplayBuffer(min(steps * args.batch_size, 25_600) if args.replay else 0, image_shape).to(device)
        parts |= {"generator": generator, "optimizer_g": optimizer_g, "buffer": buffer}
        z = torch.randn(80, args.latent_dim, device=device)

        def draw():
            return generator(z).detach().half().cpu()

    n, temperature = args.batch_size, args.temperature

    def generator_step():
        options = {"batch_size": n, "oh": args.oh, "alpha": args.alpha, "beta": args.beta, "temperature": temperature}
        losses, images = distill_step(teacher, student, generator, optimizer_g, optimizer_s, **options)
        if args.replay:
            buffer.add(images)
            for past in cutmix(augment(buffer.sample(args.replay * n))).split(n):
                kd_step(teacher, student, optimizer_s, past, temperature)
        return losses

    table_1 = {
        "generator": generator_step,
        "noise": lambda: kd_step(
            teacher, student, optimizer_s, torch.randn(n, *image_shape, device=device), temperature
        ),
        "real": lambda: kd_step(teacher, student, optimizer_s, real_batch(n)[0], temperature),
        "labels": lambda: classifier_step(student, optimizer_s, *real_batch(n)),
    }
    run_stage("student", table_1[args.images], steps, parts, draw=draw)

    # 3. The results
    save(student.state_dict(), folder / "student.pt")
    if args.images == "generator":
        save(generator.state_dict(), folder / "generator.pt")
        save_pictures(folder, generator, teacher, num_classes, test_set, state["film"])
    student_accuracy = evaluate(student, *test_set)
    print(f"\nstudent accuracy   {student_accuracy:.2%} on {len(test_set[0]):,} test images, after its last step")
    print(f"trained on         {len(train_set[0]) if train_set else 0:,} real images")
    (folder / "checkpoint.pt").unlink(missing_ok=True)
    return {"teacher": teacher_accuracy, "student": student_accuracy}


def main(argv=None):
    """Run a command line. Returns {"teacher": accuracy, "student": accuracy}.

    A mistake ends in one sentence on stderr and exit code 2, Ctrl-C in exit code 130.
    """
    args = parse_args(argv)
    name = vars(args).pop("name")
    flags = [f"--{flag.replace('_', '-')}={value}" for flag, value in vars(args).items() if value is not None]
    state = {"flags": flags, "stage": None, "step": 0, "seconds": 0.0, "log": [], "film": [], "parts": {}}
    folder = Path(args.resume or "runs")
    try:
        if args.resume and not (folder / "checkpoint.pt").exists():
            raise UserError(f"nothing to resume: there is no checkpoint.pt in {folder}")
        with run_folder(name, args.resume) as folder:
            if args.resume:
                with reading(folder / "checkpoint.pt"):
                    saved = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
                    state = {key: saved[key] for key in state}
                    if state["stage"] not in ("teacher", "student"):
                        raise ValueError(f"stage {state['stage']}")
                args = parse_args(state["flags"])
            return run(args, folder, state)
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("out of memory|allocate memory", str(error)):
            raise
        print(f"dafl.py: error: {' '.join(str(error).split()) or 'out of memory'}", file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt as interrupt:
        hint = f"--resume {folder} goes on" if (folder / "checkpoint.pt").exists() else "nothing had been trained"
        print(f"\ndafl.py: stopped; {hint}", file=sys.stderr)
        raise SystemExit(130) from interrupt


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")  # for logs, and paths no terminal shows
    main()
