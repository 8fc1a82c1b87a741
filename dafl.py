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
from torchvision import datasets
from torchvision.transforms.v2 import functional as transforms
from torchvision.utils import make_grid, save_image

CHECKPOINT_SECONDS = 60
MEMORY_IMAGES = 100_000

# ---------------------------------------------------------------------------------------------------------------------
# Section 3.1: teacher and student networks. Each gives (logits, features): L_a looks at the features.
# ---------------------------------------------------------------------------------------------------------------------


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


# ---------------------------------------------------------------------------------------------------------------------
# Section 3.2: the generator and its three losses
# ---------------------------------------------------------------------------------------------------------------------


class UpsampledConv2d(nn.Conv2d):
    """Nearest-neighbour upsampling by 2, then a 3x3 convolution: (N, C, H, W) to (N, C', 2H, 2W).

    Both at once: a pixel repeated over 2x2 and then weighted by a 3x3 kernel is a pixel weighted by the 4x4 kernel that
    is the sum of the four shifted ones. The same numbers for 2.25 times fewer multiplications.
    """

    def forward(self, x):
        kernel = 4 * F.avg_pool2d(F.pad(self.weight.flip(2, 3), (1, 1, 1, 1)), 2, stride=1)
        return F.conv_transpose2d(x, kernel.transpose(0, 1), self.bias, stride=2, padding=1)


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
        return self.layers(x).float()


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


def kd_loss(student_logits, teacher_logits):
    """L_KD, Eq. 1: Kullback-Leibler divergence of the student's softmax from the teacher's, in nats, batch mean.

    Both logits (N, K). Eq. 1's cross-entropy less the teacher's entropy: the same gradient, and 0 when both agree.
    """
    return F.kl_div(student_logits.log_softmax(1), teacher_logits.softmax(1), reduction="batchmean")


# ---------------------------------------------------------------------------------------------------------------------
# Section 4: the experiments
# ---------------------------------------------------------------------------------------------------------------------


DATASETS = ("mnist", "cifar10", "cifar100")
PRESETS = {
    # flag: (type, least, mnist, cifar10, cifar100, meaning)
    "steps": (int, 1, 2_000, 240_000, 240_000, "steps of generator and student"),
    "batch_size": (int, 2, 64, 1024, 1024, "images in a batch"),
    "latent_dim": (int, 1, 100, 1000, 1000, "length of the noise z"),
    "lr_g": (float, 0, 0.2, 0.02, 0.02, "learning rate of the generator (Adam)"),
    "lr_s": (float, 0, 2e-3, 0.1, 0.1, "learning rate of the student (Adam for MNIST, SGD for CIFAR)"),
    "oh": (float, 0, 1.0, 0.05, 0.5, "weight of the one-hot loss, Eq. 3"),
    "alpha": (float, 0, 0.1, 0.01, 0.1, "weight of the activation loss, Eq. 4"),
    "beta": (float, 0, 5.0, 5.0, 20.0, "weight of the information entropy loss, Eq. 5"),
    "replay": (int, 0, 8, 0, 0, "more student updates a step, on remembered images; 0 is the paper's loop"),
    "teacher_epochs": (int, 1, 9, 199, 199, "epochs of the teacher, if it is not there yet"),
}


class Source(NamedTuple):
    """Where a data set comes from, and the mean and standard deviation of its pixels on a scale of 0 to 1."""

    load: type
    num_classes: int
    mean: tuple
    std: tuple
    archives: tuple


SOURCES = {
    "mnist": Source(datasets.MNIST, 10, (0.1307,), (0.3081,), tuple(name for name, _ in datasets.MNIST.resources)),
    "cifar10": Source(
        datasets.CIFAR10, 10, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), (datasets.CIFAR10.filename,)
    ),
    "cifar100": Source(
        datasets.CIFAR100, 100, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761), (datasets.CIFAR100.filename,)
    ),
}


class UserError(Exception):
    """Something that only the user can mend, told in one sentence."""


