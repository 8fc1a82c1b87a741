"""Tests of dafl.py: the equations by hand, the released loop, short runs on real MNIST, interruptions, mistakes."""

import copy
import csv
import io
import json
import math
import re
import runpy
import shlex
import signal
import subprocess
import sys
from functools import lru_cache, partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision import datasets

import dafl

HERE = Path(__file__).parent
README = (HERE / "README.md").read_text()
SHORT = ["--device", "cpu", "--steps", "3", "--batch-size", "8", "--student-batch-size", "8", "--replay", "2"]
load_dataset = dafl.load_dataset


@lru_cache
def load(name, split, device="cpu"):
    """Real data, read once; of the test images 2,000."""
    return [part[: 2000 if split == "test" else None] for part in load_dataset(name, split, device=device)]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Each test has a working directory of its own, and so its own runs/."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dafl, "load_dataset", load)


@pytest.fixture(scope="session")
def teacher_file(tmp_path_factory):
    """A teacher that a run trained on real MNIST for one epoch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("teacher"))
        made, accuracies = run([*SHORT, "--teacher-epochs", "1"])
        assert accuracies["teacher"] > 0.93
        return (made / "teacher.pt").resolve()


@pytest.fixture
def command(teacher_file):
    """The flags of a run of a few seconds."""
    return [*SHORT, "--teacher", str(teacher_file)]


def run(command):
    """Run a command line; returns its folder and accuracies."""
    before = {*Path("runs").glob("*")}
    accuracies = dafl.main(command)
    (made,) = {*Path("runs").glob("*")} - before
    return made, accuracies


def log(folder):
    """The rows of log.csv as dictionaries, without the seconds, which no seed repeats."""
    rows = list(csv.DictReader((folder / "log.csv").read_text().splitlines()))
    assert rows and all(float(row.pop("seconds")) >= 0 for row in rows)
    return rows


def weights(path):
    return torch.load(path, weights_only=True)


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def command_line(*flags):
    """Run dafl.py as a script, in this process; returns its exit code."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", ["dafl.py", *flags])
        runpy.run_path(str(HERE / "dafl.py"), run_name="__main__")
    return stop.value.code


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
    losses = dafl.kd_loss(student.requires_grad_(), teacher), F.cross_entropy(student, teacher.softmax(1))  # Eq. 1
    torch.testing.assert_close(*(torch.autograd.grad(loss, student) for loss in losses))


@pytest.mark.parametrize("size", [1e3, 1e30])
def test_losses_and_gradients_are_finite_when_a_probability_is_zero(size):
    logits = torch.zeros(4, 10)
    logits[:, 0], logits[0, 1] = size, -size
    for loss in (dafl.one_hot_loss, dafl.information_entropy_loss, lambda x: dafl.kd_loss(x, logits.flip(1))):
        x = logits.clone().requires_grad_()
        value = loss(x)
        value.backward()
        assert value.isfinite() and x.grad.isfinite().all()


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


@pytest.mark.parametrize(("channels", "size", "parameters"), [(1, 32, 1_049_985), (3, 16, 430_595)])
def test_generator_gives_images_normalised_like_the_data(channels, size, parameters):
    torch.manual_seed(0)
    generator = dafl.Generator(100, channels, size)
    assert sum(p.numel() for p in generator.parameters()) == parameters
    images = generator(torch.randn(16, 100))
    assert images.shape == (16, channels, size, size)
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(channels), atol=1e-3, rtol=0)
    torch.testing.assert_close(images.std((0, 2, 3)), torch.ones(channels), atol=1e-2, rtol=0)
    cut = dafl.Generator(100, channels, size, pixel_range=(-0.5, 2.0))(torch.randn(16, 100))
    assert cut.min() == -0.5 and 0 < cut.max() <= 2


