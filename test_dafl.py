"""Tests of dafl.py on the CPU: every equation by hand, every network, short runs on real MNIST, every mistake."""

import csv
import math
import os
import pickle
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import datasets

import dafl

HERE = Path(__file__).parent
QUICK = ["--device", "cpu", "--precision", "fp32", "--data-dir", str(HERE / "data")]
STEPS = ["--steps", "3", "--batch-size", "8", "--replay", "2"]


@pytest.fixture(scope="session")
def teacher_file(tmp_path_factory):
    """A teacher trained on real MNIST for one epoch, by the command line."""
    out = tmp_path_factory.mktemp("teacher")
    summary = dafl.main([*QUICK, *STEPS, "--teacher-epochs", "1", "--out-dir", str(out)])
    assert summary["teacher"] > 0.93
    return out / "teacher.pt"


@pytest.fixture
def command(teacher_file, tmp_path):
    """The arguments of a run of a few seconds into tmp_path/out."""
    return [*QUICK, *STEPS, "--teacher", str(teacher_file), "--out-dir", str(tmp_path / "out")]


def read_log(out):
    """The rows of log.csv as dictionaries, without the seconds, which no seed repeats."""
    with open(Path(out) / "log.csv") as file:
        rows = list(csv.DictReader(file))
    assert all(float(row.pop("seconds")) > 0 for row in rows)
    return rows


def child(code, *arguments):
    """Start Python in a process of its own that runs `code`, with dafl imported and `arguments` in sys.argv[1:]."""
    command = [sys.executable, "-c", f"import sys, dafl\n{code}", *arguments]
    return subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


# Losses


def test_one_hot_loss_is_the_cross_entropy_of_the_argmax():
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    by_hand = (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(-1))) / 2
    assert dafl.one_hot_loss(logits).item() == pytest.approx(by_hand, rel=1e-5)


def test_activation_loss_is_minus_the_mean_absolute_feature():
    assert dafl.activation_loss(torch.tensor([[1.0, -3.0], [0.0, 2.0]])).item() == -1.5


def test_information_entropy_loss_is_minus_the_entropy_of_the_mean_prediction():
    logits = torch.tensor([[0.9, 0.1], [0.5, 0.5]]).log()
    by_hand = 0.7 * math.log10(0.7) + 0.3 * math.log10(0.3)
    assert dafl.information_entropy_loss(logits).item() == pytest.approx(by_hand, rel=1e-5)


def test_kd_loss_is_the_divergence_from_the_teacher():
    teacher, student = torch.tensor([[0.75, 0.25], [0.5, 0.5]]).log(), torch.zeros(2, 2)
    by_hand = (0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)) / 2
    assert dafl.kd_loss(student, teacher).item() == pytest.approx(by_hand, rel=1e-5)
    assert dafl.kd_loss(2 * student, 2 * teacher, temperature=2).item() == pytest.approx(4 * by_hand, rel=1e-5)
    assert dafl.kd_loss(teacher + 3, teacher).item() == pytest.approx(0, abs=1e-6)


def test_kd_loss_has_the_gradient_of_the_cross_entropy_in_eq_1():
    torch.manual_seed(0)
    teacher, student = torch.randn(5, 10), torch.randn(5, 10, requires_grad=True)
    (by_kd,) = torch.autograd.grad(dafl.kd_loss(student, teacher), student)
    (by_eq_1,) = torch.autograd.grad(F.cross_entropy(student, teacher.softmax(1)), student)
    torch.testing.assert_close(by_kd, by_eq_1)


def step_down(loss, x, lr):
    """x after one step of gradient descent on loss(x)."""
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(x), x)
    return (x - lr * gradient).detach()


def test_a_step_down_each_loss_does_what_the_paper_says():
    torch.manual_seed(0)
    x = torch.randn(16, 10)
    surer = step_down(dafl.one_hot_loss, x, lr=1.0)
    assert (surer.softmax(1).amax(1) > x.softmax(1).amax(1)).all()
    stronger = step_down(dafl.activation_loss, x, lr=1.0)
    assert (stronger.abs() > x.abs()).all()
    lopsided = x + 2 * F.one_hot(torch.tensor(3), 10)
    evener = step_down(dafl.information_entropy_loss, lopsided, lr=10.0)
    assert evener.softmax(1).mean(0)[3] < lopsided.softmax(1).mean(0)[3]
    student = step_down(lambda s: dafl.kd_loss(s, lopsided), x, lr=1.0)
    assert dafl.kd_loss(student, lopsided) < dafl.kd_loss(x, lopsided)


