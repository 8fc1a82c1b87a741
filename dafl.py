# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4.1", "torchvision>=0.19.1"]
# ///
"""Data-Free Learning of Student Networks (Chen et al., ICCV 2019, https://arxiv.org/abs/1904.01186) in one file.

A trained classifier, the teacher, is all that is left; its training data are gone. A generator learns to draw images
that the fixed teacher takes for its own data: it is sure of each image (L_oh), its features are strong (L_a), and a
batch covers all classes evenly (L_ie). A smaller student learns to give the teacher's outputs on those images (L_KD).
Then it is tested on real images, none of which it has seen. Beyond the paper, by default the student also learns from
past images again, mixed and at a higher temperature, so that minutes do instead of hours.

    python dafl.py                       # MNIST: trains a teacher, then a student without data
    python dafl.py --recipe released     # the same with the authors' loop and values
    python dafl.py --help                # every flag with its defaults
"""

import argparse
import csv
import io
import json
import math
import os
import re
import sys
import time
from contextlib import contextmanager, suppress
from functools import partial
from itertools import count
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, MultiStepLR
from torchvision import datasets
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import save_image

# === The method: it needs only PyTorch and UpsampleConv2d, a faster convolution, from the next part ==================

# --- Section 3.1: teacher and student, and the loss between them -----------------------------------------------------


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


def kd_loss(student_logits, teacher_logits, temperature=1):
    """L_KD, Eq. 1, as mean_i sum_k p_ik ln(p_ik / q_ik): the student's answers q should be the teacher's, p.

    p and q are softmaxes of logits (N, K). Eq. 1 is their cross-entropy; less the entropy of p, which no student can
    change, the gradient is the same, and 0 means agreement. A temperature T divides the logits, so that unlikely
    classes count for more, and multiplies the loss by T^2, so that gradients keep their size (Hinton et al., 2015).
    Raises ValueError if shapes differ.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(f"shapes differ: student {[*student_logits.shape]}, teacher {[*teacher_logits.shape]}")
    log_q, p = (student_logits / temperature).log_softmax(1), (teacher_logits / temperature).softmax(1)
    return temperature**2 * F.kl_div(log_q, p, reduction="batchmean")


# --- Section 3.2: the generator and its three losses -----------------------------------------------------------------


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
        self.register_buffer("pixel_range", torch.tensor(pixel_range))  # a buffer, so that generator.pt keeps it
        self.linear = nn.Linear(latent_dim, 128 * self.start_size**2)
        self.layers = nn.Sequential(  # (N, 128, 8, 8)
            nn.BatchNorm2d(128),
            UpsampleConv2d(128, 128, 3),  # nn.Upsample(scale_factor=2) and nn.Conv2d in one: (N, 128, 16, 16)
            nn.BatchNorm2d(128, eps=0.8),  # 0.8 as released
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
        return self.layers(x).clamp(*self.pixel_range)


def one_hot_loss(logits):
    """L_oh = mean_i -ln p_i[t_i], Eq. 4, with p_i the softmax of the teacher's logits (N, K), t_i their argmax.

    The teacher should be sure of each image, as it is of real ones.
    """
    return F.cross_entropy(logits, logits.argmax(1))


def activation_loss(features):
    """L_a = -mean |f|, Eq. 5, with f the teacher's features (N, D): they should be strong, as real images make them.

    The mean is over N and D, as in the released code, to whose scale alpha belongs; Eq. 5 sums over D.
    """
    return -features.abs().mean()


def information_entropy_loss(logits):
    """L_ie = sum_k p_k log10 p_k, Eq. 6, with p the mean softmax of a batch of the teacher's logits (N, K).

    A batch should show all classes equally often: from 0, a single class, to the best, -log10 K. The scale is the
    released code's, to which beta belongs; Eq. 6 has a factor 1/K besides.
    """
    p = logits.softmax(1).mean(0)
    return (p * p.clamp_min(torch.finfo(p.dtype).tiny).log10()).sum()


# --- Algorithm 1 -----------------------------------------------------------------------------------------------------


def classify(network, images):
    """Logits (N, K) and features (N, ...) of images (N, C, H, W), from a network that returns (logits, features).

    It may return logits alone; features are None then. Logits are what comes before any softmax. Raises ValueError for
    anything else and for fewer than two classes.
    """
    outputs = network(images)
    parts = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    good = len(parts) in (1, 2) and all(isinstance(x, torch.Tensor) and x.shape[:1] == images.shape[:1] for x in parts)
    if not good or parts[0].ndim != 2 or parts[0].shape[1] < 2:
        came = ", ".join(str([*x.shape]) if isinstance(x, torch.Tensor) else type(x).__name__ for x in parts)
        raise ValueError(f"a network must return logits [N, K], K >= 2, or (logits, features [N, ...]), not {came}")
    return parts[0], parts[1] if len(parts) == 2 else None


def set_modes(teacher, student):
    """Freeze the teacher, let the student train. Raises ValueError if a parameter of the student is frozen then."""
    teacher.eval().requires_grad_(False)
    student.train()
    if not all(parameter.requires_grad for parameter in student.parameters()):
        raise ValueError(
            "the student has frozen parameters: call requires_grad_() on it; it must share no layer with the teacher"
        )


def update(optimizer, loss):
    """One step of the optimizer along the loss's gradient. Raises ValueError if the loss has none in its parameters."""
    optimizer.zero_grad()
    loss.backward()
    if all(parameter.grad is None for group in optimizer.param_groups for parameter in group["params"]):
        raise ValueError("an optimizer holds no parameter of its network: are the two optimizers swapped?")
    optimizer.step()


