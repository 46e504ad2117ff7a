"""Students of a network of the user's own: their times, adapters, folders, and what is refused."""

import importlib.util
import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from students import own_network
from students.export import own_folder
from students.export.folder import ExportError, sample_student, student_folder
from students.export.forms import OwnForm, form_of
from students.export.sources import user as user_source
from students.lora import Adapter, network_of
from teachers import Linear, Network, Pixels, Teacher, UserError, load
from teachers.denoiser import edm
from tests.helpers import own, preloaded


def student_of(teacher, steps=4, renoise=True, adapter=None):
    torch.manual_seed(1)
    student = own_network.student(teacher, steps, None, renoise, adapter)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return student.eval().requires_grad_(False)


def exported(student, teacher, folder):
    """The sampler of the student's folder."""
    own_folder.export(student, teacher, folder, {})
    spec = importlib.util.spec_from_file_location("a_sampler", folder / "sampler.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("renoise", [True, False])
@pytest.mark.parametrize("adapter", [None, Adapter(rank=2, targets=r".*(first|told)")])
@pytest.mark.parametrize("dims", ["one", "three"])
def test_a_folder_samples_as_the_student_in_another_process(dims, adapter, renoise, tmp_path):
    teacher = load(f"{own.write(tmp_path, own.CONV)}:{dims}")
    assert isinstance(form_of(teacher), OwnForm)
    student = student_of(teacher, 4, renoise, adapter)
    sampler = exported(student, teacher, tmp_path / "student")  # it compares in another process
    cond = {"class_labels": torch.tensor([0, 2, 1, 1, 0])}
    for steps in (1, 2, 4):
        ours = sample_student(student.at(steps), teacher, [0] * 5, 7, cond=cond)
        theirs = sampler.sample(tmp_path / "student", 5, steps, 7, cond)
        torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="class_labels"):
        sampler.sample(tmp_path / "student", 5)
    with pytest.raises(ValueError, match="one of"):
        sampler.sample(tmp_path / "student", 5, 3, cond=cond)
    with pytest.raises(ValueError, match="n is 1"):
        sampler.sample(tmp_path / "student", 0, 4, cond={"class_labels": torch.zeros(0).long()})
    for wrong in (torch.zeros(5), torch.zeros(5, 1).long(), torch.zeros(4).long(), 3):
        with pytest.raises(ValueError, match="class_labels"):
            sampler.sample(tmp_path / "student", 5, 4, cond={"class_labels": wrong})