def test_information_entropy_loss_is_lowest_for_even_classes():
    torch.manual_seed(0)
    even = dafl.information_entropy_loss(50 * torch.eye(10)).item()
    assert even == pytest.approx(-1, abs=1e-5)
    assert all(even < dafl.information_entropy_loss(torch.randn(16, 10)).item() for _ in range(20))
    assert dafl.information_entropy_loss(50 * torch.eye(10)[:1]).item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("size", [1e3, 1e30])
def test_losses_and_gradients_are_finite_when_a_probability_is_zero(size):
    logits = torch.zeros(4, 10)
    logits[:, 0], logits[0, 1] = size, -size
    assert logits.softmax(1)[:, 1].eq(0).all()
    losses = [
        dafl.one_hot_loss, dafl.activation_loss, dafl.information_entropy_loss,
        lambda x: dafl.kd_loss(x, logits), lambda x: dafl.kd_loss(x, logits.flip(1)),
    ]  # fmt: skip
    for loss in losses:
        x = logits.clone().requires_grad_()
        value = loss(x)
        value.backward()
        assert value.isfinite() and x.grad.isfinite().all()


# Networks


@pytest.mark.parametrize(
    "model, parameters, channels, classes, width",
    [
        (dafl.LeNet5(), 61_706, 1, 10, 120),
        (dafl.LeNet5(0.5), 15_738, 1, 10, 60),
        (dafl.resnet34(), 21_282_122, 3, 10, 512),
        (dafl.resnet18(100), 11_220_132, 3, 100, 512),
    ],
)
def test_classifiers_have_the_size_of_the_paper(model, parameters, channels, classes, width):
    assert sum(p.numel() for p in model.parameters()) == parameters
    logits, features = model(torch.randn(2, channels, 32, 32))
    assert logits.shape == (2, classes) and features.shape == (2, width)
    assert (features >= 0).all() and (features > 0).any()


@pytest.mark.parametrize("channels, size, parameters", [(1, 32, 1_049_985), (3, 16, 430_595)])
def test_generator_gives_images_normalised_like_the_data(channels, size, parameters):
    torch.manual_seed(0)
    generator = dafl.Generator(latent_dim=100, channels=channels, image_size=size)
    assert sum(p.numel() for p in generator.parameters()) == parameters
    images = generator(torch.randn(16, 100))
    assert images.shape == (16, channels, size, size)
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(channels), atol=1e-3, rtol=0)
    torch.testing.assert_close(images.std((0, 2, 3)), torch.ones(channels), atol=1e-2, rtol=0)


def test_upsampled_convolution_is_upsampling_and_convolution():
    torch.manual_seed(0)
    layer, x = dafl.UpsampledConv2d(5, 7, 3, padding=1), torch.randn(2, 5, 6, 4)
    expected = F.conv2d(F.interpolate(x, scale_factor=2), layer.weight, layer.bias, padding=1)
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


def test_bf16_runs_generator_and_resnet_but_no_lenet_in_low_precision():
    args = Namespace(device=torch.device("cpu"), precision="bf16")
    torch.manual_seed(0)
    for model, x, rounded in [
        (dafl.LeNet5(), torch.randn(2, 1, 32, 32), False),
        (dafl.resnet18(), torch.randn(2, 3, 32, 32), True),
        (dafl.Generator(), torch.randn(4, 100), True),
    ]:
        exact = model(x)
        output = dafl.place(model, args)(x)
        exact, output = (y[0] if isinstance(y, tuple) else y for y in (exact, output))
        assert output.dtype == torch.float32
        assert (exact - output).abs().max().gt(1e-4) == rounded


# Data


def test_mnist_is_real_and_normalised():
    images, labels = dafl.load_dataset("mnist", "test", HERE / "data", "cpu")
    assert images.shape == (10_000, 1, 32, 32) and images.dtype == torch.float32
    assert labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    assert images.min().item() == pytest.approx(-0.1307 / 0.3081, abs=1e-3)
    assert images.mean().item() == pytest.approx(0, abs=0.1) and images.std().item() == pytest.approx(1, abs=0.1)