def test_upsample_conv_is_an_upsampling_and_a_convolution():
    torch.manual_seed(0)
    fast, x = dafl.UpsampleConv2d(4, 6, 3), torch.randn(2, 4, 5, 5)
    plain = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(4, 6, 3, padding=1))
    plain[1].load_state_dict(fast.state_dict())
    torch.testing.assert_close(fast(x), plain(x), atol=1e-5, rtol=1e-4)
    gradients = [torch.autograd.grad(layer(x).square().sum(), layer.parameters()) for layer in (fast, plain)]
    torch.testing.assert_close(*gradients, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("network", [dafl.LeNet5(), dafl.resnet18(width=0.25), dafl.Generator()])
def test_bf16_computes_all_but_a_lenet(network, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    generator = isinstance(network, dafl.Generator)
    x = torch.randn(4, 100) if generator else torch.randn(4, next(network.parameters()).shape[1], 32, 32)
    twin = dafl.to_device(copy.deepcopy(network), "cpu")
    exact, rounded = (y if generator else y[0] for y in (network(x), twin(x)))
    assert rounded.dtype == torch.float32
    assert exact.sub(rounded).abs().max().gt(1e-4) != isinstance(network, dafl.LeNet5)
    file = io.BytesIO()
    torch.save(twin, file)
    file.seek(0)
    assert torch.load(file, weights_only=False)(x)[0].equal(twin(x)[0])
    zeroed = copy.deepcopy(twin)
    for parameter in zeroed.parameters():
        parameter.data.zero_()
    assert (zeroed(x) if generator else zeroed(x)[0]).abs().max() == 0  # it has weights of its own


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


@pytest.mark.parametrize("dataset", ["mnist", "cifar10"])
def test_distill_step_is_the_released_loop(dataset, monkeypatch):
    args = vars(dafl.parse_args(["--dataset", dataset, "--recipe", "released"])[0])
    torch.manual_seed(0)
    if dataset == "mnist":
        networks = dafl.LeNet5(), dafl.LeNet5(0.5), dafl.Generator()
        oh, a, ie, lr_g, adam_or_sgd = 1, 0.1, 5, 0.2, partial(torch.optim.Adam, lr=2e-3)
    else:
        networks = dafl.resnet34(width=0.1), dafl.resnet18(width=0.1), dafl.Generator(100, 3)
        oh, a, ie, lr_g = 0.05, 0.01, 5, 0.02
        adam_or_sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=5e-4)
    networks = [network.double() for network in networks]
    released = copy.deepcopy(networks)
    released_optimizers = torch.optim.Adam(released[2].parameters(), lr_g), adam_or_sgd(released[1].parameters())
    optimizer_g = torch.optim.Adam(networks[2].parameters(), args["lr_g"])
    optimizer_s, _ = dafl.make_optimizer(networks[1], args["lr_s"], args["steps"], "released", (0.4, 0.8))
    noise = torch.randn(3, 16, 100, dtype=torch.float64)
    draws = iter(noise)
    monkeypatch.setattr(torch, "randn", lambda *shape, **options: next(draws))
    options = {name: args[name] for name in ("oh", "alpha", "beta", "temperature")}
    for expected in released_loop(*released, noise, oh, a, ie, *released_optimizers):
        losses, images = dafl.distill_step(*networks, optimizer_g, optimizer_s, batch_size=16, **options)
        assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(expected, abs=1e-8)
        assert images.shape[0] == 16 and not images.requires_grad
    for x, y in zip(networks[1].parameters(), released[1].parameters()):
        assert (x - y).abs().max() < 1e-8


def test_steps_set_modes_and_leave_the_teacher_alone():
    torch.manual_seed(0)
    teacher, student, generator = dafl.resnet34(width=0.25), dafl.resnet18(width=0.25), dafl.Generator(10, 3)
    before = copy.deepcopy(teacher.state_dict())
    optimizers = [torch.optim.Adam(network.parameters(), 0.01) for network in (generator, student)]
    student.eval()  # as a user's own evaluation leaves it
    _, images = dafl.distill_step(teacher, student, generator, *optimizers, batch_size=4)
    assert student.training and generator.training and not teacher.training
    assert all(tensor.equal(before[name]) for name, tensor in teacher.state_dict().items())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    student.eval()
    losses = [dafl.kd_step(teacher, student, optimizers[1], images)["l_kd"] for _ in range(20)]
    assert student.training and losses[-1] < losses[0]


class Net(nn.Module):
    """A small classifier: logits alone, unless outputs makes something else of them."""

    def __init__(self, outputs=lambda logits: logits):
        super().__init__()
        self.layers, self.outputs = nn.Sequential(nn.Flatten(), nn.Linear(1024, 10)), outputs

    def forward(self, images):
        return self.outputs(self.layers(images))


def steps(teacher, student, **options):
    """A step of each kind of a teacher and a student of MNIST's shape; returns the losses of the first."""
    generator = dafl.Generator(10)
    optimizers = [torch.optim.SGD(network.parameters(), 0.1) for network in (generator, student)]
    losses, images = dafl.distill_step(teacher, student, generator, *optimizers, batch_size=4, **options)
    dafl.kd_step(teacher, student, optimizers[1], images)
    return losses


def test_networks_may_return_logits_alone():
    student = Net()
    before = copy.deepcopy(student.state_dict())
    assert steps(dafl.LeNet5(), student)["l_a"] < 0
    assert not student.layers[1].weight.equal(before["layers.1.weight"])
    assert steps(Net(), Net(), alpha=0)["l_a"] == 0
    with pytest.raises(ValueError, match="L_a needs features"):
        steps(Net(), Net())


WRONG_OUTPUTS = (
    (lambda x: x[:, :1], "[4, 1]"),
    (lambda x: x[:, :, None, None], "[4, 10, 1, 1]"),
    (lambda x: x.mean(1), "[4]"),
    (lambda x: x[:2], "[2, 10]"),
    (lambda x: (x, x.mean()), "[4, 10], []"),
    (lambda x: (x, {"body": x}), "[4, 10], dict"),
    (lambda x: (x, x, x), "[4, 10], [4, 10], [4, 10]"),
    (lambda x: {"logits": x}, "dict"),
)


@pytest.mark.parametrize(("outputs", "came"), WRONG_OUTPUTS)
def test_networks_that_return_anything_else_are_told_what_came(outputs, came):
    for teacher, student in ((dafl.LeNet5(), Net(outputs)), (Net(outputs), Net())):
        with pytest.raises(ValueError, match="must return logits .* not " + re.escape(came)):
            steps(teacher, student)
    with pytest.raises(ValueError, match="not " + re.escape(came)):
        dafl.evaluate(Net(outputs), torch.randn(4, 1, 32, 32), torch.zeros(4))


def test_a_student_that_cannot_be_trained_whole_is_refused():
    teacher, student = Net(), Net()
    steps(teacher, student, alpha=0)
    steps(student, Net(), alpha=0)
    student.layers[0] = teacher.layers[1]
    for frozen in (copy.deepcopy(teacher), student):
        with pytest.raises(ValueError, match="frozen parameters"):
            steps(teacher, frozen, alpha=0)


def test_swapped_optimizers_are_refused():
    generator, student = dafl.Generator(10), dafl.LeNet5()
    optimizers = [torch.optim.Adam(network.parameters()) for network in (student, generator)]
    with pytest.raises(ValueError, match="swapped"):
        dafl.distill_step(dafl.LeNet5(), student, generator, *optimizers, batch_size=4)
    with pytest.raises(ValueError, match="swapped"):
        dafl.kd_step(dafl.LeNet5(), student, optimizers[1], torch.randn(4, 1, 32, 32))


def test_wrong_shapes_are_refused():
    for student, teacher in (((64, 1), (64, 10)), ((1, 10), (64, 10)), ((10,), (64, 10))):
        with pytest.raises(ValueError, match="64, 10"):
            dafl.kd_loss(torch.zeros(student), torch.zeros(teacher))
    with pytest.raises(ValueError, match="multiple of 4"):
        dafl.Generator(image_size=30)
    images, labels = torch.randn(8, 1, 32, 32), torch.zeros(8, dtype=torch.long)
    for x, y in ((images, labels[:, None]), (images[:4], labels)):
        with pytest.raises(ValueError, match="a label for each image"):
            dafl.evaluate(Net(), x, y)


def test_replay_buffer_keeps_the_latest_images():
    buffer = dafl.ReplayBuffer(4, (3, 2, 2))
    with pytest.raises(ValueError, match="add images"):
        buffer.sample(1)
    for value, kept in ((1, {1}), (2, {1, 2}), (3, {2, 3})):
        buffer.add(torch.full((2, 3, 2, 2), float(value)))
        images = buffer.sample(60)
        assert images.shape == (60, 3, 2, 2) and {*images.unique().tolist()} == kept
    with pytest.raises(ValueError, match=r"\[3, 2, 2\], not \[1, 2, 2\]"):
        buffer.add(torch.zeros(2, 1, 2, 2))
    with pytest.raises(ValueError, match="not 0"):
        dafl.ReplayBuffer(0, (3, 2, 2))


def test_cutmix_puts_a_part_of_another_image_beside_each():
    torch.manual_seed(0)
    images = torch.arange(1.0, 65.0).view(64, 1, 1, 1).expand(64, 3, 32, 32)
    mixed = dafl.cutmix(images)
    kinds = [len(image.unique()) for image in mixed]
    assert {*kinds} == {1, 2} and kinds.count(2) > 32
    kept = (mixed == images).float().mean((1, 2, 3))
    assert 0.4 < kept.mean() < 0.9 and kept.std() > 0.1


def test_mnist_is_real_and_normalised():
    images, labels = load_dataset("mnist", "test")
    assert images.shape == (10_000, 1, 32, 32) and images.dtype == torch.float32
    assert labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    assert images.mean().item() == pytest.approx(0, abs=0.1) and images.std().item() == pytest.approx(1, abs=0.1)
    for name, split in (("mnist", "Train"), ("mnist", "val"), ("svhn", "test")):
        with pytest.raises(ValueError, match="'train' and 'test'"):
            load_dataset(name, split)


@pytest.mark.parametrize("fault", ["no network", "no folder", "damage"])
def test_data_that_cannot_be_had(fault, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    folder = tmp_path / "data"
    if fault == "no folder":
        folder.write_text("a file")
    if fault == "damage":
        load_dataset("mnist", "test")  # unpacks the archives
        (folder / "MNIST" / "raw").mkdir(parents=True)
        for file in (HERE / "data/MNIST/raw").glob("*-ubyte"):
            (folder / "MNIST" / "raw" / file.name).write_bytes(file.read_bytes()[:1000])
    with pytest.raises(OSError, match="mnist in ") as error:
        load_dataset("mnist", "test", folder)
    assert str(folder) in str(error.value) and ("delete damaged" in str(error.value)) == (fault == "damage")


def test_crop_and_flip_gives_a_shifted_and_perhaps_mirrored_copy():
    torch.manual_seed(0)
    images, seen = torch.rand(40, 3, 32, 32), []
    for image, result in zip(F.pad(images, (4, 4, 4, 4)), dafl.crop_and_flip(images)):
        crops = {(y, x): image[:, y : y + 32, x : x + 32] for y in range(9) for x in range(9)}
        seen += [(at, m) for at, crop in crops.items() for m in (0, 1) if result.equal(crop.flip(2) if m else crop)]
    assert len(seen) == 40 and len({*seen}) > 20 and {mirrored for _, mirrored in seen} == {0, 1}


def test_a_run_leaves_all_files_and_repeats_with_its_seed(command, monkeypatch, capsys):
    first, accuracies = run(["--seed", "7", *command])
    assert "\r" not in capsys.readouterr().out
    networks = {"teacher": dafl.LeNet5(), "student": dafl.LeNet5(0.5), "generator": dafl.Generator()}
    names = {*(f"{name}.pt" for name in networks), "log.csv", "args.json", "generated.png"}
    assert {path.name for path in first.iterdir()} == names
    assert Image.open(first / "generated.png").size == (10 * 34 + 2, 8 * 34 + 2)
    for name, network in networks.items():
        network.load_state_dict(weights(first / f"{name}.pt"))
    rows = log(first)
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    assert float(rows[-1]["accuracy"]) == accuracies["student"]
    assert all(-1 <= float(row["l_ie"]) <= 0 <= float(row["l_kd"]) and float(row["l_oh"]) >= 0 for row in rows)
    before = files(first)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    second, _ = run(["--seed", "7", *command])
    out = capsys.readouterr().out
    assert re.search(r"student +1 of 3 +\r", out) and "%  0:00 left\n" in out
    third, _ = run(["--seed", "8", *command])
    assert second.name == f"{first.name}-2" and third.name == first.name.replace("seed-7", "seed-8")
    assert log(first) == log(second) != log(third)
    assert files(first) == before


GPUS = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()


@pytest.mark.parametrize("device", ["cpu", *GPUS])
def test_student_learns_digits_from_no_digits(device, command):
    more = "--steps 60 --batch-size 32 --student-batch-size 32 --replay 4"
    _, accuracies = run([*command, "--device", device, *more.split()])
    assert accuracies["student"] > 0.6


@pytest.mark.parametrize("images", ["generator", "noise", "real", "labels"])
def test_only_baselines_on_data_open_training_images(images, command, monkeypatch, capsys):
    opened = []
    monkeypatch.setattr(dafl, "load_dataset", lambda name, split, **kw: opened.append(split) or load(name, split, **kw))
    made, _ = run([*command, "--images", images])
    real = images in ("real", "labels")
    assert opened == ["test", "train"][: 1 + real]
    assert f"trained on {60_000 * real:,} real images" in capsys.readouterr().out
    assert (made / "student.pt").exists() and (made / "generator.pt").exists() == (images == "generator")
    # As many student updates as with a generator: 3 on its images and 6 on past ones.
    assert log(made)[-1]["step"] == ("3" if images == "generator" else "9")


def test_a_cifar_run_trains_narrow_resnets(monkeypatch):
    data = torch.randn(200, 3, 32, 32), torch.arange(200) % 10
    monkeypatch.setattr(dafl, "load_dataset", lambda name, split, **options: data)
    made, _ = run([*SHORT, "--dataset", "cifar10", "--teacher-epochs", "1"])
    dafl.resnet34(width=0.25).load_state_dict(weights(made / "teacher.pt"))
    dafl.resnet18(width=0.25).load_state_dict(weights(made / "student.pt"))
    assert [row["step"] for row in log(made)] == ["1", "2", "1", "2", "3"]


CHILD = f"""import os, sys
sys.path.insert(0, {str(HERE)!r})
import dafl
load, evaluate, left = dafl.load_dataset, dafl.evaluate, [0] * int(sys.argv[1])
dafl.load_dataset = lambda *args, **options: [part[:2000] for part in load(*args, **options)]
dafl.evaluate = lambda *args: evaluate(*args) if left.pop() == 0 and left else os._exit(9)  # as kill -9 does
dafl.CHECKPOINT_SECONDS = 0
dafl.main(sys.argv[2:])"""


def test_a_run_killed_in_either_stage_and_resumed_ends_with_the_same_files(monkeypatch, capsys):
    monkeypatch.setattr(dafl, "load_dataset", lambda *args, **kw: [part[:2000] for part in load(*args, **kw)])
    flags = [*SHORT, "--teacher-epochs", "2", "--steps", "12"]
    whole, _ = run(flags)
    stopped = Path(f"{whole}-2")
    for tests, stage in (("6", "teacher"), ("12", "student")):  # when so many tests of a network are over
        error = subprocess.run(
            [sys.executable, "-c", CHILD, tests, *flags], capture_output=True, text=True, check=False
        ).stderr
        assert (stopped / f"{stage}-checkpoint.pt").exists() and not (stopped / "student.pt").exists(), error
        assert (stopped / "teacher.pt").exists() == (stage == "student")
        flags = ["--resume", str(stopped)]
    dafl.main(flags)
    assert {path.name for path in whole.iterdir()} == {path.name for path in stopped.iterdir()}
    for name in ("teacher.pt", "student.pt", "generator.pt"):
        a, b = weights(whole / name), weights(stopped / name)
        assert all(b[key].equal(tensor) for key, tensor in a.items())
    assert log(whole) == log(stopped)
    assert (whole / "generated.png").read_bytes() == (stopped / "generated.png").read_bytes()
    assert command_line(*flags) == 2
    assert f"the run in {stopped} is finished" in capsys.readouterr().err


def test_resume_takes_the_stopped_runs_flags_and_perhaps_another_device(command, monkeypatch, capsys):
    monkeypatch.setattr(dafl, "fit", lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        dafl.main([*command, "--dataset", "mnist", "--alpha", "0.5", "--seed", "3"])
    (folder,) = Path("runs").iterdir()
    args, _ = dafl.parse_args(["--resume", str(folder)])
    assert (args.alpha, args.seed, args.steps, args.teacher) == (0.5, 3, 3, str((folder / "teacher.pt").absolute()))
    flags = json.loads((folder / "args.json").read_text())
    (folder / "args.json").write_text(json.dumps(flags | {"device": "cuda"}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert dafl.parse_args(["--resume", str(folder), "--device", "cpu"])[0].device == "cpu"
    for more, message in ((), "there is no cuda here: add --device cpu"), (("--alpha", "0"), "only --device may"):
        with pytest.raises(SystemExit, match="2"):
            dafl.parse_args(["--resume", str(folder), *more])
        assert message in capsys.readouterr().err


DAMAGES = (
    lambda state: state.pop("parts"),
    lambda state: state.update(step=99),
    lambda state: state["parts"].update(student=dafl.LeNet5().state_dict()),
    lambda state: state["parts"].update(student=dafl.LeNet5(0.5)),  # unpickling one would run its code
)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_checkpoint_that_will_not_do_is_refused_and_left(damage, command, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(dafl, "save_picture", lambda *_: signal.raise_signal(signal.SIGINT))
        dafl.main(command)
    (stopped,) = Path("runs").iterdir()
    path = stopped / "student-checkpoint.pt"
    state = weights(path)
    damage(state)
    torch.save(state, path)
    before = files(stopped)
    for size in (None, 5000, 0):
        path.write_bytes(before[path][:size])
        with pytest.raises(OSError, match="student-checkpoint.pt: it is damaged"):
            dafl.main(["--resume", str(stopped)])
    assert files(stopped) == before | {path: b""}


def test_numbers_that_are_not_finite_stop_the_run_and_keep_the_checkpoint(command, monkeypatch):
    update, calls = dafl.update, []

    def spoilt(optimizer, loss):
        update(optimizer, loss)
        calls.append(0)
        if len(calls) == 6:  # the student's third and last: no loss shows it
            optimizer.param_groups[0]["params"][0].data.fill_(math.nan)

    monkeypatch.setattr(dafl, "update", spoilt)
    monkeypatch.setattr(dafl, "CHECKPOINT_SECONDS", 0)
    with pytest.raises(FloatingPointError, match="step 3 of the student"):
        dafl.main([*command, "--replay", "0"])
    checkpoint = weights(next(Path("runs").glob("*/student-checkpoint.pt")))
    assert checkpoint["step"] == 2 and all(t.isfinite().all() for t in checkpoint["parts"]["student"].values())


WRONG = """
    --dataset svhn, --recipe slow, --device tpu, --images cats, --steps 0, --steps 1.5, --batch-size 1, --lr-g -1,
    --batch-size 4611686018427387904, --student-batch-size 1, --lr-g nan, --lr-s inf, --oh -0.1, --alpha nan, --beta -5, --replay -1,
    --width 0, --temperature 0, --latent-dim 0, --teacher-epochs 0, --teacher-lr -1, --teacher-batch-size 1, --seed x,
    --seed -1, --seed 99999999999999999999, --no-such-flag, --resume nowhere --alpha 0, --resume nowhere
"""


@pytest.mark.parametrize("flags", WRONG.split(","))
def test_wrong_values(flags, capsys):
    with pytest.raises(SystemExit, match="2"):
        dafl.main(flags.split())
    *_, error = capsys.readouterr().err.splitlines()
    assert flags.split()[0] in error and error.startswith("dafl.py: error: ")


@pytest.mark.parametrize("flag", ["--batch-size", "--replay", "--latent-dim", "--width"])
def test_what_has_no_room_is_told_before_anything_is_trained(flag, capsys):
    assert command_line(flag, "1000000000000", "--device", "cpu") == 2
    output, error = capsys.readouterr()
    assert output == "" and "memory" in error and error.count("\n") == 1 and not Path("runs").exists()


@pytest.mark.parametrize("obstacle", [Path.touch, lambda path: path.symlink_to("nowhere")])
def test_results_that_cannot_be_written(obstacle, command, capsys):
    obstacle(Path("runs"))
    assert command_line(*command) == 2
    error = capsys.readouterr().err
    assert error.startswith("dafl.py: error: ") and "'runs'" in error and error.count("\n") == 1


def test_a_notebook_runs_it(command, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())  # without reconfigure
    monkeypatch.setattr(sys, "argv", ["dafl.py", *command])
    runpy.run_path(str(HERE / "dafl.py"), run_name="__main__")
    assert "student accuracy" in sys.stdout.getvalue()


def test_each_data_set_has_its_own_help(capsys):
    for flags, steps in ((["--help"], "(200)"), (["--recipe", "released", "--help"], "(24000)")):
        assert command_line(*flags) == 0
        assert steps in capsys.readouterr().out


LENET = dafl.LeNet5().state_dict()
TEACHER_FILES = (
    (None, "No such file"),
    (b"a text", "it holds no state dict, as torch.save(network.state_dict(), FILE) writes one"),
    (b"PK", "it holds no state dict"),
    (dafl.LeNet5(), "it holds no state dict"),  # a whole network: unpickling one would run its code
    ([1, 2], "it holds no state dict"),
    ({"state_dict": LENET, "epoch": 3}, "it has epoch ['int'], state_dict ['OrderedDict'] and lacks conv1.bias [6], "),
    ({**LENET, "extra": torch.zeros(10)}, "no state dict of LeNet5 at --width 1: it has extra [10] and lacks nothing"),
    (dafl.LeNet5(0.5).state_dict(), "it has conv1.bias [3], conv1.weight [3, 1, 5, 5], ... and lacks conv1.bias [6], "),
)


@pytest.mark.parametrize(("content", "message"), TEACHER_FILES)
def test_teacher_file_that_will_not_do(content, message, command, tmp_path):
    if content is not None:
        torch.save(content, tmp_path / "bad.pt")
    if isinstance(content, bytes):
        (tmp_path / "bad.pt").write_bytes(content)
    with pytest.raises(OSError, match=r"bad\.pt") as error:
        dafl.main([*command, "--teacher", str(tmp_path / "bad.pt")])
    assert message in str(error.value) and "\n" not in str(error.value) and not Path("runs").exists()


def test_teacher_file_with_the_prefixes_of_wrappers_or_not_finite_numbers(command, teacher_file, tmp_path):
    state = weights(teacher_file)
    torch.save({f"_orig_mod.module.{name}": tensor for name, tensor in state.items()}, tmp_path / "wrapped.pt")
    made, _ = run([*command, "--teacher", str(tmp_path / "wrapped.pt")])
    assert all(tensor.equal(state[name]) for name, tensor in weights(made / "teacher.pt").items())
    torch.save({name: tensor * math.nan for name, tensor in state.items()}, tmp_path / "nan.pt")
    with pytest.raises(FloatingPointError, match="bad teacher"):
        dafl.main([*command, "--teacher", str(tmp_path / "nan.pt")])


def test_flags_make_a_name_that_any_file_system_takes():
    _, name = dafl.parse_args(["--teacher", "a/b\\c:d e\u00e9" + "x" * 300, "--alpha=0.0"])
    assert re.fullmatch(r"teacher-a-b-c-d-e-x+", name) and len(name) == 100
    assert dafl.parse_args([])[1] == "mnist" and dafl.parse_args(["--seed", "7"])[1] == "seed-7"


def test_readme_commands_parse():
    commands = re.findall(r"python dafl\.py([^`#\n]*)", README)
    assert len(commands) >= 8
    for command in commands:
        if not {"--help", "--resume"} & {*command.split()}:
            dafl.parse_args(shlex.split(command))


def test_readme_block_distils_a_teacher_of_ones_own():
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    result = subprocess.run([sys.executable, "-c", block], cwd=HERE, capture_output=True, text=True, check=False)
    accuracies = re.fullmatch(r"teacher (\S+)%, student (\S+)%\n", result.stdout)  # and importing prints nothing
    assert accuracies and all(80 < float(accuracy) <= 100 for accuracy in accuracies.groups()), result.stderr
