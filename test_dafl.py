"""Tests of dafl.py: the equations by hand, the released loop, short runs on real MNIST, interruptions and mistakes."""

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
README = (HERE / "README.md").read_text(encoding="utf-8")
SHORT = ["--device", "cpu", "--steps", "3", "--batch-size", "8", "--replay", "2", "--teacher-epochs", "1"]
RESNET34, RESNET18 = (3, 4, 6, 3), (2, 2, 2, 2)
dafl.load_dataset = lru_cache(dafl.load_dataset)


@pytest.fixture(scope="session")
def command(tmp_path_factory):
    """The flags of a run of a few seconds. Its teacher was trained for one epoch on real MNIST by another run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("teacher"))
        assert dafl.main(SHORT)["teacher"] > 0.93
        return [*SHORT, "--teacher", str(Path("runs/mnist-fast-generator-0-1/teacher.pt").resolve())]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # each test has its own runs/


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_losses_are_the_numbers_worked_out_by_hand_and_stay_finite():
    by_hand = (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(-1))) / 2
    assert dafl.one_hot_loss(torch.tensor([[2.0, 0.0], [0.0, 1.0]])).item() == pytest.approx(by_hand, rel=1e-5)
    assert dafl.activation_loss(torch.tensor([[1.0, -3.0], [0.0, 2.0]])).item() == -1.5
    logits, by_hand = torch.tensor([[0.9, 0.1], [0.5, 0.5]]).log(), 0.7 * math.log10(0.7) + 0.3 * math.log10(0.3)
    assert dafl.information_entropy_loss(logits).item() == pytest.approx(by_hand, rel=1e-5)
    assert dafl.information_entropy_loss(50 * torch.eye(10)).item() == pytest.approx(-1, abs=1e-5)
    teacher, student = torch.tensor([[0.75, 0.25], [0.5, 0.5]]).log(), torch.zeros(2, 2, requires_grad=True)
    by_hand = (0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)) / 2
    assert dafl.kd_loss(student, teacher).item() == pytest.approx(by_hand, rel=1e-5)
    assert dafl.kd_loss(2 * student, 2 * teacher, temperature=2).item() == pytest.approx(4 * by_hand, rel=1e-5)
    losses = dafl.kd_loss(student, teacher), F.cross_entropy(student, teacher.softmax(1))
    torch.testing.assert_close(*(torch.autograd.grad(loss, student) for loss in losses))
    with pytest.raises(ValueError, match=r"student \[64, 1\], teacher \[64, 10\]"):
        dafl.kd_loss(torch.zeros(64, 1), torch.zeros(64, 10))
    x = torch.tensor([[1e30, -1e30, 0.0], [1e30, 0.0, 0.0]], requires_grad=True)  # some probabilities are exactly 0
    for loss in dafl.kd_loss(x, x.detach().flip(1)), dafl.one_hot_loss(x), dafl.information_entropy_loss(x):
        assert loss.isfinite() and torch.autograd.grad(loss, x)[0].isfinite().all()


def test_classifiers_have_the_size_of_the_paper_and_the_released_names():
    for model, parameters, *shapes in (
        (dafl.LeNet5(), 61_706, (2, 10), (2, 120)),
        (dafl.LeNet5(width=0.5), 15_738, (2, 10), (2, 60)),
        (dafl.ResNet(RESNET34), 21_282_122, (2, 10), (2, 512)),
        (dafl.ResNet(RESNET18, 100, width=0.5), 2_820_740, (2, 100), (2, 256)),
    ):
        assert sum(p.numel() for p in model.parameters()) == parameters
        assert [x.shape for x in model(torch.randn(2, model.conv1.in_channels, 32, 32))] == shapes
    names = dafl.ResNet(RESNET34).state_dict().keys()
    assert {name.split(".")[0] for name in names} == {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "linear"}
    assert {"layer1.2.conv2.weight", "layer4.2.bn2.running_var", "layer2.0.shortcut.1.weight"} <= names


def test_mnist_is_real_and_generated_images_are_normalised_as_it_is():
    images, labels = dafl.load_dataset("mnist", "test")
    assert images.shape == (10_000, 1, 32, 32) and labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    assert images.mean().item() == pytest.approx(0, abs=0.1) and images.std().item() == pytest.approx(1, abs=0.1)
    for channels, size, parameters in (1, 32, 1_049_985), (3, 16, 430_595):
        generator = dafl.Generator(100, channels, size)
        images = generator(torch.randn(16, 100))
        std, mean = torch.std_mean(images, (0, 2, 3))
        assert images.shape == (16, channels, size, size) and mean.abs().max() < 1e-3 and (std - 1).abs().max() < 1e-2
        assert sum(p.numel() for p in generator.parameters()) == parameters


@pytest.mark.parametrize("dataset", ["mnist", "cifar10"])
def test_distill_step_is_the_released_loop(dataset):
    torch.manual_seed(0)
    if dataset == "mnist":
        networks = dafl.LeNet5(), dafl.Generator(), dafl.LeNet5(width=0.5)
        oh, a, ie, lr_g, adam_or_sgd = 1, 0.1, 5, 0.2, partial(Adam, lr=2e-3)
    else:
        networks = dafl.ResNet(RESNET34, width=0.25), dafl.Generator(100, 3), dafl.ResNet(RESNET18, width=0.25)
        oh, a, ie, lr_g, adam_or_sgd = 0.05, 0.01, 5, 0.02, partial(SGD, lr=0.1, momentum=0.9, weight_decay=5e-4)
    ours = [network.double() for network in networks]
    teacher, generator, student = copy.deepcopy(ours)
    teacher.eval()
    for i, channels in (3, 128), (6, 64):  # the released generator upsamples first and then convolves
        convolution = nn.Conv2d(128, channels, 3, padding=1, dtype=torch.float64)
        convolution.load_state_dict(generator[i].state_dict())
        generator[i] = nn.Sequential(nn.Upsample(scale_factor=2), convolution)
    released_g, released_s = Adam(generator.parameters(), lr_g), adam_or_sgd(student.parameters())
    args = dafl.parse_args(["--dataset", dataset, "--recipe", "released"])
    optimizer_g = Adam(ours[1].parameters(), args.lr_g)
    optimizer_s, _ = dafl.make_optimizer(ours[2], args.lr_s, args.steps, args.recipe, (0.4, 0.8))
    options = {"oh": args.oh, "alpha": args.alpha, "beta": args.beta, "temperature": args.temperature}
    for z in torch.randn(3, 16, 100, dtype=torch.float64):
        losses, _ = dafl.distill_step(*ours, optimizer_g, optimizer_s, z, **options)
        # The released loop, written anew: it has one backward pass through the sum of all four losses.
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
    for network, released in (ours[1], generator), (ours[2], student):
        assert all((x - y).abs().max() < 1e-8 for x, y in zip(network.parameters(), released.parameters()))


def test_steps_set_modes_and_leave_alone_the_teacher_and_frozen_layers():
    torch.manual_seed(0)
    teacher, student = (dafl.ResNet(RESNET18, width=0.25) for _ in range(2))
    generator = dafl.Generator(10, 3)
    frozen, before = student.conv1.requires_grad_(False).weight.clone(), copy.deepcopy(teacher.state_dict())
    optimizers = [Adam(network.parameters(), 0.01) for network in (generator, student)]
    student.eval()  # as a user's own evaluation leaves it
    _, images = dafl.distill_step(teacher, generator, student, *optimizers, torch.randn(4, 10))
    assert student.training and generator.training and not teacher.training and not images.requires_grad
    losses = [dafl.kd_step(teacher, student, optimizers[1], images)["l_kd"] for _ in range(20)]
    assert losses[-1] < losses[0] and student.conv1.weight.equal(frozen)
    assert all(tensor.equal(before[name]) for name, tensor in teacher.state_dict().items())


@pytest.mark.filterwarnings("ignore:.torch.jit.script")
def test_networks_may_return_logits_alone_and_be_torchscript():
    plain, student = (nn.Sequential(nn.Flatten(), nn.Linear(1024, 10)) for _ in range(2))
    for teacher in (plain, torch.jit.script(plain)):
        generator, before = dafl.Generator(), student[1].weight.clone()
        optimizers = [SGD(network.parameters(), 0.1) for network in (generator, student)]
        losses, _ = dafl.distill_step(teacher, generator, student, *optimizers, torch.randn(4, 100), alpha=0)
        assert losses["l_a"] == 0 and not student[1].weight.equal(before)
        with pytest.raises(ValueError, match="L_a needs features"):
            dafl.distill_step(teacher, generator, student, *optimizers, torch.randn(4, 100))
    for logits, labels in ((10, 10), (10,)), ((10, 10, 1, 1), (10,)), ((10, 10), (10, 1)):
        assert dafl.evaluate(nn.Identity(), torch.eye(10).view(logits), torch.arange(10).view(labels)) == 1


def test_cut_and_join_shows_a_part_of_another_image_and_crop_and_flip_a_shifted_perhaps_mirrored_copy():
    torch.manual_seed(0)
    images = torch.arange(1.0, 65.0).view(64, 1, 1, 1).expand(64, 3, 32, 32)
    joined = dafl.cut_and_join(images)
    kinds, kept = [len(image.unique()) for image in joined], (joined == images).float().mean((1, 2, 3))
    assert {*kinds} == {1, 2} and kinds.count(2) > 32 and 0.4 < kept.mean() < 0.9 and kept.std() > 0.1
    images, seen = torch.rand(40, 3, 28, 40), []
    for image, result in zip(F.pad(images, (4, 4, 4, 4)), dafl.crop_and_flip(images)):
        crops = {(y, x): image[:, y : y + 28, x : x + 40] for y in range(9) for x in range(9)}
        seen += [(at, m) for at, crop in crops.items() for m in (0, 1) if result.equal(crop.flip(2) if m else crop)]
    assert len(seen) == 40 and len({*seen}) > 20 and {mirrored for _, mirrored in seen} == {0, 1}


def test_a_run_leaves_all_files_repeats_with_its_seed_and_overwrites_none(command):
    accuracies = dafl.main(["--seed", "7", *command])
    first, second, other = (Path(f"runs/mnist-fast-generator-{run}") for run in ("7-1", "7-2", "-8-1"))
    networks = {"teacher.pt": dafl.LeNet5(), "student.pt": dafl.LeNet5(width=0.5), "generator.pt": dafl.Generator()}
    for name, network in networks.items():
        dafl.load_weights(network, first / name)
    before = files(first)
    assert set(before) == {*networks, "student.csv", "args.json", "generated.png"}
    assert Image.open(first / "generated.png").size == (10 * 34 + 2, 8 * 34 + 2)
    header, *log = before["student.csv"].decode().splitlines()
    assert header == "step,l_oh,l_a,l_ie,l_kd,accuracy" and [line.split(",")[0] for line in log] == ["1", "2", "3"]
    assert float(log[-1].split(",")[-1]) == accuracies["student"]
    dafl.main(["--seed", "7", *command])
    dafl.main(["--seed", "-8", *command])
    assert files(first) == before == files(second) and before["student.pt"] != files(other)["student.pt"]


def test_the_student_begins_with_none_of_the_teachers_weights(monkeypatch):
    started = []
    monkeypatch.setattr(dafl, "train_student", lambda *networks: started.extend(copy.deepcopy(networks[:3])))
    dafl.main(["--device", "cpu", "--images", "labels"])  # which trains no teacher
    teacher, _, student = (network.state_dict() for network in started)
    for name, weights in student.items():
        corner = teacher[name][tuple(slice(size) for size in weights.shape)]
        assert not (weights == corner).any(), name


@pytest.mark.parametrize("device", sorted({"cpu", dafl.parse_args([]).device}))
def test_student_learns_digits_from_no_digits(device, command):
    assert dafl.main([*command, *f"--device {device} --steps 60 --batch-size 32 --replay 4".split()])["student"] > 0.6


@pytest.mark.parametrize("images", ["generator", "noise", "real", "labels"])
def test_only_baselines_on_data_open_training_images(images, command, monkeypatch):
    opened, load = [], dafl.load_dataset
    monkeypatch.setattr(dafl, "load_dataset", lambda *args: opened.append(args[1]) or load(*args))
    accuracies = dafl.main([*command, "--images", images])
    assert opened == (["test", "train"] if images in ("real", "labels") else ["test"])
    assert list(accuracies) == (["student"] if images == "labels" else ["teacher", "student"])
    last = Path(f"runs/mnist-fast-{images}-0-1/student.csv").read_text().splitlines()[-1]
    assert last.startswith("3," if images == "generator" else "9,")  # 3 updates on generated images, 6 on past ones


def test_a_cifar_run_trains_narrow_resnets(monkeypatch):
    data = Namespace(data=torch.randint(256, (200, 32, 32, 3)).byte().numpy(), targets=[3] * 200)
    monkeypatch.setitem(dafl.DATASETS, "cifar10", (lambda *_, **__: data, *dafl.DATASETS["cifar10"][1:]))
    dafl.main([*SHORT, "--dataset", "cifar10"])
    for name, blocks in ("teacher", RESNET34), ("student", RESNET18):
        dafl.load_weights(dafl.ResNet(blocks, width=0.25), f"runs/cifar10-fast-generator-0-1/{name}.pt")


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
        flags = ["--resume", str(stopped)]
    (stopped / "args.json").write_text((whole / "args.json").read_text().replace('"cpu"', '"gone"'))
    assert dafl.parse_args(flags).device == dafl.parse_args([]).device
    (stopped / "args.json").write_text((whole / "args.json").read_text())
    dafl.main(flags)
    assert files(whole) == files(stopped)


WRONG = """--recipe slow, --device tpu, --steps 0, --steps 1.5, --batch-size 1, --lr-g -1, --lr-g nan, --lr-s inf,
    --seed x, --no-such-flag, --resume nowhere, --resume finished, --resume unfinished --seed 0, --teacher nowhere"""


@pytest.mark.parametrize("flags", [*WRONG.split(","), "--images labels --lr-s 1e30"])
def test_a_mistake_ends_in_one_sentence(flags, command, monkeypatch, capsys):
    start = [] if "--resume" in flags else command
    flags = flags.replace(" finished", f" {Path(command[-1]).parent}").split()
    monkeypatch.setattr(sys, "argv", ["dafl.py", *start, *flags])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(HERE / "dafl.py"), run_name="__main__")
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("dafl.py: error: ") and re.search(f"{flags[0]}|{flags[-1]}|not finite", error)


def test_a_teacher_file_is_a_state_dict_as_people_publish_it_and_runs_no_code(command):
    state = dafl.LeNet5().state_dict()
    parallel, compiled = ({prefix + name: x for name, x in state.items()} for prefix in ("module.", "_orig_mod."))
    for content in (parallel, compiled, {"state_dict": state, "epoch": 3}, {"state_dict": parallel}):
        torch.save(content, "published.pt")
        dafl.load_weights(network := dafl.LeNet5(), "published.pt")
        assert all(tensor.equal(state[name]) for name, tensor in network.state_dict().items())
    for content in (b"a text", b"", [1, 2], {"net": state}, dafl.LeNet5(), dafl.LeNet5(width=0.5).state_dict()):
        Path("bad.pt").write_bytes(content) if isinstance(content, bytes) else torch.save(content, "bad.pt")
        with pytest.raises(OSError, match=r"bad\.pt") as error:
            dafl.main([*command, "--teacher", "bad.pt"])
        assert content != {"net": state} or 'Unexpected key(s) in state_dict: "net"' in str(error.value)
    assert not Path("runs").exists()


def test_readme_commands_parse_and_its_block_distils_a_teacher(command, monkeypatch):
    commands = [found.split() for found in re.findall(r"`(?:python dafl\.py )?(--[^`]*)`", README)]
    assert all(dafl.parse_args(x) for x in commands if x[0] not in ("--help", "--resume")) and len(commands) >= 5
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    setup = f"import sys, torch; sys.path.insert(0, {str(HERE)!r}); torch.manual_seed(0)\n"
    script = setup + block.replace("= 100, 128", "= 40, 32")
    monkeypatch.chdir(Path(command[-1]).parents[2])  # where there is a teacher
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert re.search(r"(?s)teacher 9\d.*step 40: [^\n]* student [7-9]\d", result.stdout), result.stdout + result.stderr
