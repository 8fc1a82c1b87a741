# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4.1", "torchvision>=0.19.1"]
# ///
"""Data-Free Learning of Student Networks (Chen et al., ICCV 2019, https://arxiv.org/abs/1904.01186) in one file.

A trained classifier, the teacher, is all that is left; its training data are gone. A generator learns to draw images
that the fixed teacher takes for its own data, and a smaller student learns to give the teacher's outputs on them. Then
the student is tested on real images, none of which it has seen. Beyond the paper, the default replays mixed past images
to the student, at a higher temperature: minutes instead of hours.

    python dafl.py                       # MNIST: trains a teacher, then a student without data
    python dafl.py --recipe released     # the same with the authors' loop and values
    python dafl.py --help                # every flag with its defaults
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, MultiStepLR
from torchvision import datasets
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import save_image

# === 1. The method: Eqs. 1 to 7 and Algorithm 1 ======================================================================


def kd_loss(student_logits, teacher_logits, temperature=1):
    """L_KD, Eq. 1: the student's softmax q should be the teacher's, p. Logits (N, K); ValueError if shapes differ.

    Eq. 1 is their cross-entropy; the KL divergence has the same gradient and is 0 when they agree. A temperature T
    lets unlikely classes count for more, and T^2 keeps the gradients' size (Hinton et al., 2015).
    """
    if student_logits.shape != teacher_logits.shape:  # (N, 1) would broadcast in silence
        raise ValueError(f"shapes differ: student {[*student_logits.shape]}, teacher {[*teacher_logits.shape]}")
    log_q, p = (student_logits / temperature).log_softmax(1), (teacher_logits / temperature).softmax(1)
    return temperature**2 * F.kl_div(log_q, p, reduction="batchmean")


def one_hot_loss(logits):
    """L_oh, Eq. 4: the teacher should be sure of each image. Cross-entropy of its logits (N, K) and their argmax."""
    return F.cross_entropy(logits, logits.argmax(1))


def activation_loss(features):
    """L_a, Eq. 5: the teacher's features (N, D) should be strong, as real images make them.

    The mean is over N and D, as released, and alpha is set for that; Eq. 5 sums over D.
    """
    return -features.abs().mean()


def information_entropy_loss(logits):
    """L_ie, Eq. 6: a batch of the teacher's logits (N, K) should show all classes equally often.

    From 0 for one class alone to -log10 K at best, as released, and beta is set for that; Eq. 6 has a factor 1/K.
    """
    p = logits.softmax(1).mean(0)
    return (p * p.clamp_min(torch.finfo(p.dtype).tiny).log10()).sum()  # 0 log 0 is 0


def classify(network, images):
    """Logits (N, K) and features (N, D) of images (N, C, H, W); features are None if the network gives logits alone."""
    out = network(images)
    return out if isinstance(out, tuple) else (out, None)


def distill_step(teacher, student, generator, optimizer_g, optimizer_s, z, *, oh=1, alpha=0.1, beta=5, temperature=1):
    """One iteration of Algorithm 1 on noise z (N, latent_dim): an update of the generator, then one of the student.

    teacher, student: modules from images (N, C, H, W) to logits (N, K), before any softmax, or to (logits, features);
    only L_a needs features (N, D), the teacher's: the input of its last layers. generator: any module from z to images.
    oh, alpha, beta: the weights in Eq. 7, where oh is 1.

    Freezes the teacher. Returns the losses by name and the images, all detached. ValueError if L_a lacks features.
    """
    teacher.eval().requires_grad_(False)
    student.train()
    generator.train()

    # Module 1: the generator
    images = generator(z)
    logits, features = classify(teacher, images)
    if features is None and alpha:
        raise ValueError("L_a needs features: return (logits, features) from the teacher, or set alpha to 0")
    l_oh = one_hot_loss(logits)
    l_a = torch.zeros_like(l_oh) if features is None else activation_loss(features)
    l_ie = information_entropy_loss(logits)
    l_total = oh * l_oh + alpha * l_a + beta * l_ie  # Eq. 7
    optimizer_g.zero_grad()
    l_total.backward()
    optimizer_g.step()

    # Module 2: the student, on the same images, as released; the paper's Algorithm 1 draws new ones
    images = images.detach()
    l_kd = kd_loss(classify(student, images)[0], logits.detach(), temperature)
    optimizer_s.zero_grad()
    l_kd.backward()
    optimizer_s.step()
    return {"l_oh": l_oh.detach(), "l_a": l_a.detach(), "l_ie": l_ie.detach(), "l_kd": l_kd.detach()}, images


def kd_step(teacher, student, optimizer_s, images, temperature=1):
    """Module 2 alone: one update of the student on any images (N, C, H, W). Returns the loss by name, detached."""
    teacher.eval()
    student.train()
    with torch.no_grad():
        teacher_logits, _ = classify(teacher, images)
    l_kd = kd_loss(classify(student, images)[0], teacher_logits, temperature)
    optimizer_s.zero_grad()
    l_kd.backward()
    optimizer_s.step()
    return {"l_kd": l_kd.detach()}


def classifier_step(network, optimizer, images, labels):
    """One update on images (N, C, H, W) with labels (N,), as the teacher was trained. Returns the loss by name."""
    network.train()
    loss = F.cross_entropy(classify(network, images)[0], labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return {"loss": loss.detach()}


# === 2. The networks =================================================================================================


class UpsampleConv2d(nn.Conv2d):
    """nn.Upsample(scale_factor=2) and a 3x3 nn.Conv2d of padding 1 as one layer, with 2.25 times fewer products."""

    def forward(self, x):
        # Each pixel becomes 2x2 equal ones, and each of these adds the mirrored kernel one place on: together 4x4.
        kernel = self.weight.flip(2, 3).transpose(0, 1)
        kernel = sum(F.pad(kernel, (right, 1 - right, down, 1 - down)) for down in (1, 0) for right in (1, 0))
        layout = torch.contiguous_format if x.is_mps else torch.channels_last  # as in main
        return F.conv_transpose2d(x, kernel.contiguous(memory_format=layout), self.bias, stride=2, padding=1)


class Generator(nn.Module):
    """G, as released: noise z (N, latent_dim) to images (N, channels, image_size, image_size); 4 divides that size.

    The last BatchNorm gives each channel mean 0 and variance 1 over a batch, as normalised data have. Beyond the paper,
    pixels can then be clamped to a range: without it some seeds draw black digits on white, which the losses permit.
    """

    def __init__(self, latent_dim=100, channels=1, image_size=32, pixel_range=(-math.inf, math.inf)):
        super().__init__()
        self.pixel_range = pixel_range
        self.layers = nn.Sequential(
            nn.Linear(latent_dim, 128 * (image_size // 4) ** 2),
            nn.Unflatten(1, (128, image_size // 4, image_size // 4)),  # (N, 128, 8, 8)
            nn.BatchNorm2d(128),
            UpsampleConv2d(128, 128, 3),  # (N, 128, 16, 16)
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
        return self.layers(z).clamp(*self.pixel_range)


class LeNet5(nn.Module):
    """LeNet-5 of Table 1: the teacher at width 1 (61,706 parameters), the student at width 0.5 (15,738).

    Images (N, 1, 32, 32) to logits (N, num_classes) and features (N, 120 * width), the input of the last two layers.
    """

    def __init__(self, num_classes=10, width=1.0):
        super().__init__()
        c1, c2, c3, hidden = (round(width * channels) for channels in (6, 16, 120, 84))
        self.conv1 = nn.Conv2d(1, c1, 5)
        self.conv2 = nn.Conv2d(c1, c2, 5)
        self.conv3 = nn.Conv2d(c2, c3, 5)
        self.fc1 = nn.Linear(c3, hidden)
        self.fc2 = nn.Linear(hidden, num_classes)

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
    """ResNet in its CIFAR form, as released: blocks (3, 4, 6, 3) for ResNet-34, (2, 2, 2, 2) for ResNet-18.

    Images (N, 3, 32, 32) to logits (N, num_classes) and features (N, 512 * width), the input of the last layer.
    """

    def __init__(self, blocks, num_classes=10, width=1.0):
        super().__init__()
        channels = [round(width * c) for c in (64, 64, 128, 256, 512)]
        self.conv1 = nn.Conv2d(3, channels[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels[0])
        for i, stride in enumerate((1, 2, 2, 2)):
            first = BasicBlock(channels[i], channels[i + 1], stride)
            others = (BasicBlock(channels[i + 1], channels[i + 1], 1) for _ in range(blocks[i] - 1))
            self.add_module(f"layer{i + 1}", nn.Sequential(first, *others))
        self.linear = nn.Linear(channels[-1], num_classes)

    def forward(self, images):  # (N, 3, 32, 32)
        x = self.bn1(self.conv1(images)).relu()  # (N, 64, 32, 32)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))  # (N, 512, 4, 4)
        features = x.mean((2, 3))  # (N, 512)
        return self.linear(features), features


# === 3. Beyond the paper =============================================================================================
# Images are slow to generate and quick to learn from. So the student learns again from past ones, as in later work on
# data-free distillation (Binici et al., WACV 2022, https://arxiv.org/abs/2108.05698), each time mixed in another way;
# the teacher labels the mixture.


def cutmix(images):
    """Cut each image (N, C, H, W) along a random line; one side shows another. CutMix pastes rectangles (Yun, 2019)."""
    n, _, height, width = images.shape
    turns, offset = torch.rand(2, n, 1, 1, 1, device=images.device)
    angle = 2 * math.pi * turns
    y = torch.linspace(-1, 1, height, device=images.device)[:, None]
    x = torch.linspace(-1, 1, width, device=images.device)
    own = x * angle.cos() + y * angle.sin() > offset - 0.5  # a line less than 0.5 from the centre (0, 0)
    return torch.where(own, images, images[torch.randperm(n, device=images.device)])


def crop_and_flip(images):
    """Shift each image (N, C, 32, 32) by up to 4 pixels, mirror half of them. The margin is grey (released: black)."""
    n = len(images)
    shifted = F.pad(images, (4, 4, 4, 4)).unfold(2, 32, 1).unfold(3, 32, 1)  # (N, C, 9, 9, 32, 32)
    row, column = torch.randint(9, (2, n), device=images.device)
    images = shifted[torch.arange(n, device=images.device), :, row, column]
    return torch.where(torch.rand(n, 1, 1, 1, device=images.device) < 0.5, images, images.flip(3))


# === 4. The experiments of Section 4: data sets and recipes ==========================================================

DATASETS = {  # torchvision's class, number of classes, mean and std of each channel for pixels from 0 to 1
    "mnist": (datasets.MNIST, 10, (0.1307,), (0.3081,)),
    "cifar10": (datasets.CIFAR10, 10, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": (datasets.CIFAR100, 100, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),  # released: CIFAR-10's
}
RECIPE_NAMES = ("fast", "released")  # released: the authors' values and loop; their epoch is 120 steps
RECIPES = {  # by hyperparameter: least value, (fast, released) for mnist, for cifar10, for cifar100, help
    "steps": (1, (200, 24_000), (1_600, 240_000), (1_600, 240_000), "steps; each updates the student 1 + replay times"),
    "batch_size": (2, (128, 512), (128, 1_024), (128, 1_024), "images in a batch; more than there are classes"),
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
CHECKPOINT_SECONDS = 30


def load_dataset(name, split, device="cpu"):
    """The "train" or "test" split: normalised images (N, C, 32, 32) and labels (N,). OSError if it cannot be had."""
    (source, _, mean, std), folder = DATASETS[name], Path(__file__).parent / "data"
    try:
        dataset = source(folder, train={"train": True, "test": False}[split], download=True)
    except RuntimeError as error:  # torchvision's
        raise OSError(f"cannot read or download {name} in {folder}: {error}") from error
    images = torch.as_tensor(dataset.data)  # uint8 (N, 28, 28) or (N, 32, 32, 3)
    images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
    images = TF.to_dtype(TF.resize(images, [32, 32]).to(device), torch.float32, scale=True)
    return TF.normalize(images, mean, std), torch.as_tensor(dataset.targets, device=device)


def random_batch(images, labels, n):
    """n of the images and labels, drawn with replacement."""
    picked = torch.randint(len(images), (n,), device=images.device)
    return images[picked], labels[picked]


@torch.no_grad()
def evaluate(network, images, labels):
    """Accuracy in [0, 1] of a classifier on normalised images (N, C, H, W) with labels (N,)."""
    network.eval()
    answers = torch.cat([classify(network, batch)[0].argmax(1) for batch in images.split(500)])
    return (answers == labels).float().mean().item()


def make_optimizer(network, lr, steps, recipe, milestones):
    """Adam for a LeNet5, SGD for a ResNet, and the schedule of its rate. Milestones: shares of the steps, for SGD."""
    if isinstance(network, LeNet5):
        optimizer, milestones = torch.optim.Adam(network.parameters(), lr), ()
    else:
        optimizer = torch.optim.SGD(network.parameters(), lr, momentum=0.9, weight_decay=5e-4)
    if recipe == "released":  # down to a tenth at each milestone
        return optimizer, MultiStepLR(optimizer, [round(share * steps) for share in milestones])
    # The lower of two lines: up to the full rate in a sixth of the steps, and from there down to 0 at their end.
    return optimizer, LambdaLR(optimizer, lambda step: min(6 * (step + 1) / steps, 1.2 * (1 - step / steps)))


# === 5. Runs: a folder each, with the networks, a CSV file for each stage, a picture, and checkpoints =================


def save(content, path):
    """torch.save, whole or not at all."""
    torch.save(content, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def load_weights(network, path):
    """Read a network's state dict from a file, in place. Raises OSError if the file holds anything else."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
        nn.modules.utils.consume_prefix_in_state_dict_if_present(state, "module.")
        network.load_state_dict(state)
    except Exception as error:  # torch raises many kinds
        raise OSError(f"{path} is no state dict of this {type(network).__name__}: {str(error)[:200]}") from error