def distill_step(
    teacher, student, generator, optimizer_g, optimizer_s, *, batch_size=64, oh=1, alpha=0.1, beta=5, temperature=1
):
    """One step of Algorithm 1: one update of the generator, then one of the student, both in place.

    teacher, student: any networks from images (N, C, H, W) to logits (N, K) before softmax, alone or followed by
    features. Only L_a needs features, the teacher's: the input of its last layers. The teacher stays frozen.
    generator: any network from noise (N, generator.latent_dim) to images.
    oh, alpha, beta: the weights of Eq. 7, where that of L_oh is 1. temperature: of kd_loss; Eq. 1 has 1.

    Returns the losses l_oh, l_a, l_ie and l_kd by name, and the images, all detached. Raises ValueError if outputs are
    not as above, L_a lacks features, a parameter of the student is frozen, or the optimizers are swapped.
    """
    set_modes(teacher, student)
    generator.train()

    # Module 1: the generator
    weight = next(generator.parameters())
    z = torch.randn(batch_size, generator.latent_dim, device=weight.device, dtype=weight.dtype)
    images = generator(z)
    logits, features = classify(teacher, images)
    if features is None and alpha:
        raise ValueError("L_a needs features: return (logits, features) from the teacher, or set alpha to 0")
    l_oh = one_hot_loss(logits)
    l_a = torch.zeros(()) if features is None else activation_loss(features)
    l_ie = information_entropy_loss(logits)
    update(optimizer_g, oh * l_oh + alpha * l_a + beta * l_ie)  # L_Total, Eq. 7

    # Module 2: the student, on the same images, as in the released code; the paper's Algorithm 1 draws new ones
    images = images.detach()
    l_kd = kd_loss(classify(student, images)[0], logits.detach(), temperature)
    update(optimizer_s, l_kd)
    return {"l_oh": l_oh.detach(), "l_a": l_a.detach(), "l_ie": l_ie.detach(), "l_kd": l_kd.detach()}, images


def kd_step(teacher, student, optimizer_s, images, temperature=1):
    """One update of the student alone, in place, on given images (N, C, H, W), otherwise as in distill_step.

    Returns the loss l_kd by name, detached. Raises ValueError as distill_step does.
    """
    set_modes(teacher, student)
    l_kd = kd_loss(classify(student, images)[0], classify(teacher, images)[0], temperature)
    update(optimizer_s, l_kd)
    return {"l_kd": l_kd.detach()}


# === Beyond the paper ================================================================================================
# Images are slow to generate and quick to learn from. So the student learns again from past ones, as in later work on
# data-free distillation (Binici et al., WACV 2022, https://arxiv.org/abs/2108.05698), each time mixed in another way.
# How this joins distill_step is seen in main, in student_step.


