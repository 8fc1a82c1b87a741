# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4.1", "torchvision>=0.19.1"]
# ///
"""Data-Free Learning of Student Networks (Chen et al., ICCV 2019, https://arxiv.org/abs/1904.01186) in one file.

You have a trained classifier, the teacher, but its training data are gone. A generator learns to generate images that
the teacher classifies with confidence, and a smaller student learns to match the teacher's outputs on these images.
The student is tested on real images, which it never sees in training.

In this file, "released" means the code that the authors published (https://github.com/huawei-noah/Efficient-Computing).
The recipe "released" is close to that code, and the recipe "fast", the default, is not. Section 3 has the details.

    python dafl.py                       # trains a teacher on MNIST, then a student without data, in minutes
    python dafl.py --recipe released     # does the same with the released loop and values, in hours
    python dafl.py --resume FOLDER       # continues a run that was stopped
    python dafl.py --help                # explains every flag
"""

import argparse
import json
import math
import random
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

# === 1. The method: Eq. 1, Eqs. 4 to 7 and one iteration of Algorithm 1 ==============================================


def kd_loss(student_logits, teacher_logits, temperature=1):
    """L_KD, Eq. 1: the student's softmax q should match the teacher's softmax p. Both inputs are logits (N, K).

    Eq. 1 is the cross-entropy of p and q. Like the released code, we use the KL divergence: it gives the student the
    same gradient and is 0 when q equals p. A temperature above 1 gives unlikely classes more weight, and
    temperature**2 keeps the gradients at the same scale (Hinton et al., 2015). Raises ValueError if the shapes differ.
    """
    if student_logits.shape != teacher_logits.shape:  # (N, 1) would silently broadcast to (N, K)
        raise ValueError(f"shapes differ: student {[*student_logits.shape]}, teacher {[*teacher_logits.shape]}")
    log_q = (student_logits / temperature).log_softmax(1)
    p = (teacher_logits / temperature).softmax(1)
    return temperature**2 * F.kl_div(log_q, p, reduction="batchmean")


def one_hot_loss(logits):
    """L_oh, Eq. 4: the teacher should be confident. This is the cross-entropy of its logits (N, K) and their argmax."""
    return F.cross_entropy(logits, logits.argmax(1))


def activation_loss(features):
    """L_a, Eq. 5: the teacher's features (N, D) should be large, as they are for real images.

    Like the released code, we take the mean over N and D, and alpha is chosen for that scale. Eq. 5 sums over D.
    """
    return -features.abs().mean()


def information_entropy_loss(logits):
    """L_ie, Eq. 6: the teacher's softmax, averaged over a batch of logits (N, K), should be uniform.

    The loss is 0 when all images surely belong to the same class, and -log10(K) when all classes are equally likely.
    Like the released code, we take log10 and leave out the factor 1/K of Eq. 6, and beta is chosen for that scale.
    """
    p = logits.softmax(1).mean(0)
    log_p = p.clamp_min(torch.finfo(p.dtype).tiny).log10()  # clamped, because 0 * log10(0) would be NaN
    return (p * log_p).sum()


def logits_and_features(network, images):
    """Run a network on images (N, C, H, W). If it returns logits only, the features are None."""
    output = network(images)
    return output if isinstance(output, tuple) else (output, None)


