"""Tests of dafl.py: the equations by hand, the released loop, short runs on real MNIST, interruptions, mistakes."""

import copy
import csv
import math
import os
import re
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision import datasets

import dafl

HERE = Path(__file__).parent
README = (HERE / "README.md").read_text()
SHORT = ["--device", "cpu", "--steps", "3", "--batch-size", "8", "--replay", "2"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Each test has a working directory of its own, and so its own runs/."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def teacher_file(tmp_path_factory):
    """A teacher that a run trained on real MNIST for one epoch."""
    home, folder = os.getcwd(), tmp_path_factory.mktemp("teacher")
    os.chdir(folder)
    accuracy = dafl.main([*SHORT, "--teacher-epochs", "1"])["teacher"]
    os.chdir(home)
    assert accuracy > 0.93
    return next(folder.glob("runs/*/teacher.pt"))


@pytest.fixture
def command(teacher_file):
    """The flags of a run of a few seconds."""
    return [*SHORT, "--teacher", str(teacher_file)]


@pytest.fixture
def no_training(monkeypatch):
    monkeypatch.setattr(dafl, "fit", lambda *args, **kwargs: pytest.fail("training began"))


def run(command):
    """Run a command line; returns its folder and accuracies."""
    before = {*Path("runs").glob("*")}
    accuracies = dafl.main(command)
    (made,) = {*Path("runs").glob("*")} - before
    return made, accuracies


def read_log(folder):
    """The rows of log.csv as dictionaries, without the seconds, which no seed repeats."""
    rows = list(csv.DictReader((folder / "log.csv").read_text().splitlines()))
    assert rows and all(float(row.pop("seconds")) >= 0 for row in rows)
    return rows


def weights(path):
    return torch.load(path, weights_only=True)


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def child(code, *arguments):
    """Start Python in a process of its own that runs `code`, with dafl imported and `arguments` in sys.argv[1:]."""
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(HERE)!r})\nimport dafl\n{code}", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def fails(command, capsys):
    """Run a command that is a mistake; returns its one sentence on stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        dafl.main(command)
    *usage, error = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and error.startswith("dafl.py: error: ") and len(usage) <= 1
    return error


# Losses


def test_each_loss_is_the_number_worked_out_by_hand():
    by_hand = (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(-1))) / 2
    assert dafl.one_hot_loss(torch.tensor([[2.0, 0.0], [0.0, 1.0]])).item() == pytest.approx(by_hand, rel=1e-5)
    assert dafl.activation_loss(torch.tensor([[1.0, -3.0], [0.0, 2.0]])).item() == -1.5
    by_hand, logits = 0.7 * math.log10(0.7) + 0.3 * math.log10(0.3), torch.tensor([[0.9, 0.1], [0.5, 0.5]]).log()
    assert dafl.information_entropy_loss(logits).item() == pytest.approx(by_hand, rel=1e-5)
    assert dafl.information_entropy_loss(50 * torch.eye(10)).item() == pytest.approx(-1, abs=1e-5)
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


@pytest.mark.parametrize("size", [1e3, 1e30])
def test_losses_and_gradients_are_finite_when_a_probability_is_zero(size):
    logits = torch.zeros(4, 10)
    logits[:, 0], logits[0, 1] = size, -size
    assert logits.softmax(1)[:, 1].eq(0).all()
    for loss in (dafl.one_hot_loss, dafl.information_entropy_loss, lambda x: dafl.kd_loss(x, logits.flip(1))):
        x = logits.clone().requires_grad_()
        value = loss(x)
        value.backward()
        assert value.isfinite() and x.grad.isfinite().all()


# Networks


def test_classifiers_have_the_size_of_the_paper_times_width():
    for model, parameters, classes, width in (
        (dafl.LeNet5(), 61_706, 10, 120),
        (dafl.LeNet5(0.5), 15_738, 10, 60),
        (dafl.resnet34(), 21_282_122, 10, 512),
        (dafl.resnet18(100, width=0.5), 2_820_740, 100, 256),
    ):
        assert sum(p.numel() for p in model.parameters()) == parameters
        logits, features = model(torch.randn(2, next(model.parameters()).shape[1], 32, 32))
        assert logits.shape == (2, classes) and features.shape == (2, width)
        assert (features >= 0).all() and (features > 0).any()


@pytest.mark.parametrize(("channels", "size", "parameters"), [(1, 32, 1_049_985), (3, 16, 430_595)])
def test_generator_gives_images_normalised_like_the_data(channels, size, parameters):
    torch.manual_seed(0)
    generator = dafl.Generator(latent_dim=100, channels=channels, image_size=size)
    assert sum(p.numel() for p in generator.parameters()) == parameters
    images = generator(torch.randn(16, 100))
    assert images.shape == (16, channels, size, size)
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(channels), atol=1e-3, rtol=0)
    torch.testing.assert_close(images.std((0, 2, 3)), torch.ones(channels), atol=1e-2, rtol=0)
    generator.pixel_range = (-0.5, 2.0)
    cut = generator(torch.randn(16, 100)).detach()
    assert cut.min() == -0.5 and 0 < cut.max() <= 2


def test_upsample_conv_is_an_upsampling_and_a_convolution():
    torch.manual_seed(0)
    fast, x = dafl.UpsampleConv2d(4, 6, 3), torch.randn(2, 4, 5, 5)
    plain = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(4, 6, 3, padding=1))
    plain[1].load_state_dict(fast.state_dict())
    for a, b in zip(
        torch.autograd.grad(fast(x).square().sum(), fast.parameters()),
        torch.autograd.grad(plain(x).square().sum(), plain.parameters()),
    ):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(fast(x), plain(x), atol=1e-5, rtol=1e-4)


def test_bf16_runs_generator_and_resnet_but_no_lenet_in_low_precision():
    torch.manual_seed(0)
    for model, x, rounded in [
        (dafl.LeNet5(), torch.randn(2, 1, 32, 32), False),
        (dafl.resnet18(width=0.25), torch.randn(2, 3, 32, 32), True),
        (dafl.Generator(), torch.randn(4, 100), True),
    ]:
        exact, output = model(x), dafl.to_device(model, "cpu", bf16=True)(x)
        exact, output = (y[0] if isinstance(y, tuple) else y for y in (exact, output))
        assert output.dtype == torch.float32
        assert (exact - output).abs().max().gt(1e-4) == rounded


# Algorithm 1


def released_loop(teacher, student, generator, noise, oh, a, ie, optimizer_g, optimizer_s):
    """The released code's loop, written anew: one backward pass through the sum of all four losses."""
    teacher.eval()
    for z in noise:
        optimizer_g.zero_grad()
        optimizer_s.zero_grad()
        images = generator(z)
        outputs, features = teacher(images)
        l_oh = nn.CrossEntropyLoss()(outputs, outputs.data.max(1)[1])
        l_a = -features.abs().mean()
        mean_output = nn.functional.softmax(outputs, dim=1).mean(dim=0)
        l_ie = (mean_output * torch.log10(mean_output)).sum()
        log_p, q = F.log_softmax(student(images.detach())[0], dim=1), F.softmax(outputs.detach(), dim=1)
        l_kd = F.kl_div(log_p, q, reduction="sum") / len(images)
        (oh * l_oh + a * l_a + ie * l_ie + l_kd).backward()
        optimizer_g.step()
        optimizer_s.step()
        yield {"l_oh": l_oh.item(), "l_a": l_a.item(), "l_ie": l_ie.item(), "l_kd": l_kd.item()}


