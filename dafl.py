# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4.1", "torchvision>=0.19.1"]
# ///
"""Data-Free Learning of Student Networks (Chen et al., ICCV 2019, https://arxiv.org/abs/1904.01186) in one file.

A trained classifier, the teacher, is all that is left; its training data are gone. A generator learns to draw images
that the fixed teacher takes for its own data: it is sure of each (L_oh), its features are strong (L_a), and a
batch covers all classes evenly (L_ie). A smaller student learns to give the teacher's outputs on those images (L_KD).
Then it is tested on real images, none of which it has seen. Beyond the paper, by default the student also learns from
past images again, so that minutes do instead of hours.

    python dafl.py                       # MNIST: trains a teacher, then a student without data
    python dafl.py --recipe released     # the same with the authors' loop and values
    python dafl.py --help                # every flag with its defaults
"""

import argparse
import csv
import io
import math
import re
import sys
import time
from contextlib import contextmanager, suppress
from functools import partial
from itertools import count
from pathlib import Path
from pickle import UnpicklingError

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, MultiStepLR
from torchvision import datasets
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import make_grid, save_image

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
        self.shortcut = nn.Sequential()  # the identity
        if stride != 1 or in_channels != channels:
            self.shortcut.extend([nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)])

    def forward(self, x):
        out = self.bn1(self.conv1(x)).relu()
        return (self.bn2(self.conv2(out)) + self.shortcut(x)).relu()


class ResNet(nn.Module):
    """ResNet in its CIFAR form: a 3x3 stem and no max-pooling, four stages of `blocks` basic blocks.

    Images (N, 3, 32, 32) to logits (N, num_classes) and features (N, 512 * width), the input of the last layer.
    """

    def __init__(self, blocks, num_classes=10, width=1.0):
        super().__init__()
        widths = [round(width * channels) for channels in (64, 64, 128, 256, 512)]
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.stages = nn.Sequential()
        for c_in, c_out, n, stride in zip(widths, widths[1:], blocks, (1, 2, 2, 2)):
            self.stages.extend([BasicBlock(c_in, c_out, stride), *(BasicBlock(c_out, c_out, 1) for _ in range(n - 1))])
        self.fc = nn.Linear(widths[-1], num_classes)

    def forward(self, images):  # (N, 3, 32, 32)
        x = self.bn1(self.conv1(images)).relu()  # (N, 64, 32, 32)
        features = self.stages(x).mean((2, 3))  # (N, 512, 4, 4) averaged to (N, 512)
        return self.fc(features), features


resnet34, resnet18 = partial(ResNet, (3, 4, 6, 3)), partial(ResNet, (2, 2, 2, 2))  # CIFAR's teacher and student