class ReplayBuffer:
    """The latest `capacity` images of one shape (C, H, W), in half precision."""

    def __init__(self, capacity, image_shape):
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, not {capacity}")
        self.capacity, self.images = capacity, torch.empty(0, *image_shape, dtype=torch.float16)

    def add(self, images):
        """Take in images (N, C, H, W) and drop the oldest. Raises ValueError if they have another shape."""
        if images.shape[1:] != self.images.shape[1:]:
            raise ValueError(f"the images must be {[*self.images.shape[1:]]}, not {[*images.shape[1:]]}")
        self.images = torch.cat([self.images.to(images.device), images.detach().half()])[-self.capacity :]

    def sample(self, n):
        """Images (n, C, H, W), drawn with replacement from those kept. Raises ValueError if there are none yet."""
        if len(self.images) == 0:
            raise ValueError("add images before drawing from them")
        return self.images[torch.randint(len(self.images), (n,), device=self.images.device)].float()

    def state_dict(self):
        return {"images": self.images}

    def load_state_dict(self, state):
        self.images = state["images"]


def cutmix(images):
    """CutMix (Yun et al., ICCV 2019): cut each image (N, C, H, W) along a random line; one side shows another image.

    CutMix proper pastes rectangles and mixes the labels; here the teacher labels the mixture.
    """
    n, _, height, width = images.shape
    turns, offset = torch.rand(2, n, 1, 1, 1, device=images.device)
    angle = 2 * math.pi * turns
    y = torch.linspace(-1, 1, height, device=images.device)[:, None]
    x = torch.linspace(-1, 1, width, device=images.device)
    own = x * angle.cos() + y * angle.sin() > offset - 0.5  # a line less than 0.5 from the centre (0, 0)
    return torch.where(own, images, images[torch.randperm(n, device=images.device)])


class UpsampleConv2d(nn.Conv2d):
    """nn.Upsample(scale_factor=2), then a 3x3 nn.Conv2d of padding 1, the same but with 2.25 times fewer products."""

    def forward(self, x):
        # A pixel fills 2x2 upsampled ones, and so adds the mirrored 3x3 kernel at 4 places: a 4x4 kernel, their sum,
        # which is 4 times their average.
        kernel = 4 * F.avg_pool2d(F.pad(self.weight.flip(2, 3), (1, 1, 1, 1)), 2, stride=1).transpose(0, 1)
        layout = torch.contiguous_format if x.device.type == "mps" else torch.channels_last  # faster, except on MPS
        return F.conv_transpose2d(x, kernel.contiguous(memory_format=layout), self.bias, stride=2, padding=1)


# === The experiments of Section 4: from here on there are data sets, files and flags =================================