@pytest.mark.parametrize(("dataset", "steps"), [("mnist", 5), ("cifar10", 2)])
def test_distill_step_is_the_released_loop(dataset, steps, monkeypatch):
    args = vars(dafl.parse_args(["--dataset", dataset, "--recipe", "released", "--device", "cpu"]))
    torch.manual_seed(0)
    if dataset == "mnist":
        networks = dafl.LeNet5(), dafl.LeNet5(0.5), dafl.Generator()
        oh, a, ie, lr_g, sgd = 1, 0.1, 5, 0.2, partial(torch.optim.Adam, lr=2e-3)
    else:
        networks = dafl.resnet34(width=0.1), dafl.resnet18(width=0.1), dafl.Generator(100, 3)
        oh, a, ie, lr_g = 0.05, 0.01, 5, 0.02
        sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=5e-4)
    networks = [network.double() for network in networks]
    released = copy.deepcopy(networks)
    released_optimizers = torch.optim.Adam(released[2].parameters(), lr_g), sgd(released[1].parameters())
    optimizer_g = torch.optim.Adam(networks[2].parameters(), args["lr_g"])
    optimizer_s, _ = dafl.make_optimizer(networks[1], args["lr_s"], args["steps"], "released", (0.4, 0.8))
    noise = torch.randn(steps, 16, 100, dtype=torch.float64)
    draws = iter(noise)
    monkeypatch.setattr(torch, "randn", lambda *shape, device: next(draws))
    options = {name: args[name] for name in ("oh", "alpha", "beta", "temperature")}
    for expected in released_loop(*released, noise, oh, a, ie, *released_optimizers):
        losses, images = dafl.distill_step(*networks, optimizer_g, optimizer_s, batch_size=16, **options)
        assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(expected, abs=1e-8)
        assert images.shape[0] == 16 and not images.requires_grad
    for x, y in zip(networks[1].parameters(), released[1].parameters()):
        assert (x - y).abs().max() < 1e-8