def kd_loss(student_logits, teacher_logits, temperature=1.0):
    """L_KD, Eq. 1 less the teacher's own entropy: KL(teacher || student) in nats, batch mean; both logits (N, K).

    At temperature 1 it has the gradient of Eq. 1. A higher one shows how the teacher ranks the classes that it rules
    out; its square keeps the size of the gradient (Hinton et al., 2015). ValueError if shapes differ.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(f"shapes differ: student {[*student_logits.shape]}, teacher {[*teacher_logits.shape]}")
    log_q, p = (student_logits / temperature).log_softmax(1), (teacher_logits / temperature).softmax(1)
    return temperature**2 * F.kl_div(log_q, p, reduction="batchmean")


# --- Section 3.2: the generator and its three losses -----------------------------------------------------------------


class UpsampleConv2d(nn.Conv2d):
    """nn.Upsample(scale_factor=2), then a 3x3 nn.Conv2d of padding 1: the same numbers, 2.25 times fewer products."""

    def forward(self, x):
        # A pixel repeated over 2x2 adds its mirrored 3x3 kernel at four places: a 4x4 kernel, 4 times their average.
        kernel = 4 * F.avg_pool2d(F.pad(self.weight.flip(2, 3), (1, 1, 1, 1)), 2, stride=1).transpose(0, 1)
        layout = torch.contiguous_format if x.device.type == "mps" else torch.channels_last  # faster, except on MPS
        return F.conv_transpose2d(x, kernel.contiguous(memory_format=layout), self.bias, stride=2, padding=1)


class Generator(nn.Module):
    """G, as released: noise z (N, latent_dim) to images (N, channels, image_size, image_size); 4 divides that size.

    The last BatchNorm gives each channel mean 0 and variance 1 over a batch, as normalised data have. Beyond the paper,
    pixels can then be clamped to a range: without it some seeds draw black digits on white, which the losses permit.
    """

    def __init__(self, latent_dim=100, channels=1, image_size=32, pixel_range=(-math.inf, math.inf)):
        if image_size % 4:
            raise ValueError(f"image_size must be a multiple of 4, not {image_size}")
        super().__init__()
        self.latent_dim, self.start_size = latent_dim, image_size // 4
        self.register_buffer("pixel_range", torch.tensor(pixel_range))
        self.linear = nn.Linear(latent_dim, 128 * self.start_size**2)
        self.layers = nn.Sequential(  # (N, 128, 8, 8)
            nn.BatchNorm2d(128),
            UpsampleConv2d(128, 128, 3),  # (N, 128, 16, 16)
            nn.BatchNorm2d(128, eps=0.8),  # as released
            nn.LeakyReLU(0.2, inplace=True),
            UpsampleConv2d(128, 64, 3),  # (N, 64, 32, 32)
            nn.BatchNorm2d(64, eps=0.8),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(64, channels, 3, padding=1),  # (N, channels, 32, 32)
            nn.Tanh(),
            nn.BatchNorm2d(channels, affine=False),
        )

    def forward(self, z):
        x = self.linear(z).unflatten(1, (128, self.start_size, self.start_size))
        return self.layers(x).clamp(*self.pixel_range).to(z.dtype)


def one_hot_loss(logits):
    """L_oh, Eq. 4: cross-entropy of the teacher's logits (N, K) against their own argmax; low when it is sure."""
    return F.cross_entropy(logits, logits.argmax(1))


def activation_loss(features):
    """L_a, Eq. 5: minus the mean absolute feature (N, D) of the teacher; low when its filters respond strongly.

    The mean is over N and D, as in the released code, to whose scale alpha belongs; Eq. 5 sums over D.
    """
    return -features.abs().mean()


def information_entropy_loss(logits):
    """L_ie, Eq. 6: minus the entropy of the mean prediction p; lowest when a batch covers all classes evenly.

    Logits (N, K) to sum p log10 p, from -log10 K to 0. That is the released code's scale, to which beta belongs; Eq. 6
    has a factor 1/K besides.
    """
    p = logits.softmax(1).mean(0)
    return (p * p.clamp_min(torch.finfo(p.dtype).tiny).log10()).sum()


# --- Algorithm 1 -----------------------------------------------------------------------------------------------------


def classify(network, images):
    """Logits (N, K) and features (N, D) of images (N, C, H, W). Raises ValueError unless the network returns both."""
    outputs = network(images)
    if not isinstance(outputs, (tuple, list)) or len(outputs) != 2:
        raise ValueError("teacher and student must return (logits, features); features are the last layers' input")
    return [output.to(images.dtype) for output in outputs]  # float32 again after bf16


def update(optimizer, loss):
    """One step of the optimizer along the loss's gradient."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def distill_step(
    teacher, student, generator, optimizer_g, optimizer_s, *, batch_size=64, oh=1, alpha=0.1, beta=5, temperature=1
):
    """One step of Algorithm 1: one update of the generator, then one of the student, both in place.

    Teacher and student return (logits, features); the teacher is frozen. The generator has a latent_dim. Eq. 7 has no
    weight oh on L_oh. Returns the losses l_oh, l_a, l_ie and l_kd by name and the images (N, C, H, W), all detached.
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
    l_kd = kd_loss(classify(student, images)[0], classify(teacher, images)[0], temperature)
    update(optimizer_s, l_kd)
    return {"l_kd": l_kd.detach()}