def test_evaluate_counts_hits_and_leaves_the_mode():
    class Threshold(torch.nn.Module):
        def forward(self, images):
            assert not self.training
            return torch.stack([-images.mean((1, 2, 3)), images.mean((1, 2, 3))], 1), images

    model, images = Threshold(), torch.tensor([1.0, -1.0, 2.0, -2.0]).view(4, 1, 1, 1)
    assert dafl.evaluate(model, images, torch.tensor([1, 0, 0, 0])) == 0.75
    assert model.training


def test_crop_and_flip_gives_a_shifted_and_perhaps_mirrored_copy():
    torch.manual_seed(0)
    images = torch.rand(40, 3, 32, 32)
    padded = F.pad(images, (4, 4, 4, 4))
    seen = set()
    for image, out in zip(padded, dafl.random_crop_and_flip(images)):
        crops = {(y, x): image[:, y : y + 32, x : x + 32] for y in range(9) for x in range(9)}
        (match,) = [
            (y, x, m) for (y, x), c in crops.items() for m in (False, True) if (c.flip(2) if m else c).equal(out)
        ]
        seen.add(match)
    assert len(seen) > 20 and {m for _, _, m in seen} == {False, True}


def test_memory_keeps_the_latest_images():
    memory = dafl.Memory(4, (1, 2, 2))
    for value in (1, 2, 3):
        memory.add(torch.full((2, 1, 2, 2), float(value)))
        drawn = {int(image.unique().item()) for image in memory.sample(100)}
        assert drawn == {1: {1}, 2: {1, 2}, 3: {2, 3}}[value]


def test_distort_moves_turns_and_scales_each_image_its_own_way():
    torch.manual_seed(0)
    image = torch.zeros(1, 1, 32, 32)
    image[..., 12:20, 12:20] = 1
    torch.testing.assert_close(dafl.distort(image, 0.0), image)
    distorted = dafl.distort(image.expand(400, -1, -1, -1), 0.1)
    assert distorted.shape == (400, 1, 32, 32) and len(distorted.flatten(1).unique(dim=0)) == 400
    assert 0 <= distorted.min() and distorted.max() <= 1
    pixel = torch.linspace(-31 / 32, 31 / 32, 32)
    mass = distorted.sum((1, 2, 3))
    x, y = (distorted.sum(axes) @ pixel / mass for axes in ((1, 2), (1, 3)))
    assert 0.07 < x.std() < 0.15 and 0.07 < y.std() < 0.15 and 0.08 < (mass / 64).std() < 0.25


def test_mix_puts_two_images_side_by_side():
    torch.manual_seed(0)
    images = torch.arange(1.0, 65.0).view(64, 1, 1, 1).expand(64, 1, 32, 32)
    mixed = dafl.mix(images)
    kinds = [set(image.unique().tolist()) for image in mixed]
    assert all(1 <= len(kind) <= 2 for kind in kinds) and sum(len(kind) == 2 for kind in kinds) > 32
    assert all(i + 1.0 in kind for i, kind in enumerate(kinds))


# Training


def cifar_args(tmp_path, *more):
    return dafl.parse_args(["--dataset", "cifar10", "--steps", "2", "--batch-size", "4", "--device", "cpu",
                            "--precision", "fp32", "--out-dir", str(tmp_path), *more])  # fmt: skip


def test_cifar_is_wired_from_resnet34_to_resnet18_and_leaves_the_teacher_alone(tmp_path):
    args = cifar_args(tmp_path)
    torch.manual_seed(0)
    teacher, student, generator = dafl.resnet34(), dafl.resnet18(), dafl.Generator(args.latent_dim, 3)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    start = student.fc.weight.clone()
    made_up = torch.randn(4, 3, 32, 32), torch.randint(10, (4,))
    dafl.distill(teacher, student, generator, made_up, args)
    assert [row["step"] for row in read_log(tmp_path)] == ["1", "2"]
    assert not student.fc.weight.equal(start)
    assert not teacher.training and all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(tensor.equal(before[name]) for name, tensor in teacher.state_dict().items())


def test_cifar_teacher_trains_on_augmented_batches(tmp_path):
    args = cifar_args(tmp_path, "--teacher-epochs", "1")
    torch.manual_seed(0)
    teacher = dafl.resnet18()
    before = teacher.fc.weight.clone()
    dafl.train_teacher(teacher, torch.randn(4, 3, 32, 32), torch.randint(10, (4,)), args)
    assert not teacher.fc.weight.equal(before)


