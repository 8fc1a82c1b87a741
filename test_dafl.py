"""Tests of dafl.py on the CPU: every equation by hand, the released code's loop, short runs on real MNIST, mistakes."""

import copy
import csv
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision import datasets
from torchvision.transforms.functional import pil_to_tensor

import dafl

HERE = Path(__file__).parent
README = (HERE / "README.md").read_text()
SHORT = ["--device", "cpu", "--steps", "3", "--batch-size", "8", "--replay", "2"]


@pytest.fixture(scope="session")
def teacher_file(tmp_path_factory):
    """A teacher that a run trained on real MNIST for one epoch, in that run's folder."""
    out = tmp_path_factory.mktemp("teacher")
    accuracies = dafl.main([*SHORT, "--teacher-epochs", "1", "--out-dir", str(out)])
    assert accuracies["teacher"] > 0.93
    return out / "teacher.pt"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def command(teacher_file, out):
    """The arguments of a run of a few seconds into the folder `out`."""
    return [*SHORT, "--teacher", str(teacher_file), "--out-dir", str(out)]


def read_log(out):
    """The rows of log.csv as dictionaries, without the seconds, which no seed repeats."""
    with open(out / "log.csv") as file:
        rows = list(csv.DictReader(file))
    assert all(float(row.pop("seconds")) >= 0 for row in rows)
    return rows


def weights(path):
    return torch.load(path, weights_only=True)


def child(code, *arguments):
    """Start Python in a process of its own that runs `code`, with dafl imported and `arguments` in sys.argv[1:]."""
    command = [sys.executable, "-c", f"import sys, dafl\n{code}", *arguments]
    return subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


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


@pytest.mark.parametrize("model, parameters, channels, classes, width", [
    (dafl.LeNet5(), 61_706, 1, 10, 120), (dafl.LeNet5(0.5), 15_738, 1, 10, 60),
    (dafl.resnet34(), 21_282_122, 3, 10, 512), (dafl.resnet18(100), 11_220_132, 3, 100, 512),
    (dafl.resnet34(width=0.25), 1_334_618, 3, 10, 128), (dafl.resnet18(width=0.5), 2_797_610, 3, 10, 256),
])  # fmt: skip
def test_classifiers_have_the_size_of_the_paper_times_width(model, parameters, channels, classes, width):
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
    generator.pixel_range = (-0.5, 2.0)
    cut = generator(torch.randn(16, 100)).detach()
    assert cut.min() == -0.5 and 0 < cut.max() <= 2


def test_the_faster_generator_gives_the_same_images_gradients_and_file():
    torch.manual_seed(0)
    plain, z = dafl.Generator(20, 3, 16), torch.randn(4, 20)
    faster = copy.deepcopy(plain)
    images, same = plain(z), dafl.accelerate(faster, torch.device("cpu"), "fp32")(z)
    torch.testing.assert_close(same, images, atol=1e-4, rtol=1e-4)
    images[0].abs().sum().backward(), same[0].abs().sum().backward()
    torch.testing.assert_close(faster.layers[2].weight.grad, plain.layers[2].weight.grad, atol=1e-2, rtol=1e-2)
    plain.load_state_dict(faster.state_dict())


def test_bf16_runs_generator_and_resnet_but_no_lenet_in_low_precision():
    torch.manual_seed(0)
    for model, x, rounded in [
        (dafl.LeNet5(), torch.randn(2, 1, 32, 32), False),
        (dafl.resnet18(width=0.25), torch.randn(2, 3, 32, 32), True),
        (dafl.Generator(), torch.randn(4, 100), True),
    ]:
        exact, fast = model(x), dafl.accelerate(model, torch.device("cpu"), "bf16")
        zeroed = copy.deepcopy(fast)
        for parameter in zeroed.parameters():
            parameter.data.zero_()
        exact, output, zeros = (y[0] if isinstance(y, tuple) else y for y in (exact, fast(x), zeroed(x)))
        assert output.dtype == torch.float32 and zeros.abs().max() == 0
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
        yield l_oh.item(), l_a.item(), l_ie.item(), l_kd.item()