def test_a_folder_needs_no_code_of_ours_and_says_what_is_in_it(tmp_path):
    teacher = load(f"{own.write(tmp_path)}:teacher")
    student = student_of(teacher, 1)
    with preloaded.real():
        exported(student, teacher, tmp_path / "student")
    files = {p.name: p.read_text() for p in (tmp_path / "student").glob("*.py")}
    assert len(files) == 2 and not any("teachers" in text for text in files.values())
    assert len(files["sampler.py"].splitlines()) < 100
    config = json.loads((tmp_path / "student" / "config.json").read_text())
    assert config["process"] == {"name": "Linear", "shift": 1.0} and config["predicts"] == "flow"
    assert config["shape"] == [2] and config["condition"] is None and config["steps"] == [1]
    assert config["chains"]["1"][0]["c_out"] == -1.0  # x̂ = x_t - F at t = 1
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); from sampler import sample;"
        "x = sample(sys.argv[1], 3, seed=5); assert 'teachers' not in sys.modules;"
        "print(x.double().sum().item())"
    )
    out = subprocess.run(
        [sys.executable, "-I", "-c", script, str(tmp_path / "student")],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    ours = sample_student(student, teacher, [0] * 3, 5).double().sum().item()
    assert float(out.stdout) == pytest.approx(ours, rel=1e-5), out.stderr
    assert "copy of the network's own source" in (tmp_path / "student" / "README.md").read_text()


def test_commands_for_diffusers_students_name_the_sampler(tmp_path):
    teacher = load(f"{own.write(tmp_path)}:teacher")
    exported(student_of(teacher, 1), teacher, tmp_path / "student")
    (tmp_path / "checkpoints").mkdir()
    for folder in (tmp_path, tmp_path / "student"):
        with pytest.raises(UserError, match=r"network of your own.*student/sampler\.py"):
            student_folder(folder)


def test_a_changed_folder_is_refused(tmp_path):
    teacher = load(f"{own.write(tmp_path)}:teacher")
    student = own_folder.merged(student_of(teacher, 1))
    folder = tmp_path / "student"
    folder.mkdir()
    own_folder.write(student, teacher, folder)
    own_folder.verify(folder, student, teacher)
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"c_out": -1.0', '"c_out": -1.0001'))
    with pytest.raises(ExportError, match="other samples"):
        own_folder.verify(folder, student, teacher)


def test_times_are_equal_steps_of_the_process(tmp_path):
    assert own_network.times_of(Linear(), 4, None) == [1, 0.75, 0.5, 0.25]
    assert own_network.times_of(Linear(), 2, 1.0) == pytest.approx([0.5, 0.25])
    with pytest.raises(UserError) as refused:
        own_network.times_of(Linear(), 1, -2.0)
    assert refused.value.key == "student.start"


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attend = nn.MultiheadAttention(4, 1)
        self.maps = nn.ModuleList([nn.Linear(4, 4), nn.Conv2d(1, 1, 1), nn.GroupNorm(1, 4)])

    def forward(self, x, t):
        return self.maps[0](x)


def test_adapters_go_to_the_layers_that_targets_names():
    teacher = Teacher(Network(Attention(), Linear(), "x"), Pixels(), (4,))
    names = own_network.network_of(teacher.denoiser)
    from students.lora import adaptable_layers

    assert adaptable_layers(names) == ["backbone.maps.0", "backbone.maps.1"]
    student = student_of(teacher, 1, adapter=Adapter(rank=2, targets=r"maps\.0"))
    assert {n.split(".lora")[0] for n in student.denoiser.names} == {"backbone.maps.0"}
    for targets in ("attn", "maps.2", "("):
        with pytest.raises(UserError) as refused:
            own_network.student(teacher, 1, None, True, Adapter(rank=2, targets=targets))
        assert refused.value.key == "adapters.targets"


class Weightless(nn.Module):
    def forward(self, x, t):
        return x


class Narrow(nn.Linear):
    def forward(self, x, t):
        return super().forward(x)[:, :1]


class Unknown(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layer = nn.Linear(width, width)

    def forward(self, x, t):
        return self.layer(x)


class OtherWidth(Unknown):
    def __init__(self, width=3):
        super().__init__(width)


class Pair(Pixels):
    def condition(self, prompts):
        return [0] * len(prompts)


class Short(Pixels):
    def condition(self, prompts):
        return {"text": torch.zeros(1, 3)}


class Outside(Network):
    def __init__(self, *args):
        super().__init__(*args)
        self.more = nn.Linear(1, 1)


@pytest.mark.parametrize(
    ("teacher", "part"),
    [
        (Teacher(Network(Weightless(), Linear(), "x"), Pixels(), (4,)), "no parameters"),
        (Teacher(Network(Narrow(4, 4), Linear(), "x"), Pixels(), (4,)), "2×1"),
        (Teacher(Network(Unknown(4), Linear(), "x"), Pixels(), (4,)), "self.width"),
        (Teacher(Network(OtherWidth(4), Linear(), "x"), Pixels(), (4,)), "other weights"),
        (Teacher(Network(Narrow(4, 4), Linear(), "x"), Pair(), (4,)), "it returns list"),
        (Teacher(Network(Narrow(4, 4), Linear(), "x"), Short(), (4,)), "1×3"),
        (Teacher(Network(Narrow(4, 4), Linear(), "x"), Pixels(), (5,)), "raised"),
        (Teacher(Outside(Attention(), Linear(), "x"), Pixels(), (4,)), "more.weight"),
    ],
)
def test_what_no_student_could_be_made_of_is_refused_in_one_line(teacher, part):
    with pytest.raises(UserError, match=part) as refused:
        own_network.check(teacher)
    assert refused.value.key.startswith("teacher") and ";" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_ε_from_pure_noise_is_refused(tmp_path):
    teacher = load(f"{own.write(tmp_path)}:teacher")
    network = network_of(teacher.denoiser)
    network.coefficients = Network(network.backbone, Linear(), "eps").coefficients
    student = own_network.student(teacher, 1, None, True, None)
    with pytest.raises(UserError) as refused:
        own_folder.rehearse(student, teacher)
    assert refused.value.key == "student.start"
    network.coefficients = edm(0.5)
    assert own_folder.prediction_of(network) == "custom"


def test_source_that_needs_something_of_ours_is_refused(tmp_path):
    text = own.FLOW.replace("def linear(n):", "def linear(n):\n    Linear()")
    teacher = load(f"{own.write(tmp_path, text)}:teacher")
    with pytest.raises(UserError, match="Linear of this project"):
        own_folder.rehearse(own_network.student(teacher, 1, None, True, None), teacher)


def test_the_needed_part_of_a_file_is_taken_word_for_word(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "import os\nimport torch\nfrom teachers import Network\n\nA = 1\nB = A + 1\nC = 3\n\n\n"
        "@torch.no_grad()\ndef f(x: Network) -> Network:\n    # kept\n    return x + B\n\n\n"
        "def g():\n    return os\n"
    )
    text = user_source.standalone(path, ["f"], "teacher")["mine.py"]
    assert "# kept" in text and "A = 1" in text and "@torch.no_grad()" in text
    assert "C = 3" not in text and "def g" not in text and "teachers" not in text
    (tmp_path / "plain.py").write_text("import mine_too\nX = 1  # all of it\n")
    (tmp_path / "mine_too.py").write_text("Y = 2\n")
    files = user_source.standalone(tmp_path / "plain.py", ["X"], "teacher")
    assert files == {"plain.py": "import mine_too\nX = 1  # all of it\n", "mine_too.py": "Y = 2\n"}


# ---- networks of careless users

NET = """
import torch
from torch import nn
{more}

class Net(nn.Module):
    def __init__(self, size=4):
        super().__init__()
        self.size = size
        self.a = {layer}
        {init}

    def forward(self, x, t):
        {first}
        return self.a(x) + t[:, None]


def teacher():
    from teachers import Linear, Network, Pixels, Teacher

    torch.manual_seed(0)
    return Teacher(Network({made}, Linear(), "flow"), Pixels(), (4,))
"""
PLAIN = {"more": "", "layer": "nn.Linear(size, size)", "init": "", "first": "", "made": "Net()"}
NORMED = "nn.utils.parametrizations.weight_norm(nn.Linear(size, size))"


def of(folder, name="mine.py", **parts):
    (folder / name).write_text(NET.format(**{**PLAIN, **parts}), encoding="utf-8")
    return f"{folder / name}:teacher"


@pytest.mark.parametrize(
    "parts",
    [
        {"init": "self.rates = [v.item() for v in torch.linspace(0, 1, 3)]"},
        {"init": "self.k = nn.Parameter(torch.arange(size), requires_grad=False)"},
        {"more": "\x0c\nX = 'a\u2028b'\n", "init": "self.x = X"},
        {"layer": NORMED},
        {"init": "self.a.weight = nn.Parameter(self.a.weight.t())"},
        {"layer": "nn.Sequential(nn.Linear(size, size), nn.Dropout(0.5), nn.BatchNorm1d(size))"},
    ],
)
def test_unusual_networks_become_students(parts, tmp_path):
    teacher = load(of(tmp_path, **parts))
    own_network.check(teacher)
    own_folder.rehearse(student_of(teacher, 2), teacher)


@pytest.mark.parametrize(
    ("parts", "word"),
    [
        ({"first": "x.mul_(2)"}, "writes into x_t"),
        ({"first": "t.mul_(1000)"}, "writes into t,"),
        ({"first": "x = x + torch.randn_like(x)"}, "two outputs"),
        ({"first": "x = x / 0"}, "NaN or infinity"),
        ({"first": "x = x - x.mean(0)"}, "other samples of its batch"),
        ({"first": "return (self.a(x) + t[:, None]).detach()"}, "no gradient"),
        ({"made": "nn.DataParallel(Net())"}, "DataParallel"),
        ({"made": "Net().bfloat16()", "first": "x = x.bfloat16()"}, "of float32, raised"),
        ({"layer": "nn.LazyLinear(size)"}, "no shape yet"),
        ({"init": "self.c = nn.Parameter(torch.ones(2, dtype=torch.complex64))"}, "is complex"),
        ({"name": "sampler.py"}, "rename"),
        ({"name": "random.py"}, "rename"),
    ],
)
def test_what_would_fail_or_mislead_later_is_refused(parts, word, tmp_path):
    with pytest.raises(UserError, match=word) as refused:
        teacher = load(of(tmp_path, **parts))
        own_network.check(teacher)
        own_folder.rehearse(own_network.student(teacher, 1, None, True, None), teacher)
    assert refused.value.key.startswith("teacher") and ";" in str(refused.value)


def test_a_layer_with_a_computed_weight_gets_no_adapter(tmp_path):
    teacher = load(of(tmp_path, layer=NORMED, init="self.b = nn.Linear(size, size)"))
    student = student_of(teacher, 1, adapter=Adapter(rank=2))
    assert {n.split(".lora")[0] for n in student.denoiser.names} == {"backbone.b"}


def test_two_folders_have_their_own_files_of_one_name(tmp_path):
    """In training and in the samplers: the first folder's helper does not stand in the other's."""
    for number in (1, 2):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "torch.py").write_text("raise ImportError('not torch')\n")
        if number == 1:
            (folder / "helper_of_two.py").write_text("SCALE = 5.0\n")
        else:
            (folder / "helper_of_two.py").write_text("SCALE = -3.0\n")
        (folder / "net_of_two.py").write_text(
            f"import torch\nfrom torch import nn\n{'from helper_of_two import SCALE'}\n\n\n"
            "class Net(nn.Linear):\n    def forward(self, x, t):\n"
            "        return SCALE * super().forward(x)\n"
        )
    from teachers.storage.plugin import import_file

    kinds = [import_file(tmp_path / k / "net_of_two.py").Net for k in "12"]
    assert [user_source.file_of(k, "teacher").parent.name for k in kinds] == ["1", "2"]
    for k in "12":
        files = user_source.standalone(tmp_path / k / "net_of_two.py", ["Net"], "teacher")
        assert files.keys() == {"net_of_two.py", "helper_of_two.py"}  # and not torch.py
        (tmp_path / k / "torch.py").unlink()
    modules = [own_folder.sampler_file.read_module(tmp_path / k / "net_of_two.py") for k in "12"]
    assert [m.SCALE for m in modules] == [5.0, -3.0]
    assert "helper_of_two" in sys.modules  # of the training process, as it was