DATASETS = {  # torchvision's class, number of classes, mean and std of each channel for pixels from 0 to 1
    "mnist": (datasets.MNIST, 10, (0.1307,), (0.3081,)),
    "cifar10": (datasets.CIFAR10, 10, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": (datasets.CIFAR100, 100, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),  # released: CIFAR-10's
}
RECIPE_NAMES = ("fast", "released")  # released: the authors' values and loop
RECIPES = {  # by hyperparameter: least value, (fast, released) for mnist, for cifar10, for cifar100, help
    "steps": (1, (200, 24_000), (2_000, 240_000), (2_000, 240_000), "steps; each updates the student 1 + replay times"),
    "batch_size": (2, (64, 512), (64, 1_024), (64, 1_024), "images that a step generates"),
    "student_batch_size": (2, (128, 512), (128, 1_024), (128, 1_024), "images in a batch for the student alone"),
    "latent_dim": (1, (100, 100), (256, 1_000), (256, 1_000), "length of the noise z"),
    "lr_g": (0.0, (0.01, 0.2), (0.001, 0.02), (0.001, 0.02), "learning rate of the generator"),
    "lr_s": (0.0, (0.01, 0.002), (0.1, 0.1), (0.1, 0.1), "learning rate of the student"),
    "oh": (0.0, (1.0, 1.0), (1.0, 0.05), (0.5, 0.5), "weight of L_oh, Eq. 4"),
    "alpha": (0.0, (0.1, 0.1), (0.01, 0.01), (0.1, 0.1), "weight of L_a, Eq. 5"),
    "beta": (0.0, (5.0, 5.0), (5.0, 5.0), (20.0, 20.0), "weight of L_ie, Eq. 6"),
    "temperature": (0.001, (4.0, 1.0), (4.0, 1.0), (4.0, 1.0), "temperature of L_KD"),
    "replay": (0, (24, 0), (4, 0), (4, 0), "batches of past images that a step replays"),
    "width": (0.2, (1.0, 1.0), (0.25, 1.0), (0.25, 1.0), "width of the teacher (MNIST's student: half of it)"),
    "teacher_epochs": (1, (5, 9), (10, 199), (10, 199), "epochs of the teacher"),
    "teacher_batch_size": (2, (256, 256), (128, 128), (128, 128), "images in a batch of the teacher's"),
    "teacher_lr": (0.0, (0.003, 0.001), (0.1, 0.1), (0.1, 0.1), "learning rate of the teacher"),
}
LARGEST = 10**15  # of any flag: more than fits anywhere, less than overflows
LOG_COLUMNS = ("stage", "step", "seconds", "loss", "l_oh", "l_a", "l_ie", "l_kd", "accuracy")
CHECKPOINT_SECONDS = 60


def load_dataset(name, split, data_dir=Path(__file__).parent / "data", device="cpu"):
    """The whole "train" or "test" split on the device: normalised images (N, C, 32, 32) and labels (N,).

    Downloads to data_dir what is not there. Raises ValueError for another name or split, OSError without the data.
    """
    if name not in DATASETS or split not in ("train", "test"):
        raise ValueError(f"no {split!r} split of {name!r}: there are 'train' and 'test' of {', '.join(DATASETS)}")
    source, _, mean, std = DATASETS[name]
    try:
        dataset = source(data_dir, split == "train", download=True)
    except Exception as error:  # torchvision raises many kinds
        reason = " ".join(str(error).split())
        advice = "" if isinstance(error, OSError) or "Error downloading" in reason else " (delete damaged files there)"
        raise OSError(f"cannot read or download {name} in {data_dir}{advice}: {reason}") from error
    images = torch.as_tensor(dataset.data)  # uint8 (N, 28, 28) or (N, 32, 32, 3)
    images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2)
    images = TF.to_dtype(TF.resize(images, [32, 32]).to(device), torch.float32, scale=True)
    return TF.normalize(images, mean, std, inplace=True), torch.as_tensor(dataset.targets, device=device)


def crop_and_flip(images):
    """CIFAR's augmentation: shift each image (N, C, H, W) by up to 4 pixels, mirror each with probability 1/2.

    The margin has the mean colour; in the released code it is black.
    """
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
def evaluate(network, images, labels):
    """Accuracy in [0, 1] of a classifier on normalised images (N, C, H, W). ValueError: labels are not (N,)."""
    if labels.shape != images.shape[:1]:
        raise ValueError(f"there must be a label for each image: labels {[*labels.shape]}, images {[*images.shape]}")
    network.eval()
    batches = zip(images.split(500), labels.split(500))
    correct = sum((classify(network, x)[0].argmax(1) == y).sum() for x, y in batches)
    return correct.item() / len(labels)


def forward_in_bf16(network, device_type, *args, **kwargs):
    """network.forward in bf16, where that is safe, with float32 outputs."""
    with torch.autocast(device_type, torch.bfloat16):
        outputs = type(network).forward(network, *args, **kwargs)
    parts = outputs if isinstance(outputs, (tuple, list)) else [outputs]
    parts = [x.float() if isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16 else x for x in parts]
    return parts if isinstance(outputs, (tuple, list)) else parts[0]


def to_device(network, device, low_precision=True):
    """Move a network, in place, to "cpu", "cuda" or "mps", in its fastest layout, and in bf16 where that pays.

    It pays for all but a LeNet5: on CUDA GPUs that have bf16, on CPUs with AMX, on AMD's since Zen 4.
    """
    kind = torch.device(device).type
    # On Apple GPUs BatchNorm's gradient is wrong in channels_last (github.com/pytorch/pytorch/issues/175189).
    network.to(device, memory_format=torch.preserve_format if kind == "mps" else torch.channels_last)
    cpu = getattr(torch.cpu, "get_capabilities", dict)() if kind == "cpu" else {}
    has_bf16 = cpu.get("amx_bf16") or (cpu.get("avx512_bf16") and "AMD" in cpu.get("cpu_name", ""))
    if kind == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if has_bf16 and low_precision and not isinstance(network, LeNet5):
        network.forward = partial(forward_in_bf16, network, kind)
    return network