@pytest.mark.parametrize("dataset, steps", [("mnist", 5), ("cifar10", 2)])
def test_distill_is_the_released_loop(dataset, steps, monkeypatch):
    args = dafl.parse_args(["--dataset", dataset, "--recipe", "released", "--device", "cpu"])
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(0)
        if dataset == "mnist":
            networks = dafl.LeNet5(), dafl.LeNet5(0.5), dafl.Generator()
        else:
            networks = dafl.resnet34(width=0.1), dafl.resnet18(width=0.1), dafl.Generator(20, 3)
        teacher, student, generator = networks
        teacher_2, student_2, generator_2 = copy.deepcopy(networks)
        optimizer_g = torch.optim.Adam(generator.parameters(), args.lr_g)
        optimizer_s, _ = dafl.make_optimizer(student, args.lr_s, args.steps, args.drops_s)
        released_g = torch.optim.Adam(generator_2.parameters(), lr={"mnist": 0.2, "cifar10": 0.02}[dataset])
        released_s = {
            "mnist": torch.optim.Adam(student_2.parameters(), lr=2e-3),
            "cifar10": torch.optim.SGD(student_2.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4),
        }[dataset]
        torch.manual_seed(1)
        noise = [torch.randn(16, generator.latent_dim) for _ in range(steps)]
        oh, a, ie = {"mnist": (1, 0.1, 5), "cifar10": (0.05, 0.01, 5)}[dataset]
        expected = list(released_loop(teacher_2, student_2, generator_2, noise, oh, a, ie, released_g, released_s))
        torch.manual_seed(1)
        losses = list(dafl.distill(teacher, student, generator, steps=steps, batch_size=16, optimizer_g=optimizer_g,
                                   optimizer_s=optimizer_s, oh=args.oh, alpha=args.alpha, beta=args.beta,
                                   temperature=args.temperature))  # fmt: skip
        assert torch.tensor(losses).sub(torch.tensor(expected)).abs().max() < 1e-8
        # Biases in front of a BatchNorm have no gradient but rounding noise, which Adam blows up.
        noisy = ("linear.bias", "layers.2.bias", "layers.6.bias", "layers.9.bias")
        for ours, theirs in ((student, student_2), (generator, generator_2)):
            for (name, x), y in zip(ours.named_parameters(), theirs.parameters()):
                assert name in noisy or (x - y).abs().max() < 1e-8, name
    finally:
        torch.set_default_dtype(torch.float32)


def test_distill_needs_three_modules_and_steps_and_leaves_the_teacher_alone():
    torch.manual_seed(0)
    teacher, student = dafl.resnet34(width=0.1), dafl.resnet18(width=0.1)
    before, start = copy.deepcopy(teacher.state_dict()), student.fc.weight.clone()
    generator = dafl.Generator(10, 3)
    turns = list(dafl.distill(teacher, student, generator, steps=2, batch_size=4))
    assert len(turns) == 2 and all(len(losses) == 4 and not any(x.requires_grad for x in losses) for losses in turns)
    assert not student.fc.weight.equal(start)
    assert not teacher.training and all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(tensor.equal(before[name]) for name, tensor in teacher.state_dict().items())


def test_memory_keeps_the_latest_images():
    memory = dafl.Memory(30, 4, (1, 2, 2), augment=lambda images: images)
    for value, kept in ((1, {1}), (2, {1, 2}), (3, {2, 3})):
        memory.keep(torch.full((2, 1, 2, 2), float(value)))
        batches = memory.replay(2)
        assert [batch.shape for batch in batches] == 30 * [(2, 1, 2, 2)]
        assert set(torch.cat(batches).unique().tolist()) == kept


def test_distort_puts_a_part_of_another_image_beside_each():
    torch.manual_seed(0)
    images = torch.arange(1.0, 65.0).view(64, 1, 1, 1).expand(64, 1, 32, 32)
    kinds = [set(image.round(decimals=3).unique().tolist()) for image in dafl.distort(images)]
    assert all(1 <= len(kind) <= 2 for kind in kinds) and sum(len(kind) == 2 for kind in kinds) > 32
    assert all(i + 1.0 in kind for i, kind in enumerate(kinds))


def test_distort_moves_and_scales_each_image_its_own_way():
    torch.manual_seed(0)
    image = torch.zeros(1, 1, 32, 32)
    image[..., 12:20, 12:20] = 1
    halves = dafl.distort(image.expand(400, -1, -1, -1), strength=0.1)
    assert halves.shape == (400, 1, 32, 32) and 0 <= halves.min() and halves.max() <= 1.001
    mass = halves.sum((1, 2, 3))
    x = halves.sum((1, 2)) @ torch.linspace(-31 / 32, 31 / 32, 32) / mass
    assert 0.07 < x.std() < 0.2 and 0.08 < (mass / 64).std() < 0.4
    still = dafl.distort(image.expand(400, -1, -1, -1), strength=0.0)
    torch.testing.assert_close(still, image.expand(400, -1, -1, -1), atol=1e-4, rtol=0)