# --- Beyond the paper: images are slow to generate and quick to learn from, so past ones are replayed ----------------


class ReplayBuffer(nn.Module):
    """The latest `capacity` images of shape (C, H, W), in half precision; a module, so that it has a state_dict."""

    def __init__(self, capacity, image_shape):
        super().__init__()
        self.register_buffer("added", torch.tensor(0))  # a tensor, to be in the state_dict
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
    """CutMix (Yun et al., ICCV 2019) by half-planes: beyond a random line an image (N, C, H, W) shows another one."""
    n, _, height, width = images.shape
    turns, threshold = torch.rand(2, n, 1, 1, 1, device=images.device)
    angle = 2 * math.pi * turns
    y = torch.linspace(-1, 1, height, device=images.device)[:, None]
    x = torch.linspace(-1, 1, width, device=images.device)
    keep = x * angle.cos() + y * angle.sin() > threshold - 0.5
    return torch.where(keep, images, images[torch.randperm(n, device=images.device)])


# === The experiments of Section 4: from here on there are data sets, files and flags =================================

DATASETS = {  # torchvision's class, classes, mean and std of each channel (pixels 0 to 1), teacher's batch and rate
    "mnist": (datasets.MNIST, 10, (0.1307,), (0.3081,), 256, 1e-3),
    "cifar10": (datasets.CIFAR10, 10, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), 128, 0.1),
    "cifar100": (datasets.CIFAR100, 100, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761), 128, 0.1),
}
# fmt: off
RECIPES = {  # the least and greatest allowed; the values of fast and released (the authors') for each data set; help
    #                               mnist: fast, released  cifar10         cifar100
    "steps":          (1, 10**9,      400, 24_000,  4_000, 240_000,  4_000, 240_000, "steps, each 1 + replay updates"),
    "batch_size":     (2, 10**5,       64,    512,    128,   1_024,    128,   1_024, "images in a batch"),
    "latent_dim":     (1, 10**5,      100,    100,    256,   1_000,    256,   1_000, "length of the noise z"),
    "lr_g":           (0.0, 1e6,     0.01,    0.2,  0.001,    0.02,  0.001,    0.02, "learning rate of the generator"),
    "lr_s":           (0.0, 1e6,    0.005,  0.002,    0.1,     0.1,    0.1,     0.1, "learning rate of the student"),
    "oh":             (0.0, 1e6,      1.0,    1.0,    1.0,    0.05,    0.5,     0.5, "weight of L_oh, Eq. 4"),
    "alpha":          (0.0, 1e6,      0.1,    0.1,   0.01,    0.01,    0.1,     0.1, "weight of L_a, Eq. 5"),
    "beta":           (0.0, 1e6,      5.0,    5.0,    5.0,     5.0,   20.0,    20.0, "weight of L_ie, Eq. 6"),
    "temperature":    (1e-3, 1e3,     4.0,    1.0,    4.0,     1.0,    4.0,     1.0, "temperature of L_KD"),
    "replay":         (0, 1000,        24,      0,      4,       0,      4,       0, "past batches replayed per step"),
    "width":          (0.2, 10.0,     1.0,    1.0,   0.25,     1.0,   0.25,     1.0, "width (MNIST student: half)"),
    "teacher_epochs": (1, 10**5,        9,      9,     40,     199,     40,     199, "epochs of the teacher"),
}
# fmt: on
LOG_COLUMNS = ["stage", "step", "seconds", "loss", "l_oh", "l_a", "l_ie", "l_kd", "accuracy"]
CHECKPOINT_SECONDS = 60
BAD_FILE = OSError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, EOFError, UnpicklingError


@contextmanager
def using(source):
    """Turn what a missing, damaged or foreign file raises into an OSError that names the source."""
    try:
        yield
    except BAD_FILE as error:
        raise OSError(f"cannot use {source}: {' '.join(str(error).split())[:200] or 'it is damaged'}") from error