def load_dataset(name, split, data_dir, device="cpu"):
    """The whole "train" or "test" split on the device: images float (N, C, 32, 32), normalised, and labels (N,).

    Downloaded to data_dir if it is not there. Raises UserError, naming the missing files, where that fails.
    """
    source = SOURCES[name]
    try:
        dataset = source.load(data_dir, train=split == "train", download=True)
    except Exception as error:
        folder = Path(data_dir, "MNIST", "raw") if name == "mnist" else Path(data_dir)
        raise UserError(
            f"cannot read or download {name}: put {', '.join(source.archives)} in {folder} and delete what was unpacked"
            f" there ({type(error).__name__})"
        ) from error
    images = torch.as_tensor(dataset.data)
    images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2)  # uint8 (N, C, H, W)
    images = transforms.to_dtype(transforms.resize(images, [32, 32]).to(device), torch.float32, scale=True)
    return transforms.normalize(images, source.mean, source.std, inplace=True), torch.as_tensor(dataset.targets).to(device)


def random_crop_and_flip(images):
    """Shift each image (N, C, H, W) by up to 4 pixels over black, mirror every second one: CIFAR's augmentation."""
    n, _, h, w = images.shape
    rows, columns = (torch.randint(9, (n, 1), device=images.device) + torch.arange(s, device=images.device) for s in (h, w))
    mirrored = torch.rand(n, 1, device=images.device) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    batch = torch.arange(n, device=images.device)[:, None, None]
    return F.pad(images, (4, 4, 4, 4)).permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


class Memory(nn.Module):
    """The latest `capacity` images the student saw, with the teacher's logits for them. Not in the paper."""

    def __init__(self, capacity, image_shape, num_classes):
        super().__init__()
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("images", torch.zeros(capacity, *image_shape, dtype=torch.float16))
        self.register_buffer("logits", torch.zeros(capacity, num_classes))

    def add(self, images, logits):
        slots = (self.count + torch.arange(len(images), device=images.device)) % len(self.images)
        self.images[slots], self.logits[slots] = images.half(), logits
        self.count += len(images)

    def sample(self, n):
        picked = torch.randint(min(int(self.count), len(self.images)), (n,), device=self.images.device)
        return self.images[picked].float(), self.logits[picked]


# ---------------------------------------------------------------------------------------------------------------------
# Algorithm 1 and what it needs around it
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model, images, labels):
    """Accuracy in [0, 1] of a classifier on normalised images (N, C, 32, 32) with labels (N,)."""
    was_training = model.training
    model.eval()
    hits = sum((model(x)[0].argmax(1) == y).sum() for x, y in zip(images.split(1000), labels.split(1000)))
    model.train(was_training)
    return hits.item() / len(labels)


def make_optimizer(model, lr, dataset, steps, drops):
    """Optimizer and learning-rate schedule of a classifier.

    MNIST: Adam, falling linearly to 0. CIFAR: SGD, divided by ten after each fraction of the steps in `drops`.
    """
    if dataset == "mnist":
        optimizer = torch.optim.Adam(model.parameters(), lr, fused=True)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=5e-4)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.1 ** sum(step >= drop * steps for drop in drops)
    )


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
    batch_size = 256 if mnist else 128
    steps = args.teacher_epochs * math.ceil(len(images) / batch_size)
    optimizer, schedule = make_optimizer(teacher, 1e-3 if mnist else 0.1, args.dataset, steps, drops=(0.4, 0.6))
    checkpoint = Checkpoint("teacher", args, saved, teacher=teacher, optimizer=optimizer, schedule=schedule)
    teacher.train()
    for epoch in range(checkpoint.step + 1, args.teacher_epochs + 1):
        for picked in torch.randperm(len(images), device=images.device).split(batch_size):
            batch = images[picked] if mnist else random_crop_and_flip(images[picked])
            loss = F.cross_entropy(teacher(batch)[0], labels[picked])
            descend(optimizer, loss)
            schedule.step()
        if not loss.isfinite():
            raise UserError(f"the teacher's loss is {loss.item()} in epoch {epoch}: its training diverged")
        print(f"  epoch {epoch}/{args.teacher_epochs}  loss {loss.item():.4f}  {checkpoint.seconds():.0f} s", flush=True)
        checkpoint.save(epoch)