# Data and training


def test_mnist_is_real_and_normalised():
    images, labels = dafl.load_dataset("mnist", "test")
    assert images.shape == (10_000, 1, 32, 32) and images.dtype == torch.float32
    assert labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    assert images.min().item() == pytest.approx(-0.1307 / 0.3081, abs=1e-3)
    assert images.mean().item() == pytest.approx(0, abs=0.1) and images.std().item() == pytest.approx(1, abs=0.1)


def test_evaluate_counts_hits_and_leaves_the_mode():
    class Threshold(nn.Module):
        def forward(self, images):
            assert not self.training
            return torch.stack([-images.mean((1, 2, 3)), images.mean((1, 2, 3))], 1), images

    model, images = Threshold(), torch.tensor([1.0, -1.0, 2.0, -2.0]).view(4, 1, 1, 1)
    assert dafl.evaluate(model, images, torch.tensor([1, 0, 0, 0])) == 0.75
    assert model.training


def test_crop_and_flip_gives_a_shifted_and_perhaps_mirrored_copy():
    torch.manual_seed(0)
    images = torch.rand(40, 3, 32, 32)
    seen = set()
    for image, result in zip(F.pad(images, (4, 4, 4, 4)), dafl.crop_and_flip(images)):
        crops = {(y, x): image[:, y : y + 32, x : x + 32] for y in range(9) for x in range(9)}
        (match,) = [
            (y, x, m) for (y, x), c in crops.items() for m in (False, True) if (c.flip(2) if m else c).equal(result)
        ]
        seen.add(match)
    assert len(seen) > 20 and {m for _, _, m in seen} == {False, True}


def test_cutout_blanks_one_square_somewhere_in_each_image():
    torch.manual_seed(0)
    images = torch.rand(40, 3, 32, 32) + 1
    results = dafl.cutout(images, 8)
    assert dafl.cutout(images, 0).equal(images)
    corners = set()
    for image, result in zip(images, results):
        y, x = (result[0] == 0).nonzero()[0].tolist()
        image[:, y : y + 8, x : x + 8] = 0
        assert result.equal(image)
        corners.add((y, x))
    assert len(corners) > 20


@pytest.mark.parametrize("dataset, steps, batch_size, latent_dim, lr_g, oh, beta, alpha, epochs, batch_size_t", [
    ("mnist", 200 * 120, 512, 100, 0.2, 1, 5, 0.1, 9, 256),
    ("cifar10", 2000 * 120, 1024, 1000, 0.02, 0.05, 5, 0.01, 199, 128),
    ("cifar100", 2000 * 120, 1024, 1000, 0.02, 0.5, 20, 0.1, 199, 128),
])  # fmt: skip
def test_released_recipe_has_the_released_values(dataset, steps, batch_size, latent_dim, lr_g, oh, beta, alpha, epochs,
                                                 batch_size_t):  # fmt: skip
    def rates(lr, drops, steps):
        optimizer, schedule = dafl.make_optimizer(nn.Linear(1, 1), lr, steps, drops)
        for _ in range(steps):
            yield optimizer.param_groups[0]["lr"]
            optimizer.step()
            schedule.step()

    args = dafl.parse_args(["--dataset", dataset, "--recipe", "released"])
    assert (args.steps, args.batch_size, args.latent_dim, args.lr_g) == (steps, batch_size, latent_dim, lr_g)
    assert (args.oh, args.beta, args.alpha) == (oh, beta, alpha)
    assert (args.teacher_epochs, args.batch_size_t) == (epochs, batch_size_t)
    assert (args.replay, args.temperature, args.width, args.precision) == (0, 1, 1, "fp32")
    assert not vars(args).get("cutout")
    assert args.pixel_range == (-math.inf, math.inf)
    teacher, student = rates(args.lr_t, args.drops_t, 199), rates(args.lr_s, args.drops_s, 2000)
    if dataset == "mnist":
        assert {*teacher} == {1e-3} and {*student} == {2e-3}
    else:
        assert list(teacher) == pytest.approx([0.1] * 79 + [0.01] * 40 + [0.001] * 80)
        assert list(student) == pytest.approx([0.1] * 800 + [0.01] * 800 + [0.001] * 400)