def test_steps_train_student_and_generator_and_leave_the_teacher_alone():
    torch.manual_seed(0)
    teacher, student, generator = dafl.resnet34(width=0.1), dafl.resnet18(width=0.1), dafl.Generator(10, 3)
    before = copy.deepcopy([network.state_dict() for network in (teacher, student, generator)])
    optimizers = [torch.optim.Adam(network.parameters(), 0.01) for network in (generator, student)]
    student.eval()  # as a user's own evaluation leaves it
    _, images = dafl.distill_step(teacher, student, generator, *optimizers, batch_size=4)
    assert student.training and generator.training and not teacher.training
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(tensor.equal(before[0][name]) for name, tensor in teacher.state_dict().items())
    assert not student.fc.weight.equal(before[1]["fc.weight"])
    assert not generator.linear.weight.equal(before[2]["linear.weight"])
    student.eval()
    losses = [dafl.kd_step(teacher, student, optimizers[1], images)["l_kd"] for _ in range(20)]
    assert student.training and losses[-1] < losses[0]


def test_wrong_shapes_and_networks_are_told_what_is_expected():
    for student, teacher in (((64, 1), (64, 10)), ((1, 10), (64, 10)), ((10,), (64, 10))):
        with pytest.raises(ValueError, match="64, 10"):
            dafl.kd_loss(torch.zeros(student), torch.zeros(teacher))
    with pytest.raises(ValueError, match="multiple of 4"):
        dafl.Generator(image_size=30)
    plain = nn.Sequential(nn.Flatten(), nn.Linear(1024, 10))
    optimizer = torch.optim.SGD(plain.parameters(), 0.1)
    generator = dafl.Generator()
    for teacher, student in ((plain, dafl.LeNet5()), (dafl.LeNet5(), plain)):
        with pytest.raises(ValueError, match="logits, features"):
            dafl.distill_step(teacher, student, generator, torch.optim.Adam(generator.parameters()), optimizer)
        with pytest.raises(ValueError, match="logits, features"):
            dafl.kd_step(teacher, student, optimizer, torch.randn(2, 1, 32, 32))


