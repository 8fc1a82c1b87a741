# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "torchvision"]
# ///
"""Data-Free Learning of Student Networks, in one file.

Hanting Chen, Yunhe Wang, Chang Xu, Zhaohui Yang, Chuanjian Liu, Boxin Shi, Chunjing Xu, Chao Xu, Qi Tian.
ICCV 2019, https://arxiv.org/abs/1904.01186

A trained classifier, the teacher, is all that is left; its training data are gone. A generator learns to draw images
that the fixed teacher takes for its own data: it is sure of each (L_oh), its features answer strongly (L_a), and a
batch covers all classes evenly (L_ie). A smaller student learns to give the teacher's outputs on those images (L_KD).
Then it is tested on real images, the first it ever sees.

    python dafl.py                     # MNIST: trains the teacher, then the student without data
    python dafl.py --images noise      # a baseline: the student learns on noise instead
    python dafl.py --help              # every option with its default

The first printed, after 6 min 20 s on two cores of an AMD EPYC (Zen 4; bf16, PyTorch 2.15, seed 0):

    teacher accuracy   99.05% on 10,000 test images
    student accuracy   98.51%, after its last step
    real images seen   0 by the student

Over seeds 50 to 59 the student had 98.47 % on average, 98.33 % at worst and 98.69 % at best. The paper has 98.20 %.
"""

import argparse
import math
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torchvision import datasets
from torchvision.transforms.v2 import functional as transforms
from torchvision.utils import make_grid, save_image

CHECKPOINT_SECONDS = 60
MEMORY_IMAGES = 100_000


# --- Section 3.1: teacher and student networks. Each gives (logits, features): L_a looks at the features. ------------


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
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x):
        out = self.bn1(self.conv1(x)).relu()
        return (self.bn2(self.conv2(out)) + self.shortcut(x)).relu()