# Runs


def test_a_run_leaves_all_files(command, out):
    accuracies = dafl.main(command)
    pictures = {"samples.png", "samples.gif", "class_means.png"}
    assert {path.name for path in out.iterdir()} == {"settings.json", "log.csv", "student.pt", "generator.pt"} | pictures
    assert Image.open(out / "samples.gif").n_frames == 3
    dafl.LeNet5(0.5).load_state_dict(weights(out / "student.pt"))
    dafl.Generator().load_state_dict(weights(out / "generator.pt"))
    rows = read_log(out)
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    assert float(rows[-1]["accuracy"]) == accuracies["student"]
    assert all(-1 <= float(row["l_ie"]) <= 0 <= float(row["l_kd"]) and float(row["l_oh"]) >= 0 for row in rows)


def test_student_learns_digits_from_no_digits(command):
    assert dafl.main([*command, "--steps", "60", "--batch-size", "32", "--replay", "4"])["student"] > 0.6


def test_only_baselines_on_data_open_training_images(command, out, monkeypatch, capsys):
    load = dafl.load_dataset

    def guarded(name, split, **options):
        assert split == "test", "training images were asked for"
        return load(name, split, **options)

    monkeypatch.setattr(dafl, "load_dataset", guarded)
    for images in ("generator", "noise"):
        dafl.main([*command, "--images", images, "--out-dir", str(out / images)])
        assert "trained on         0 real images" in capsys.readouterr().out
    for images in ("real", "labels"):
        with pytest.raises(AssertionError, match="training images"):
            dafl.main([*command, "--images", images, "--out-dir", str(out / images)])
    monkeypatch.undo()
    for images in ("real", "labels"):
        dafl.main([*command, "--images", images, "--out-dir", str(out / images)])
        assert "trained on         60,000 real images" in capsys.readouterr().out
    for folder in (out / "noise", out / "real", out / "labels"):
        assert (folder / "student.pt").exists() and not (folder / "generator.pt").exists()
        assert read_log(folder)[-1]["step"] == "9", "as many updates as with a generator: 3 of 8 images, 6 on past ones"


def test_a_cifar_run_trains_narrow_resnets(out, monkeypatch):
    data = torch.randn(200, 3, 32, 32), torch.arange(200) % 10
    monkeypatch.setattr(dafl, "load_dataset", lambda name, split, **options: data)
    flags = "--dataset cifar10 --device cpu --teacher-epochs 1 --steps 2 --batch-size 8 --width 0.2 --replay 1"
    dafl.main([*flags.split(), "--out-dir", str(out)])
    dafl.resnet34(width=0.2).load_state_dict(weights(out / "teacher.pt"))
    dafl.resnet18(width=0.2).load_state_dict(weights(out / "student.pt"))
    assert [row["step"] for row in read_log(out)] == ["1", "2", "1", "2"]
    assert Image.open(out / "class_means.png").size == (10 * 34 + 2, 2 * 34 + 2)


def test_a_step_at_the_size_of_the_paper():
    torch.manual_seed(0)
    networks = dafl.resnet34(), dafl.resnet18(), dafl.Generator(1000, 3)
    (losses,) = dafl.distill(*networks, steps=1, batch_size=8)
    assert all(loss.isfinite() for loss in losses)


def test_same_seed_same_log_other_seed_other_log(command, out):
    logs = []
    for folder, seed in (("a", "7"), ("b", "7"), ("c", "8")):
        dafl.main([*command, "--seed", seed, "--out-dir", str(out / folder)])
        logs.append(read_log(out / folder))
    assert logs[0] == logs[1] != logs[2]


