"""`distill wrap`: the file that it writes, what it guesses, and the doctor on data of any shape."""

import json

import pytest
import torch
from safetensors.torch import save_file

from distill.planning.doctor import takes_pictures
from teachers import load
from teachers.storage.plugin import import_file
from tests.helpers.command_line import called
from tests.helpers.refusals import refused_line

# The exact ε of two sounds, ±0.5 everywhere, under DDPM's betas; it reads the index.
EPS = """
import torch
from torch import nn


class Block(nn.Module):
    def forward(self, x, other):
        return x


class Eps(nn.Module):
    def __init__(self):
        super().__init__()
        bar = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
        self.register_buffer("bar", bar)
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x, t):
        bar = self.bar[t.round().long().clamp(0, 999)].float()[:, None, None]
        a, s = bar.sqrt(), (1 - bar).sqrt()
        x0 = 0.5 * torch.tanh(0.5 * a * x.sum(-1, keepdim=True) / s**2)
        return self.gain * (x - a * x0) / s


def data():
    signs = torch.randint(2, (64, 1, 1), generator=torch.Generator().manual_seed(5))
    return (signs - 0.5).expand(64, 1, 16)
"""

# The exact flow of N((k, -k), 0.1²) for each label k of 3; the null label 3 is read as label 1.
LABELS = """
import torch
from torch import nn


class Flow(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding({entries}, 2)
        with torch.no_grad():
            k = torch.tensor([0.0, 1.0, 2.0, 1.0])[:{entries}]
            self.table.weight.copy_(torch.stack([k, -k], 1))

    def forward(self, x, t, {argument}):
        mean, t = self.table({labels}), t[:, None]
        a = 1 - t
        x0 = mean + a * 0.01 / (a**2 * 0.01 + t**2) * (x - a * mean)
        return (x - x0) / t.clamp(min=1e-4)


def data():
    labels = torch.arange(30) % 3
    k = labels.float()
    noise = torch.randn(30, 2, generator=torch.Generator().manual_seed(1))
    return torch.stack([k, -k], 1) + 0.1 * noise, {returned}
"""

PLAIN = """
from torch import nn


class {name}(nn.Module):
    def __init__(self{argument}):
        super().__init__()
        self.layer = nn.Conv1d(2, 2, 3, padding=1)

    def forward(self, x, t, cond=None):
        return self.layer(x)
"""


def test_what_a_trained_network_predicts_is_guessed_and_the_doctor_agrees(tmp_path, capsys):
    (tmp_path / "eps_net.py").write_text(EPS)
    network = import_file(tmp_path / "eps_net.py").Eps()
    save_file(network.state_dict(), tmp_path / "eps.safetensors")
    code, out, err = called(
        capsys, "wrap", tmp_path / "eps_net.py", "--data", f"{tmp_path / 'eps_net.py'}:data",
        "--weights", tmp_path / "eps.safetensors",
    )  # fmt: skip
    assert code == 0, err
    assert "passed" in out
    text = (tmp_path / "eps_net_teacher.py").read_text()
    assert "PROCESS = Tabulated.linear()" in text and 'PREDICTS = "eps"' in text
    teacher = load(f"{tmp_path / 'eps_net_teacher.py'}:teacher")
    assert teacher.shape == (1, 16)
    x_t = torch.full((1, 1, 16), 0.4)
    x = teacher.denoiser(x_t, torch.tensor([0.3]))
    assert x.flatten().tolist() == pytest.approx([0.5] * 16, abs=2e-3)
    code, _, err = called(capsys, "wrap", tmp_path / "eps_net.py")
    assert code == 2
    refused_line(err, "--out*")


def test_a_network_without_weights_is_examined_for_its_structure(tmp_path, capsys):
    (tmp_path / "plain_net.py").write_text(PLAIN.format(name="Plain", argument=""))
    code, out, err = called(capsys, "wrap", tmp_path / "plain_net.py")
    assert code == 0, err
    assert "left out" in out and "TODO" in (tmp_path / "plain_net_teacher.py").read_text()
    report = tmp_path / "report.json"
    source = f"{tmp_path / 'plain_net_teacher.py'}:teacher"
    code, _, err = called(capsys, "doctor", source, "--json", report)
    checks = {c["name"]: c["verdict"] for c in json.loads(report.read_text())["checks"]}
    assert code == 0 and checks["shape of data"] == "ok" and checks["denoising"] == "left out"


@pytest.mark.slow
def test_a_network_of_volumes_has_no_pictures_to_be_examined_with(tmp_path, capsys):
    """One of Conv3d, without data and weights, and with data alone."""
    text = PLAIN.format(name="Volume", argument="").replace(
        "self.layer = nn.Conv1d(2, 2,",
        "self.time = nn.Linear(1, 1)\n        self.layer = nn.Conv3d(1, 1,",
    )
    data = "\n\ndef data():\n    import torch\n\n    return torch.randn(4, 1, 8, 8, 8)\n"
    (tmp_path / "volume.py").write_text(text + data)
    code, out, err = called(capsys, "wrap", tmp_path / "volume.py")
    assert code == 0, err
    assert "SHAPE = (1, 64, 64, 64)" in (tmp_path / "volume_teacher.py").read_text()
    assert "passed" in out
    place = f"{tmp_path / 'volume.py'}:data"
    words = ("--data", place, "--out", tmp_path / "small.py")
    code, out, err = called(capsys, "wrap", tmp_path / "volume.py", *words)
    assert code == 0, err
    assert not takes_pictures(load(f"{tmp_path / 'small.py'}:teacher")) and "passed" in out