def draw_images(args, generator, train_images):
    """A batch (N, C, 32, 32) to distil on: generated, or as a baseline normal noise or real images (Table 1)."""
    n, device = args.batch_size, args.device
    if args.images == "generator":
        return generator(torch.randn(n, args.latent_dim, device=device))
    if args.images == "noise":
        return torch.randn(n, len(SOURCES[args.dataset].mean), 32, 32, device=device)
    return train_images[torch.randint(len(train_images), (n,), device=device)]


def distill(teacher, student, generator, test_set, args, saved=None, train_images=None):
    """Algorithm 1: train the generator against the fixed teacher and the student on its images, both in place.

    test_set is (images, labels), for evaluate alone; train_images only for args.images == "real". `saved` is a
    checkpoint to go on from. Writes log.csv. Raises UserError when a loss is no longer finite.
    """
    teacher.eval().requires_grad_(False)
    optimizer_g = torch.optim.Adam(generator.parameters(), args.lr_g, fused=True)
    optimizer_s, schedule = make_optimizer(student, args.lr_s, args.dataset, args.steps, drops=(0.4, 0.8))
    capacity = min(MEMORY_IMAGES, args.steps * args.batch_size) if args.replay else 0
    memory = Memory(capacity, test_set[0].shape[1:], SOURCES[args.dataset].num_classes).to(args.device)
    checkpoint = Checkpoint(
        "student", args, saved, generator=generator, student=student, optimizer_g=optimizer_g, optimizer_s=optimizer_s,
        schedule=schedule, memory=memory,
    )  # fmt: skip
    report_every = max(1, min(200, args.steps // 20))
    print("\n    step     L_oh      L_a     L_ie     L_KD  classes  accuracy  images/s      left")
    for step in range(checkpoint.step + 1, args.steps + 1):
        images = draw_images(args, generator, train_images)
        logits, features = teacher(images)
        l_oh, l_a, l_ie = one_hot_loss(logits), activation_loss(features), information_entropy_loss(logits)
        if args.images == "generator":
            descend(optimizer_g, args.oh * l_oh + args.alpha * l_a + args.beta * l_ie)  # Eq. 6

        images, logits = images.detach(), logits.detach()
        l_kd = kd_loss(student(images)[0], logits)
        descend(optimizer_s, l_kd)
        if args.replay:
            memory.add(images, logits)
            for _ in range(args.replay):
                past_images, past_logits = memory.sample(args.batch_size)
                descend(optimizer_s, kd_loss(student(past_images)[0], past_logits))
        schedule.step()

        losses = torch.stack([l_oh, l_a, l_ie, l_kd]).tolist()
        if not all(map(math.isfinite, losses)):
            raise UserError(f"a loss is no longer finite at step {step}: lower --lr-g or --lr-s")
        if step % report_every == 0 or step == args.steps:
            checkpoint.report(step, losses, logits.argmax(1).unique().numel(), evaluate(student, *test_set))
        checkpoint.save(step)


@torch.no_grad()
def save_pictures(teacher, generator, test_set, args, train_images=None):
    """Write samples.png (a column of images per class, as the teacher sees them) and class_means.png (Figure 2).

    Figure 2 compares, class by class, the mean generated image (top) with the mean real test image (bottom).
    """
    source, per_class = SOURCES[args.dataset], 8
    batches = math.ceil(200 * source.num_classes / args.batch_size)
    images = torch.cat([draw_images(args, generator, train_images) for _ in range(batches)])
    seen_as = torch.cat([teacher(batch)[0].argmax(1) for batch in images.split(1000)])
    columns = images.new_zeros(source.num_classes, per_class, *images.shape[1:])
    means = images.new_zeros(2, source.num_classes, *images.shape[1:])
    for k in range(source.num_classes):
        of_class = images[seen_as == k][:per_class]
        columns[k, : len(of_class)] = of_class
        for row, (x, y) in enumerate([(images, seen_as), test_set]):
            if (y == k).any():
                means[row, k] = x[y == k].mean(0)
    for name, grid in (("samples.png", columns.transpose(0, 1)), ("class_means.png", means)):
        grid = make_grid(grid.flatten(0, 1), nrow=source.num_classes, normalize=True, scale_each=True, pad_value=0.5)
        write(args.out_dir / name, lambda path: save_image(grid, path, format="png"))


# ---------------------------------------------------------------------------------------------------------------------
# Files: whole or not at all, tensors and plain numbers only
# ---------------------------------------------------------------------------------------------------------------------


def write(path, save):
    """Let save(temporary path) make a file, then rename it to `path`. Raises UserError when that fails."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        save(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path} ({error})") from error


def read(path):
    """The tensors in `path`; no code in it is run. Raises UserError for anything else than a saved dictionary."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path}") from error
    except Exception as error:
        raise UserError(f"{path} is no file of tensors, or not a whole one ({type(error).__name__})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a state dict")
    return content


def load_weights(model, path):
    """Load a state dict from `path` into the model. Raises UserError, naming the first difference, if it differs."""
    state = read(path)
    found, wanted = (
        {name: tuple(t.shape) if torch.is_tensor(t) else type(t).__name__ for name, t in weights.items()}
        for weights in (state, model.state_dict())
    )
    for name in [*wanted, *found]:
        if found.get(name) != wanted.get(name):
            raise UserError(
                f"{path} is not of the expected {type(model).__name__}: {name} is {found.get(name, 'missing')} there, "
                f"and should be {wanted.get(name, 'missing')}"
            )
    model.load_state_dict(state)


class Checkpoint:
    """Progress of one training loop, and what a killed run needs to go on with it: the parts' states and the random state.

    Kept in OUT/checkpoint.pt, at most once every CHECKPOINT_SECONDS.
    """

    def __init__(self, stage, args, saved, **parts):
        self.stage, self.args, self.parts = stage, args, parts
        self.path = args.out_dir / "checkpoint.pt"
        self.random = torch if args.device.type == "cpu" else torch.get_device_module(args.device)
        self.step, self.rows, seconds = 0, [], 0.0
        if saved and saved["stage"] == stage:
            for name, part in parts.items():
                part.load_state_dict(saved[name])
            self.random.set_rng_state(saved["random"])
            self.step, self.rows, seconds = saved["step"], saved["rows"], saved["seconds"]
        self.saved_at = time.monotonic()
        self.started_at = self.saved_at - seconds

    def seconds(self):
        return time.monotonic() - self.started_at

    def save(self, step):
        if time.monotonic() - self.saved_at < CHECKPOINT_SECONDS:
            return
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"stage": self.stage, "settings": settings(self.args), "random": self.random.get_rng_state()}
        state |= {"step": step, "rows": self.rows, "seconds": self.seconds()}
        write(self.path, lambda path: torch.save(state, path))
        self.saved_at = time.monotonic()

    def report(self, step, losses, classes, accuracy):
        """Print a progress line and rewrite log.csv."""
        seconds = self.seconds()
        self.rows.append([step, round(seconds, 1), *(round(loss, 5) for loss in losses), classes, accuracy])
        lines = ["step,seconds,l_oh,l_a,l_ie,l_kd,classes,accuracy"] + [",".join(map(str, row)) for row in self.rows]
        write(self.args.out_dir / "log.csv", lambda path: path.write_text("\n".join(lines) + "\n"))
        speed, left = step * self.args.batch_size / seconds, seconds / step * (self.args.steps - step)
        print(
            f"{step:8,}" + "".join(f"{loss:9.3f}" for loss in losses)
            + f"{classes:9}{accuracy:10.2%}{speed:10,.0f}{left // 60:7.0f}:{left % 60:02.0f}", flush=True,
        )  # fmt: skip