def test_a_picture_stands_in_the_column_of_its_class(tmp_path):
    stripes = torch.zeros(10, 1, 32, 32)  # class k is a bright stripe in rows 3k to 3k + 2
    for k in range(10):
        stripes[k, :, 3 * k : 3 * k + 3] = 1

    def teacher(images):
        return images[:, 0, :30, 0].unflatten(1, (10, 3)).sum(2), images

    drawn = stripes.repeat(4, 1, 1, 1)
    dafl.save_pictures(tmp_path, lambda n: stripes[torch.randint(10, (n,))], teacher, 10, stripes, torch.arange(10),
                       [drawn.flip(2), drawn])  # fmt: skip
    film = Image.open(tmp_path / "samples.gif")
    film.seek(1)
    film.convert("RGB").save(tmp_path / "last.png")
    for name, rows in (("samples.png", 8), ("class_means.png", 2), ("last.png", 4)):
        picture = pil_to_tensor(Image.open(tmp_path / name))[0]
        cells = picture[2:, 2:].unfold(0, 32, 34).unfold(1, 32, 34)  # a frame of 2 pixels around each image
        assert cells.shape[:2] == (rows, 10)
        assert (cells.float().div(255).round() == stripes[:, 0]).all()


# Interruption


def test_a_run_killed_in_either_stage_and_resumed_ends_with_the_same_weights(out, tmp_path, capsys):
    code = """load = dafl.load_dataset
dafl.load_dataset = lambda *args, **options: [part[:2000] for part in load(*args, **options)]
dafl.CHECKPOINT_SECONDS = 0
dafl.main(sys.argv[1:])"""
    command = [*SHORT, "--teacher-epochs", "2", "--steps", "12", "--out-dir"]
    child(code, *command, str(tmp_path / "whole")).communicate()
    for last_row, flags in (("5", []), ("2", ["--resume"])):  # the second goes on after the teacher's fourth step
        process = child(code, *command, str(out), *flags)
        assert any(line.split()[:1] == [last_row] for line in process.stdout)
        process.kill()
        process.communicate()
        assert (out / "teacher.pt").exists() == (last_row == "2") and not (out / "student.pt").exists()
    before = {path: path.read_bytes() for path in out.iterdir()}
    assert "--resume" in fails([*command, str(out)], capsys)
    assert "alpha" in fails([*command, str(out), "--alpha", "0", "--resume"], capsys)
    assert before == {path: path.read_bytes() for path in out.iterdir()}
    child(code, *command, str(out), "--resume").communicate()
    for name in ("teacher.pt", "student.pt"):
        whole, resumed = weights(tmp_path / "whole" / name), weights(out / name)
        assert all(resumed[key].equal(tensor) for key, tensor in whole.items())
    assert read_log(out) == read_log(tmp_path / "whole") and not (out / "checkpoint.pt").exists()


def test_a_finished_run_is_not_touched_and_its_teacher_is_named_with_its_making(command, teacher_file, capsys):
    folder = teacher_file.parent
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert "--out-dir" in fails([*command, "--out-dir", str(folder)], capsys)
    assert "checkpoint.pt" in fails([*command, "--out-dir", str(folder), "--resume"], capsys)
    assert before == {path: path.read_bytes() for path in folder.iterdir()}
    dafl.main(command)
    printed = capsys.readouterr().out
    assert str(teacher_file) in printed and '"teacher_epochs": "1"' in printed and '"seed": "0"' in printed


def test_a_checkpoint_of_another_device_is_refused_in_a_sentence(command, out, capsys, no_training):
    out.mkdir()
    settings = {name: str(value) for name, value in vars(dafl.parse_args(command)).items()}
    torch.save({"settings": settings | {"device": "cuda"}, "stage": "student"}, out / "checkpoint.pt")
    assert "device cuda" in fails([*command, "--resume"], capsys)
    torch.save({"weights": torch.zeros(1)}, out / "checkpoint.pt")
    assert "checkpoint.pt" in fails([*command, "--resume"], capsys)
    (out / "checkpoint.pt").write_bytes(b"half")
    assert "checkpoint.pt" in fails([*command, "--resume"], capsys)


def test_a_full_disk_ends_in_a_sentence_and_leaves_whole_files(command, out):
    limit = "import resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\ndafl.main(sys.argv[1:])"
    process = child(limit, *command)
    _, error = process.communicate()
    assert process.returncode == 2 and error.startswith("dafl.py: error: ") and error.count("\n") == 1
    assert {path.name for path in out.iterdir()} == {"settings.json", "log.csv", "checkpoint.pt.tmp"}


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(command, out, capsys, monkeypatch):
    calls = []

    def spoilt(features):
        calls.append(0)
        return features.mean() * (math.nan if len(calls) == 3 else 1)

    monkeypatch.setattr(dafl, "activation_loss", spoilt)
    monkeypatch.setattr(dafl, "CHECKPOINT_SECONDS", 0)
    error = fails(command, capsys)
    assert "step 3" in error and "learning rates" in error
    checkpoint = weights(out / "checkpoint.pt")
    assert checkpoint["step"] == 2 and all(t.isfinite().all() for t in checkpoint["student"].values())