def training_loop(stage, steps, parts, folder):
    """Yield 1 to `steps`, but go on after the folder's checkpoint of this stage, if any; write one now and then.

    parts: all that training changes, by name: networks, optimizers, schedules, tensors.
    """
    checkpoint, log, done = folder / f"{stage}-checkpoint.pt", folder / f"{stage}.csv", 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
        for name, part in parts.items():
            part.copy_(saved[name]) if isinstance(part, torch.Tensor) else part.load_state_dict(saved[name])
        done = saved["step"]
        log.write_text(saved["log"])  # without rows of later steps, which come again
        torch.set_rng_state(saved["rng"])  # a CPU goes on with the very same random numbers
    started_at = saved_at = time.monotonic()
    for step in range(done + 1, steps + 1):
        yield step
        now = time.monotonic()
        if now - saved_at >= CHECKPOINT_SECONDS:
            states = {name: x if isinstance(x, torch.Tensor) else x.state_dict() for name, x in parts.items()}
            save(states | {"step": step, "log": log.read_text(), "rng": torch.get_rng_state()}, checkpoint)
            saved_at = now
        if sys.stdout.isatty() and step < steps:
            minutes, seconds = divmod(round((now - started_at) / (step - done) * (steps - step)), 60)
            print(f"{stage} {step:6,} of {steps:,}  {minutes}:{seconds:02} left", end="   \r", flush=True)