def rates(args, steps):
    """The learning rate in each of the steps, where --lr-s is 0.1."""
    optimizer, schedule = dafl.make_optimizer(torch.nn.Linear(1, 1), 0.1, args, steps, drops=(0.4, 0.8))
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_learning_rate_of_cifar_falls_by_ten_twice(dataset):
    args = dafl.parse_args(["--dataset", dataset])
    assert rates(args, 10) == pytest.approx([0.1] * 4 + [0.01] * 4 + [0.001] * 2)


def test_learning_rate_of_mnist_rises_and_falls_to_0_or_is_constant_as_released():
    linear = rates(dafl.parse_args([]), 100)
    assert linear[:2] == pytest.approx([0.1 / 3, 0.2 / 3])
    assert linear[3:] == pytest.approx([0.1 - 0.001 * step for step in range(3, 100)])
    assert rates(dafl.parse_args(["--schedule", "paper"]), 10) == [0.1] * 10


def test_smoke_run_leaves_all_files(command, tmp_path, capsys):
    summary = dafl.main(command)
    out = tmp_path / "out"
    files = {"student.pt", "generator.pt", "log.csv", "samples.png", "class_means.png"}
    assert {path.name for path in out.iterdir()} == files
    for name, model in (("student.pt", dafl.LeNet5(0.5)), ("generator.pt", dafl.Generator())):
        model.load_state_dict(torch.load(out / name, weights_only=True))
    rows = read_log(out)
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    assert float(rows[-1]["accuracy"]) == summary["student"]
    assert all(-1 <= float(row["l_ie"]) <= 0 <= float(row["l_kd"]) and float(row["l_oh"]) >= 0 for row in rows)
    assert Image.open(out / "samples.png").size == (10 * 34 + 2, 8 * 34 + 2)
    assert Image.open(out / "class_means.png").size == (10 * 34 + 2, 2 * 34 + 2)
    printed = capsys.readouterr().out
    assert f"{summary['student']:.2%}" in printed.splitlines()[-2]
    assert printed.splitlines()[-1] == "real images seen   0 by the student"


def test_student_learns_digits_from_no_digits(command):
    steps = ["--steps", "60", "--batch-size", "32", "--replay", "8"]
    assert dafl.main([*command, *steps])["student"] > 0.4


def test_student_run_opens_no_training_image(command, monkeypatch):
    load = dafl.load_dataset

    def guarded(name, split, *rest):
        assert split == "test", "training images were asked for"
        return load(name, split, *rest)

    monkeypatch.setattr(dafl, "load_dataset", guarded)
    dafl.main(command)
    dafl.main([*command, "--images", "noise"])
    with pytest.raises(AssertionError, match="training images"):
        dafl.main([*command, "--images", "real"])


@pytest.mark.parametrize("images, name, seen", [("noise", "noise", "0"), ("real", "real training images", "60,000")])
def test_baselines_run_without_a_generator(command, tmp_path, capsys, images, name, seen):
    dafl.main([*command, "--images", images])
    printed = capsys.readouterr().out
    assert f"DAFL on mnist with {name}:" in printed and f"real images seen   {seen} by the student" in printed
    assert not (tmp_path / "out" / "generator.pt").exists()
    assert (tmp_path / "out" / "student.pt").exists()


def test_same_seed_same_log_other_seed_other_log(command, tmp_path):
    logs = []
    for seed in ("7", "7", "8"):
        dafl.main([*command, "--seed", seed])
        logs.append(read_log(tmp_path / "out"))
    assert logs[0] == logs[1] != logs[2]


def test_a_term_with_weight_0_is_switched_off(command, tmp_path, monkeypatch):
    def run(*flags):
        dafl.main([*command, "--replay", "0", *flags])
        return torch.load(tmp_path / "out" / "generator.pt", weights_only=True)["linear.weight"]

    default, off = run(), run("--alpha", "0")
    monkeypatch.setattr(dafl, "activation_loss", lambda features: features.sum() * 0)
    assert not default.equal(off) and run().equal(off)