class ResNet(nn.Module):
    """ResNet in its CIFAR form: a 3x3 stem and no max-pooling, four stages of `blocks` basic blocks.

    Images (N, 3, 32, 32) to logits (N, num_classes) and features (N, 512), the input of the fully connected layer.
    """

    def __init__(self, blocks, num_classes=10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        stages, in_channels = [], 64
        for channels, count, stride in zip((64, 128, 256, 512), blocks, (1, 2, 2, 2)):
            for block in range(count):
                stages.append(BasicBlock(in_channels, channels, stride if block == 0 else 1))
                in_channels = channels
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(512, num_classes)

    def forward(self, images):  # (N, 3, 32, 32)
        x = self.bn1(self.conv1(images)).relu()  # (N, 64, 32, 32)
        features = self.stages(x).mean((2, 3)).float()  # (N, 512, 4, 4) averaged to (N, 512)
        return self.fc(features).float(), features


def resnet34(num_classes=10):
    """The CIFAR teacher of Tables 3 and 4."""
    return ResNet((3, 4, 6, 3), num_classes)


def resnet18(num_classes=10):
    """The CIFAR student of Tables 3 and 4."""
    return ResNet((2, 2, 2, 2), num_classes)


# --- Section 3.2: the generator and its three losses -----------------------------------------------------------------


class UpsampledConv2d(nn.Conv2d):
    """Nearest-neighbour upsampling by 2, then a 3x3 convolution: (N, C, H, W) to (N, C', 2H, 2W).

    Both at once: a pixel repeated over 2x2 and then weighted by a 3x3 kernel is a pixel weighted by the 4x4 kernel that
    is the sum of the four shifted ones. The same numbers for 2.25 times fewer multiplications.
    """

    def forward(self, x):
        kernel = 4 * F.avg_pool2d(F.pad(self.weight.flip(2, 3), (1, 1, 1, 1)), 2, stride=1)
        kernel = kernel.transpose(0, 1).contiguous(memory_format=torch.channels_last)
        return F.conv_transpose2d(x, kernel, self.bias, stride=2, padding=1)


class Generator(nn.Module):
    """G of Section 3.2, as released: noise z (N, latent_dim) to images (N, channels, image_size, image_size).

    The last BatchNorm has no parameters: over a batch the images have mean 0 and variance 1, as normalised data do.
    The inner ones have the released code's eps of 0.8, which keeps channels that hardly vary from being blown up.
    """

    def __init__(self, latent_dim=100, channels=1, image_size=32):
        super().__init__()
        self.start_size = image_size // 4
        self.linear = nn.Linear(latent_dim, 128 * self.start_size**2)
        self.layers = nn.Sequential(  # (N, 128, 8, 8)
            nn.BatchNorm2d(128),
            UpsampledConv2d(128, 128, 3, padding=1),  # (N, 128, 16, 16)
            nn.BatchNorm2d(128, eps=0.8),
            nn.LeakyReLU(0.2),
            UpsampledConv2d(128, 64, 3, padding=1),  # (N, 64, 32, 32)
            nn.BatchNorm2d(64, eps=0.8),
            nn.LeakyReLU(0.2),
            nn.Conv2d(64, channels, 3, padding=1),  # (N, channels, 32, 32)
            nn.Tanh(),
            nn.BatchNorm2d(channels, affine=False),
        )

    def forward(self, z):
        x = self.linear(z).unflatten(1, (128, self.start_size, self.start_size))
        return self.layers(x.contiguous(memory_format=torch.channels_last)).float()


def one_hot_loss(logits):
    """L_oh, Eq. 3: cross-entropy of the teacher's logits (N, K) against their own argmax; low when it is sure."""
    return F.cross_entropy(logits, logits.argmax(1))


def activation_loss(features):
    """L_a, Eq. 4: minus the mean absolute feature (N, D) of the teacher; low when its filters answer strongly."""
    return -features.abs().mean()


def information_entropy_loss(logits):
    """L_ie, Eq. 5: minus the entropy, in decimal digits, of the mean prediction; lowest when classes are even.

    Logits (N, K) to sum p log10 p, from -log10 K to 0, with p the mean of the softmax over the batch.
    """
    p = logits.softmax(1).mean(0)
    return (p * p.clamp_min(torch.finfo(p.dtype).tiny).log10()).sum()


def kd_loss(student_logits, teacher_logits, temperature=1.0):
    """L_KD, Eq. 1: Kullback-Leibler divergence of the student's softmax from the teacher's, in nats, batch mean.

    Both logits (N, K). Eq. 1's cross-entropy less the teacher's entropy: the same gradient, and 0 when both agree.
    Eq. 1 has temperature 1; a higher one shows how the teacher ranks the classes it rules out (Hinton et al., 2015).
    """
    q, p = student_logits / temperature, teacher_logits / temperature
    return temperature**2 * F.kl_div(q.log_softmax(1), p.softmax(1), reduction="batchmean")


# --- Section 4: data sets and hyper-parameters -----------------------------------------------------------------------


PRESETS = {
    # flag: (type, least, mnist, cifar10, cifar100, meaning)
    "steps": (int, 1, 800, 240_000, 240_000, "steps of generator and student"),
    "batch_size": (int, 2, 64, 1024, 1024, "images in a batch"),
    "latent_dim": (int, 1, 100, 1000, 1000, "length of the noise z"),
    "lr_g": (float, 0, 0.01, 0.02, 0.02, "learning rate of the generator (Adam)"),
    "lr_s": (float, 0, 2e-3, 0.1, 0.1, "learning rate of the student (mnist: Adam, cifar: SGD)"),
    "oh": (float, 0, 1.0, 0.05, 0.5, "weight of the one-hot loss, Eq. 3"),
    "alpha": (float, 0, 0.1, 0.01, 0.1, "weight of the activation loss, Eq. 4"),
    "beta": (float, 0, 5.0, 5.0, 20.0, "weight of the information entropy loss, Eq. 5"),
    "temperature": (float, 0.01, 4.0, 1.0, 1.0, "softens both outputs in the KD loss; 1 is the paper's"),
    "warmup": (float, 0, 0.05, 0.0, 0.0, "share of the steps in which the generator trains alone"),
    "replay": (int, 0, 32, 0, 0, "more student updates a step, on mixtures of past images; 0 is the paper's loop"),
    "affine": (float, 0, 0.15, 0.0, 0.0, "strength of a random affine map of each past image; 0 is none"),
    "collapse": (float, 0, 0.1, 0.0, 0.0, "restart a generator whose images differ by less than this; 0 never does"),
    "teacher_epochs": (int, 1, 9, 199, 199, "epochs of the teacher, if it is still to be trained"),
}  # fmt: skip


class Source(NamedTuple):
    """A data set: its torchvision class, number of classes, mean and deviation of its pixels on a scale of 0 to 1."""

    load: type
    num_classes: int
    mean: tuple
    std: tuple


SOURCES = {
    "mnist": Source(datasets.MNIST, 10, (0.1307,), (0.3081,)),
    "cifar10": Source(datasets.CIFAR10, 10, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": Source(datasets.CIFAR100, 100, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
}


class UserError(Exception):
    """Something that only the user can mend, told in one sentence."""


def load_dataset(name, split, data_dir, device="cpu"):
    """The whole "train" or "test" split on the device: normalised images (N, C, 32, 32) and labels (N,).

    Downloads to data_dir what is not there. Raises UserError, naming the files it needs, where that fails.
    """
    source = SOURCES[name]
    try:
        dataset = source.load(data_dir, train=split == "train", download=True)
    except Exception as error:
        files = getattr(source.load, "filename", None) or ", ".join(file for file, _ in source.load.resources)
        folder = Path(data_dir, "MNIST", "raw") if name == "mnist" else data_dir
        reason = type(error).__name__
        raise UserError(f"cannot read or download {name} ({reason}): put {files} into an empty {folder}") from error
    images = torch.as_tensor(dataset.data)  # uint8 (N, 28, 28) or (N, 32, 32, 3)
    images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2)
    images = transforms.to_dtype(transforms.resize(images, [32, 32]).to(device), torch.float32, scale=True)
    images = transforms.normalize(images, source.mean, source.std, inplace=True)
    return images, torch.as_tensor(dataset.targets, device=device)


def pixel_range(args):
    """Black and white, 0 and 1 before they are normalised, as tensors (C, 1, 1)."""
    source = SOURCES[args.dataset]
    mean, std = (torch.tensor(values, device=args.device).view(-1, 1, 1) for values in (source.mean, source.std))
    return -mean / std, (1 - mean) / std


def random_crop_and_flip(images):
    """CIFAR's augmentation: shift each image (N, C, H, W) by up to 4 pixels, mirror every second one."""
    n, _, height, width = images.shape
    padded = F.pad(images, (4, 4, 4, 4)).permute(0, 2, 3, 1)
    image, row, column = (torch.arange(size, device=images.device) for size in (n, height, width))
    column = torch.where(torch.rand(n, 1, device=images.device) < 0.5, column, column.flip(0))
    row = row + torch.randint(9, (n, 1), device=images.device)
    column = column + torch.randint(9, (n, 1), device=images.device)
    return padded[image[:, None, None], row[:, :, None], column[:, None, :]].permute(0, 3, 1, 2)


# --- Beyond the paper: a memory of past images, distorted and mixed (--replay), makes MNIST a matter of minutes -------


class Memory(nn.Module):
    """The latest `capacity` generated images, of shape (C, H, W), in half precision."""

    def __init__(self, capacity, image_shape):
        super().__init__()
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("images", torch.zeros(capacity, *image_shape, dtype=torch.float16))

    def add(self, images):
        slots = (self.count + torch.arange(len(images), device=images.device)) % len(self.images)
        self.images[slots] = images.half()
        self.count += len(images)

    def sample(self, n):
        filled = self.count.clamp(max=len(self.images))
        return self.images[(torch.rand(n, device=filled.device) * filled).long()].float()


def distort(images, strength):
    """Move, turn, scale and shear each image (N, C, H, W) by a random affine map.

    The map is the identity plus Gaussian noise of standard deviation `strength` on its six numbers, where 1 is half the
    width of an image. What comes into view repeats the border.
    """
    identity = torch.eye(2, 3, device=images.device)
    maps = identity + strength * torch.randn(len(images), 2, 3, device=images.device)
    grid = F.affine_grid(maps, images.shape, align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def mix(images):
    """Cut each image (N, C, H, W) along a random line and put a random other one on the far side."""
    n, _, height, width = images.shape
    turn, offset = torch.rand(2, n, 1, 1, 1, device=images.device)
    angle = 2 * math.pi * turn
    y = torch.linspace(-1, 1, height, device=images.device)[:, None]
    x = torch.linspace(-1, 1, width, device=images.device)
    near = x * angle.cos() + y * angle.sin() > offset - 0.5
    return torch.where(near, images, images[torch.randperm(n, device=images.device)])


def restart(generator, optimizer):
    """Give a collapsed generator fresh weights, and its optimizer a fresh start."""
    for layer in generator.modules():
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    optimizer.state.clear()


# --- Algorithm 1 -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model, images, labels):
    """Accuracy in [0, 1] of a classifier on normalised images (N, C, 32, 32) with labels (N,)."""
    was_training = model.training
    model.eval()
    hits = sum((model(x)[0].argmax(1) == y).sum() for x, y in zip(images.split(1000), labels.split(1000)))
    model.train(was_training)
    return hits.item() / len(labels)


def make_optimizer(model, lr, args, steps, drops):
    """Optimizer of a classifier and schedule of its learning rate, at most `lr`.

    MNIST: Adam, constant. CIFAR: SGD, divided by ten after each of the fractions `drops` of the steps. With
    args.schedule == "linear" the rate rises over the first 3 % of the steps and then falls linearly to 0 instead.
    """
    if args.dataset == "mnist":
        optimizer, drops = torch.optim.Adam(model.parameters(), lr, fused=True), ()
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=5e-4)
    if args.schedule == "linear":
        return optimizer, LambdaLR(optimizer, lambda step: min((step + 1) / (0.03 * steps), 1 - step / steps))
    return optimizer, LambdaLR(optimizer, lambda step: 0.1 ** sum(step >= drop * steps for drop in drops))


def descend(optimizer, loss):
    """One step of the optimizer down the gradient of the loss."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def train_teacher(teacher, images, labels, args, saved=None):
    """Train the teacher, in place, on real images (N, C, 32, 32) with labels (N,), as Section 4 does.

    MNIST: Adam, batches of 256. CIFAR: SGD, batches of 128, cropped and mirrored. `saved` is a checkpoint to go on
    from. Raises UserError when the loss is no longer finite.
    """
    mnist = args.dataset == "mnist"
    lr, batch_size = (1e-3, 256) if mnist else (0.1, 128)
    steps = args.teacher_epochs * math.ceil(len(images) / batch_size)
    optimizer, schedule = make_optimizer(teacher, lr, args, steps, drops=(0.4, 0.6))
    progress = Progress("teacher", args, saved, teacher=teacher, optimizer=optimizer, schedule=schedule)
    teacher.train()
    for epoch in range(progress.step + 1, args.teacher_epochs + 1):
        for picked in torch.randperm(len(images), device=images.device).split(batch_size):
            batch = images[picked] if mnist else random_crop_and_flip(images[picked])
            loss = F.cross_entropy(teacher(batch)[0], labels[picked])
            descend(optimizer, loss)
            schedule.step()
        if not loss.isfinite():
            raise UserError(f"the teacher's loss is no longer finite in epoch {epoch}")
        print(f"  epoch {epoch}/{args.teacher_epochs}  loss {loss.item():.4f}  {progress.seconds():.0f} s", flush=True)
        progress.save(epoch)


def draw_images(n, generator, args, train_images=None):
    """Images (n, C, 32, 32) to distil on: generated or, as baselines of Table 1, normal noise or real images.

    With args.clamp no generated pixel is darker than black or brighter than white.
    """
    if args.images == "noise":
        return torch.randn(n, len(SOURCES[args.dataset].mean), 32, 32, device=args.device)
    if args.images == "real":
        return train_images[torch.randint(len(train_images), (n,), device=args.device)]
    images = generator(torch.randn(n, args.latent_dim, device=args.device))
    return images.clamp(*pixel_range(args)) if args.clamp else images


def distill(teacher, student, generator, test_set, args, saved=None, train_images=None):
    """Algorithm 1: train the generator against the fixed teacher and the student on its images, both in place.

    For the share args.warmup of the steps the generator trains alone, as its first images are noise. From then on the
    student learns from each new batch and, beyond the paper, args.replay times from mixtures of past ones.

    The test set (images, labels) only goes to evaluate; train_images are for args.images == "real". `saved` is a
    checkpoint to go on from. Writes log.csv. Raises UserError when a loss is no longer finite.
    """
    teacher.eval().requires_grad_(False)
    optimizer_g = torch.optim.Adam(generator.parameters(), args.lr_g, fused=True)
    warmup = int(args.warmup * args.steps)
    optimizer_s, schedule = make_optimizer(student, args.lr_s, args, args.steps - warmup, drops=(0.4, 0.8))
    memory = Memory(min(MEMORY_IMAGES, args.steps * args.batch_size) if args.replay else 0, test_set[0].shape[1:])
    progress = Progress(
        "student", args, saved, generator=generator, student=student, optimizer_g=optimizer_g, optimizer_s=optimizer_s,
        schedule=schedule, memory=memory.to(args.device),
    )  # fmt: skip
    for step in range(progress.step + 1, args.steps + 1):
        images = draw_images(args.batch_size, generator, args, train_images)
        logits, features = teacher(images)
        l_oh, l_a, l_ie = one_hot_loss(logits), activation_loss(features), information_entropy_loss(logits)
        if args.images == "generator":
            descend(optimizer_g, args.oh * l_oh + args.alpha * l_a + args.beta * l_ie)  # Eq. 6

        images, logits = images.detach(), logits.detach()
        l_kd = kd_loss(student(images)[0], logits, args.temperature)
        if step > warmup:
            descend(optimizer_s, l_kd)
            if args.replay:
                memory.add(images)
                past = mix(distort(memory.sample(args.replay * args.batch_size), args.affine))
                for x, y in zip(past.split(args.batch_size), teacher(past)[0].split(args.batch_size)):
                    descend(optimizer_s, kd_loss(student(x)[0], y, args.temperature))
            schedule.step()

        *losses, spread = torch.stack([l_oh, l_a, l_ie, l_kd, images.std(0).mean()]).tolist()
        if not all(map(math.isfinite, losses)):
            raise UserError(f"a loss is no longer finite at step {step}: try a lower --lr-g or --lr-s")
        if args.images == "generator" and spread < args.collapse:
            print(f"{step:8,}  all images alike: the generator starts afresh", flush=True)
            restart(generator, optimizer_g)
            progress.restarts += 1
        if step % progress.interval == 0 or step == args.steps:
            progress.report(step, losses, logits.argmax(1).unique().numel(), evaluate(student, *test_set))
        progress.save(step)


@torch.no_grad()
def save_pictures(teacher, generator, test_set, args, train_images=None):
    """Write samples.png, a column of images for each class as the teacher sees them, and class_means.png, Figure 2.

    Figure 2: the mean of the images that the teacher takes for each class (top), and of the real test images (bottom).
    """
    num_classes, per_class = SOURCES[args.dataset].num_classes, 8
    images = torch.cat([draw_images(500, generator, args, train_images) for _ in range(num_classes // 5)])
    seen_as = torch.cat([teacher(batch)[0].argmax(1) for batch in images.split(500)])
    samples = images.new_zeros(per_class, num_classes, *images.shape[1:])
    means = images.new_zeros(2, num_classes, *images.shape[1:])
    for k in range(num_classes):
        of_class = images[seen_as == k]
        samples[: len(of_class), k] = of_class[:per_class]
        means[0, k] = of_class.mean(0).nan_to_num()
        means[1, k] = test_set[0][test_set[1] == k].mean(0)
    for name, pictures in (("samples.png", samples), ("class_means.png", means)):
        grid = make_grid(pictures.flatten(0, 1), num_classes, normalize=True, scale_each=True, pad_value=0.5)
        write_file(args.out_dir / name, lambda path, grid=grid: save_image(grid, path, format="png"))


# --- Files: whole or not at all, tensors and plain values only -------------------------------------------------------


def write_file(path, write):
    """Let write(temporary path) make a file, then rename it to `path`. Raises UserError if that fails."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path} ({str(error).splitlines()[0]})") from error