def test_replay_buffer_keeps_the_latest_images():
    buffer = dafl.ReplayBuffer(4, (1, 2, 2))
    for value, kept in ((1, {1}), (2, {1, 2}), (3, {2, 3})):
        buffer.add(torch.full((2, 1, 2, 2), float(value)))
        images = buffer.sample(60)
        assert images.shape == (60, 1, 2, 2) and images.dtype == torch.float32
        assert set(images.unique().tolist()) == kept


def test_cutmix_puts_a_part_of_another_image_beside_each():
    torch.manual_seed(0)
    images = torch.arange(1.0, 65.0).view(64, 1, 1, 1).expand(64, 3, 32, 32)
    mixed = dafl.cutmix(images)
    kinds = [set(image.unique().tolist()) for image in mixed]
    assert all(1 <= len(kind) <= 2 for kind in kinds) and sum(len(kind) == 2 for kind in kinds) > 32
    kept = (mixed == images).float().mean((1, 2, 3))
    assert 0.4 < kept.mean() < 0.9 and kept.std() > 0.1


@pytest.mark.skipif(not torch.version.cuda or torch.__version__ < "2.15", reason="pretends a GPU with a CUDA build")
def test_no_gpu_tensor_meets_a_cpu_tensor():
    with FakeTensorMode(), torch.device("cuda"):
        networks = dafl.LeNet5(), dafl.resnet18(width=0.25)
        generators = dafl.Generator(), dafl.Generator(channels=3)
        for network, generator in zip(networks, generators):
            images = generator(torch.randn(8, 100))
            logits, features = dafl.classify(network, images)
            losses = dafl.one_hot_loss(logits), dafl.activation_loss(features), dafl.information_entropy_loss(logits)
            assert {loss.device.type for loss in (*losses, dafl.kd_loss(logits, logits))} == {"cuda"}
            buffer = dafl.ReplayBuffer(16, images.shape[1:])
            buffer.add(images.detach())
            assert dafl.cutmix(dafl.crop_and_flip(buffer.sample(8))).device.type == "cuda"


# Data


def test_mnist_is_real_and_normalised():
    images, labels = dafl.load_dataset("mnist", "test")
    assert images.shape == (10_000, 1, 32, 32) and images.dtype == torch.float32
    assert labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    assert images.min().item() == pytest.approx(-0.1307 / 0.3081, abs=1e-3)
    assert images.mean().item() == pytest.approx(0, abs=0.1) and images.std().item() == pytest.approx(1, abs=0.1)
    for name, split in (("mnist", "Train"), ("mnist", "val"), ("svhn", "test")):
        with pytest.raises(ValueError, match="'train' and 'test'"):
            dafl.load_dataset(name, split)