def test_what_must_be_filled_in_is_marked(tmp_path, capsys):
    (tmp_path / "wide_net.py").write_text(PLAIN.format(name="Wide", argument=", width"))
    code, out, err = called(capsys, "wrap", tmp_path / "wide_net.py")
    assert code == 0, err
    assert "TODO" in out and "width=..." in (tmp_path / "wide_net_teacher.py").read_text()


@pytest.mark.parametrize("place", ["none.py", "two.py", "two.py:Missing", "broken.py", "a.ckpt"])
def test_files_without_one_network_are_refused(place, tmp_path, capsys):
    (tmp_path / "a.ckpt").touch()
    one = PLAIN.format(name="One", argument="")
    (tmp_path / "two.py").write_text(one + one.replace("One", "Two"))
    (tmp_path / "broken.py").write_text("import none_of_this_name\n")
    code, _, err = called(capsys, "wrap", tmp_path / place)
    assert code == 2 and len(err.strip().splitlines()) == 1
    assert ("no such file" in err) == (place == "none.py")
    assert not list(tmp_path.glob("*_teacher.py"))


@pytest.mark.parametrize(
    ("name", "words", "key"),
    [
        ("my-net.py", [], "wrap 'my-net.py'"),
        ("random.py", [], "wrap 'random.py'"),
        ("torch.py", [], "wrap 'torch.py'"),
        ("net.py", ["--out", "other/teacher.py"], "--out"),
        ("net.py", ["--out", "teacher.txt"], "--out"),
        ("net.py", ["--data", "net.py:empty"], "--data"),
        ("net.py", ["--data", "net.py:unknown"], "--data"),
    ],
)
def test_adapters_that_no_run_could_import_are_not_written(
    name, words, key, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    data = "\n\ndef empty():\n    return torch.zeros(0, 2, 8)\n"
    data += "\n\ndef unknown():\n    return torch.zeros(3, 2, 8) / 0\n"
    (tmp_path / name).write_text("import torch\n" + PLAIN.format(name="Net", argument="") + data)
    code, _, err = called(capsys, "wrap", name, *words)
    assert code == 2
    refused_line(err, key)
    assert {p.name for p in tmp_path.rglob("*.*") if p.suffix in (".py", ".txt")} == {name}


def test_a_weights_file_with_a_quote_in_its_name_is_loaded(tmp_path, capsys):
    file = tmp_path / 'the "best".safetensors'
    (tmp_path / "quoted_net.py").write_text(PLAIN.format(name="Net", argument=""))
    save_file(import_file(tmp_path / "quoted_net.py").Net().state_dict(), file)
    code, _, err = called(capsys, "wrap", tmp_path / "quoted_net.py", "--weights", file)
    assert (code, err) == (0, "")


@pytest.mark.parametrize(
    ("entries", "argument", "labels", "codec", "call"),
    [
        (4, "y", "y", "Pixels(classes=3, null=3)", ', cond["class_labels"])'),
        (3, "y", "y", "Pixels(classes=3)", ', cond["class_labels"])'),
        (3, "a=1, *, y", "y", "Pixels(classes=3)", ', y=cond["class_labels"])'),
        (4, "cond=None", "3 + 0 * t.long() if cond is None else cond['class_labels']",
         "Pixels(classes=3, null=3)", ", cond)"),
        (4, "c=None", "3 + 0 * t.long() if c is None else c",
         "Pixels(classes=3, null=3)", ', cond["class_labels"])'),
    ],
)  # fmt: skip
def test_the_labels_of_data_are_given_to_the_network(
    entries, argument, labels, codec, call, tmp_path, capsys
):
    text = LABELS.format(entries=entries, argument=argument, labels=labels, returned="labels")
    out, err, source = wrapped(tmp_path, text, capsys)
    assert "nothing was guessed" not in out and "passed" in out, (out, err)
    assert ("error with the description" in out) == ("null" in codec)  # the doctor has the labels
    assert codec in source and f"return self.backbone(x_t, t{call}" in source
    assert 'PREDICTS = "flow"' in source and "guessed: x̂ has" in source
    (moved := tmp_path / "elsewhere").mkdir()
    for file in list(tmp_path.glob("*_net*")):  # the weights are named relative to the file
        file.rename(moved / file.name)
    (file,) = moved.glob("*_teacher.py")
    teacher = load(f"{file}:teacher")
    cond = teacher.codec.condition([2])
    x = teacher.denoiser(torch.tensor([[0.3, 0.1]]), torch.tensor([0.6]), cond)
    assert x.flatten().tolist() == pytest.approx([2.0, -2.0], abs=0.02)


def test_a_network_that_could_not_be_tried_is_said_to_be_so(tmp_path, capsys):
    """Without labels, and with prompts that are no labels."""
    for i, returned in enumerate(["None", "['red'] * 30"]):
        text = LABELS.format(entries=4, argument="y", labels="y", returned=returned)
        (folder := tmp_path / str(i)).mkdir()
        out, _, source = wrapped(folder, text, capsys)
        line = next(k for k in out.splitlines() if k.startswith("nothing was guessed: Flow: "))
        assert "embedding" in line and "passed" not in out
        assert "LongTensor (B,)" in source and "Pixels(), SHAPE" in source


def wrapped(folder, text, capsys):
    """What `distill wrap` prints and writes of a class Flow with data and weights."""
    name = f"a{abs(hash(text))}_net"  # the adapter imports the file by its name, once a process
    file, weights = folder / f"{name}.py", folder / f"{name}.safetensors"
    file.write_text(text)
    save_file(import_file(file).Flow().state_dict(), weights)
    words = ("--data", f"{file}:data", "--weights", weights)
    code, out, err = called(capsys, "wrap", f"{file}:Flow", *words)
    assert code == 0, err
    source = (folder / f"{name}_teacher.py").read_text()
    assert str(folder) not in source
    return out, err, source