def distill_step(teacher, generator, student, optimizer_g, optimizer_s, z, *, oh=1, alpha=0.1, beta=5, temperature=1):
    """Run one iteration of Algorithm 1: update the generator, then the student.

    z: noise (N, latent_dim). generator: any module that maps z to images (N, C, H, W).
    teacher, student: modules that map images to logits (N, K), before any softmax, or to a tuple (logits, features).
    The features (N, D) are the input of the first linear layer. Only L_a needs them, and only from the teacher.
    oh, alpha, beta: the weights of L_oh, L_a and L_ie. Eq. 7 has oh=1; the released code lowers it on CIFAR.

    Returns two values, both detached: a dict of the losses, and the images. The teacher's parameters get
    requires_grad=False. Raises ValueError if the teacher returns no features and alpha is not 0.
    """
    teacher.eval()
    for parameter in teacher.parameters():
        parameter.requires_grad_(False)
    generator.train()
    student.train()

    # Module 1: update the generator.
    images = generator(z)
    teacher_logits, features = logits_and_features(teacher, images)
    if features is None and alpha != 0:
        raise ValueError("L_a needs features: return (logits, features) from the teacher, or set alpha to 0")
    l_oh = one_hot_loss(teacher_logits)
    l_a = torch.zeros_like(l_oh) if features is None else activation_loss(features)
    l_ie = information_entropy_loss(teacher_logits)
    l_total = oh * l_oh + alpha * l_a + beta * l_ie  # Eq. 7
    optimizer_g.zero_grad()
    l_total.backward()
    optimizer_g.step()

    # Module 2: update the student on the same images, like the released code. The paper generates new ones here.
    images = images.detach()
    student_logits, _ = logits_and_features(student, images)
    l_kd = kd_loss(student_logits, teacher_logits.detach(), temperature)
    optimizer_s.zero_grad()
    l_kd.backward()
    optimizer_s.step()
    return {"l_oh": l_oh.detach(), "l_a": l_a.detach(), "l_ie": l_ie.detach(), "l_kd": l_kd.detach()}, images


def kd_step(teacher, student, optimizer_s, images, temperature=1):
    """Run Module 2 alone: update the student once on given images (N, C, H, W). Returns a dict with l_kd, detached."""
    teacher.eval()
    student.train()
    with torch.no_grad():
        teacher_logits, _ = logits_and_features(teacher, images)
    student_logits, _ = logits_and_features(student, images)
    l_kd = kd_loss(student_logits, teacher_logits, temperature)
    optimizer_s.zero_grad()
    l_kd.backward()
    optimizer_s.step()
    return {"l_kd": l_kd.detach()}