def read_file(path):
    """The dictionary of tensors in `path`; code in it is not run. Raises UserError if it is anything else."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path}") from error
    except Exception as error:
        raise UserError(f"{path} is not a file of tensors, or not a whole one ({type(error).__name__})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a state dict")
    return content


def load_weights(model, path):
    """Load the state dict in `path` into the model. Raises UserError, naming the first difference, if it is no fit."""
    state, expected = read_file(path), model.state_dict()
    for name in [*expected, *state]:
        there, here = (list(getattr(weights.get(name), "shape", ["nothing"])) for weights in (state, expected))
        if there != here:
            raise UserError(f"{path} does not fit this {type(model).__name__}: {name} is {there} there, {here} here")
    if not all(tensor.isfinite().all() for tensor in state.values()):
        raise UserError(f"{path} has weights that are not finite")
    model.load_state_dict(state)


def settings(args):
    """The arguments that shape the result, as plain values."""
    elsewhere = ("device", "data_dir", "out_dir", "resume")
    return {name: str(value) for name, value in sorted(vars(args).items()) if name not in elsewhere}


def read_checkpoint(args):
    """The checkpoint to resume. Raises UserError if there is none, or one that was made with other settings."""
    path = args.out_dir / "checkpoint.pt"
    if not path.exists():
        raise UserError(f"nothing to resume: there is no {path}")
    saved = read_file(path)
    if not isinstance(saved.get("settings"), dict):
        raise UserError(f"{path} is not a checkpoint")
    for name, value in settings(args).items():
        if saved["settings"].get(name) != value:
            raise UserError(f"cannot resume: {path} was made with {name} {saved['settings'].get(name)}, not {value}")
    return saved


class Progress:
    """Where a training loop stands: its log, and in OUT/checkpoint.pt what a killed run needs to go on.

    That is the state of each of the `parts` (networks, optimizers, ...) and of the random numbers.
    """

    def __init__(self, stage, args, saved, **parts):
        self.stage, self.args, self.parts = stage, args, parts
        self.random = torch if args.device.type == "cpu" else torch.get_device_module(args.device)
        self.interval = max(1, min(200, args.steps // 20))
        self.step, self.restarts, self.rows, seconds = 0, 0, [], 0.0
        if saved and saved["stage"] == stage:
            for name, part in parts.items():
                part.load_state_dict(saved[name])
            self.random.set_rng_state(saved["random"])
            self.step, self.restarts, self.rows, seconds = (saved[k] for k in ("step", "restarts", "rows", "seconds"))
            print(f"going on after {'epoch' if stage == 'teacher' else 'step'} {self.step:,}")
        if stage == "student":
            print("\n    step     L_oh      L_a     L_ie     L_KD  classes  accuracy  images/s      left", flush=True)
        self.saved_at = time.monotonic()
        self.started_at = self.saved_at - seconds

    def seconds(self):
        """Training time so far, earlier sittings included."""
        return time.monotonic() - self.started_at

    def save(self, step):
        """Write the checkpoint if the last one is CHECKPOINT_SECONDS old and every weight is finite."""
        if time.monotonic() - self.saved_at < CHECKPOINT_SECONDS:
            return
        networks = [part for part in self.parts.values() if isinstance(part, nn.Module)]
        if not all(tensor.isfinite().all() for network in networks for tensor in network.state_dict().values()):
            return
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"stage": self.stage, "settings": settings(self.args), "random": self.random.get_rng_state()}
        state |= {"step": step, "restarts": self.restarts, "rows": self.rows, "seconds": self.seconds()}
        write_file(self.args.out_dir / "checkpoint.pt", lambda path: torch.save(state, path))
        self.saved_at = time.monotonic()

    def report(self, step, losses, classes, accuracy):
        """Print a line and write log.csv."""
        seconds = self.seconds()
        last_step, last_seconds = self.rows[-1][:2] if self.rows else (0, 0.0)
        pace = (seconds - last_seconds) / (step - last_step)
        losses = [round(loss, 5) for loss in losses]
        self.rows.append([step, round(seconds, 3), *losses, classes, self.restarts, accuracy])
        table = [["step", "seconds", "l_oh", "l_a", "l_ie", "l_kd", "classes", "restarts", "accuracy"], *self.rows]
        text = "".join(",".join(map(str, row)) + "\n" for row in table)
        write_file(self.args.out_dir / "log.csv", lambda path: path.write_text(text))
        minutes, rest = divmod(round(pace * (self.args.steps - step)), 60)
        columns = "".join(f"{loss:9.3f}" for loss in losses) + f"{classes:9}{accuracy:10.2%}"
        print(f"{step:8,}{columns}{self.args.batch_size / pace:10,.0f}{minutes:7}:{rest:02}", flush=True)


# --- Command line ----------------------------------------------------------------------------------------------------


def parse_args(argv=None):
    """The command line as a namespace: presets filled in, device and precision chosen. Exits with 2 on a mistake."""
    parser = argparse.ArgumentParser(
        "dafl.py", description="Data-Free Learning of Student Networks (ICCV 2019)",
        epilog="Beyond the paper, on mnist by default: --replay, --affine, --warmup, --temperature, --schedule linear, "
        "--clamp and --collapse. After 200 steps with seed 50 the student has 97.89 % by default, 52.50 with --replay "
        "0, 97.51 with --affine 0, 98.17 with --warmup 0, 97.73 with --schedule paper and 97.50 with --no-clamp; 0.2 "
        "either way is noise.",
    )
    parser.error = lambda message: parser.exit(2, f"dafl.py: error: {message}\n")
    add = parser.add_argument
    add("--dataset", choices=SOURCES, default="mnist", help="what the teacher knows (default: mnist)")
    add("--images", choices=("generator", "noise", "real"), default="generator",
        help="what the student is distilled on, the rows of Table 1 (default: generator)")
    for name, (kind, least, *values, meaning) in PRESETS.items():
        defaults = ", ".join(f"{dataset} {value}" for dataset, value in zip(SOURCES, values))
        metavar = "N" if kind is int else "X"
        add(f"--{name.replace('_', '-')}", type=kind, metavar=metavar, help=f"{meaning} (default: {defaults})")
    add("--clamp", action=argparse.BooleanOptionalAction,
        help="cut generated pixels to the range from black to white (default: mnist yes, cifar10 no, cifar100 no)")
    add("--schedule", choices=("linear", "paper"),
        help="learning rates of teacher and student: a short rise and a linear fall to 0, or as released, constant on "
        "mnist, falling in steps on cifar (default: mnist linear, cifar10 paper, cifar100 paper)")
    add("--teacher", type=Path, metavar="FILE", help="the teacher's state dict (default: OUT/teacher.pt, else trained)")
    add("--data-dir", type=Path, metavar="DIR", default=Path("data"), help="folder of the data sets (default: data)")
    add("--out-dir", type=Path, metavar="OUT", help="folder of the results (default: runs/DATASET)")
    add("--seed", type=int, metavar="N", default=0, help="seed of everything random (default: 0)")
    add("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto", help="(default: auto, the first there is)")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto",
        help="of generator and ResNets (default: auto, bf16 if the hardware has fast bf16, else fp32)")
    add("--resume", action="store_true", help="go on with a killed run of the same settings from OUT/checkpoint.pt, at "
        "most a minute old; on the CPU in fp32 it ends with the same weights (default: start afresh)")  # fmt: skip
    args = parser.parse_args(argv)
    column = list(SOURCES).index(args.dataset)
    for name, (kind, least, *values, _) in PRESETS.items():
        if getattr(args, name) is None:
            setattr(args, name, values[column])
        if not least <= getattr(args, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be a number of at least {least}, not {getattr(args, name)}")
    if args.warmup >= 1:
        parser.error(f"--warmup must be below 1, or the student never trains, not {args.warmup}")
    if not -(2**63) <= args.seed < 2**63:
        parser.error(f"--seed must fit into 64 bits, not {args.seed}")
    args.clamp = args.dataset == "mnist" if args.clamp is None else args.clamp
    args.schedule = args.schedule or ("linear" if args.dataset == "mnist" else "paper")
    args.out_dir = args.out_dir or Path("runs", args.dataset)

    choose_device(args, parser.error)
    return args


def choose_device(args, error):
    """Settle args.device and args.precision by what this machine has; error(message) is for what it has not."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if args.device == "auto":
        args.device = next(device for device in there if there[device])
    elif not there[args.device]:
        error(f"--device {args.device}: PyTorch finds no such device here")
    cpu = getattr(torch.cpu, "get_capabilities", dict)()
    fast_bf16 = {
        "cuda": there["cuda"] and torch.cuda.is_bf16_supported(including_emulation=False),
        "mps": False,
        "cpu": cpu.get("amx_bf16", False) or (cpu.get("avx512_bf16", False) and "AMD" in cpu.get("cpu_name", "")),
    }[args.device]
    if args.precision == "auto":
        args.precision = "bf16" if fast_bf16 else "fp32"
    elif args.precision == "bf16" and args.device == "cuda" and not fast_bf16:
        error("--precision bf16: this GPU has none")
    args.device = torch.device(args.device)


