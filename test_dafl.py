"""Tests of dafl.py: the equations by hand, the released loop, short runs on real MNIST, interruptions, mistakes."""

import copy
import math
import re
import runpy
import subprocess
import sys
from argparse import Namespace
from functools import lru_cache, partial
from itertools import count
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.optim import SGD, Adam

import dafl

HERE = Path(__file__).parent
README = (HERE / "README.md").read_text()
SHORT = ["--device", "cpu", "--steps", "3", "--batch-size", "8", "--replay", "2", "--teacher-epochs", "1"]
RESNET34, RESNET18 = (3, 4, 6, 3), (2, 2, 2, 2)
dafl.load_dataset = lru_cache(dafl.load_dataset)


@pytest.fixture(scope="session")
def command(tmp_path_factory):
    """The flags of a run of a few seconds, with a teacher that another trained on real MNIST for one epoch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("teacher"))
        assert dafl.main(SHORT)["teacher"] > 0.93
        return [*SHORT, "--teacher", str(Path("runs/mnist-fast-generator-0-1/teacher.pt").resolve())]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # and so its own runs/


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_each_loss_is_the_number_worked_out_by_hand_and_finite_when_a_probability_is_zero():
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
    losses = dafl.kd_loss(student.requires_grad_(), teacher), F.cross_entropy(student, teacher.softmax(1))  # Eq. 1
    torch.testing.assert_close(*(torch.autograd.grad(loss, student) for loss in losses))
    zero = torch.tensor([[1e30, -1e30, 0.0], [1e30, 0.0, 0.0]], requires_grad=True)
    kd = dafl.kd_loss(zero, zero.detach().flip(1))
    for loss in (kd, dafl.one_hot_loss(zero), dafl.information_entropy_loss(zero)):
        assert loss.isfinite() and torch.autograd.grad(loss, zero)[0].isfinite().all()
    with pytest.raises(ValueError, match=r"student \[64, 1\], teacher \[64, 10\]"):
        dafl.kd_loss(torch.zeros(64, 1), torch.zeros(64, 10))


def test_classifiers_have_the_size_of_the_paper_and_the_released_names():
    for model, parameters, *shapes in (
        (dafl.LeNet5(), 61_706, (2, 10), (2, 120)),
        (dafl.LeNet5(width=0.5), 15_738, (2, 10), (2, 60)),
        (dafl.ResNet(RESNET34), 21_282_122, (2, 10), (2, 512)),
        (dafl.ResNet(RESNET18, 100, width=0.5), 2_820_740, (2, 100), (2, 256)),
    ):
        assert sum(p.numel() for p in model.parameters()) == parameters
        assert [x.shape for x in model(torch.randn(2, model.conv1.in_channels, 32, 32))] == shapes
    names, released = dafl.ResNet(RESNET34).state_dict().keys(), "conv1 bn1 layer1 layer2 layer3 layer4 linear"
    assert len(names) == 218 and {name.split(".")[0] for name in names} == {*released.split()}
    assert {"layer1.2.conv2.weight", "layer4.2.bn2.running_var", "layer2.0.shortcut.1.weight"} <= names


@pytest.mark.parametrize(("channels", "size", "parameters"), [(1, 32, 1_049_985), (3, 16, 430_595)])
def test_generator_gives_images_normalised_like_the_data(channels, size, parameters):
    torch.manual_seed(0)
    generator, z = dafl.Generator(100, channels, size), torch.randn(16, 100)
    assert sum(p.numel() for p in generator.parameters()) == parameters
    assert generator(z).shape == (16, channels, size, size)
    std, mean = torch.std_mean(generator(z), (0, 2, 3))
    assert mean.abs().max() < 1e-3 and (std - 1).abs().max() < 1e-2
    cut = dafl.Generator(100, channels, size, pixel_range=(-0.5, 2.0))(z)
    assert cut.min() == -0.5 and 0 < cut.max() <= 2


def test_upsample_conv_is_an_upsampling_and_a_convolution():
    torch.manual_seed(0)
    fast, x = dafl.UpsampleConv2d(4, 6, 3), torch.randn(2, 4, 5, 5)
    plain = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(4, 6, 3, padding=1))
    plain[1].load_state_dict(fast.state_dict())
    torch.testing.assert_close(fast(x), plain(x), atol=1e-5, rtol=1e-4)
    gradients = [torch.autograd.grad(layer(x).square().sum(), layer.parameters()) for layer in (fast, plain)]
    torch.testing.assert_close(*gradients, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("dataset", ["mnist", "cifar10"])
def test_distill_step_is_the_released_loop(dataset):
    torch.manual_seed(0)
    if dataset == "mnist":
        networks = dafl.LeNet5(), dafl.LeNet5(width=0.5), dafl.Generator()
        oh, a, ie, lr_g, released_s = 1, 0.1, 5, 0.2, partial(Adam, lr=2e-3)
    else:
        networks = dafl.ResNet(RESNET34, width=0.1), dafl.ResNet(RESNET18, width=0.1), dafl.Generator(100, 3)
        oh, a, ie, lr_g, released_s = 0.05, 0.01, 5, 0.02, partial(SGD, lr=0.1, momentum=0.9, weight_decay=5e-4)
    networks = [network.double() for network in networks]
    teacher, student, generator = copy.deepcopy(networks)
    teacher.eval()
    released_g, released_s = Adam(generator.parameters(), lr_g), released_s(student.parameters())
    args = dafl.parse_args(["--dataset", dataset, "--recipe", "released"])
    optimizer_g = Adam(networks[2].parameters(), args.lr_g)
    optimizer_s, _ = dafl.make_optimizer(networks[1], args.lr_s, args.steps, args.recipe, (0.4, 0.8))
    options = {"oh": args.oh, "alpha": args.alpha, "beta": args.beta, "temperature": args.temperature}
    for z in torch.randn(3, 16, 100, dtype=torch.float64):
        losses, _ = dafl.distill_step(*networks, optimizer_g, optimizer_s, z, **options)
        # The released code's loop, written anew: one backward pass through the sum of all four losses.
        released_g.zero_grad()
        released_s.zero_grad()
        images = generator(z)
        logits, features = teacher(images)
        l_oh, l_a = nn.CrossEntropyLoss()(logits, logits.data.max(1)[1]), -features.abs().mean()
        mean_output = F.softmax(logits, dim=1).mean(dim=0)
        l_ie = (mean_output * torch.log10(mean_output)).sum()
        log_q, p = F.log_softmax(student(images.detach())[0], dim=1), F.softmax(logits.detach(), dim=1)
        l_kd = F.kl_div(log_q, p, reduction="sum") / len(images)
        (oh * l_oh + a * l_a + ie * l_ie + l_kd).backward()
        released_g.step()
        released_s.step()
        torch.testing.assert_close([*losses.values()], [l_oh, l_a, l_ie, l_kd], atol=1e-8, rtol=0)
    assert all((x - y).abs().max() < 1e-8 for x, y in zip(networks[1].parameters(), student.parameters()))


def test_steps_set_modes_and_leave_alone_the_teacher_and_frozen_layers():
    torch.manual_seed(0)
    teacher, student, generator = *(dafl.ResNet(RESNET18, width=0.1) for _ in range(2)), dafl.Generator(10, 3)
    frozen, before = student.conv1.requires_grad_(False).weight.clone(), copy.deepcopy(teacher.state_dict())
    optimizers = [Adam(network.parameters(), 0.01) for network in (generator, student)]
    student.eval()  # as a user's own evaluation leaves it
    _, images = dafl.distill_step(teacher, student, generator, *optimizers, torch.randn(4, 10))
    assert student.training and generator.training and not teacher.training and not images.requires_grad
    losses = [dafl.kd_step(teacher, student, optimizers[1], images)["l_kd"] for _ in range(20)]
    assert losses[-1] < losses[0] and student.conv1.weight.equal(frozen)
    assert all(tensor.equal(before[name]) for name, tensor in teacher.state_dict().items())


def test_networks_may_return_logits_alone():
    teacher, student = (nn.Sequential(nn.Flatten(), nn.Linear(1024, 10)) for _ in range(2))
    generator, before = dafl.Generator(), student[1].weight.clone()
    optimizers = [SGD(network.parameters(), 0.1) for network in (generator, student)]
    losses, _ = dafl.distill_step(teacher, student, generator, *optimizers, torch.randn(4, 100), alpha=0)
    assert losses["l_a"] == 0 and not student[1].weight.equal(before)
    with pytest.raises(ValueError, match="L_a needs features"):
        dafl.distill_step(teacher, student, generator, *optimizers, torch.randn(4, 100))


def test_cutmix_shows_a_part_of_another_image_and_crop_and_flip_a_shifted_perhaps_mirrored_copy():
    torch.manual_seed(0)
    images = torch.arange(1.0, 65.0).view(64, 1, 1, 1).expand(64, 3, 32, 32)
    mixed = dafl.cutmix(images)
    kinds, kept = [len(image.unique()) for image in mixed], (mixed == images).float().mean((1, 2, 3))
    assert {*kinds} == {1, 2} and kinds.count(2) > 32 and 0.4 < kept.mean() < 0.9 and kept.std() > 0.1
    images, seen = torch.rand(40, 3, 32, 32), []
    for image, result in zip(F.pad(images, (4, 4, 4, 4)), dafl.crop_and_flip(images)):
        crops = {(y, x): image[:, y : y + 32, x : x + 32] for y in range(9) for x in range(9)}
        seen += [(at, m) for at, crop in crops.items() for m in (0, 1) if result.equal(crop.flip(2) if m else crop)]
    assert len(seen) == 40 and len({*seen}) > 20 and {mirrored for _, mirrored in seen} == {0, 1}


def test_mnist_is_real_and_normalised():
    images, labels = dafl.load_dataset("mnist", "test")
    assert images.shape == (10_000, 1, 32, 32) and labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    assert images.mean().item() == pytest.approx(0, abs=0.1) and images.std().item() == pytest.approx(1, abs=0.1)


def test_a_run_leaves_all_files_repeats_with_its_seed_and_overwrites_none(command):
    accuracies = dafl.main(["--seed", "7", *command])
    first, second, other = (Path(f"runs/mnist-fast-generator-{run}") for run in ("7-1", "7-2", "-8-1"))
    networks = {"teacher.pt": dafl.LeNet5(), "student.pt": dafl.LeNet5(width=0.5), "generator.pt": dafl.Generator()}
    for name, network in networks.items():
        dafl.load_weights(network, first / name)
    before = files(first)
    assert {*before} == {*networks, "student.csv", "args.json", "generated.png"}
    assert Image.open(first / "generated.png").size == (10 * 34 + 2, 8 * 34 + 2)
    header, *log = before["student.csv"].decode().splitlines()
    assert header == "step,l_oh,l_a,l_ie,l_kd,accuracy" and [line.split(",")[0] for line in log] == ["1", "2", "3"]
    assert float(log[-1].split(",")[-1]) == accuracies["student"]
    dafl.main(["--seed", "7", *command])
    dafl.main(["--seed", "-8", *command])
    assert files(first) == before == files(second) and before["student.pt"] != files(other)["student.pt"]


@pytest.mark.parametrize("device", sorted({"cpu", dafl.parse_args([]).device}))
def test_student_learns_digits_from_no_digits(device, command):
    assert dafl.main([*command, *f"--device {device} --steps 60 --batch-size 32 --replay 4".split()])["student"] > 0.6


@pytest.mark.parametrize("images", ["generator", "noise", "real", "labels"])
def test_only_baselines_on_data_open_training_images(images, command, monkeypatch):
    opened, load = [], dafl.load_dataset
    monkeypatch.setattr(dafl, "load_dataset", lambda *args: opened.append(args[1]) or load(*args))
    dafl.main([*command, "--images", images])
    assert opened == (["test", "train"] if images in ("real", "labels") else ["test"])
    last = Path(f"runs/mnist-fast-{images}-0-1/student.csv").read_text().splitlines()[-1]
    assert last.startswith("3," if images == "generator" else "9,")  # 3 updates on images drawn, 6 on past ones


def test_a_cifar_run_trains_narrow_resnets(monkeypatch):
    data = Namespace(data=torch.randint(256, (200, 32, 32, 3)).byte().numpy(), targets=[3] * 200)
    monkeypatch.setitem(dafl.DATASETS, "cifar10", (lambda *_, **__: data, *dafl.DATASETS["cifar10"][1:]))
    assert dafl.load_dataset("cifar10", "test")[0].is_contiguous()
    dafl.main([*SHORT, "--dataset", "cifar10"])
    for name, blocks in ("teacher", RESNET34), ("student", RESNET18):
        dafl.load_weights(dafl.ResNet(blocks, width=0.25), f"runs/cifar10-fast-generator-0-1/{name}.pt")
    assert dafl.parse_args(["--dataset", "cifar100"]).batch_size > 100  # a batch can show all classes


def test_a_run_stopped_in_either_stage_and_resumed_ends_with_the_same_files(monkeypatch):
    flags, report, reports, load = [*SHORT, "--steps", "6"], dafl.report, count(1), dafl.load_dataset
    whole, stopped = Path("runs/mnist-fast-generator-0-1"), Path("runs/mnist-fast-generator-0-2")

    def stopping_report(*args):
        report(*args)
        if next(reports) in (5, 13):  # the teacher's fifth of eight, the student's fourth of six
            raise KeyboardInterrupt

    monkeypatch.setattr(dafl, "load_dataset", lambda *args: [part[:2000] for part in load(*args)])
    dafl.main(flags)
    monkeypatch.setattr(dafl, "CHECKPOINT_SECONDS", 0)
    monkeypatch.setattr(dafl, "report", stopping_report)
    for stage, done in ("teacher", 4), ("student", 3):
        with pytest.raises(KeyboardInterrupt):
            dafl.main(flags)
        assert torch.load(stopped / f"{stage}-checkpoint.pt", weights_only=True)["step"] == done
        flags = ["--resume", str(stopped), "--device", "cpu"]
    dafl.main(flags)
    assert files(whole) == files(stopped)


WRONG = """--recipe slow, --device tpu, --steps 0, --steps 1.5, --batch-size 1, --lr-g -1, --lr-g nan, --lr-s inf,
    --seed x, --no-such-flag, --resume nowhere, --resume finished, --teacher nowhere, --images labels --lr-s 1e30"""


@pytest.mark.parametrize("flags", WRONG.split(","))
def test_a_mistake_ends_in_one_sentence(flags, command, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dafl.py", *command, *flags.replace("finished", command[-1][:-11]).split()])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(HERE / "dafl.py"), run_name="__main__")
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("dafl.py: error: ") and ("not finite" in error or flags.split()[-1] in error)


def test_a_teacher_file_is_a_state_dict_as_people_publish_it_and_runs_no_code(command):
    state = dafl.LeNet5().state_dict()
    wrapped = {f"module.{name}": tensor for name, tensor in state.items()}
    for content in (wrapped, {"state_dict": state, "epoch": 3}, {"state_dict": wrapped}):
        torch.save(content, "published.pt")
        dafl.load_weights(network := dafl.LeNet5(), "published.pt")
        assert all(tensor.equal(state[name]) for name, tensor in network.state_dict().items())
    for content in (b"a text", b"", [1, 2], dafl.LeNet5(), dafl.LeNet5(width=0.5).state_dict()):
        Path("bad.pt").write_bytes(content) if isinstance(content, bytes) else torch.save(content, "bad.pt")
        with pytest.raises(OSError, match=r"bad\.pt"):
            dafl.main([*command, "--teacher", "bad.pt"])
    assert not Path("runs").exists()


def test_readme_commands_parse_and_its_block_distils_a_teacher_of_ones_own():
    commands = [found.split() for found in re.findall(r"`(?:python dafl\.py )?(--[^`]*)`", README)]
    assert all(dafl.parse_args(x) for x in commands if x[0] not in ("--help", "--resume")) and len(commands) >= 5
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    script = f"import sys; sys.path.insert(0, {str(HERE)!r})\n" + block.replace("= 40, 128", "= 40, 32")
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert re.search(r"teacher [89]\d\.\d+%\nstudent [89]\d\.\d+%\n", result.stdout), result.stderr
