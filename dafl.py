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
    python dafl.py --help              # every option with its default

The first took 79 to 98 s on two cores of an AMD EPYC (Zen 5, bf16, PyTorch 2.14). Its figures:

    teacher accuracy   99.05%
    student accuracy   98.43% on 10,000 test images, after its last step
    trained on         0 real images

With seeds 90 to 99 the student had 98.41 % on average, 98.23 % at worst and 98.62 % at best. The paper has 98.20 %.
"""

import argparse
import csv
import io
import json
import math
import os
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, MultiStepLR
from torchvision import datasets
from torchvision.transforms.v2 import functional as transforms
from torchvision.utils import make_grid, save_image


# === The method: down to the next double line, it needs only math and torch ==========================================

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


def resnet34(num_classes=10, width=1.0):
    """The CIFAR teacher of Tables 3 and 4; each layer has `width` times the paper's channels."""
    return ResNet((3, 4, 6, 3), num_classes, width)


def resnet18(num_classes=10, width=1.0):
    """The CIFAR student of Tables 3 and 4; each layer has `width` times the paper's channels."""
    return ResNet((2, 2, 2, 2), num_classes, width)


def kd_loss(student_logits, teacher_logits, temperature=1.0):
    """L_KD, Eq. 1: the Kullback-Leibler divergence KL(teacher || student) in nats, batch mean; both logits (N, K).

    At temperature 1 it is Eq. 1's cross-entropy less the teacher's entropy: the student's gradient is the same, and it
    is 0 when both agree. A higher temperature shows how the teacher ranks the classes it rules out; the divergence is
    then multiplied by its square, which keeps the size of the gradient (Hinton et al., 2015).
    """
    log_q, p = (student_logits / temperature).log_softmax(1), (teacher_logits / temperature).softmax(1)
    return temperature**2 * F.kl_div(log_q, p, reduction="batchmean")


# --- Section 3.2: the generator and its three losses -----------------------------------------------------------------