def load_dataset(name, split, data_dir=Path(__file__).parent / "data", device="cpu"):
    """The whole "train" or "test" split on the device: normalised images (N, C, 32, 32) and labels (N,).

    Downloads to data_dir what is not there. Raises ValueError for another name or split, OSError without the data.
    """
    if name not in DATASETS or split not in ("train", "test"):
        raise ValueError(f"no {split!r} split of {name!r}: there are 'train' and 'test' of {', '.join(DATASETS)}")
    source, _, mean, std, _, _ = DATASETS[name]
    with using(f"{name} in {data_dir} (delete damaged files there)"):
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


def to_device(network, device, low_precision=True):
    """Move a network, in place, to "cpu", "cuda" or "mps", in its fastest layout, and in bf16 where that pays.

    It pays for all but a LeNet5: on CUDA GPUs that have bf16, on CPUs with AMX and on AMD's since Zen 4.
    """
    # On Apple GPUs BatchNorm's gradient is wrong in channels_last (github.com/pytorch/pytorch/issues/175189).
    network.to(device, memory_format=torch.preserve_format if device == "mps" else torch.channels_last)
    cpu = getattr(torch.cpu, "get_capabilities", dict)() if device == "cpu" else {}
    has_bf16 = cpu.get("amx_bf16") or (cpu.get("avx512_bf16") and "AMD" in cpu.get("cpu_name", ""))
    if device == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if has_bf16 and low_precision and not isinstance(network, LeNet5):
        network.forward = torch.autocast(device, torch.bfloat16)(network.forward)
    return network


def make_optimizer(network, lr, steps, recipe, milestones):
    """Adam for a LeNet5, SGD for a ResNet, and the schedule of its learning rate.

    Fast: up for a sixth of the steps, then down to 0. Released: constant; a ResNet's falls to a tenth at milestones,
    given as shares of the steps (the authors' teacher: after 79 and 119 of 199 epochs).
    """
    if isinstance(network, LeNet5):
        optimizer, milestones = torch.optim.Adam(network.parameters(), lr), ()
    else:
        optimizer = torch.optim.SGD(network.parameters(), lr, momentum=0.9, weight_decay=5e-4)
    if recipe == "fast":
        return optimizer, LambdaLR(optimizer, lambda step: min(6 * (step + 1) / steps, 1.2 * (1 - step / steps)))
    return optimizer, MultiStepLR(optimizer, [round(share * steps) for share in milestones])


def new_folder(name):
    """Make runs/NAME, or runs/NAME-2 and so on, and return it: to make a folder is to claim it."""
    for number in count(1):
        folder = Path("runs", name if number == 1 else f"{name}-{number}")
        with suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder


def open_log(folder):
    """log.csv, locked until this process closes it or dies, so that no two write to a folder. Raises OSError."""
    file = (folder / "log.csv").open("a", newline="")
    try:
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise OSError(f"cannot use {folder}: its run is still alive") from error
    except (ImportError, OSError):  # Windows and some network drives have no such lock
        pass
    return file


def save(content, path):
    """torch.save, but whole or not at all. Raises OSError."""
    buffer, temporary = io.BytesIO(), path.with_suffix(".tmp")
    torch.save(content, buffer)
    temporary.write_bytes(buffer.getbuffer())
    temporary.replace(path)