@pytest.mark.parametrize("damage", ["missing", "truncated archive", "truncated file"])
def test_data_that_cannot_be_had(damage, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for archive in (HERE / "data/MNIST/raw").glob("*.gz"):
        (raw / archive.name).write_bytes(archive.read_bytes()[: 1000 if "archive" in damage else None])
        if damage == "truncated file":
            (raw / archive.stem).write_bytes(b"\0\0\10\3" + b"\0\0\0\1" * 3)
        elif damage == "missing":
            (raw / archive.name).unlink()
    with pytest.raises(dafl.UserError, match="mnist in .*damaged files"):
        dafl.load_dataset("mnist", "test", tmp_path)


def test_crop_and_flip_gives_a_shifted_and_perhaps_mirrored_copy():
    torch.manual_seed(0)
    images, seen = torch.rand(40, 3, 32, 32), set()
    for image, result in zip(F.pad(images, (4, 4, 4, 4)), dafl.crop_and_flip(images)):
        crops = {(y, x): image[:, y : y + 32, x : x + 32] for y in range(9) for x in range(9)}
        matches = {
            (*at, m) for at, crop in crops.items() for m in (False, True) if result.equal(crop.flip(2) if m else crop)
        }
        assert len(matches) == 1
        seen |= matches
    assert len(seen) > 20 and {mirrored for _, _, mirrored in seen} == {False, True}


# Runs


def test_released_recipe_has_the_released_values():
    for dataset, values in {
        "mnist": (200 * 120, 512, 100, 0.2, 2e-3, 1, 0.1, 5, 1, 0, 1, 9, 256, 1e-3),
        "cifar10": (2000 * 120, 1024, 1000, 0.02, 0.1, 0.05, 0.01, 5, 1, 0, 1, 199, 128, 0.1),
        "cifar100": (2000 * 120, 1024, 1000, 0.02, 0.1, 0.5, 0.1, 20, 1, 0, 1, 199, 128, 0.1),
    }.items():
        args = dafl.parse_args(["--dataset", dataset, "--recipe", "released"])
        assert tuple(getattr(args, name) for name in dafl.HYPERPARAMETERS) == values


def test_a_run_leaves_all_files_and_repeats_with_its_seed(command):
    first, accuracies = run([*command, "--seed", "7"])
    pictures = {"samples.gif", "class_means.png"}
    networks = {"teacher.pt", "student.pt", "generator.pt"}
    assert {path.name for path in first.iterdir()} == {"log.csv"} | networks | pictures
    assert Image.open(first / "samples.gif").n_frames == 3
    for name, network in (("teacher", dafl.LeNet5()), ("student", dafl.LeNet5(0.5)), ("generator", dafl.Generator())):
        network.load_state_dict(weights(first / f"{name}.pt"))
    rows = read_log(first)
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    assert float(rows[-1]["accuracy"]) == accuracies["student"]
    assert all(-1 <= float(row["l_ie"]) <= 0 <= float(row["l_kd"]) and float(row["l_oh"]) >= 0 for row in rows)
    before = files(first)
    second, _ = run([*command, "--seed=7"])
    third, _ = run([*command, "--seed", "8"])
    assert second.name == f"{first.name}-2" and third.name == first.name.replace("seed-7", "seed-8")
    assert read_log(first) == read_log(second) != read_log(third)
    assert files(first) == before


def test_student_learns_digits_from_no_digits(command):
    _, accuracies = run([*command, "--steps", "60", "--batch-size", "32", "--replay", "4"])
    assert accuracies["student"] > 0.6


@pytest.mark.skipif(not (torch.cuda.is_available() or torch.backends.mps.is_available()), reason="needs a GPU")
def test_a_gpu_learns_too(command):
    device = "cuda" if torch.cuda.is_available() else "mps"
    _, accuracies = run([*command, "--device", device, "--steps", "60", "--batch-size", "32", "--replay", "4"])
    assert accuracies["student"] > 0.6


@pytest.mark.parametrize("images", ["generator", "noise", "real", "labels"])
def test_only_baselines_on_data_open_training_images(images, command, monkeypatch, capsys):
    load, opened = dafl.load_dataset, []
    monkeypatch.setattr(dafl, "load_dataset", lambda name, split, **kw: opened.append(split) or load(name, split, **kw))
    made, _ = run([*command, "--images", images])
    real = images in ("real", "labels")
    assert opened == ["test", "train"][: 1 + real]
    assert f"trained on         {60_000 * real:,} real images" in capsys.readouterr().out
    assert (made / "student.pt").exists() and (made / "generator.pt").exists() == (images == "generator")
    # As many student updates as with a generator: 3 on its images and 6 on past ones.
    assert read_log(made)[-1]["step"] == ("3" if images == "generator" else "9")


def test_a_cifar_run_trains_narrow_resnets(monkeypatch):
    data = torch.randn(200, 3, 32, 32), torch.arange(200) % 10
    monkeypatch.setattr(dafl, "load_dataset", lambda name, split, **options: data)
    flags = "--dataset cifar10 --device cpu --teacher-epochs 1 --steps 2 --batch-size 8 --width 0.2 --replay 1"
    made, _ = run(flags.split())
    dafl.resnet34(width=0.2).load_state_dict(weights(made / "teacher.pt"))
    dafl.resnet18(width=0.2).load_state_dict(weights(made / "student.pt"))
    assert [row["step"] for row in read_log(made)] == ["1", "2", "1", "2"]


# Interruption


CHILD = """load = dafl.load_dataset
dafl.load_dataset = lambda *args, **options: [part[:2000] for part in load(*args, **options)]
dafl.CHECKPOINT_SECONDS = 0
dafl.main(sys.argv[1:])"""


def test_a_run_killed_in_either_stage_and_resumed_ends_with_the_same_weights(capsys):
    command = [*SHORT, "--teacher-epochs", "2", "--steps", "12", "--teacher-lr", "0.01"]
    child(CHILD, *command).communicate()
    (whole,) = Path("runs").iterdir()
    stopped = Path(f"{whole}-2")
    flags = command
    for last_row in ("5", "2"):  # the second goes on after the teacher's fourth step
        process = child(CHILD, *flags)
        assert any(line.split()[:1] == [last_row] for line in process.stdout)
        assert "still going on" in fails(["--resume", str(stopped)], capsys)
        process.kill()
        process.communicate()
        assert (stopped / "teacher.pt").exists() == (last_row == "2") and not (stopped / "student.pt").exists()
        flags = ["--resume", str(stopped)]
    assert "give no others" in fails([*flags, "--alpha", "0"], capsys)
    child(CHILD, *flags).communicate()
    for name in ("teacher.pt", "student.pt", "generator.pt"):
        a, b = weights(whole / name), weights(stopped / name)
        assert all(b[key].equal(tensor) for key, tensor in a.items())
    assert read_log(whole) == read_log(stopped) and not (stopped / "checkpoint.pt").exists()
    assert files(whole)[whole / "samples.gif"] == files(stopped)[stopped / "samples.gif"]
    assert "nothing to resume" in fails(flags, capsys)


@pytest.fixture
def stopped(command, monkeypatch):
    """The folder of a run that Ctrl-C stopped at its second step of three."""
    steps = iter([0, 0, KeyboardInterrupt()])

    def interrupted(network):
        if stop := next(steps):
            raise stop
        return torch.tensor(0.0)

    with monkeypatch.context() as patch:
        patch.setattr(dafl, "activation_loss", interrupted)
        patch.setattr(dafl, "CHECKPOINT_SECONDS", 0)
        with pytest.raises(SystemExit) as stop:
            dafl.main(command)
    assert stop.value.code == 130
    return next(Path("runs").iterdir())


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: state.pop("parts"),
        lambda state: state.update(stage="finished"),
        lambda state: state.update(step=99),
        lambda state: state["parts"].update(student=dafl.LeNet5().state_dict()),
        lambda state: state["parts"].update(random=torch.zeros(3)),
        lambda state: state["parts"].update(student=dafl.LeNet5(0.5)),  # unpickling one would run its code
    ],
)
def test_a_checkpoint_that_will_not_do_is_refused_and_left(damage, stopped, capsys):
    path = stopped / "checkpoint.pt"
    state = weights(path)
    damage(state)
    torch.save(state, path)
    before = files(stopped)
    assert "checkpoint.pt" in fails(["--resume", str(stopped)], capsys)
    assert files(stopped) == before
    for size in (5000, 0):
        path.write_bytes(before[path][:size])
        assert "checkpoint.pt" in fails(["--resume", str(stopped)], capsys)