def read_checkpoint(args):
    """The checkpoint to resume. Raises UserError if there is none, or one that was made with other settings."""
    path = args.out_dir / "checkpoint.pt"
    if not path.exists():
        raise UserError(f"nothing to resume: there is no {path}; leave --resume out to start afresh")
    saved, wanted = read(path), settings(args)
    made_with = saved.get("settings")
    if not isinstance(made_with, dict):
        raise UserError(f"{path} is no checkpoint of this program")
    for name in sorted(wanted):
        if made_with.get(name) != wanted[name]:
            raise UserError(
                f"{path} was made with {name} {made_with.get(name)}, not {wanted[name]}: "
                "resume with the same settings, or leave --resume out"
            )
    return saved


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def settings(args):
    """The arguments that shape the result, as plain values: a run resumes only under the same ones."""
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    return {name: plain[name] for name in plain.keys() - {"device", "data_dir", "out_dir", "resume"}}


def number(kind, least):
    """A converter for argparse: text to a finite number of this kind, at least `least`."""

    def convert(text):
        value = kind(text)
        if not least <= value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not a finite number of at least {least}")
        return value

    convert.__name__ = kind.__name__
    return convert


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that answers a mistake in one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse_args(argv=None):
    """The command line as a namespace: presets filled in, device and precision chosen. Exits with 2 on a mistake."""
    parser = Parser("dafl.py", description="Data-Free Learning of Student Networks (Chen et al., ICCV 2019).")
    add = parser.add_argument
    add("--dataset", choices=DATASETS, default="mnist", help="what the teacher was trained on (default: mnist)")
    add("--images", choices=("generator", "noise", "real"), default="generator",
        help="what the student is distilled on, the rows of Table 1 (default: generator)")  # fmt: skip
    for name, (kind, least, *values, meaning) in PRESETS.items():
        defaults = ", ".join(f"{dataset} {value}" for dataset, value in zip(DATASETS, values))
        add("--" + name.replace("_", "-"), type=number(kind, least), metavar=kind.__name__.upper(),
            default=argparse.SUPPRESS, help=f"{meaning} (default: {defaults})")  # fmt: skip
    add("--teacher", type=Path, metavar="FILE", help="the teacher's state dict (default: OUT/teacher.pt, else trained)")
    add("--data-dir", type=Path, metavar="DIR", default=Path("data"), help="where the data sets lie (default: data)")
    add("--out-dir", type=Path, metavar="OUT", help="where results go (default: runs/DATASET)")
    add("--seed", type=int, default=0, help="seed of all randomness (default: 0)")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="(default: auto, cuda or mps if there)")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto",
        help="of generator and ResNets; LeNets and losses are fp32 (default: auto, bf16 where the hardware has it)")  # fmt: skip
    add("--resume", action="store_true",
        help="go on with a killed run from OUT/checkpoint.pt, under the same settings; on the CPU in fp32 the result is "
        "the same as without the interruption")  # fmt: skip
    args = parser.parse_args(argv)
    column = DATASETS.index(args.dataset)
    args = argparse.Namespace(**{name: row[2 + column] for name, row in PRESETS.items()} | vars(args))
    args.out_dir = args.out_dir or Path("runs", args.dataset)
    if not -(2**63) <= args.seed < 2**64:
        parser.error(f"argument --seed: {args.seed} does not fit into 64 bits")

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if args.device == "auto":
        args.device = next(name for name in there if there[name])
    if not there[args.device]:
        parser.error(f"argument --device: this machine, or this build of PyTorch, has no {args.device}")
    has_bf16 = {
        "cuda": lambda: torch.cuda.is_bf16_supported(including_emulation=False),
        "cpu": lambda: getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16", False),
        "mps": lambda: False,
    }[args.device]()
    if args.precision == "auto":
        args.precision = "bf16" if has_bf16 else "fp32"
    if args.device == "cuda" and args.precision == "bf16" and not has_bf16:
        parser.error("argument --precision: this GPU has no bf16")
    args.device = torch.device(args.device)
    return args