def make_optimizer(network, lr, steps, recipe, milestones):
    """Adam for a LeNet5, SGD for a ResNet, and the schedule of its learning rate.

    Fast: up for a sixth of the steps, then down to 0. Released: constant for a LeNet5; a ResNet's falls to a tenth at
    each milestone, given as a share of the steps.
    """
    if isinstance(network, LeNet5):
        optimizer, milestones = torch.optim.Adam(network.parameters(), lr), ()
    else:
        optimizer = torch.optim.SGD(network.parameters(), lr, momentum=0.9, weight_decay=5e-4)
    if recipe == "released":
        return optimizer, MultiStepLR(optimizer, [round(share * steps) for share in milestones])
    # The lower of two lines: up to the full rate in a sixth of the steps, and from there down to 0 at their end.
    return optimizer, LambdaLR(optimizer, lambda step: min(6 * (step + 1) / steps, 1.2 * (1 - step / steps)))


# --- Runs: their files, the training loop, the picture ---------------------------------------------------------------


def new_folder(name, flags):
    """Make runs/NAME, or runs/NAME-2 and so on, with the flags in args.json and an empty log.csv. Raises OSError."""
    Path("runs").mkdir(exist_ok=True)
    for number in count(1):
        folder = Path("runs", name if number == 1 else f"{name}-{number}")
        with suppress(FileExistsError):
            folder.mkdir()  # to make a folder is to claim it
            (folder / "log.csv").write_text(",".join(LOG_COLUMNS) + "\n")
            (folder / "args.json").write_text(json.dumps(flags, indent=2) + "\n")
            return folder


def save(content, path):
    """torch.save, but whole or not at all. Raises OSError."""
    buffer, temporary = io.BytesIO(), path.with_suffix(".tmp")
    torch.save(content, buffer)  # straight into a full disk it would raise a RuntimeError that says nothing
    temporary.write_bytes(buffer.getbuffer())
    temporary.replace(path)


@contextmanager
def reading(path, fault):
    """Turn what a damaged or foreign file raises into an OSError of one line that names the fault."""
    try:
        yield
    except (FileNotFoundError, PermissionError, IsADirectoryError):  # these speak for themselves
        raise
    except Exception as error:  # torch.load raises many kinds
        raise OSError(f"cannot use {path}: {fault}") from error


def load_weights(network, path, description):
    """Read a network's state dict from a file, in place. Raises OSError if the file holds anything else.

    Names may begin with "module." or "_orig_mod.", as DataParallel and torch.compile leave them.
    """
    with reading(path, "it holds no state dict, as torch.save(network.state_dict(), FILE) writes one"):
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = {re.sub(r"^(module\.|_orig_mod\.)+", "", name): tensor for name, tensor in state.items()}

    def entries(content):
        return {f"{name} {[*getattr(x, 'shape', [type(x).__name__])]}" for name, x in content.items()}

    strange, missing = entries(state) - entries(network.state_dict()), entries(network.state_dict()) - entries(state)
    if strange or missing:
        has, lacks = (", ".join(sorted(x)[:2]) + ", ..." * (len(x) > 2) or "nothing else" for x in (strange, missing))
        raise OSError(f"cannot use {path}: no state dict of {description}: it has {has} and lacks {lacks}")
    network.load_state_dict(state)