def test_a_full_disk_ends_in_a_sentence_and_leaves_whole_files(command):
    limit = "import resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\ndafl.main(sys.argv[1:])"
    process = child(limit, *command)
    _, error = process.communicate()
    assert process.returncode == 2 and error.startswith("dafl.py: error: ") and error.count("\n") == 1
    assert not list(Path("runs").glob("*/*.pt"))


def test_numbers_that_are_not_finite_stop_the_run_and_keep_the_checkpoint(command, capsys, monkeypatch):
    update, calls = dafl.update, []

    def spoilt(optimizer, loss):
        update(optimizer, loss)
        calls.append(0)
        if len(calls) == 6:  # the student's third and last: no loss shows it
            with torch.no_grad():
                optimizer.param_groups[0]["params"][0].fill_(math.nan)

    monkeypatch.setattr(dafl, "update", spoilt)
    monkeypatch.setattr(dafl, "CHECKPOINT_SECONDS", 0)
    assert "step 3 of the student is not finite" in fails([*command, "--replay", "0"], capsys)
    (made,) = Path("runs").iterdir()
    checkpoint = weights(made / "checkpoint.pt")
    assert checkpoint["step"] == 2 and all(t.isfinite().all() for t in checkpoint["parts"]["student"].values())


# Mistakes: a sentence on stderr, exit code 2, before any training