def report(stage, step, steps, losses, network, test_set, folder):
    """Losses and test accuracy, after step 1 and each 10% of the steps, on the screen and in the stage's CSV file."""
    if step > 1 and 10 * step % steps >= 10:
        return
    row = {"step": step} | {name: loss.item() for name, loss in losses.items()}
    if not all(map(math.isfinite, row.values())):
        raise FloatingPointError(f"step {step:,} of the {stage} is not finite: too high a rate, or a bad teacher")
    row["accuracy"] = evaluate(network, *test_set)
    shown = "".join(f"  {name} {row[name]:6.3f}" for name in losses)
    print(f"{stage} {step:6,}{shown}  accuracy {row['accuracy']:6.2%}", flush=True)
    with (folder / f"{stage}.csv").open("w" if step == 1 else "a") as file:
        if step == 1:
            print(*row, sep=",", file=file)
        print(*row.values(), sep=",", file=file)


@torch.no_grad()
def save_picture(path, generator, teacher, noise, num_classes):
    """A column for each class, as the teacher sees it: the mean generated image (Figure 2), then seven of them."""
    images = torch.cat([generator(z) for z in noise.split(500)])
    classes = torch.cat([classify(teacher, batch)[0].argmax(1) for batch in images.split(500)])
    columns, black = [], torch.zeros_like(images[:7])  # where a class has too few
    for k in range(num_classes):
        drawn = images[classes == k]
        columns.append(torch.cat([drawn.mean(0, True).nan_to_num(), drawn, black])[:8])
    rows = torch.stack(columns, 1).flatten(0, 1)
    save_image(rows, path, nrow=num_classes, normalize=True, scale_each=True, pad_value=0.5)