def test_paper_loop_takes_one_student_step_on_the_generators_batch(command, monkeypatch):
    calls = []
    loss = dafl.kd_loss
    monkeypatch.setattr(dafl, "kd_loss", lambda *args: calls.append(args[2]) or loss(*args))
    dafl.main([*command, "--replay", "0", "--temperature", "1"])
    assert calls == [1.0] * 3
    dafl.main([*command, "--replay", "2"])
    assert calls[3:] == [4.0] * 9


def test_generated_pixels_are_between_black_and_white(tmp_path):
    def extremes(*flags):
        args = dafl.parse_args(["--device", "cpu", *flags])
        torch.manual_seed(0)
        generator = dafl.Generator(args.latent_dim, len(dafl.SOURCES[args.dataset].mean))
        images = dafl.draw_images(8, generator, args)
        return images.amin((0, 2, 3)).tolist(), images.amax((0, 2, 3)).tolist()

    mnist, _ = dafl.load_dataset("mnist", "test", HERE / "data")
    black, white = dafl.pixel_range(dafl.parse_args(["--device", "cpu"]))
    assert (black.item(), white.item()) == pytest.approx((mnist.min().item(), mnist.max().item()), abs=1e-3)
    assert extremes()[0] == [black.item()] and extremes()[1][0] <= white.item()
    assert extremes("--no-clamp")[0][0] < 2 * black.item()
    black, white = dafl.pixel_range(dafl.parse_args(["--device", "cpu", "--dataset", "cifar10"]))
    assert black.flatten().tolist() == pytest.approx([-0.4914 / 0.2023, -0.4822 / 0.1994, -0.4465 / 0.2010])
    assert white.flatten().tolist() == pytest.approx([0.5086 / 0.2023, 0.5178 / 0.1994, 0.5535 / 0.2010])


def test_student_waits_while_the_generator_trains_alone(command, monkeypatch):
    updates, descend = [], dafl.descend
    monkeypatch.setattr(dafl, "descend", lambda optimizer, loss: updates.append(optimizer) or descend(optimizer, loss))
    dafl.main([*command, "--warmup", "0.5"])
    generator, student = updates[0], updates[-1]
    assert updates == [generator] + 2 * [generator, student, student, student]


def test_a_collapsed_generator_starts_afresh(command, tmp_path, capsys, monkeypatch):
    class Collapsing(dafl.Generator):
        calls = 0

        def forward(self, z):
            Collapsing.calls += 1
            images = super().forward(z)
            return images[:1].expand_as(images) if Collapsing.calls == 2 else images

    monkeypatch.setattr(dafl, "Generator", Collapsing)
    fresh, restart = [], dafl.restart

    def watched(generator, optimizer):
        restart(generator, optimizer)
        fresh.append((generator.linear.weight.clone(), len(optimizer.state)))

    monkeypatch.setattr(dafl, "restart", watched)
    dafl.main(command)
    assert "       2  all images alike: the generator starts afresh" in capsys.readouterr().out
    assert [row["restarts"] for row in read_log(tmp_path / "out")] == ["0", "1", "1"]
    ((weight, state_size),) = fresh
    assert state_size == 0 and weight.abs().max() <= 0.1


# Interruption


def test_a_killed_and_resumed_run_ends_with_the_same_weights(command, tmp_path, capsys):
    command = [*command, "--steps", "12"]
    dafl.main(command)
    whole = torch.load(tmp_path / "out" / "student.pt", weights_only=True)
    whole_log = read_log(tmp_path / "out")
    (tmp_path / "out" / "student.pt").unlink()

    process = child("dafl.CHECKPOINT_SECONDS = 0\ndafl.main(sys.argv[1:])", *command)
    for line in process.stdout:
        if line.split()[:1] == ["5"]:
            break
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "out" / "student.pt").exists()
    capsys.readouterr()
    dafl.main([*command, "--resume"])
    assert "going on after step" in capsys.readouterr().out
    resumed = torch.load(tmp_path / "out" / "student.pt", weights_only=True)
    assert all(resumed[name].equal(tensor) for name, tensor in whole.items())
    assert read_log(tmp_path / "out") == whole_log
    assert not (tmp_path / "out" / "checkpoint.pt").exists()