def place(model, args):
    """Put a network on the device, channels last; with bf16, run it under autocast unless it is a LeNet."""
    model.to(args.device, memory_format=torch.channels_last)
    if args.precision == "bf16" and not isinstance(model, LeNet5):
        model.forward = torch.autocast(args.device.type, torch.bfloat16)(model.forward)
    return model


def describe(role, model, remark=""):
    """Print a network's kind and size."""
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{role:10}{type(model).__name__:10}{size:12,} parameters{remark}", flush=True)


def run(args):
    """Check everything, train the teacher if there is none, distil the student, write OUT/. Gives both accuracies."""
    out, source, mnist = args.out_dir, SOURCES[args.dataset], args.dataset == "mnist"
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise UserError(f"cannot write to {out} ({error.strerror})") from error
    saved = read_checkpoint(args) if args.resume else None
    torch.manual_seed(args.seed)
    teacher = place(LeNet5() if mnist else resnet34(source.num_classes), args)
    teacher_file = args.teacher or out / "teacher.pt"
    untrained = not (args.teacher or teacher_file.exists() or (saved and saved["stage"] == "student"))
    if not untrained:
        load_weights(teacher, teacher_file)
    test_set = load_dataset(args.dataset, "test", args.data_dir, args.device)
    train_images = None
    if untrained or args.images == "real":
        train_images, train_labels = load_dataset(args.dataset, "train", args.data_dir, args.device)
    if not saved:
        (out / "checkpoint.pt").unlink(missing_ok=True)

    threads = f" ({torch.get_num_threads()} threads)" if args.device.type == "cpu" else ""
    images = {"generator": "generated images", "noise": "noise", "real": "real training images"}[args.images]
    print(f"DAFL on {args.dataset} with {images}: {args.device.type}{threads}, {args.precision}, seed {args.seed}")
    if untrained:
        print(f"training the teacher on {len(train_images):,} real images", flush=True)
        train_teacher(teacher, train_images, train_labels, args, saved)
        write_file(teacher_file, lambda path: torch.save(teacher.state_dict(), path))
    if args.images != "real":
        train_images = None
    teacher_accuracy = evaluate(teacher, *test_set)
    describe("teacher", teacher, f", {teacher_accuracy:.2%} ({teacher_file})")

    torch.manual_seed(args.seed)
    student = place(LeNet5(0.5) if mnist else resnet18(source.num_classes), args)
    generator = place(Generator(args.latent_dim, len(source.mean)), args)
    describe("student", student)
    describe("generator", generator)
    distill(teacher, student, generator, test_set, args, saved, train_images)
    student_accuracy = evaluate(student, *test_set)
    write_file(out / "student.pt", lambda path: torch.save(student.state_dict(), path))
    if args.images == "generator":
        write_file(out / "generator.pt", lambda path: torch.save(generator.state_dict(), path))
    save_pictures(teacher, generator, test_set, args, train_images)
    (out / "checkpoint.pt").unlink(missing_ok=True)
    print(f"\nteacher accuracy   {teacher_accuracy:.2%} on {len(test_set[0]):,} test images")
    print(f"student accuracy   {student_accuracy:.2%}, after its last step")
    print(f"real images seen   {0 if train_images is None else len(train_images):,} by the student")
    return {"teacher": teacher_accuracy, "student": student_accuracy}


def main(argv=None):
    """Run the command line. A mistake ends in one sentence on stderr and exit code 2, Ctrl-C in exit code 130."""
    args = parse_args(argv)
    try:
        return run(args)
    except UserError as error:
        print(f"dafl.py: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt as interrupt:
        there = (args.out_dir / "checkpoint.pt").exists()
        hint = "add --resume to go on from the last checkpoint" if there else "there is no checkpoint to resume yet"
        print(f"\ndafl.py: stopped; {hint}", file=sys.stderr)
        raise SystemExit(130) from interrupt


if __name__ == "__main__":
    main()