def fit(stage, train_step, steps, parts, folder, test_set):
    """The one training loop: train_step() `steps` times, about eleven reports, and a checkpoint a minute.

    parts is all that a checkpoint keeps, by name, each with a state_dict; parts["schedule"] sets the rate, parts[stage]
    is the network to test. If the folder has a checkpoint of this stage, training goes on from there. A report is a
    line on the screen and in log.csv. Returns the last accuracy. Raises FloatingPointError, OSError.
    """

    def check_finite(step):
        if not all(p.isfinite().all() for x in parts.values() if isinstance(x, nn.Module) for p in x.parameters()):
            raise FloatingPointError(f"step {step:,} of the {stage} is not finite: too high a rate, or a bad teacher")

    checkpoint, log = folder / f"{stage}-checkpoint.pt", folder / "log.csv"
    done = {"step": 0, "seconds": 0.0}
    if checkpoint.exists():
        with reading(checkpoint, "it is damaged, or of a run with other flags"):
            done = torch.load(checkpoint, map_location="cpu", weights_only=True)
            if done["step"] >= steps:
                raise ValueError("no step is left")
            for name, part in parts.items():
                part.load_state_dict(done["parts"][name])
            torch.manual_seed(torch.initial_seed() + done["step"])  # a GPU goes on with other random numbers,
            torch.set_rng_state(done["rng"])  # a CPU with the very same
            os.truncate(log, done["log_size"])  # rows of later steps will come again
    started_at, saved_at, shown_at = time.monotonic() - done["seconds"], -math.inf, -math.inf
    for step in range(done["step"] + 1, steps + 1):
        seconds = time.monotonic() - started_at
        if seconds - saved_at >= CHECKPOINT_SECONDS:
            check_finite(step - 1)
            states = {name: part.state_dict() for name, part in parts.items()}
            progress = {"step": step - 1, "seconds": seconds, "log_size": log.stat().st_size}
            save(progress | {"parts": states, "rng": torch.get_rng_state()}, checkpoint)
            saved_at = seconds
        losses = train_step()
        parts["schedule"].step()
        seconds = time.monotonic() - started_at
        minutes, rest = divmod(round(seconds / step * (steps - step)), 60)
        left = f"  {minutes}:{rest:02} left" if step > 1 else ""  # a GPU's first step takes far longer than the others
        if sys.stdout.isatty() and seconds - shown_at >= 1:
            print(f"{stage} {step:6,} of {steps:,}{left}", end="   \r")
            shown_at = seconds
        if step == 1 or 10 * step % steps < 10:  # the first, and each that completes a tenth
            check_finite(step)
            values, accuracy = {name: loss.item() for name, loss in losses.items()}, evaluate(parts[stage], *test_set)
            row = {"stage": stage, "step": step, "seconds": round(seconds, 2), **values, "accuracy": accuracy}
            with log.open("a", newline="") as file:
                csv.DictWriter(file, LOG_COLUMNS, lineterminator="\n").writerow(row)
            shown = "".join(f"  {name} {value:6.3f}" for name, value in values.items())
            print(f"{stage} {step:6,}{shown}  accuracy {accuracy:6.2%}{left}")
    return accuracy