def parse_args(argv=None):
    """The command line as a namespace."""
    devices = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    images = ("generator", "noise", "real", "labels")
    parser = argparse.ArgumentParser("dafl.py", usage="dafl.py [--flag value ...]", allow_abbrev=False)
    add = parser.add_argument
    add("--dataset", help="what the teacher knows", choices=DATASETS, default="mnist")
    add("--recipe", help="sets the values below and the schedules", choices=RECIPE_NAMES, default="fast")
    add("--images", help="what the student learns from, see Table 1", choices=images, default="generator")
    add("--teacher", help="state dict of a teacher, so that none is trained", metavar="FILE")
    add("--seed", help="seed of everything random", type=int, default=0, metavar="int")
    add("--device", help="where to compute", choices=devices, default=devices[0])
    add("--resume", help="go on with the stopped run in FOLDER, with its flags", metavar="FOLDER")
    for name, (least, *pairs, text) in RECIPES.items():
        values = ", ".join(f"{dataset} {fast:g} / {released:g}" for dataset, (fast, released) in zip(DATASETS, pairs))
        add("--" + name.replace("_", "-"), help=f"{text} ({values})", type=type(least), metavar=type(least).__name__)
    args = parser.parse_args(argv)
    if args.resume:
        if Path(args.resume, "student.pt").exists():
            parser.error(f"argument --resume: the run in {args.resume} is finished")
        stopped = json.loads(Path(args.resume, "args.json").read_text())
        args = parser.parse_args(argv, argparse.Namespace(**stopped))  # what is typed now wins
    for name, (least, *pairs, _) in RECIPES.items():
        if getattr(args, name) is None:
            setattr(args, name, dict(zip(DATASETS, pairs))[args.dataset][RECIPE_NAMES.index(args.recipe)])
        if not least <= getattr(args, name) < math.inf:
            parser.error(f"argument --{name.replace('_', '-')}: must be at least {least}, not {getattr(args, name)}")
    return args