def place(model, args):
    """Put a network on the device, channels last; a generator or ResNet under bf16 autocast if that is the precision."""
    model.to(args.device, memory_format=torch.channels_last)
    if args.precision == "bf16" and not isinstance(model, LeNet5):
        model.forward = torch.autocast(args.device.type, torch.bfloat16)(model.forward)
    return model


def prepare_output(args):
    """Make the output folder and see that it can be written. Raises UserError."""
    try:
        args.out_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out_dir).close()
    except OSError as error:
        raise UserError(f"cannot write to the folder {args.out_dir} ({error.strerror})") from error


def run(args):
    """Check everything, train the teacher if there is none, distil the student, write OUT/; gives both accuracies."""
    mnist, source = args.dataset == "mnist", SOURCES[args.dataset]
    prepare_output(args)
    saved = read_checkpoint(args) if args.resume else None
    torch.manual_seed(args.seed)
    teacher = place(LeNet5() if mnist else resnet34(source.num_classes), args)
    teacher_file = args.teacher or args.out_dir / "teacher.pt"
    train_first = not (args.teacher or teacher_file.exists() or saved and saved["stage"] == "student")
    if not train_first:
        load_weights(teacher, teacher_file)
    test_set = load_dataset(args.dataset, "test", args.data_dir, args.device)
    train_images = None
    if train_first or args.images == "real":
        train_images, train_labels = load_dataset(args.dataset, "train", args.data_dir, args.device)
    if not args.resume:
        (args.out_dir / "checkpoint.pt").unlink(missing_ok=True)

    threads = f" ({torch.get_num_threads()} threads)" if args.device.type == "cpu" else ""
    print(f"DAFL on {args.dataset}, {args.device.type}{threads}, {args.precision}, seed {args.seed}")
    if train_first:
        print(f"training the teacher on {len(train_images):,} real images", flush=True)
        train_teacher(teacher, train_images, train_labels, args, saved)
        write(teacher_file, lambda path: torch.save(teacher.state_dict(), path))
    teacher_accuracy = evaluate(teacher, *test_set)
    torch.manual_seed(args.seed)
    student = place(LeNet5(0.5) if mnist else resnet18(source.num_classes), args)
    generator = place(Generator(args.latent_dim, len(source.mean)), args)
    for role, model in (("teacher", teacher), ("student", student), ("generator", generator)):
        print(f"{role:10}{type(model).__name__:10}{sum(p.numel() for p in model.parameters()):11,} parameters", end="")
        print(f"  {teacher_accuracy:.2%} ({teacher_file})" if model is teacher else "")

    train_images = train_images if args.images == "real" else None
    distill(teacher, student, generator, test_set, args, saved, train_images)
    student_accuracy = evaluate(student, *test_set)
    write(args.out_dir / "student.pt", lambda path: torch.save(student.state_dict(), path))
    if args.images == "generator":
        write(args.out_dir / "generator.pt", lambda path: torch.save(generator.state_dict(), path))
    save_pictures(teacher, generator, test_set, args, train_images)
    (args.out_dir / "checkpoint.pt").unlink(missing_ok=True)
    print(f"\nteacher  {teacher_accuracy:.2%} of the {len(test_set[0]):,} test images")
    print(f"student  {student_accuracy:.2%} of the same, after its last step")
    print(f"real images the student learnt from: {0 if train_images is None else len(train_images):,}")
    return {"teacher": teacher_accuracy, "student": student_accuracy}


def main(argv=None):
    """Run the command line; a mistake ends with one sentence on stderr and exit code 2, Ctrl-C with 130."""
    args = parse_args(argv)
    try:
        return run(args)
    except UserError as error:
        print(f"dafl.py: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt as interrupt:
        print("\ndafl.py: stopped; the same command with --resume goes on from the last checkpoint", file=sys.stderr)
        raise SystemExit(130) from interrupt


if __name__ == "__main__":
    main()