@torch.no_grad()
def save_picture(path, generator, teacher, num_classes, test_set):
    """Write a picture with a column for each class, as the teacher sees it, of what the generator draws.

    Rows: the mean generated image (Figure 2), the mean real one, six generated ones; black where there are none. They
    are drawn in train mode, as in training: after eval() the same noise gives somewhat other images.
    """
    noise = torch.randn(num_classes // 5, 500, generator.latent_dim, device=test_set[0].device)  # 100 images a class
    images = torch.cat([generator(z) for z in noise])
    classes = torch.cat([classify(teacher, batch)[0].argmax(1) for batch in images.split(500)])
    columns, black = [], torch.zeros_like(images[:6])
    for k in range(num_classes):
        drawn, real = images[classes == k], test_set[0][test_set[1] == k]
        columns.append(torch.cat([drawn.mean(0, True).nan_to_num(), real.mean(0, True), drawn, black])[:8])
    rows = torch.stack(columns, 1).flatten(0, 1)
    save_image(rows, path, nrow=num_classes, normalize=True, scale_each=True, pad_value=0.5)


# --- The command line ------------------------------------------------------------------------------------------------


def parse_args(argv=None):
    """The command line as a namespace, and a name for the run's folder. Exits with 2 and a sentence on a mistake."""
    argv = sys.argv[1:] if argv is None else argv
    devices = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    images = ("generator", "noise", "real", "labels")
    parser = argparse.ArgumentParser("dafl.py", usage="dafl.py [--flag value ...]", allow_abbrev=False, add_help=False)
    add = parser.add_argument
    add("--dataset", help="what the teacher knows (%(default)s)", choices=DATASETS, default="mnist")
    add(
        "--recipe",
        help="sets values below, schedules, bf16, pixel range (%(default)s)",
        choices=RECIPE_NAMES,
        default="fast",
    )
    add("--images", help="what the student learns from, see Table 1 (%(default)s)", choices=images, default="generator")
    add("--teacher", help="state dict of a teacher, so that none is trained", type=os.path.abspath, metavar="FILE")
    add("--seed", help="seed of everything random (%(default)s)", type=int, default=0, metavar="int")
    add("--device", help="where to compute (%(default)s)", choices=devices, default=devices[0])
    add("--resume", help="go on with the stopped run in this folder, with its own flags", metavar="FOLDER")
    first = vars(parser.parse_known_args(argv)[0])
    stopped = {}
    if first["resume"] is not None:
        folder, typed = Path(first["resume"]), {word.split("=")[0] for word in argv if word.startswith("--")}
        if typed - {"--resume", "--device", "--help"}:
            parser.error("argument --resume: the stopped run has its own flags; only --device may stand beside it")
        if (folder / "student.pt").exists():
            parser.error(f"argument --resume: the run in {folder} is finished")
        try:
            stopped = dict(json.loads((folder / "args.json").read_text()))
        except (OSError, ValueError, TypeError) as error:
            parser.error(f"argument --resume: there is no run in {folder}: {error}")
        if (folder / "teacher.pt").exists():
            stopped["teacher"] = str(folder / "teacher.pt")
    first |= stopped
    group = parser.add_argument_group("hyperparameters", f"(of {first['dataset']}, {first['recipe']} recipe)")
    for name, (least, *pairs, text) in RECIPES.items():
        value = dict(zip(DATASETS, pairs))[first["dataset"]][RECIPE_NAMES.index(first["recipe"])]
        flag, kind = "--" + name.replace("_", "-"), type(least)
        group.add_argument(flag, help=f"{text} (%(default)s)", type=kind, default=value, metavar=kind.__name__)
    add("-h", "--help", help="this text; with --dataset and --recipe, their values", action="help")

    parser.set_defaults(**stopped)
    args = parser.parse_args(argv)
    for name, least in [("seed", 0), *((name, row[0]) for name, row in RECIPES.items())]:
        if not least <= getattr(args, name) <= LARGEST:
            flag = "--" + name.replace("_", "-")
            parser.error(f"argument {flag}: must be from {least:g} to {LARGEST:g}, not {getattr(args, name)}")
    if args.device not in devices:
        parser.error(f"argument --device: there is no {args.device} here: add --device {devices[0]}")
    return args, re.sub(r"[^A-Za-z0-9.]+", "-", " ".join(argv)).strip("-")[:100] or args.dataset


def main(argv=None):
    """Run a command line: train a teacher, unless one is given, and a student. Returns the accuracy of both by name."""
    args, name = parse_args(argv)
    mnist, fast, from_data = args.dataset == "mnist", args.recipe == "fast", args.images in ("real", "labels")
    device, (_, num_classes, mean, std) = args.device, DATASETS[args.dataset]
    torch.manual_seed(args.seed)
    teacher = LeNet5(args.width) if mnist else resnet34(num_classes, args.width)
    if args.teacher is not None:
        load_weights(teacher, args.teacher, f"{type(teacher).__name__} at --width {args.width:g}")
    to_device(teacher, device, low_precision=fast)
    test_set = load_dataset(args.dataset, "test", device=device)
    train_set = load_dataset(args.dataset, "train", device=device) if from_data or args.teacher is None else None
    image_shape, augment = test_set[0].shape[1:], nn.Identity() if mnist else crop_and_flip
    # The generator's largest weight and activations, and the replayed images: what has no room should fail at once.
    replayed = max(1, args.replay), args.student_batch_size, *image_shape
    for shape in (128 * 8 * 8, args.latent_dim), (args.batch_size, 64, 32, 32), replayed:
        torch.empty(shape, device=device)
    folder = Path(args.resume) if args.resume is not None else new_folder(name, vars(args))
    print(f"DAFL on {args.dataset}: {args.recipe} recipe, seed {args.seed}, on {device}; results in {folder}")

    def real_batch(n):  # drawn with replacement: an epoch is as many images as the set has, not each once
        images, labels = train_set
        picked = torch.randint(len(images), (n,), device=device)
        return augment(images[picked]), labels[picked]

    # 1. The teacher
    if args.teacher is None:
        steps = args.teacher_epochs * math.ceil(len(train_set[0]) / args.teacher_batch_size)
        milestones = (79 / 199, 119 / 199)  # the authors': after 79 and 119 of 199 epochs
        optimizer, schedule = make_optimizer(teacher, args.teacher_lr, steps, args.recipe, milestones)
        parts = {"teacher": teacher, "optimizer": optimizer, "schedule": schedule}
        n = args.teacher_batch_size
        fit("teacher", lambda: classifier_step(teacher, optimizer, *real_batch(n)), steps, parts, folder, test_set)
    save(teacher.state_dict(), folder / "teacher.pt")
    (folder / "teacher-checkpoint.pt").unlink(missing_ok=True)
    teacher_accuracy = evaluate(teacher, *test_set)
    print(f"teacher accuracy {teacher_accuracy:.2%}")
    if not from_data:
        train_set = None  # gone

    # 2. The student
    torch.manual_seed(args.seed)  # again: the same student whether its teacher was trained or read
    student = to_device(LeNet5(args.width / 2) if mnist else resnet18(num_classes, args.width), device, fast)
    steps = args.steps if args.images == "generator" else args.steps * (1 + args.replay)  # as many updates
    milestones = (0.4, 0.8)  # the authors': after 800 and 1,600 of 2,000 epochs
    optimizer_s, schedule = make_optimizer(student, args.lr_s, steps, args.recipe, milestones)
    parts = {"student": student, "optimizer_s": optimizer_s, "schedule": schedule}
    if args.images == "generator":
        black_to_white = [(pixel - mean[0]) / std[0] for pixel in (0, 1)]
        pixel_range = black_to_white if mnist and fast else (-math.inf, math.inf)
        generator = to_device(Generator(args.latent_dim, image_shape[0], 32, pixel_range), device, fast)
        optimizer_g = torch.optim.Adam(generator.parameters(), args.lr_g)  # at a constant rate
        buffer = ReplayBuffer(25_600, image_shape)
        options = {name: vars(args)[name] for name in ("batch_size", "oh", "alpha", "beta", "temperature")}
        parts |= {"generator": generator, "optimizer_g": optimizer_g, "buffer": buffer}

    def student_step():
        if args.images == "labels":  # the teacher is not used
            return classifier_step(student, optimizer_s, *real_batch(args.student_batch_size))
        if args.images == "real":  # the teacher, no labels
            return kd_step(teacher, student, optimizer_s, real_batch(args.student_batch_size)[0], args.temperature)
        if args.images == "noise":
            noise = torch.randn(args.student_batch_size, *image_shape, device=device)
            return kd_step(teacher, student, optimizer_s, noise, args.temperature)
        losses, images = distill_step(teacher, student, generator, optimizer_g, optimizer_s, **options)
        if args.replay:
            buffer.add(images)
            past_images = augment(buffer.sample(args.replay * args.student_batch_size))
            for batch in cutmix(past_images).split(args.student_batch_size):
                kd_step(teacher, student, optimizer_s, batch, args.temperature)
        return losses

    student_accuracy = fit("student", student_step, steps, parts, folder, test_set)

    # 3. The results
    if args.images == "generator":
        save(generator.state_dict(), folder / "generator.pt")
        save_picture(folder / "generated.png", generator, teacher, num_classes, test_set)
    save(student.state_dict(), folder / "student.pt")
    (folder / "student-checkpoint.pt").unlink(missing_ok=True)
    print(f"student accuracy {student_accuracy:.2%}, trained on {len(train_set[0]) if from_data else 0:,} real images")
    return {"teacher": teacher_accuracy, "student": student_accuracy}


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")  # for logs, and odd names of paths
    try:
        main()
    except KeyboardInterrupt:
        argparse.ArgumentParser().exit(130, "\ndafl.py: stopped\n")
    except (OSError, FloatingPointError, MemoryError, RuntimeError) as error:
        message = " ".join(str(error).split())
        if isinstance(error, (MemoryError, RuntimeError)):
            if not re.search("^$|(out of|allocate|enough) memory|overflow", message):
                raise
            message = "not enough memory: choose smaller batch sizes, replay, latent-dim or width"
        argparse.ArgumentParser().exit(2, f"dafl.py: error: {message}\n")