def test_teacher_training_resumes_too(tmp_path, monkeypatch, capsys):
    images, labels = dafl.load_dataset("mnist", "train", HERE / "data", "cpu")
    small = {"train": (images[:1000], labels[:1000]), "test": (images[1000:1500], labels[1000:1500])}
    monkeypatch.setattr(dafl, "load_dataset", lambda name, split, *rest: small[split])
    monkeypatch.setattr(dafl, "CHECKPOINT_SECONDS", 0)
    command = [*QUICK, *STEPS, "--teacher-epochs", "3", "--out-dir", str(tmp_path)]
    dafl.main(command)
    whole = torch.load(tmp_path / "teacher.pt", weights_only=True)
    (tmp_path / "teacher.pt").unlink()
    save = dafl.Progress.save

    def save_then_interrupt(self, step):
        save(self, step)
        if step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(dafl.Progress, "save", save_then_interrupt)
        dafl.main(command)
    assert stop.value.code == 130 and "--resume" in capsys.readouterr().err
    dafl.main([*command, "--resume"])
    assert "going on after epoch 2" in capsys.readouterr().out
    resumed = torch.load(tmp_path / "teacher.pt", weights_only=True)
    assert all(resumed[name].equal(tensor) for name, tensor in whole.items())


def test_a_full_disk_leaves_the_last_whole_file(command, tmp_path):
    dafl.main(command)
    out = tmp_path / "out"
    before = (out / "student.pt").read_bytes()
    limit = "import resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\ndafl.main(sys.argv[1:])"
    process = child(limit, *command, "--seed", "1")
    _, error = process.communicate()
    assert process.returncode == 2 and error.startswith("dafl.py: error: cannot write ") and error.count("\n") == 1
    assert (out / "student.pt").read_bytes() == before
    assert not list(out.glob("*.tmp"))


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(command, tmp_path, capsys, monkeypatch):
    calls = []

    def spoilt(features):
        calls.append(0)
        return features.mean() * (math.nan if len(calls) == 3 else 1)

    monkeypatch.setattr(dafl, "activation_loss", spoilt)
    monkeypatch.setattr(dafl, "CHECKPOINT_SECONDS", 0)
    error = fails(command, capsys)
    assert "step 3" in error and "lower --lr-g" in error
    checkpoint = torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)
    assert checkpoint["step"] == 2 and all(t.isfinite().all() for t in checkpoint["student"].values())


def test_weights_that_are_not_finite_are_not_saved(command, tmp_path, monkeypatch):
    monkeypatch.setattr(dafl, "CHECKPOINT_SECONDS", 0)
    args = dafl.parse_args(command)
    args.out_dir.mkdir()
    model = torch.nn.Linear(1, 1)
    progress = dafl.Progress("teacher", args, None, teacher=model)
    progress.save(1)
    model.weight.data.fill_(math.nan)
    progress.save(2)
    assert torch.load(args.out_dir / "checkpoint.pt", weights_only=True)["step"] == 1


# Mistakes: one sentence on stderr, exit code 2, before any training


def fails(command, capsys):
    """Run a command that is a mistake; gives its one line on stderr."""
    with pytest.raises(SystemExit) as stop:
        dafl.main(command)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("dafl.py: error: ") and error.count("\n") == 1
    return error


@pytest.fixture
def no_training(monkeypatch):
    for loop in ("train_teacher", "distill"):
        monkeypatch.setattr(dafl, loop, lambda *args, **kwargs: pytest.fail("training began"))