def fit(stage, train_step, steps, parts, state, checkpoint, log_file, test_set, film_noise=None):
    """The one training loop: train_step() `steps` times, about eleven reports, and a checkpoint a minute.

    parts maps names to all with a state_dict, including the "schedule" and the network to test, parts[stage]. state is
    the rest of a checkpoint, updated in place; if it was saved in this stage, training goes on from there. A report is
    a line on the screen and in log.csv and, for the GIF, what the generator makes of film_noise. Returns the last
    accuracy. Raises FloatingPointError, OSError.
    """
    device = test_set[0].device
    rng = torch if device.type == "cpu" else torch.get_device_module(device)
    if state["stage"] == stage:  # resumed
        with using(checkpoint):
            if state["step"] > steps:
                raise ValueError(f"step {state['step']} of {steps}")
            rng.set_rng_state(state["parts"].pop("random"))
            for name, part in parts.items():
                part.load_state_dict(state["parts"].pop(name))
    else:
        state |= {"stage": stage, "step": 0, "seconds": 0.0}
    parameters = [p for part in parts.values() if isinstance(part, nn.Module) for p in part.parameters()]
    started_at, saved_at = time.monotonic() - state["seconds"], -math.inf
    for step in range(state["step"] + 1, steps + 1):
        losses = train_step()
        parts["schedule"].step()
        seconds = time.monotonic() - started_at
        report = step == 1 or 10 * step % steps < 10  # each tenth
        due = seconds - saved_at >= CHECKPOINT_SECONDS
        if (report or due) and not all(x.isfinite().all() for x in [*losses.values(), *parameters]):
            raise FloatingPointError(f"step {step:,} of the {stage} is not finite: too high a rate, or a bad teacher")
        if report:
            losses = {name: loss.item() for name, loss in losses.items()}
            accuracy = evaluate(parts[stage], *test_set)
            row = {"stage": stage, "step": step, "seconds": round(seconds, 2), **losses, "accuracy": accuracy}
            state["log"].append(row)
            log_file.truncate(0)
            writer = csv.DictWriter(log_file, LOG_COLUMNS)
            writer.writeheader()
            writer.writerows(state["log"])
            log_file.flush()
            values = "".join(f"  {name} {loss:6.3f}" for name, loss in losses.items())
            minutes, rest = divmod(round(seconds / step * (steps - step)), 60)
            print(f"{stage} {step:6,}{values}  accuracy {accuracy:6.2%}  {minutes}:{rest:02} left")
            if film_noise is not None:
                state["film"].append(parts["generator"](film_noise).detach().half().cpu())
        if due:
            states = {name: part.state_dict() for name, part in parts.items()} | {"random": rng.get_rng_state()}
            save(state | {"step": step, "seconds": seconds, "parts": states}, checkpoint)
            saved_at = time.monotonic() - started_at
    return state["log"][-1]["accuracy"]