class Generator(nn.Module):
    """G, as released: noise z (N, latent_dim) to images (N, channels, image_size, image_size); 4 divides image_size.

    The last BatchNorm has no parameters: over a batch each channel has mean 0 and variance 1, as normalised data have.
    Two others have an eps of 0.8, as in the released code. Beyond the paper, pixels can then be cut to a `pixel_range`,
    black to white: the losses do not care which sign a stroke has, and now and then a generator draws black on white. A
    range that lies mostly above 0, as that of the digits, makes that rarer.
    """

    def __init__(self, latent_dim=100, channels=1, image_size=32, pixel_range=(-math.inf, math.inf)):
        super().__init__()
        self.latent_dim, self.start_size, self.pixel_range = latent_dim, image_size // 4, pixel_range
        self.linear = nn.Linear(latent_dim, 128 * self.start_size**2)
        self.layers = nn.Sequential(  # (N, 128, 8, 8)
            nn.BatchNorm2d(128),
            nn.Upsample(scale_factor=2),  # (N, 128, 16, 16)
            nn.Conv2d(128, 128, 3, padding=1),
            nn.BatchNorm2d(128, eps=0.8),
            nn.LeakyReLU(0.2),
            nn.Upsample(scale_factor=2),  # (N, 128, 32, 32)
            nn.Conv2d(128, 64, 3, padding=1),  # (N, 64, 32, 32)
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


def descend(optimizer, loss):
    """One step of the optimizer down the gradient of the loss."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def distill(teacher, student, generator, *, steps, batch_size=64, optimizer_g=None, optimizer_s=None,
            oh=1.0, alpha=0.1, beta=5.0, temperature=4.0, memory=None):  # fmt: skip
    """Algorithm 1 as an iterator: each turn is one step, in place, of the generator and of the student.

    Teacher and student are modules that give (logits, features); the teacher is frozen. The generator has a latent_dim.
    Optimizers default to Adam at rates of 0.01 (generator) and 0.002 (student), and a schedule can be stepped between
    turns. oh, alpha and beta weigh the generator's losses; the paper has oh 1, and temperature 1 in L_KD. A Memory,
    beyond the paper, adds student updates on past images to each turn. Yields (l_oh, l_a, l_ie, l_kd), detached.
    """
    teacher.eval().requires_grad_(False)
    student.train()
    generator.train()
    optimizer_g = optimizer_g or torch.optim.Adam(generator.parameters(), lr=0.01)
    optimizer_s = optimizer_s or torch.optim.Adam(student.parameters(), lr=0.002)
    device = next(generator.parameters()).device
    for _ in range(steps):
        z = torch.randn(batch_size, generator.latent_dim, device=device)
        images = generator(z)
        logits, features = teacher(images)
        l_oh, l_a, l_ie = one_hot_loss(logits), activation_loss(features), information_entropy_loss(logits)
        descend(optimizer_g, oh * l_oh + alpha * l_a + beta * l_ie)  # L_Total, Eq. 7

        images, logits = images.detach(), logits.detach()  # as released; the paper draws a second batch
        l_kd = kd_loss(student(images)[0], logits, temperature)
        descend(optimizer_s, l_kd)
        if memory is not None:
            memory.keep(images)
            for past in memory.replay(batch_size):
                descend(optimizer_s, kd_loss(student(past)[0], teacher(past)[0], temperature))
        yield tuple(loss.detach() for loss in (l_oh, l_a, l_ie, l_kd))


# --- Beyond the paper: images are dear to draw and cheap to learn from, so past ones come again, distorted -----------


def distort(images, strength=0.15):
    """Move, turn, scale and shear each square image (N, C, H, W), cut it along a line, put another behind it.

    The affine map is the identity plus Gaussian noise of deviation `strength` on its six numbers, where 1 is half an
    image. What comes into view repeats the border.
    """
    n, _, height, width = images.shape
    maps = torch.eye(2, 3, device=images.device) + strength * torch.randn(n, 2, 3, device=images.device)
    grid = F.affine_grid(maps, images.shape, align_corners=False)
    border = 1 - 1 / width  # of the last pixel's centre; older Apple GPUs have no padding_mode="border"
    images = F.grid_sample(images, grid.clamp(-border, border), align_corners=False)

    turn, offset = torch.rand(2, n, 1, 1, 1, device=images.device)
    angle = 2 * math.pi * turn
    y = torch.linspace(-1, 1, height, device=images.device)[:, None]
    x = torch.linspace(-1, 1, width, device=images.device)
    near = x * angle.cos() + y * angle.sin() > offset - 0.5
    return torch.where(near, images, images[torch.randperm(n, device=images.device)])


class Memory(nn.Module):
    """The latest `capacity` images, of shape (C, H, W), for `updates` extra student updates in each step.

    A module, so that it moves to a device and into a checkpoint as one; the images are kept in half precision.
    """

    def __init__(self, updates=24, capacity=25_600, image_shape=(1, 32, 32), augment=distort):
        super().__init__()
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("images", torch.zeros(capacity, *image_shape, dtype=torch.float16))
        self.updates, self.augment = updates, augment

    def keep(self, images):
        """Put these images (N, C, H, W) in the place of the oldest."""
        slots = (self.count + torch.arange(len(images), device=images.device)) % len(self.images)
        self.images[slots] = images.half()
        self.count += len(images)

    def replay(self, batch_size):
        """`updates` batches of images (batch_size, C, H, W), drawn from all that are kept, then augmented."""
        filled = self.count.clamp(max=len(self.images))  # a tensor, so that nobody waits for a GPU
        picked = (torch.rand(self.updates * batch_size, device=filled.device) * filled).long()
        return self.augment(self.images[picked].float()).split(batch_size)


# === The experiments of Section 4: from here on there are data sets, files and flags =================================

CHECKPOINT_SECONDS = 60
LOG_COLUMNS = ["stage", "step", "seconds", "loss", "l_oh", "l_a", "l_ie", "l_kd", "accuracy"]

DATASETS = {  # torchvision's class, number of classes, mean and deviation of the pixels on a scale of 0 to 1
    "mnist": (datasets.MNIST, 10, (0.1307,), (0.3081,)),
    "cifar10": (datasets.CIFAR10, 10, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": (datasets.CIFAR100, 100, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
}

# What a recipe sets; "released" has the authors' values. _t is the teacher's, _s the student's, _g the generator's,
# whose learning rate is constant. Where drops is None, a rate rises to its value over a sixth of the steps and then
# falls to 0; else it falls to a tenth after each of these shares of the steps. The pixel range is MNIST's, from black,
# (0 - mean) / deviation, to white, (1 - mean) / deviation.
UNCUT = (-math.inf, math.inf)
MNIST = dict(latent_dim=100, oh=1.0, alpha=0.1, beta=5.0, distortion=0.15, width=1.0, teacher_epochs=9, lr_t=1e-3,
    batch_size_t=256)  # fmt: skip
CIFAR = dict(alpha=0.01, beta=5.0, lr_s=0.1, distortion=0.05, lr_t=0.1, batch_size_t=128, pixel_range=UNCUT)
RECIPES = {
    "mnist": {
        "fast": MNIST | dict(steps=400, batch_size=64, lr_g=0.01, lr_s=2.5e-3, temperature=4.0, replay=24,
            pixel_range=(-0.4242, 2.8215), drops_t=None, drops_s=None),
        "released": MNIST | dict(steps=24_000, batch_size=512, lr_g=0.2, lr_s=2e-3, temperature=1.0, replay=0,
            pixel_range=UNCUT, drops_t=(), drops_s=()),
    },
    "cifar10": {
        "fast": CIFAR | dict(steps=4000, batch_size=128, latent_dim=256, lr_g=1e-3, oh=1.0, temperature=4.0, replay=4,
            width=0.25, cutout=8, teacher_epochs=40, drops_t=None, drops_s=None),
        "released": CIFAR | dict(steps=240_000, batch_size=1024, latent_dim=1000, lr_g=0.02, oh=0.05, temperature=1.0,
            replay=0, width=1.0, cutout=0, teacher_epochs=199, drops_t=(79 / 199, 119 / 199), drops_s=(0.4, 0.8)),
    },
}  # fmt: skip
RECIPES["cifar100"] = {name: recipe | dict(oh=0.5, alpha=0.1, beta=20.0) for name, recipe in RECIPES["cifar10"].items()}


class UserError(Exception):
    """Something that only the user can mend, told in one sentence."""


def load_dataset(name, split, data_dir=Path(__file__).parent / "data", device="cpu"):
    """The whole "train" or "test" split on the device: normalised images (N, C, 32, 32) and labels (N,).

    Downloads to data_dir what is not there. Raises UserError where that fails.
    """
    source, _, mean, std = DATASETS[name]
    try:
        dataset = source(data_dir, train=split == "train", download=True)
    except Exception as error:
        raise UserError(f"cannot read or download {name} in {data_dir} ({' '.join(str(error).split())})") from error
    images = torch.as_tensor(dataset.data)  # uint8 (N, 28, 28) or (N, 32, 32, 3)
    images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2)
    images = transforms.to_dtype(transforms.resize(images, [32, 32]).to(device), torch.float32, scale=True)
    return transforms.normalize(images, mean, std, inplace=True), torch.as_tensor(dataset.targets, device=device)


def crop_and_flip(images):
    """CIFAR's augmentation: shift each image (N, C, H, W) by up to 4 pixels, mirror each with probability 1/2."""
    n, _, height, width = images.shape
    shifted = F.pad(images, (4, 4, 4, 4)).unfold(2, height, 1).unfold(3, width, 1)  # (N, C, 9, 9, H, W)
    row, column = torch.randint(9, (2, n), device=images.device)
    images = shifted[torch.arange(n, device=images.device), :, row, column]
    return torch.where(torch.rand(n, 1, 1, 1, device=images.device) < 0.5, images, images.flip(3))


def cutout(images, size):
    """Set a random square of size x size pixels of each image (N, C, H, W) to 0 (DeVries and Taylor, 2017)."""
    n, _, height, width = images.shape
    top, left = torch.randint(height - size + 1, (2, n, 1, 1, 1), device=images.device)
    y, x = torch.arange(height, device=images.device)[:, None], torch.arange(width, device=images.device)
    inside = (top <= y) & (y < top + size) & (left <= x) & (x < left + size)
    return images.masked_fill(inside, 0)


@torch.no_grad()
def evaluate(model, images, labels):
    """Accuracy in [0, 1] of a classifier on normalised images (N, C, H, W) with labels (N,)."""
    was_training = model.training
    model.eval()
    hits = sum((model(x)[0].argmax(1) == y).sum() for x, y in zip(images.split(500), labels.split(500)))
    model.train(was_training)
    return hits.item() / len(labels)


def make_optimizer(network, lr, steps, drops):
    """Adam for a LeNet5, SGD for a ResNet, and the schedule of its learning rate (see RECIPES on drops)."""
    if isinstance(network, LeNet5):
        optimizer = torch.optim.Adam(network.parameters(), lr)
    else:
        optimizer = torch.optim.SGD(network.parameters(), lr, momentum=0.9, weight_decay=5e-4)
    if drops is None:
        return optimizer, LambdaLR(optimizer, lambda step: min(6 * (step + 1) / steps, 1.2 * (1 - step / steps)))
    return optimizer, MultiStepLR(optimizer, [round(drop * steps) for drop in drops])


def train_classifier(network, images, labels, optimizer, *, steps, batch_size=256, augment=nn.Identity()):
    """Train a classifier, in place, on batches drawn with replacement from images (N, C, H, W) with labels (N,).

    An iterator: each turn is a step and yields its cross-entropy, detached, in a tuple.
    """
    network.train()
    for _ in range(steps):
        picked = torch.randint(len(images), (batch_size,), device=images.device)
        loss = F.cross_entropy(network(augment(images[picked]))[0], labels[picked])
        descend(optimizer, loss)
        yield (loss.detach(),)


def distill_on(draw, teacher, student, optimizer, *, steps, batch_size, temperature=1.0):
    """Table 1 without a generator: an iterator over the student's losses on images draw(n), (n, C, H, W)."""
    teacher.eval().requires_grad_(False)
    student.train()
    for _ in range(steps):
        images = draw(batch_size)
        l_kd = kd_loss(student(images)[0], teacher(images)[0], temperature)
        descend(optimizer, l_kd)
        yield (l_kd.detach(),)


# --- The same networks, faster ---------------------------------------------------------------------------------------


class UpsampledConv2d(nn.Module):
    """nn.Upsample(scale_factor=2), then a 3x3 nn.Conv2d, in one: the same numbers for 2.25 times fewer products.

    A pixel repeated over 2x2 and then weighted by a 3x3 kernel is a pixel weighted by the 4x4 kernel that is the sum of
    the four shifted ones, and that is a transposed convolution.
    """

    def __init__(self, conv):
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias

    def forward(self, x):
        kernel = 4 * F.avg_pool2d(F.pad(self.weight.flip(2, 3), (1, 1, 1, 1)), 2, stride=1)
        kernel = kernel.transpose(0, 1).contiguous(memory_format=torch.channels_last)
        return F.conv_transpose2d(x, kernel, self.bias, stride=2, padding=1)


class BFloat16(nn.Module):
    """A network under autocast: it computes in bf16 what is safe in bf16, and gives float32."""

    def __init__(self, network):
        super().__init__()
        self.network, self.latent_dim = network, getattr(network, "latent_dim", None)

    def forward(self, x):
        with torch.autocast(x.device.type, torch.bfloat16):
            outputs = self.network(x)
        return outputs.float() if torch.is_tensor(outputs) else tuple(output.float() for output in outputs)


def accelerate(network, device, precision):
    """Put a network on the device in its fastest form, in place; gives what to call for it. LeNets stay in float32."""
    if isinstance(network, Generator):
        for i, layer in enumerate(network.layers):
            if isinstance(layer, nn.Upsample):
                network.layers[i], network.layers[i + 1] = nn.Identity(), UpsampledConv2d(network.layers[i + 1])
    network.to(device, memory_format=torch.channels_last)
    return BFloat16(network) if precision == "bf16" and not isinstance(network, LeNet5) else network


# --- A run and its files ---------------------------------------------------------------------------------------------


def write_file(path, write):
    """Write a file whole or not at all, what write(buffer) puts into a buffer. Raises OSError, as on a full disk."""
    buffer, temporary = io.BytesIO(), path.with_name(path.name + ".tmp")
    write(buffer)
    temporary.write_bytes(buffer.getbuffer())
    os.replace(temporary, path)


def read_file(path, network=None):
    """What torch.save wrote, without running code in it; loaded into the network if one is given. Raises UserError."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if network is not None:
            network.load_state_dict(content)
    except Exception as error:
        raise UserError(f"cannot load {path}: {' '.join(str(error).split())[:200]}") from error
    return content


def find_checkpoint(out, resume, settings):
    """The checkpoint of a run of these settings that is to be resumed, else {}. Raises UserError if neither can be."""
    path = out / "checkpoint.pt"
    if not resume:
        if any(out.glob("*.pt")):
            hint = "add --resume to go on with the run in it, or " if path.exists() else ""
            raise UserError(f"{out} has the files of an earlier run: {hint}choose another --out-dir")
        return {}
    if not path.exists():
        raise UserError(f"nothing to resume: there is no {path}")
    saved = read_file(path)
    for name, value in settings.items():
        if (begun := saved.get("settings", {}).get(name)) != value:
            raise UserError(f"cannot resume: {path} has {name} {begun}, not {value}")
    return saved


def train(stage, turns, names, steps, parts, out, test_set, saved, settings, snapshot=None):
    """Take `steps` turns of an iterator over tuples of losses, named by `names`; report the first turn and ten others.

    A report is a line on the screen and in log.csv. The checkpoint, never much more than a minute old, has the state of
    the parts (by name; the stage's network and its schedule are among them) and the random state; `saved` is one to go
    on from, or {}. Gives a list of what snapshot() gave at each report.
    """
    device = test_set[0].device
    rng = torch if device.type == "cpu" else torch.get_device_module(device)
    done, seconds, snapshots = 0, 0.0, []
    if saved.get("stage") == stage:
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        rng.set_rng_state(saved["random"])
        os.truncate(out / "log.csv", saved["log_size"])
        done, seconds, snapshots = saved["step"], saved["seconds"], saved["snapshots"]
    started_at, saved_at = time.monotonic() - seconds, -math.inf
    print(f"\n{stage:>8}" + "".join(f"{name:>9}" for name in names) + "  accuracy    left", flush=True)
    for step, losses in zip(range(done + 1, steps + 1), turns):
        parts["schedule"].step()
        seconds = time.monotonic() - started_at
        report = step == 1 or 10 * step % steps < 10
        due = seconds - saved_at >= CHECKPOINT_SECONDS
        if not (report or due):
            continue
        losses = torch.stack(losses).tolist()
        if not all(map(math.isfinite, losses)):
            raise UserError(f"a loss is not finite at step {step:,} of the {stage}: try lower learning rates")
        if report:
            accuracy = evaluate(parts[stage], *test_set)
            row = dict(stage=stage, step=step, seconds=round(seconds, 2), accuracy=accuracy)
            with open(out / "log.csv", "a", newline="") as file:
                csv.DictWriter(file, LOG_COLUMNS, lineterminator="\n").writerow(row | dict(zip(names, losses)))
            minutes, rest = divmod(round(seconds / step * (steps - step)), 60)
            columns = "".join(f"{loss:9.3f}" for loss in losses)
            print(f"{step:8,}{columns}{accuracy:10.2%}{minutes:5}:{rest:02}", flush=True)
            if snapshot:
                snapshots.append(snapshot())
        if due:
            state = {name: part.state_dict() for name, part in parts.items()}
            state |= dict(stage=stage, step=step, seconds=seconds, snapshots=snapshots, settings=settings,
                random=rng.get_rng_state(), log_size=os.path.getsize(out / "log.csv"))  # fmt: skip
            write_file(out / "checkpoint.pt", partial(torch.save, state))
            saved_at = seconds
    return snapshots


def in_columns(images, classes, num_classes, rows):
    """The first `rows` images (N, C, H, W) of each class as one picture with a column a class.

    Each image is stretched from its darkest to its brightest pixel.
    """
    table = images.new_zeros(rows, num_classes, *images.shape[1:])
    for k in range(num_classes):
        column = images[classes == k][:rows]
        table[: len(column), k] = column
    return make_grid(table.flatten(0, 1), num_classes, normalize=True, scale_each=True, pad_value=0.5)


@torch.no_grad()
def save_pictures(out, draw, teacher, num_classes, test_images, test_labels, snapshots):
    """Write samples.png, a column of images for each class as the teacher sees them, and class_means.png, Figure 2.

    Figure 2: the mean of the images that the teacher takes for each class (top), and of the real test images (bottom).
    With snapshots, what one batch of noise gave in the course of training, samples.gif shows these in such columns.
    """
    batches = [draw(500) for _ in range(num_classes // 5)]  # some 100 images a class
    images, classes = torch.cat(batches), torch.cat([teacher(batch)[0].argmax(1) for batch in batches])
    pairs = (images, classes), (test_images, test_labels)
    means = torch.stack([x[y == k].mean(0).nan_to_num() for x, y in pairs for k in range(num_classes)])
    figure_2 = in_columns(means, torch.arange(num_classes, device=means.device).repeat(2), num_classes, rows=2)
    samples = in_columns(images, classes, num_classes, rows=8)
    write_file(out / "class_means.png", partial(save_image, figure_2, format="png"))
    write_file(out / "samples.png", partial(save_image, samples, format="png"))
    if snapshots:
        classes = teacher(snapshots[-1].to(images))[0].argmax(1).cpu()
        film = [transforms.to_pil_image(in_columns(shot.float(), classes, num_classes, rows=4)) for shot in snapshots]
        write = partial(film[0].save, format="gif", save_all=True, append_images=film[1:], loop=0,
                        duration=[300] * len(film[1:]) + [2000])
        write_file(out / "samples.gif", write)


# --- Command line ----------------------------------------------------------------------------------------------------


def number(kind, least):
    """An argparse type: an int or float of at least `least`, and below 2**62, where a seed still fits."""

    def check(text):
        value = kind(text)
        if not least <= value < 2**62:
            raise argparse.ArgumentTypeError(f"must be at least {least} and below 2**62, not {text}")
        return value

    check.__name__ = kind.__name__  # argparse then says "invalid int value"
    return check


def has_fast_bf16(device):
    """Whether the device is faster in bf16: GPUs that have it, CPUs with AMX, AMD's since Zen 4."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpu = getattr(torch.cpu, "get_capabilities", dict)() if device == "cpu" else {}
    return cpu.get("amx_bf16", False) or (cpu.get("avx512_bf16", False) and "AMD" in cpu.get("cpu_name", ""))


def parse_args(argv=None):
    """The command line as a namespace, with what the recipe sets filled in. Exits with 2 on a mistake."""
    parser = argparse.ArgumentParser(
        prog="dafl.py", usage="dafl.py [--flag value ...]", allow_abbrev=False, add_help=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Data-Free Learning of Student Networks (ICCV 2019). Defaults are those of the data set and recipe",
    )  # fmt: skip
    add = parser.add_argument
    # The other defaults depend on these two.
    add("--dataset", help="what the teacher knows", choices=DATASETS, default="mnist")
    add("--recipe", help="whence the defaults", choices=("fast", "released"), default="fast")
    chosen, _ = parser.parse_known_args(argv)
    parser.set_defaults(**RECIPES[chosen.dataset][chosen.recipe])
    add("--images", help="what the student learns from (Table 1); labels: real ones, not the teacher's",
        choices=("generator", "noise", "real", "labels"), default="generator")  # fmt: skip
    add("--steps", help="steps of Algorithm 1", type=number(int, 1), metavar="N")
    add("--batch-size", help="images in a batch of the student's", type=number(int, 2), metavar="N")
    add("--lr-g", help="learning rate of the generator", type=number(float, 0), metavar="X")
    add("--lr-s", help="learning rate of the student", type=number(float, 0), metavar="X")
    add("--oh", help="weight of the one-hot loss, Eq. 4", type=number(float, 0), metavar="X")
    add("--alpha", help="weight of the activation loss, Eq. 5", type=number(float, 0), metavar="X")
    add("--beta", help="weight of the information entropy loss, Eq. 6", type=number(float, 0), metavar="X")
    add("--replay", help="student updates a step on past images; the paper has 0", type=number(int, 0), metavar="N")
    add("--width", help="share of the paper's channels in teacher and student", type=number(float, 0.2), metavar="X")
    add("--teacher-epochs", help="epochs of the teacher's training", type=number(int, 1), metavar="N")
    add("--teacher", help="state dict of a teacher, so that none is trained", type=Path, metavar="FILE")
    add("--out-dir", help="new folder for the results; None is runs/ and the flags", type=Path, metavar="OUT")
    add("--seed", help="seed of everything random", type=number(int, 0), default=0, metavar="N")
    devices = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    add("--device", help="where to compute", choices=devices, default=devices[0])
    add("--resume", action="store_true", help="go on with a stopped run of the same flags")
    add("--help", action="help", help="show this and stop")
    args = parser.parse_args(argv)
    words = [word.lstrip("-") for word in (sys.argv[1:] if argv is None else argv) if word != "--resume"]
    args.out_dir = args.out_dir or Path("runs", "-".join(words).replace(os.sep, "-") or "mnist")
    args.precision = "bf16" if args.recipe == "fast" and has_fast_bf16(args.device) else "fp32"
    return args


def train_student(args, teacher, student, train_set, augment, image_shape, train_stage):
    """Train the student on what --images says; gives draw(n), images (n, C, H, W) such as it saw, and snapshots."""
    device = args.device
    steps = args.steps if args.images == "generator" else args.steps * (1 + args.replay)  # as many student updates
    fast_student = accelerate(student, device, args.precision)
    optimizer, schedule = make_optimizer(student, args.lr_s, steps, args.drops_s)
    parts = dict(student=student, optimizer=optimizer, schedule=schedule)
    options = dict(steps=steps, batch_size=args.batch_size)

    def draw_real(n):
        return augment(train_set[0][torch.randint(len(train_set[0]), (n,), device=device)])

    if args.images == "labels":
        losses = train_classifier(fast_student, *train_set, optimizer, **options, augment=augment)
        return draw_real, train_stage("student", losses, ["loss"], steps, parts)
    if args.images != "generator":
        draw = draw_real if args.images == "real" else lambda n: torch.randn(n, *image_shape, device=device)
        losses = distill_on(draw, teacher, fast_student, optimizer, **options, temperature=args.temperature)
        return draw, train_stage("student", losses, ["l_kd"], steps, parts)

    generator = Generator(args.latent_dim, image_shape[0], pixel_range=args.pixel_range)
    fast_generator = accelerate(generator, device, args.precision)
    optimizer_g = torch.optim.Adam(generator.parameters(), args.lr_g)
    parts |= dict(generator=generator, optimizer_g=optimizer_g)
    memory = None
    if args.replay:
        capacity = min(steps * args.batch_size, 50_000)
        memory = Memory(args.replay, capacity, image_shape, lambda x: distort(augment(x), args.distortion)).to(device)
        parts["memory"] = memory
    z = torch.randn(80, args.latent_dim, device=device)
    losses = distill(teacher, fast_student, fast_generator, **options, optimizer_g=optimizer_g, optimizer_s=optimizer,
        oh=args.oh, alpha=args.alpha, beta=args.beta, temperature=args.temperature, memory=memory)  # fmt: skip
    snapshots = train_stage("student", losses, ["l_oh", "l_a", "l_ie", "l_kd"], steps, parts,
        snapshot=lambda: fast_generator(z).detach().half().cpu())  # fmt: skip
    write_file(args.out_dir / "generator.pt", partial(torch.save, generator.state_dict()))
    return lambda n: fast_generator(torch.randn(n, args.latent_dim, device=device)), snapshots


def run(args):
    """Check everything, train the teacher if need be, then the student, and fill OUT. Gives both accuracies."""
    out, device, mnist = args.out_dir, args.device, args.dataset == "mnist"
    num_classes = DATASETS[args.dataset][1]
    settings = {name: str(value) for name, value in vars(args).items() if name not in ("out_dir", "resume")}
    saved = find_checkpoint(out, args.resume, settings)
    torch.manual_seed(args.seed)
    teacher = LeNet5(args.width) if mnist else resnet34(num_classes, args.width)
    teacher_file = args.teacher or out / "teacher.pt"
    to_train = not args.teacher and saved.get("stage") != "student"
    if not to_train:
        read_file(teacher_file, teacher)
    test_set = load_dataset(args.dataset, "test", device=device)
    from_data = args.images in ("real", "labels")
    train_set = load_dataset(args.dataset, "train", device=device) if to_train or from_data else ()
    out.mkdir(parents=True, exist_ok=True)
    if not args.resume:
        (out / "settings.json").write_text(json.dumps(settings))
        (out / "log.csv").write_text(",".join(LOG_COLUMNS) + "\n")
    where = f"{device}, {torch.get_num_threads()} threads, {args.precision}"
    print(f"DAFL on {args.dataset} with images from: {args.images} ({args.recipe} recipe, seed {args.seed}; {where})")

    train_stage = partial(train, out=out, test_set=test_set, saved=saved, settings=settings)
    fast_teacher = accelerate(teacher, device, args.precision)
    augment = nn.Identity() if mnist else lambda images: cutout(crop_and_flip(images), args.cutout)
    if to_train:
        steps = args.teacher_epochs * math.ceil(len(train_set[0]) / args.batch_size_t)
        optimizer, schedule = make_optimizer(teacher, args.lr_t, steps, args.drops_t)
        parts = dict(teacher=teacher, optimizer=optimizer, schedule=schedule)
        train_stage("teacher", train_classifier(fast_teacher, *train_set, optimizer, steps=steps,
            batch_size=args.batch_size_t, augment=augment), ["loss"], steps, parts)  # fmt: skip
        write_file(teacher_file, partial(torch.save, teacher.state_dict()))
    if not from_data:
        train_set = ()
    fast_teacher.eval()
    teacher_accuracy = evaluate(teacher, *test_set)
    print(f"\nteacher accuracy   {teacher_accuracy:.2%} ({teacher_file})", flush=True)
    if args.teacher:
        record = teacher_file.with_name("settings.json")
        print(f"made with          {record.read_text() if record.exists() else 'settings unknown'}")

    torch.manual_seed(args.seed)  # again: the same student whether its teacher was trained, read or resumed
    student = LeNet5(args.width / 2) if mnist else resnet18(num_classes, args.width)
    draw, snapshots = train_student(args, fast_teacher, student, train_set, augment, test_set[0].shape[1:], train_stage)
    write_file(out / "student.pt", partial(torch.save, student.state_dict()))
    save_pictures(out, draw, fast_teacher, num_classes, *test_set, snapshots)
    student_accuracy = evaluate(student, *test_set)
    (out / "checkpoint.pt").unlink(missing_ok=True)
    print(f"\nstudent accuracy   {student_accuracy:.2%} on {len(test_set[0]):,} test images, after its last step")
    print(f"trained on         {len(train_set[0]) if from_data else 0:,} real images")
    return {"teacher": teacher_accuracy, "student": student_accuracy}


def main(argv=None):
    """Run the command line. A mistake ends in one sentence on stderr and exit code 2, Ctrl-C in exit code 130."""
    args = parse_args(argv)
    try:
        return run(args)
    except (UserError, OSError) as error:
        print(f"dafl.py: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt as interrupt:
        can_resume = (args.out_dir / "checkpoint.pt").exists()
        hint = "repeat the command with --resume to go on" if can_resume else "nothing had been trained"
        print(f"\ndafl.py: stopped; {hint}", file=sys.stderr)
        raise SystemExit(130) from interrupt


if __name__ == "__main__":
    main()