def classifier_step(network, optimizer, images, labels):
    """Update a classifier once on images (N, C, H, W) with labels (N,). Returns a dict with the loss, detached."""
    network.train()
    logits, _ = logits_and_features(network, images)
    loss = F.cross_entropy(logits, labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return {"loss": loss.detach()}


# === 2. The networks =================================================================================================


class UpsampleConv2d(nn.Conv2d):
    """Computes nn.Upsample(scale_factor=2) and then a 3x3 convolution with padding 1, in 4/9 of the multiplications."""

    def forward(self, x):
        # Upsampling makes blocks of equal pixels, so weights that fall on equal pixels can be added. In one dimension,
        # the weights (a, b, c) become (a, b + c) for the left pixel of a block of two and (a + b, c) for the right one.
        # A transposed convolution by (c, b + c, a + b, a) does both.
        kernel = self.weight.flip(2, 3).transpose(0, 1)
        kernel = F.avg_pool2d(kernel, 2, stride=1, padding=1, divisor_override=1)  # adds neighbours in (0, c, b, a, 0)
        layout = torch.contiguous_format if x.is_mps else torch.channels_last  # contiguous on Apple GPUs: see main
        return F.conv_transpose2d(x, kernel.contiguous(memory_format=layout), self.bias, stride=2, padding=1)


class Generator(nn.Sequential):
    """The released generator. It maps noise z (N, latent_dim) to images (N, channels, image_size, image_size).

    image_size must be a multiple of 4. Keep the generator in training mode: its last BatchNorm then gives each channel
    mean 0 and variance 1 over the batch, like normalised real images. In eval mode it uses running statistics instead.
    """

    def __init__(self, latent_dim=100, channels=1, image_size=32):
        super().__init__(
            nn.Linear(latent_dim, 128 * (image_size // 4) ** 2),
            nn.Unflatten(1, (128, image_size // 4, image_size // 4)),  # (N, 128, 8, 8)
            nn.BatchNorm2d(128),
            UpsampleConv2d(128, 128, 3),  # (N, 128, 16, 16)
            nn.BatchNorm2d(128, eps=0.8),  # 0.8 is the released value
            nn.LeakyReLU(0.2, inplace=True),
            UpsampleConv2d(128, 64, 3),  # (N, 64, 32, 32)
            nn.BatchNorm2d(64, eps=0.8),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(64, channels, 3, padding=1),  # (N, channels, 32, 32)
            nn.Tanh(),
            nn.BatchNorm2d(channels, affine=False),
        )


class LeNet5(nn.Module):
    """LeNet-5 of Table 1. The teacher has width 1 (61,706 parameters) and the student width 0.5 (15,738).

    Maps images (N, 1, 32, 32) to logits (N, num_classes) and features (N, 120 * width).
    """

    def __init__(self, num_classes=10, width=1.0):
        super().__init__()
        c1, c2, c3, hidden = (round(width * channels) for channels in (6, 16, 120, 84))
        self.conv1 = nn.Conv2d(1, c1, 5)
        self.conv2 = nn.Conv2d(c1, c2, 5)
        self.conv3 = nn.Conv2d(c2, c3, 5)
        self.fc1 = nn.Linear(c3, hidden)
        self.fc2 = nn.Linear(hidden, num_classes)

    def forward(self, images):  # (N, 1, 32, 32); the shapes are for width 1
        x = F.max_pool2d(self.conv1(images), 2).relu()  # (N, 6, 14, 14); pooling before the ReLU is the same and faster
        x = F.max_pool2d(self.conv2(x), 2).relu()  # (N, 16, 5, 5)
        features = self.conv3(x).relu().flatten(1)  # (N, 120)
        return self.fc2(self.fc1(features).relu()), features


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al., CVPR 2016): (N, C, H, W) to (N, C', H / stride, W / stride)."""

    def __init__(self, in_channels, channels, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()  # an empty Sequential is the identity
        if stride != 1 or in_channels != channels:
            self.shortcut.extend([nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)])

    def forward(self, x):
        out = self.bn1(self.conv1(x)).relu()
        return (self.bn2(self.conv2(out)) + self.shortcut(x)).relu()


def basic_blocks(count, in_channels, channels, stride):
    """Chain `count` BasicBlocks, of which only the first one has this stride and this number of input channels."""
    first = BasicBlock(in_channels, channels, stride)
    return nn.Sequential(first, *(BasicBlock(channels, channels) for _ in range(count - 1)))


class ResNet(nn.Module):
    """The released ResNet for CIFAR. blocks is (3, 4, 6, 3) for ResNet-34 and (2, 2, 2, 2) for ResNet-18.

    Maps images (N, 3, 32, 32) to logits (N, num_classes) and features (N, 512 * width).
    """

    def __init__(self, blocks, num_classes=10, width=1.0):
        super().__init__()
        c1, c2, c3, c4 = (round(width * channels) for channels in (64, 128, 256, 512))
        self.conv1 = nn.Conv2d(3, c1, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c1)
        self.layer1 = basic_blocks(blocks[0], c1, c1, stride=1)
        self.layer2 = basic_blocks(blocks[1], c1, c2, stride=2)
        self.layer3 = basic_blocks(blocks[2], c2, c3, stride=2)
        self.layer4 = basic_blocks(blocks[3], c3, c4, stride=2)
        self.linear = nn.Linear(c4, num_classes)

    def forward(self, images):  # (N, 3, 32, 32); the shapes are for width 1
        x = self.bn1(self.conv1(images)).relu()  # (N, 64, 32, 32)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))  # (N, 512, 4, 4)
        features = x.mean((2, 3))  # (N, 512)
        return self.linear(features), features


# === 3. Beyond the paper =============================================================================================
# The fast recipe, which is the default, differs from the released one as follows:
# - It replays past images. Generating images is slow and learning from them is fast, so the student also learns from
#   past images, as in later work (Binici et al., WACV 2022, https://arxiv.org/abs/2108.05698). Two past images are cut
#   and joined into a new one, and the teacher labels that one. On CIFAR, past images are also shifted and mirrored.
# - On MNIST, a last layer clamps the generated pixels to the range from black to white.
# - The learning rates of the teacher and the student rise at first and then fall to 0.
# - Many values differ, such as the number of steps, the temperature and CIFAR's width. RECIPES in section 4 has all.
# Both recipes differ from the released code as follows:
# - Batches of real images are sampled with replacement.
# - Real images of CIFAR are shifted with a border of the mean colour instead of black.
# - CIFAR-100 is normalised with its own mean and deviation instead of those of CIFAR-10.
# - The student after the last step is the result, not the one with the best test accuracy.
# Section 1 says where the released code, and with it this file, differs from the paper.


def cut_and_join(images):
    """Cut each image (N, C, H, W) along a random line and replace one side with the same region of another image."""
    n, _, height, width = images.shape
    angle = 2 * math.pi * torch.rand(n, 1, 1, 1, device=images.device)
    distance = torch.rand(n, 1, 1, 1, device=images.device) - 0.5  # from the centre to the line
    y = torch.linspace(-1, 1, height, device=images.device)[:, None]
    x = torch.linspace(-1, 1, width, device=images.device)
    keep = x * angle.cos() + y * angle.sin() > distance  # (N, 1, H, W)
    return torch.where(keep, images, images[torch.randperm(n, device=images.device)])


def crop_and_flip(images):
    """Shift each image (N, C, H, W) by up to 4 pixels and mirror half of the images. Only CIFAR needs this."""
    n, _, height, width = images.shape
    crops = F.pad(images, (4, 4, 4, 4)).unfold(2, height, 1).unfold(3, width, 1)  # all shifts: (N, C, 9, 9, H, W)
    row, column = torch.randint(9, (2, n), device=images.device)
    images = crops[torch.arange(n, device=images.device), :, row, column]  # (N, C, H, W)
    return torch.where(torch.rand(n, 1, 1, 1, device=images.device) < 0.5, images.flip(3), images)


def replay_batches(past, count, augment):
    """Pick, augment, cut and join images of B past batches (B, N, C, H, W) into `count` new batches (N, C, H, W)."""
    n = past.shape[1]
    images = past.flatten(0, 1)
    picked = torch.randint(len(images), (count * n,), device=past.device)
    images = augment(images[picked].float())  # past is in half precision
    return cut_and_join(images).split(n)


# === 4. The paper's experiments: data sets and recipes ===============================================================

DATASETS = {  # the torchvision data set, the number of classes, and the mean and deviation of each colour channel
    "mnist": (datasets.MNIST, 10, (0.1307,), (0.3081,)),
    "cifar10": (datasets.CIFAR10, 10, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": (datasets.CIFAR100, 100, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
}
RECIPES = {
    # flag: (minimum, pair for MNIST, pair for CIFAR-10, pair for CIFAR-100, help). A pair is (fast, released).
    "steps": (1, (200, 24_000), (1_600, 240_000), (1_600, 240_000), "iterations of Algorithm 1"),
    "batch_size": (2, (128, 512), (128, 1_024), (128, 1_024), "batch size; L_ie needs more images than classes"),
    "latent_dim": (1, (100, 100), (256, 1_000), (256, 1_000), "length of the noise z"),
    "lr_g": (0.0, (0.01, 0.2), (0.001, 0.02), (0.001, 0.02), "learning rate of the generator"),
    "lr_s": (0.0, (0.01, 0.002), (0.1, 0.1), (0.1, 0.1), "learning rate of the student"),
    "oh": (0.0, (1.0, 1.0), (1.0, 0.05), (0.5, 0.5), "weight of L_oh, Eq. 4"),
    "alpha": (0.0, (0.1, 0.1), (0.01, 0.01), (0.1, 0.1), "weight of L_a, Eq. 5"),
    "beta": (0.0, (5.0, 5.0), (5.0, 5.0), (20.0, 20.0), "weight of L_ie, Eq. 6"),
    "temperature": (0.001, (4.0, 1.0), (4.0, 1.0), (4.0, 1.0), "temperature of L_KD"),
    "replay": (0, (24, 0), (4, 0), (4, 0), "updates of the student on past images in each iteration"),
    "width": (0.2, (1.0, 1.0), (0.25, 1.0), (0.25, 1.0), "width of both classifiers, halved for MNIST's student"),
    "teacher_epochs": (1, (5, 9), (10, 199), (10, 199), "epochs of the teacher"),
    "teacher_batch_size": (2, (256, 256), (128, 128), (128, 128), "batch size of the teacher"),
    "teacher_lr": (0.0, (0.003, 0.001), (0.1, 0.1), (0.1, 0.1), "learning rate of the teacher"),
}
PAST_BATCHES = 200  # how many of the latest generated batches are kept for replay
CHECKPOINT_SECONDS = 30  # how often a run saves its state


def load_dataset(name, split, device="cpu"):
    """Return normalised images (N, C, 32, 32) and labels (N,) of the "train" or "test" split, or raise OSError."""
    source, _, mean, std = DATASETS[name]
    folder = Path(__file__).parent / "data"
    try:
        dataset = source(folder, train=split == "train", download=True)
    except RuntimeError as error:
        raise OSError(f"cannot read or download {name} in {folder}: {error}") from error
    images = torch.as_tensor(dataset.data)  # uint8 (N, 28, 28) or (N, 32, 32, 3)
    images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
    images = TF.to_dtype(TF.resize(images, [32, 32]).to(device), torch.float32, scale=True)
    return TF.normalize(images, mean, std), torch.as_tensor(dataset.targets, device=device)


@torch.no_grad()
def evaluate(network, images, labels):
    """Return a classifier's accuracy in [0, 1] on images (N, C, H, W) with labels (N,) or (N, 1). Sets eval mode."""
    network.eval()
    predictions = torch.cat([logits_and_features(network, batch)[0].argmax(1) for batch in images.split(500)])
    return (predictions == labels.view_as(predictions)).sum().item() / len(labels)


def make_optimizer(network, lr, steps, recipe, milestones):
    """Return Adam for a LeNet-5 or SGD for any other network, and the schedule of its learning rate.

    milestones: fractions of the steps, such as 79 / 199, after which the released recipe divides SGD's rate by 10.
    """
    if isinstance(network, LeNet5):
        optimizer = torch.optim.Adam(network.parameters(), lr)
        milestones = ()  # the released recipe keeps Adam's rate constant
    else:
        optimizer = torch.optim.SGD(network.parameters(), lr, momentum=0.9, weight_decay=5e-4)
    if recipe == "released":
        return optimizer, MultiStepLR(optimizer, [round(fraction * steps) for fraction in milestones], gamma=0.1)
    # The rate rises linearly in the first sixth of the steps and then falls linearly to 0.
    return optimizer, LambdaLR(optimizer, lambda step: min((step + 1) / steps * 6, (1 - step / steps) * 6 / 5))


# === 5. Runs: each has a folder of its own ===========================================================================


def save(content, path):
    """Save with torch.save, but into a temporary file first, so that an interruption leaves no broken file."""
    temporary = path.with_suffix(".tmp")
    torch.save(content, temporary)
    temporary.replace(path)


def load_weights(network, path):
    """Load a state dict and drop the prefixes of DataParallel and torch.compile. Raises OSError on failure."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
        state = {name.replace("_orig_mod.", "").removeprefix("module."): tensor for name, tensor in state.items()}
        network.load_state_dict(state)
    except Exception as error:  # torch raises many types; their messages end with the cause
        raise OSError(f"cannot load {path} as a state dict of {type(network).__name__}: {str(error)[-300:]}") from error


def training_loop(stage, steps, seed, parts, folder):
    """Yield 1, 2, ... `steps`. If the folder holds a checkpoint of the stage, yield only the steps that are left.

    stage: "teacher" or "student". parts: a dict of everything that training changes: networks, optimizers, schedules
    and tensors. A checkpoint holds these and the stage's CSV file, which report() writes. Each step has a random seed
    of its own, so on the same device a resumed run draws the same numbers as an unbroken one.
    """
    checkpoint, log = folder / f"{stage}-checkpoint.pt", folder / f"{stage}.csv"
    done = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
        for name, part in parts.items():
            if isinstance(part, torch.Tensor):
                part.copy_(saved[name])
            else:
                part.load_state_dict(saved[name])
        done = saved["step"]
        log.write_text(saved["log"])  # this drops the rows of later steps, which will run again
    saved_at = time.monotonic()
    for step in range(done + 1, steps + 1):
        random.seed(f"{seed} {stage} {step}")
        torch.manual_seed(random.getrandbits(63))  # random.seed takes a text, torch's does not
        yield step  # the body of the caller's loop runs here
        if time.monotonic() - saved_at >= CHECKPOINT_SECONDS:
            states = {name: x if isinstance(x, torch.Tensor) else x.state_dict() for name, x in parts.items()}
            save(states | {"step": step, "log": log.read_text()}, checkpoint)
            saved_at = time.monotonic()


def report(stage, step, steps, losses, network, test_set, folder):
    """Print the losses and the test accuracy about ten times a stage, and append them to the stage's CSV file."""
    if step not in (1, steps) and step % math.ceil(steps / 10) != 0:
        return
    row = {"step": step} | {name: loss.item() for name, loss in losses.items()}
    if not all(map(math.isfinite, row.values())):
        raise FloatingPointError(f"a loss of the {stage} is not finite at step {step:,}: try lower learning rates")
    row["accuracy"] = evaluate(network, *test_set)
    values = "".join(f"  {name} {row[name]:6.3f}" for name in losses)
    print(f"{time.strftime('%H:%M:%S')} {stage} {step:6,}{values}  accuracy {row['accuracy']:6.2%}", flush=True)
    with (folder / f"{stage}.csv").open("w" if step == 1 else "a") as file:
        if step == 1:
            print(*row, sep=",", file=file)
        print(*row.values(), sep=",", file=file)


@torch.no_grad()
def save_picture(path, generator, teacher, noise, num_classes):
    """Save a column for each class, by the teacher's predictions: the mean image (Figure 2) and up to seven images."""
    images = torch.cat([generator(z) for z in noise.split(500)])  # in training mode, see Generator
    predictions = torch.cat([logits_and_features(teacher, batch)[0].argmax(1) for batch in images.split(500)])
    picture = images.new_zeros(8, num_classes, *images.shape[1:])  # missing images are black
    for k in range(num_classes):
        members = images[predictions == k]
        if len(members) > 0:
            column = torch.cat([members.mean(0, keepdim=True), members[:7]])
            picture[: len(column), k] = column
    save_image(picture.flatten(0, 1), path, nrow=num_classes, normalize=True, scale_each=True, pad_value=0.5)


def train_teacher(teacher, args, test_set, folder):
    """Train the teacher on real images. They are loaded here, so they are no longer in memory when this returns."""
    images, labels = load_dataset(args.dataset, "train", args.device)
    augment = nn.Identity() if args.dataset == "mnist" else crop_and_flip
    steps = args.teacher_epochs * math.ceil(len(images) / args.teacher_batch_size)
    optimizer, schedule = make_optimizer(teacher, args.teacher_lr, steps, args.recipe, (79 / 199, 119 / 199))
    parts = {"teacher": teacher, "optimizer": optimizer, "schedule": schedule}
    for step in training_loop("teacher", steps, args.seed, parts, folder):
        indices = torch.randint(len(images), (args.teacher_batch_size,), device=args.device)
        losses = classifier_step(teacher, optimizer, augment(images[indices]), labels[indices])
        schedule.step()
        report("teacher", step, steps, losses, teacher, test_set, folder)


def train_student(teacher, generator, student, args, test_set, folder):
    """Train the student by Algorithm 1 or, if args.images is not "generator", as a baseline of Table 1."""
    device, batch_size, image_shape = args.device, args.batch_size, test_set[0].shape[1:]
    augment = nn.Identity() if args.dataset == "mnist" else crop_and_flip
    # A baseline gets as many updates of the student as Algorithm 1 with replay.
    steps = args.steps if args.images == "generator" else args.steps * (1 + args.replay)
    optimizer_s, schedule = make_optimizer(student, args.lr_s, steps, args.recipe, (0.4, 0.8))
    parts = {"student": student, "optimizer_s": optimizer_s, "schedule": schedule}
    if args.images == "generator":
        optimizer_g = torch.optim.Adam(generator.parameters(), args.lr_g)  # its rate stays constant
        parts |= {"generator": generator, "optimizer_g": optimizer_g}
        if args.replay:  # past images are kept in half precision, to save memory
            past = torch.zeros(PAST_BATCHES, batch_size, *image_shape, device=device, dtype=torch.half)
            parts["past"] = past
    elif args.images in ("real", "labels"):
        real, labels = load_dataset(args.dataset, "train", device)
    options = {"oh": args.oh, "alpha": args.alpha, "beta": args.beta, "temperature": args.temperature}

    for step in training_loop("student", steps, args.seed, parts, folder):
        if args.images == "generator":  # Algorithm 1, then replay
            z = torch.randn(batch_size, args.latent_dim, device=device)
            losses, images = distill_step(teacher, generator, student, optimizer_g, optimizer_s, z, **options)
            if args.replay:
                past[(step - 1) % PAST_BATCHES] = images  # the newest batch takes the place of the oldest
                for batch in replay_batches(past[: min(step, PAST_BATCHES)], args.replay, augment):
                    kd_step(teacher, student, optimizer_s, batch, args.temperature)
        elif args.images == "noise":
            images = torch.randn(batch_size, *image_shape, device=device)
            losses = kd_step(teacher, student, optimizer_s, images, args.temperature)
        else:
            indices = torch.randint(len(real), (batch_size,), device=device)
            images = augment(real[indices])
            if args.images == "real":  # the teacher's outputs on real images, without their labels
                losses = kd_step(teacher, student, optimizer_s, images, args.temperature)
            else:  # the labels, without a teacher
                losses = classifier_step(student, optimizer_s, images, labels[indices])
        schedule.step()
        report("student", step, steps, losses, student, test_set, folder)


def parse_args(argv=None):
    """Parse the command line. Flags that are not given come from the recipe, or from the run to be resumed."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    devices = [device for device in available if available[device]]
    images = ("generator", "noise", "real", "labels")
    parser = argparse.ArgumentParser("dafl.py", usage="dafl.py [--flag value ...]", allow_abbrev=False)
    add = parser.add_argument
    add("--dataset", help="data set (default: mnist)", choices=DATASETS)
    add("--recipe", help="released is the authors' loop and values (default: fast)", choices=("fast", "released"))
    add("--images", help="generator (default), or a baseline: noise, real images, labels (no teacher)", choices=images)
    add("--teacher", help="state dict of a trained teacher; without it, one is trained", metavar="FILE")
    add("--seed", help="random seed (default: 0)", type=int, metavar="NUMBER")
    add("--device", help=f"device (default: {devices[0]}, or that of the run to be resumed)", choices=devices)
    add("--resume", help="resume the run in FOLDER; only --device may be given with it", metavar="FOLDER")
    for name, (minimum, mnist, cifar10, cifar100, text) in RECIPES.items():
        help_text = f"{text}. (fast, released): MNIST {mnist}, CIFAR-10 {cifar10}, CIFAR-100 {cifar100}"
        add("--" + name.replace("_", "-"), help=help_text, type=type(minimum), metavar="NUMBER")  # int or float
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}

    if "resume" in given:
        folder = Path(given["resume"])
        if set(given) - {"resume", "device"}:
            parser.error("argument --resume: only --device may be given with it")
        if (folder / "student.pt").exists() and not (folder / "student-checkpoint.pt").exists():  # main deletes it last
            parser.error(f"argument --resume: the run in {folder} is finished")
        stored = json.loads((folder / "args.json").read_text())
        if stored["device"] not in devices:
            stored["device"] = devices[0]
        return argparse.Namespace(**(stored | given))

    defaults = {"dataset": "mnist", "recipe": "fast", "images": "generator", "teacher": None, "seed": 0}
    values = defaults | {"device": devices[0], "resume": None} | given
    for name, (minimum, mnist, cifar10, cifar100, _) in RECIPES.items():
        fast, released = {"mnist": mnist, "cifar10": cifar10, "cifar100": cifar100}[values["dataset"]]
        values.setdefault(name, fast if values["recipe"] == "fast" else released)
        if not minimum <= values[name] < math.inf:
            parser.error(f"argument --{name.replace('_', '-')}: must be finite and at least {minimum}")
    return argparse.Namespace(**values)


def main(argv=None):
    """Train a teacher, if one is needed and none is given, and then a student. Returns a dict of their accuracies."""
    args = parse_args(argv)
    start = time.monotonic()

    # 1. The networks. The seed is set once, not for each network, so that all initial weights differ.
    mnist = args.dataset == "mnist"
    _, num_classes, mean, std = DATASETS[args.dataset]
    torch.manual_seed(args.seed)
    teacher = LeNet5(num_classes, args.width) if mnist else ResNet((3, 4, 6, 3), num_classes, args.width)
    student = LeNet5(num_classes, args.width / 2) if mnist else ResNet((2, 2, 2, 2), num_classes, args.width)
    generator = Generator(args.latent_dim, len(mean))
    if mnist and args.recipe == "fast":  # clamp to [black, white]; generator.pt is without this layer
        generator.append(nn.Hardtanh((0 - mean[0]) / std[0], (1 - mean[0]) / std[0]))
    if args.resume and Path(args.resume, "teacher.pt").exists():  # the teacher is finished
        args.teacher = Path(args.resume, "teacher.pt")
    if args.teacher:
        load_weights(teacher, args.teacher)
    # channels_last is faster, but with it BatchNorm's gradient is wrong on Apple GPUs (PyTorch issue 175189).
    layout = torch.contiguous_format if args.device == "mps" else torch.channels_last
    for network in (teacher, student, generator):
        network.to(args.device, memory_format=layout)
    test_set = load_dataset(args.dataset, "test", args.device)

    # 2. The run's folder. Its name ends with the first number that is free.
    name = f"runs/{args.dataset}-{args.recipe}-{args.images}-{args.seed}"
    number = 1
    while Path(f"{name}-{number}").exists():
        number += 1
    folder = Path(args.resume or f"{name}-{number}")
    if not args.resume:
        folder.mkdir(parents=True)
        (folder / "args.json").write_text(json.dumps(vars(args), indent=2) + "\n")
    print(f"DAFL on {args.dataset} with the {args.recipe} recipe, seed {args.seed}, on {args.device}.")
    print(f"If the run is stopped, this continues it: python dafl.py --resume {folder}")

    # 3. The teacher, unless the student learns from labels
    accuracies = {}
    if args.images != "labels":
        if not args.teacher:
            train_teacher(teacher, args, test_set, folder)
        save(teacher.state_dict(), folder / "teacher.pt")
        (folder / "teacher-checkpoint.pt").unlink(missing_ok=True)
        accuracies["teacher"] = evaluate(teacher, *test_set)

    # 4. The student and the results
    train_student(teacher, generator, student, args, test_set, folder)
    if args.images == "generator":
        save(generator.state_dict(), folder / "generator.pt")
        torch.manual_seed(args.seed)
        noise = torch.randn(100 * num_classes, args.latent_dim, device=args.device)
        save_picture(folder / "generated.png", generator, teacher, noise, num_classes)
    save(student.state_dict(), folder / "student.pt")
    accuracies["student"] = evaluate(student, *test_set)
    (folder / "student-checkpoint.pt").unlink(missing_ok=True)
    summary = ", ".join(f"{name} {accuracy:.2%}" for name, accuracy in accuracies.items())
    print(f"Test accuracy: {summary}, after {(time.monotonic() - start) / 60:.1f} minutes. The files are in {folder}.")
    return accuracies


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\ndafl.py: stopped")
    except (OSError, FloatingPointError) as error:
        print("dafl.py: error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