# Mistakes: a sentence on stderr, exit code 2, before any training


def fails(command, capsys):
    """Run a command that is a mistake; gives its sentence on stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        dafl.main(command)
    *usage, error = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and error.startswith("dafl.py: error: ")
    assert usage in ([], ["usage: dafl.py [--flag value ...]"])
    return error


@pytest.fixture
def no_training(monkeypatch):
    for loop in ("train_classifier", "distill", "distill_on"):
        monkeypatch.setattr(dafl, loop, lambda *args, **kwargs: pytest.fail("training began"))


@pytest.mark.parametrize("flags", [
        "--dataset svhn", "--recipe slow", "--device tpu", "--images cats", "--steps 0", "--steps 1.5", "--batch-size 1",
        "--lr-g -1", "--lr-g nan", "--lr-s inf", "--oh -0.1", "--alpha nan", "--beta -5", "--replay -1", "--width 0",
        "--teacher-epochs 0", "--seed x", "--seed 99999999999999999999", "--no-such-flag",
])  # fmt: skip
def test_wrong_values(flags, no_training, capsys):
    assert flags.split()[0] in fails(flags.split(), capsys)


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_device_that_is_not_there(device, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert device in fails(["--device", device], capsys)
    assert dafl.parse_args([]).device == "cpu"


@pytest.mark.parametrize("cpu, precision", [
    ({"amx_bf16": True, "cpu_name": "Intel(R) Xeon(R)"}, "bf16"), ({"avx512_bf16": True, "cpu_name": "AMD"}, "bf16"),
    ({"avx512_bf16": True, "cpu_name": "Intel(R) Xeon(R)"}, "fp32"), ({}, "fp32"),
])  # fmt: skip
def test_precision_is_bf16_where_the_cpu_is_fast_in_it(cpu, precision, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu, raising=False)
    assert dafl.parse_args(["--device", "cpu"]).precision == precision
    assert dafl.parse_args(["--device", "cpu", "--recipe", "released"]).precision == "fp32"


@pytest.mark.parametrize("kind", ["missing", "truncated", "of another size", "whole module"])
def test_teacher_file_that_will_not_do(kind, command, teacher_file, tmp_path, no_training, capsys):
    path = tmp_path / "bad.pt"
    if kind == "truncated":
        path.write_bytes(teacher_file.read_bytes()[:1000])
    elif kind == "of another size":
        torch.save(dafl.LeNet5(0.5).state_dict(), path)
    elif kind == "whole module":  # unpickling one would run its code
        torch.save(dafl.LeNet5(), path)
    assert "bad.pt" in fails([*command, "--teacher", str(path)], capsys)


@pytest.mark.parametrize("name, source", [("mnist", datasets.MNIST), ("cifar100", datasets.CIFAR100)])
def test_data_that_cannot_be_had(name, source, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    monkeypatch.setattr(datasets.CIFAR100, "url", "http://127.0.0.1:9/")
    with pytest.raises(dafl.UserError, match=f"cannot read or download {name}"):
        dafl.load_dataset(name, "test", tmp_path)


def test_output_folder_that_cannot_be_made(command, tmp_path, no_training, capsys):
    (tmp_path / "file").write_text("")
    assert "file" in fails([*command, "--out-dir", str(tmp_path / "file" / "out")], capsys)


def test_import_prints_and_runs_nothing():
    assert child("").communicate() == ("", "")


# README


def test_readme_commands_parse():
    commands = re.findall(r"^ +(?:pip install [a-z ]+&& )?python dafl\.py(.*?)(?:#.*)?$", README, re.MULTILINE)
    assert len(commands) > 5
    for command in commands:
        if "--help" not in command:
            dafl.parse_args(shlex.split(command))


def test_readme_block_distils_a_teacher_of_ones_own(teacher_file, tmp_path, monkeypatch, capsys):
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(block.strip().splitlines()) <= 15
    exec(compile(block, "README.md", "exec"), {})
    assert 0.5 < float(capsys.readouterr().out.split()[-1]) <= 1