@pytest.mark.parametrize(
    "flags",
    [
        "--dataset svhn", "--device tpu", "--precision fp8", "--images cats", "--steps 0", "--steps 1.5",
        "--batch-size 1", "--latent-dim 0", "--lr-g -1", "--lr-g nan", "--lr-s inf", "--oh -0.1", "--alpha nan",
        "--beta -5", "--temperature 0", "--replay -1", "--affine -1", "--warmup -0.1", "--warmup 1",
        "--schedule cosine", "--collapse nan", "--teacher-epochs 0", "--seed x", "--seed 99999999999999999999",
        "--no-such-flag",
    ],
)  # fmt: skip
def test_wrong_values(flags, no_training, capsys):
    assert flags.split()[0] in fails(flags.split(), capsys)


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_device_that_is_not_there(device, no_training, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert device in fails(["--device", device], capsys)
    assert dafl.parse_args([]).device.type == "cpu"


def test_precision_that_is_not_there(no_training, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert "bf16" in fails(["--device", "cuda", "--precision", "bf16"], capsys)
    assert dafl.parse_args(["--device", "cuda"]).precision == "fp32"


@pytest.mark.parametrize(
    "cpu, precision",
    [
        ({"amx_bf16": True, "cpu_name": "Intel(R) Xeon(R)"}, "bf16"),
        ({"amx_bf16": False, "avx512_bf16": True, "cpu_name": "AMD EPYC"}, "bf16"),
        ({"amx_bf16": False, "avx512_bf16": True, "cpu_name": "Intel(R) Xeon(R)"}, "fp32"),
        ({"avx512_bf16": False, "cpu_name": "AMD EPYC"}, "fp32"),
        ({}, "fp32"),
    ],
)
def test_precision_is_bf16_where_the_cpu_is_fast_in_it(cpu, precision, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu, raising=False)
    assert dafl.parse_args(["--device", "cpu"]).precision == precision
    assert dafl.parse_args(["--device", "cpu", "--precision", "fp32"]).precision == "fp32"


class Malice:
    """An object whose unpickling would make a file."""

    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return os.mkdir, (str(self.victim),)


@pytest.mark.parametrize("kind", ["missing", "truncated", "student", "classes", "no dict", "no tensors", "nan", "code"])
def test_teacher_file_that_will_not_do(kind, command, teacher_file, tmp_path, no_training, capsys):
    path, victim = tmp_path / "bad.pt", tmp_path / "victim"
    weights = torch.load(teacher_file, weights_only=True)
    if kind == "truncated":
        path.write_bytes(teacher_file.read_bytes()[:1000])
    elif kind == "code":
        path.write_bytes(pickle.dumps(Malice(victim), protocol=2))
    elif kind != "missing":
        content = {
            "student": dafl.LeNet5(0.5).state_dict(), "classes": weights | {"fc2.weight": torch.zeros(100, 84)},
            "no dict": torch.zeros(3), "no tensors": {name: 1 for name in weights},
            "nan": weights | {"fc2.bias": torch.full((10,), math.nan)},
        }[kind]  # fmt: skip
        torch.save(content, path)
    assert "bad.pt" in fails([*command, "--teacher", str(path)], capsys)
    assert not victim.exists()


def test_resume_without_a_checkpoint_or_with_another_one(command, tmp_path, no_training, capsys):
    assert "nothing to resume" in fails([*command, "--resume"], capsys)
    settings = dafl.settings(dafl.parse_args(command))
    path = tmp_path / "out" / "checkpoint.pt"
    torch.save({"settings": settings | {"lr_g": "0.3"}, "stage": "student"}, path)
    assert "lr_g 0.3" in fails([*command, "--resume"], capsys)
    torch.save({"weights": torch.zeros(1)}, path)
    assert "checkpoint" in fails([*command, "--resume"], capsys)
    path.write_bytes(b"half")
    assert "checkpoint" in fails([*command, "--resume"], capsys)


@pytest.mark.parametrize("kind", ["missing", "corrupt"])
def test_data_that_cannot_be_had(kind, command, tmp_path, no_training, capsys, monkeypatch):
    monkeypatch.setattr(datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    folder = tmp_path / "data" / "MNIST" / "raw"
    if kind == "corrupt":
        folder.mkdir(parents=True)
        (folder / "t10k-images-idx3-ubyte.gz").write_bytes(b"not gzip")
    error = fails([*command, "--data-dir", str(tmp_path / "data")], capsys)
    assert str(folder) in error and "t10k-images-idx3-ubyte.gz" in error


def test_cifar_that_cannot_be_had(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.CIFAR100, "url", "http://127.0.0.1:9/")
    with pytest.raises(dafl.UserError, match="cifar-100-python.tar.gz"):
        dafl.load_dataset("cifar100", "test", tmp_path)


def test_output_folder_that_cannot_be_made(command, tmp_path, no_training, capsys):
    (tmp_path / "file").write_text("")
    assert "file" in fails([*command, "--out-dir", str(tmp_path / "file" / "out")], capsys)


def test_import_prints_and_runs_nothing():
    start = time.monotonic()
    output, error = child("").communicate()
    assert (output, error) == ("", "") and time.monotonic() - start < 60


def test_help_has_a_default_beside_each_option(capsys):
    with pytest.raises(SystemExit):
        dafl.parse_args(["--help"])
    options = capsys.readouterr().out.split("options:")[1].split("\n  -")[2:]
    assert len(options) == 25
    assert [option for option in options if "default: " not in " ".join(option.split())] == []