@pytest.mark.parametrize(
    "flags",
    [
        *("--dataset svhn", "--recipe slow", "--device tpu", "--images cats", "--steps 0", "--steps 1.5"),
        *("--batch-size 1", "--batch-size 4611686018427387904", "--lr-g -1", "--lr-g nan", "--lr-s inf", "--oh -0.1"),
        *("--alpha nan", "--beta -5", "--replay -1", "--replay 100000000", "--width 0", "--temperature 0"),
        *("--latent-dim 0", "--teacher-epochs 0", "--seed x", "--seed -1", "--seed 99999999999999999999"),
        *("--no-such-flag", "--resume nowhere"),
    ],
)
def test_wrong_values(flags, no_training, capsys):
    assert flags.split()[-1 if "nowhere" in flags else 0] in fails(flags.split(), capsys)
    assert not any(Path("runs").glob("*"))


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_device_that_is_not_there(device, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert device in fails(["--device", device], capsys)
    assert dafl.parse_args([]).device == "cpu"


@pytest.mark.parametrize("kind", ["missing", "truncated", "of another size", "whole module", "not finite"])
def test_teacher_file_that_will_not_do(kind, command, teacher_file, tmp_path, capsys):
    path = tmp_path / "bad.pt"
    if kind == "truncated":
        path.write_bytes(teacher_file.read_bytes()[:1000])
    elif kind == "of another size":
        torch.save(dafl.LeNet5(0.5).state_dict(), path)
    elif kind == "whole module":  # unpickling one would run its code
        torch.save(dafl.LeNet5(), path)
    elif kind == "not finite":
        torch.save({name: tensor * math.nan for name, tensor in weights(teacher_file).items()}, path)
    error = fails([*command, "--teacher", str(path)], capsys)
    assert ("teacher" if kind == "not finite" else "bad.pt") in error
    assert not list(Path("runs").glob("*/student.pt"))


def test_flags_make_a_name_that_any_file_system_takes(command):
    args = dafl.parse_args(["--teacher", "a/b\\c:d e\u00e9" + "x" * 300, "--alpha", "0", "--steps=400"])
    assert re.fullmatch(r"alpha-0-teacher-a-b-c-d-e-x+", args.name) and len(args.name) <= 100
    assert dafl.parse_args(["--seed=1", "--alpha", "0.0"]).name == dafl.parse_args(["--alpha=0", "--seed", "1"]).name


def test_a_path_that_the_terminal_cannot_show(tmp_path):
    folder = tmp_path / "\u00e9t\u00e9"
    folder.mkdir()
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    command = [sys.executable, str(HERE / "dafl.py"), "--resume", str(folder)]
    stopped = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert stopped.returncode == 2 and "nothing to resume" in stopped.stderr


def test_import_prints_and_runs_nothing():
    assert child("").communicate() == ("", "")


# README


def test_readme_commands_parse():
    commands = re.findall(r"python dafl\.py([^`#\n]*)", README)
    assert len(commands) > 8
    for command in commands:
        if not {"--help", "--resume"} & {*command.split()}:
            dafl.parse_args(shlex.split(command))


def test_readme_block_distils_a_teacher_of_ones_own():
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    process = child(block)
    output, error = process.communicate()
    assert 0.5 < float(output.split()[-1]) <= 1, error