def main(argv=None):
    """Run a command line: train a teacher, unless one is given, and a student. Returns the accuracy of both by name."""
    args = parse_args(argv)
    mnist, fast, device = args.dataset == "mnist", args.recipe == "fast", args.device
    _, num_classes, mean, std = DATASETS[args.dataset]
    augment = nn.Identity() if mnist else crop_and_flip
    # On Apple GPUs BatchNorm's gradient is wrong in channels_last (github.com/pytorch/pytorch/issues/175189).
    layout = torch.preserve_format if device == "mps" else torch.channels_last

    torch.manual_seed(args.seed)
    teacher = LeNet5(num_classes, args.width) if mnist else ResNet((3, 4, 6, 3), num_classes, args.width)
    teacher.to(device, memory_format=layout)
    test_set = load_dataset(args.dataset, "test", device)
    name, number = f"runs/{args.dataset}-{args.recipe}-{args.images}-{args.seed}", 1
    while Path(f"{name}-{number}").exists():
        number += 1
    folder = Path(args.resume or f"{name}-{number}")
    teacher_file = folder / "teacher.pt" if (folder / "teacher.pt").exists() else args.teacher
    if teacher_file:
        load_weights(teacher, teacher_file)
    if not teacher_file or args.images in ("real", "labels"):
        train_set = load_dataset(args.dataset, "train", device)
    if not args.resume:
        folder.mkdir(parents=True)
        (folder / "args.json").write_text(json.dumps(vars(args), indent=2) + "\n")
    print(f"DAFL on {args.dataset}: {args.recipe} recipe, seed {args.seed}, {device}. If stopped: --resume {folder}")

    # 1. The teacher
    if not teacher_file:
        steps = args.teacher_epochs * math.ceil(len(train_set[0]) / args.teacher_batch_size)
        optimizer, schedule = make_optimizer(teacher, args.teacher_lr, steps, args.recipe, (79 / 199, 119 / 199))
        parts = {"teacher": teacher, "optimizer": optimizer, "schedule": schedule}
        for step in training_loop("teacher", steps, parts, folder):
            images, labels = random_batch(*train_set, args.teacher_batch_size)
            losses = classifier_step(teacher, optimizer, augment(images), labels)
            schedule.step()
            report("teacher", step, steps, losses, teacher, test_set, folder)
    save(teacher.state_dict(), folder / "teacher.pt")
    (folder / "teacher-checkpoint.pt").unlink(missing_ok=True)
    accuracies = {"teacher": evaluate(teacher, *test_set)}
    print(f"teacher accuracy {accuracies['teacher']:.2%}")
    if args.images in ("generator", "noise"):
        train_set = None  # gone

    # 2. The student
    torch.manual_seed(args.seed)  # again: the same student whether its teacher was trained or read
    student = LeNet5(num_classes, args.width / 2) if mnist else ResNet((2, 2, 2, 2), num_classes, args.width)
    student.to(device, memory_format=layout)
    steps = args.steps if args.images == "generator" else args.steps * (1 + args.replay)  # as many updates
    optimizer_s, schedule = make_optimizer(student, args.lr_s, steps, args.recipe, (800 / 2000, 1600 / 2000))
    parts = {"student": student, "optimizer_s": optimizer_s, "schedule": schedule}
    n, image_shape = args.batch_size, test_set[0].shape[1:]
    if args.images == "generator":
        black_to_white = [(pixel - mean[0]) / std[0] for pixel in (0, 1)]
        pixel_range = black_to_white if mnist and fast else (-math.inf, math.inf)
        generator = Generator(args.latent_dim, len(mean), 32, pixel_range).to(device, memory_format=layout)
        optimizer_g = torch.optim.Adam(generator.parameters(), args.lr_g)  # at a constant rate
        slots = max(1, 25_600 // n) if args.replay else 0  # for the latest 25,600 images, whole batches of them
        past = torch.zeros(slots, n, *image_shape, device=device, dtype=torch.half)
        parts |= {"generator": generator, "optimizer_g": optimizer_g, "past": past}
    options = {"oh": args.oh, "alpha": args.alpha, "beta": args.beta, "temperature": args.temperature}
    for step in training_loop("student", steps, parts, folder):
        if args.images == "generator":  # Algorithm 1, then replay of past images
            z = torch.randn(n, args.latent_dim, device=device)
            losses, images = distill_step(teacher, student, generator, optimizer_g, optimizer_s, z, **options)
            if args.replay:
                past[(step - 1) % len(past)] = images
                kept = past[:step].flatten(0, 1)
                picked = torch.randint(len(kept), (args.replay * n,), device=device)
                for batch in cutmix(augment(kept[picked].float())).split(n):
                    kd_step(teacher, student, optimizer_s, batch, args.temperature)
        elif args.images == "noise":
            images = torch.randn(n, *image_shape, device=device)
            losses = kd_step(teacher, student, optimizer_s, images, args.temperature)
        elif args.images == "real":  # the teacher, no labels
            images, _ = random_batch(*train_set, n)
            losses = kd_step(teacher, student, optimizer_s, augment(images), args.temperature)
        else:  # the labels, no teacher
            images, labels = random_batch(*train_set, n)
            losses = classifier_step(student, optimizer_s, augment(images), labels)
        schedule.step()
        report("student", step, steps, losses, student, test_set, folder)

    # 3. The results
    if args.images == "generator":
        save(generator.state_dict(), folder / "generator.pt")
        noise = torch.randn(100 * num_classes, args.latent_dim, device=device)
        save_picture(folder / "generated.png", generator, teacher, noise, num_classes)
    save(student.state_dict(), folder / "student.pt")
    (folder / "student-checkpoint.pt").unlink(missing_ok=True)
    accuracies["student"] = evaluate(student, *test_set)
    print(f"student accuracy {accuracies['student']:.2%}")
    return accuracies


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\ndafl.py: stopped")
    except (OSError, FloatingPointError) as error:
        print("dafl.py: error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
