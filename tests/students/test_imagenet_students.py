"""Students of SiT, LightningDiT and U-ViT: trained, exported with their source, and read back."""

import json

import pytest
import torch

from distill.config.recipe import Recipe
from distill.planning import forecast
from distill.training import build
from students import schedulers
from students.export.folder import export, load_student, rehearse
from students.export.sources import imagenet as imagenet_source
from students.lora import Adapter
from teachers import load
from teachers.diagnosis.structure import examine
from teachers.imagenet import parts
from teachers.imagenet.model import MODELS
from teachers.imagenet.schedule import FlowEuler
from tests.helpers import imagenet
from tests.helpers.disturbed import disturbed
from tests.helpers.doctor import first_broken
from tests.helpers.engines import stream

NAMES = list(imagenet.PUBLISHED)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("imagenet")
    for name in NAMES:
        imagenet.save(name, root)
    photos = root / "photos"
    for label in range(imagenet.CLASSES):
        (photos / f"{label}").mkdir(parents=True)
    return root


def loaded(folder, name, **options):
    return load(str(folder / f"{name}.pt"), vae=str(folder / "vae"), **options)


def pictures(folder):
    from torchvision.utils import save_image

    for label in range(imagenet.CLASSES):
        save_image(torch.rand(3, 16, 16), folder / "photos" / f"{label}" / "a.png")
    return str(folder / "photos")


@pytest.mark.parametrize("name", NAMES)
def test_the_doctor_finds_nothing_broken_in_the_structure(folder, name):
    teacher = loaded(folder, name)
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    assert not first_broken(examine(teacher, images, [0, 1, 2, 3], structure_only=True))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("adapter", [None, Adapter(rank=4)], ids=["full", "lora"])
@pytest.mark.parametrize("renoise", [True, False], ids=["renoise", "ode"])
def test_dits_pipeline_samples_the_student(folder, name, adapter, renoise):
    teacher = loaded(folder, name)
    rehearse(disturbed(schedulers.student(teacher, 4, None, renoise, adapter)).eval(), teacher)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("objective", ["dmd2", "ect"])
def test_an_objective_trains_a_few_steps(folder, name, objective, tmp_path):
    tree = {
        "teacher": {"source": str(folder / f"{name}.pt"), "vae": str(folder / "vae"),
                    "guidance": {"scale": 2, "channels": 3} if objective == "dmd2" else 1},
        "student": {"steps": 2},
        "objective": {"name": objective},
        "data": {"source": pictures(folder)},
        "train": {"steps": 3, "batch": 4, "sample_every": 0, "checkpointing": True},
    }  # fmt: skip
    if objective == "dmd2":
        tree["objective"]["student_every"] = 2
        tree["critic"] = {}
    recipe = Recipe.check(tree)
    engine = build.build(recipe, tmp_path / "run").engine
    before = {k: [p.clone() for p in v.params] for k, v in engine.players.items()}
    data = stream(engine)
    for _ in range(3):
        logs = engine.advance(data)
        assert all(torch.isfinite(v) for v in logs.values())
    data.close()
    for player, was in before.items():
        moved = [not torch.equal(a, b) for a, b in zip(was, engine.players[player].params)]
        assert any(moved), player


@pytest.mark.parametrize("name", NAMES)
def test_a_run_of_a_file_is_planned(folder, name):
    tree = {"teacher": {"source": str(folder / f"{name}.pt"), "vae": str(folder / "vae")},
            "objective": {"name": "dmd2"}, "train": {"steps": 2, "batch": 4}}  # fmt: skip
    plan = forecast.plan(Recipe.check(tree))
    held = 4 * sum(p.numel() for p in loaded(folder, name).denoiser.parameters())
    assert plan.weights == pytest.approx(3 * held, rel=0.05)  # teacher, student, fake


@pytest.mark.parametrize("name", NAMES)
def test_the_written_source_alone_is_the_network(folder, name):
    model = loaded(folder, name).denoiser.backbone
    module = __import__(type(model).__module__, fromlist=["_"])
    text = imagenet_source.source('"""A network."""\n', parts, module)
    assert "teachers" not in text and "students" not in text
    space: dict = {"__name__": "network"}
    exec(compile(text, "network.py", "exec"), space)
    twin = space[type(model).__name__].from_config(dict(model.config)).eval()
    twin.load_state_dict(model.state_dict())
    x, labels = torch.randn(2, 4, 8, 8), torch.tensor([1, 0])
    t = torch.tensor([700.0])  # one for all, as DiT's pipeline gives it
    with torch.no_grad():
        assert torch.equal(twin(x, t, labels).sample, model(x, t, labels).sample)


def test_a_flows_scheduler_is_the_stock_one():
    """With one method more, which returns its input."""
    theirs = FlowEuler.__mro__[1]
    assert set(vars(FlowEuler)) - set(vars(theirs)) == {"scale_model_input"}
    x = torch.randn(2)
    assert FlowEuler().scale_model_input(x, 3) is x


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_diffusers_in_another_process_draws_a_students_pictures(folder, name, precision, tmp_path):
    """Exports of the three, drawn without our packages, and read back to the same function."""
    teacher = loaded(folder, name, precision=precision)
    student = disturbed(schedulers.student(teacher, 2, None, True, Adapter(rank=4))).eval()
    export(student, teacher, tmp_path / "student", {"objective": {"name": "dmd2"}})  # compares
    own = sorted((tmp_path / "student").glob("*/*.py"))
    assert len(own) == (1 if name == "uvit" else 2)
    for file in own:  # which we never run
        file.write_text("raise SystemExit('executed')")
    index = json.loads((tmp_path / "student" / "model_index.json").read_text())
    assert index["transformer"][1] in MODELS
    again, _ = load_student(tmp_path / "student")
    z, cond = torch.randn(2, *teacher.shape), teacher.codec.condition([0, 1])
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        torch.testing.assert_close(
            again.at(2)(z, cond, 1).float(), student.at(2)(z, cond, 1).float(),
            atol=1e-4 if precision == "fp32" else 0.2, rtol=1e-2,
        )  # fmt: skip


@pytest.mark.slow
def test_a_student_of_quantised_weights_is_merged_into_its_teachers_file(folder, tmp_path):
    """SiT in nf4: the adapter is exported on the weights of the .pt file."""
    from students.export.unquantised import unquantised

    teacher = loaded(folder, "sit", precision="nf4")
    student = disturbed(schedulers.student(teacher, 1, None, True, Adapter(rank=4))).eval()
    export(unquantised(student, teacher), teacher, tmp_path / "student", {})