@torch.no_grad()
def save_pictures(folder, generator, teacher, num_classes, test_set, film):
    """Write class_means.png, which is Figure 2: the mean image of each class, generated (top) and real (bottom).

    And samples.gif: the images from one batch of noise as training went on, sorted by their final class. All are drawn
    in train mode, as in training: after generator.eval() the same noise gives somewhat other images.
    """
    grid = partial(make_grid, nrow=10, normalize=True, scale_each=True, pad_value=0.5)
    noise = torch.randn(num_classes // 5, 500, generator.latent_dim, device=test_set[0].device)  # 100 images a class
    images = torch.cat([generator(z) for z in noise])
    classes = torch.cat([classify(teacher, batch)[0].argmax(1) for batch in images.split(500)])
    rows = (images, classes), test_set
    means = torch.stack([x[y == k].mean(0).nan_to_num() for x, y in rows for k in range(num_classes)])
    save_image(grid(means), folder / "class_means.png")
    order = classify(teacher, film[-1].to(images))[0].argmax(1).argsort().cpu()
    first, *others = [TF.to_pil_image(grid(frame[order].float())) for frame in film]
    durations = [300] * len(others) + [2000]
    first.save(folder / "samples.gif", save_all=True, append_images=others, duration=durations, loop=0)


def parse_args(argv=None):
    """The command line, with its recipe's values, as a namespace; and the run's name. Exits with 2 on a mistake."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser("dafl.py", usage="dafl.py [--flag value ...]", allow_abbrev=False)
    devices = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    images = ("generator", "noise", "real", "labels")
    add = parser.add_argument
    add("--dataset", help="what the teacher knows (mnist)", choices=DATASETS, default="mnist")
    add("--recipe", help="values below, schedule, bf16, pixels (fast)", choices=("fast", "released"), default="fast")
    add("--images", help="what the student learns from, see Table 1 (generator)", choices=images, default="generator")
    add("--teacher", help="state dict of a teacher, so that none is trained", metavar="FILE")
    add("--seed", help="seed of everything random (0)", type=int, default=0, metavar="int")
    add("--device", help=f"where to compute ({devices[0]})", choices=devices, default=devices[0])
    add("--resume", help="go on with the stopped run in this folder, with its own flags", metavar="FOLDER")
    group = parser.add_argument_group("hyperparameters", f"(fast and released of {', '.join(DATASETS)})")
    for name, (least, _, *values, text) in RECIPES.items():
        flag, kind, values = "--" + name.replace("_", "-"), type(least), ", ".join(f"{value:g}" for value in values)
        group.add_argument(flag, help=f"{text} ({values})", type=kind, default=argparse.SUPPRESS, metavar=kind.__name__)

    given = vars(parser.parse_args(argv))  # of the hyperparameters only those typed
    column = 2 + 2 * list(DATASETS).index(given["dataset"]) + (given["recipe"] == "released")  # after the limits
    defaults = {name: parser.get_default(name) for name in given} | {name: row[column] for name, row in RECIPES.items()}
    args = defaults | given
    for name, (least, greatest, *_) in (RECIPES | {"seed": (0, 2**63 - 1)}).items():
        if not least <= args[name] <= greatest:
            flag = "--" + name.replace("_", "-")
            parser.error(f"argument {flag}: must be from {least:,} to {greatest:,}, not {args[name]}")
    changed = [f"{name}-{value}".removesuffix(".0") for name, value in sorted(given.items()) if value != defaults[name]]
    if args["resume"] is not None and len(argv) > 1 + ("--resume" in argv):
        parser.error("--resume uses the flags of the stopped run: give no others")
    return argparse.Namespace(**args), re.sub(r"[^A-Za-z0-9.]+", "-", "-".join(changed))[:100] or "mnist"


def main(argv=None):
    """Run a command line: train a teacher, if need be, and a student. Returns the accuracy of both by name."""
    args, name = parse_args(argv)
    flags = [f"--{flag.replace('_', '-')}={value}" for flag, value in vars(args).items() if value is not None]
    state = {"flags": flags, "stage": None, "step": 0, "seconds": 0.0, "log": [], "film": [], "parts": {}}
    folder, teacher_file = None, args.teacher
    if args.resume is not None:
        folder = Path(args.resume)
        with using(folder / "checkpoint.pt"):
            saved = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
            state = {key: saved[key] for key in state}
            args, _ = parse_args(state["flags"])
            teacher_file = {"teacher": None, "student": folder / "teacher.pt"}[state["stage"]]  # None: fit restores it

    # What is given: a teacher or the data to train one, and the images to test on
    device, mnist, fast = args.device, args.dataset == "mnist", args.recipe == "fast"
    from_data = args.images in ("real", "labels")
    _, num_classes, mean, std, teacher_batch, teacher_lr = DATASETS[args.dataset]
    augment = nn.Identity() if mnist else crop_and_flip
    torch.manual_seed(args.seed)
    teacher = LeNet5(args.width) if mnist else resnet34(num_classes, args.width)
    if teacher_file is not None:
        with using(teacher_file):
            teacher.load_state_dict(torch.load(teacher_file, map_location="cpu", weights_only=True))
    to_device(teacher, device, low_precision=fast)
    test_set = load_dataset(args.dataset, "test", device=device)
    train_set = load_dataset(args.dataset, "train", device=device) if from_data or teacher_file is None else None
    folder = folder or new_folder(name)
    checkpoint, log_file = folder / "checkpoint.pt", open_log(folder)
    train = partial(fit, state=state, checkpoint=checkpoint, log_file=log_file, test_set=test_set)
    print(f"DAFL on {args.dataset}: {args.recipe} recipe, seed {args.seed}, on {device}; results in {folder}")

    def real_batch(n):
        images, labels = train_set
        picked = torch.randint(len(images), (n,), device=device)
        return augment(images[picked]), labels[picked]

    # 1. The teacher
    if teacher_file is None:
        steps = args.teacher_epochs * math.ceil(len(train_set[0]) / teacher_batch)
        optimizer, schedule = make_optimizer(teacher, teacher_lr, steps, args.recipe, (79 / 199, 119 / 199))
        parts = {"teacher": teacher, "optimizer": optimizer, "schedule": schedule}
        train("teacher", lambda: classifier_step(teacher, optimizer, *real_batch(teacher_batch)), steps, parts)
    if not from_data:
        train_set = None  # gone
    save(teacher.state_dict(), folder / "teacher.pt")
    teacher_accuracy = evaluate(teacher, *test_set)
    print(f"teacher accuracy {teacher_accuracy:.2%}")

    # 2. The student, by one row of Table 1
    torch.manual_seed(args.seed)  # again: the same student whether its teacher was trained, read or resumed
    student = to_device(LeNet5(args.width / 2) if mnist else resnet18(num_classes, args.width), device, fast)
    steps = args.steps if args.images == "generator" else args.steps * (1 + args.replay)  # as many updates
    optimizer_s, schedule = make_optimizer(student, args.lr_s, steps, args.recipe, (0.4, 0.8))
    parts = {"student": student, "optimizer_s": optimizer_s, "schedule": schedule}
    batch_size, image_shape, film_noise = args.batch_size, test_set[0].shape[1:], None
    learn_from = partial(kd_step, teacher, student, optimizer_s, temperature=args.temperature)
    if args.images == "generator":
        black_to_white = [(pixel - mean[0]) / std[0] for pixel in (0, 1)] if mnist and fast else (-math.inf, math.inf)
        generator = to_device(Generator(args.latent_dim, image_shape[0], 32, black_to_white), device, fast)
        optimizer_g = torch.optim.Adam(generator.parameters(), args.lr_g)  # at a constant rate
        capacity = max(batch_size, min(steps * batch_size, 25_600)) if args.replay else 0
        buffer = ReplayBuffer(capacity, image_shape).to(device)
        parts |= {"generator": generator, "optimizer_g": optimizer_g, "buffer": buffer}
        distill = partial(distill_step, teacher, student, generator, optimizer_g, optimizer_s, batch_size=batch_size)
        film_noise = torch.randn(80, args.latent_dim, device=device)

    def generator_step():
        losses, images = distill(oh=args.oh, alpha=args.alpha, beta=args.beta, temperature=args.temperature)
        if args.replay:
            buffer.add(images)
            for past_images in cutmix(augment(buffer.sample(args.replay * batch_size))).split(batch_size):
                learn_from(past_images)
        return losses

    table_1 = {
        "labels": lambda: classifier_step(student, optimizer_s, *real_batch(batch_size)),  # no teacher
        "real": lambda: learn_from(real_batch(batch_size)[0]),  # no labels
        "noise": lambda: learn_from(torch.randn(batch_size, *image_shape, device=device)),
        "generator": generator_step,
    }
    student_accuracy = train("student", table_1[args.images], steps, parts, film_noise=film_noise)

    # 3. The results
    save(student.state_dict(), folder / "student.pt")
    if args.images == "generator":
        save(generator.state_dict(), folder / "generator.pt")
        save_pictures(folder, generator, teacher, num_classes, test_set, state["film"])
    print(f"student accuracy {student_accuracy:.2%}, trained on {len(train_set[0]) if train_set else 0:,} real images")
    log_file.close()
    checkpoint.unlink(missing_ok=True)
    return {"teacher": teacher_accuracy, "student": student_accuracy}


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")  # for logs, and paths that cannot be encoded
    try:
        main()
    except KeyboardInterrupt:
        argparse.ArgumentParser().exit(130, "\ndafl.py: stopped\n")
    except (OSError, FloatingPointError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("(out of|allocate|enough) memory", str(error)):
            raise
        argparse.ArgumentParser().exit(2, f"dafl.py: error: {' '.join(str(error).split()) or 'out of memory'}\n")
