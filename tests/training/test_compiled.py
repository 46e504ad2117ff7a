"""Compiled networks compute what they compute eagerly, with hooks, adapters and checkpointing.

The backend `aot_eager` traces forward and backward passes as inductor does, and leaves out the
generation of code, which takes most of the time.
"""

from __future__ import annotations

import signal
from copy import deepcopy

import pytest
import torch
from torchvision.utils import save_image

from distill.cli.errors import signal_exit_code
from distill.config.recipe import Recipe
from distill.training import build, compilation
from distill.training.engine import Stopped
from students.lora import Adapter, adapt, unwrap
from teachers import compiled, load
from teachers.compiled import (
    Compiled,
    blocks_in,
    compile_errors,
    compile_modules,
    counts,
    listed_blocks,
    running_compiled,
    why_not_compiled,
)
from teachers.features import tapped
from tests.helpers import families
from tests.helpers.disturbed import disturbed
from tests.helpers.engines import assert_same, stream
from tests.helpers.refusals import refused
from tests.helpers.toys import recipe_tree


@pytest.fixture(autouse=True)
def quick_backend(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")


def close(a, b):
    """Within 1e-5 of the largest value, in float32."""
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * max(1, b.abs().max().item()))


def some(chosen):
    """These families in every run, the others in the slow one."""
    return [
        name if name in chosen else pytest.param(name, marks=pytest.mark.slow)
        for name in (*families.FAMILIES, *families.RECENT)
    ]


def call(denoiser, teacher, n=2):
    torch.manual_seed(0)
    x = torch.randn(n, *teacher.shape, requires_grad=True)
    prompts = range(n) if teacher.codec.classes else ["a", "b c"][:n]
    out = denoiser(x, torch.linspace(0.3, 0.7, n), teacher.codec.condition(list(prompts)))
    return out, torch.autograd.grad(out.square().sum(), x)[0]


@pytest.mark.parametrize("name", some({"dit"}))
def test_each_familys_blocks_compute_the_same_compiled(folders, name):
    """x̂ and its gradient of each family's teacher, compiled and eager."""
    teacher = load(folders(name), **families.OPTIONS.get(name, {}))
    eager, network, before = call(teacher.denoiser, teacher), unwrap(teacher.denoiser), counts()
    blocks = blocks_in(network.backbone, network.BLOCKS)
    assert compile_modules(blocks) == len(blocks) > 1
    with running_compiled():
        for a, b in zip(call(teacher.denoiser, teacher), eager, strict=True):
            close(a, b)
    after = counts()
    assert after.graphs > before.graphs and after.breaks == before.breaks


@pytest.mark.parametrize(
    ("kind", "precision"),
    [("lora", "fp32"),
     *(pytest.param(k, p, marks=pytest.mark.slow) for k, p in
       (("lora", "bf16"), ("dora", "fp32"), ("dora", "bf16"), ("loha", "fp32"), ("loha", "bf16"),
        ("lokr", "fp32"), ("lokr", "bf16")))],
)  # fmt: skip
def test_adapters_take_turns_on_compiled_blocks(folders, kind, precision):
    """Two adapters of each kind on compiled blocks compute what they do eagerly."""
    teacher = load(folders("dit"), precision=precision)
    adapters = [disturbed(adapt(teacher, Adapter(kind, rank=2), n)) for n in ("student", "fake")]
    networks = [*adapters, teacher.denoiser]
    eager = [call(n, teacher) for n in networks]
    network = unwrap(teacher.denoiser)
    compile_modules(blocks_in(network.backbone, network.BLOCKS))
    with running_compiled():
        for _ in range(2):
            graphs = counts().graphs
            for denoiser, expected in zip(networks, eager, strict=True):
                for a, b in zip(call(denoiser, teacher), expected, strict=True):
                    if precision == "fp32":
                        close(a, b)
                    else:
                        torch.testing.assert_close(a, b, rtol=0, atol=0.02 * b.abs().max().item())
    assert counts().graphs == graphs  # nothing is compiled for the second round


@pytest.mark.slow
def test_a_hook_inside_a_compiled_module_runs_and_the_module_then_runs_eagerly(folders):
    """A hook on a layer inside a compiled U-Net sees what it sees eagerly."""
    teacher = load(folders("sd"))
    network = unwrap(teacher.denoiser)
    names = ["backbone.mid_block", "backbone.down_blocks.0.resnets.0"]
    with tapped(teacher.denoiser, names) as eager:
        call(teacher.denoiser, teacher)
    compile_modules([network.backbone])
    with running_compiled():
        expected = call(teacher.denoiser, teacher)
        graphs = counts().graphs
        with tapped(teacher.denoiser, names) as outputs:
            out = call(teacher.denoiser, teacher)
        assert counts().graphs == graphs
    close(out[0], expected[0])
    for name in names:
        close(outputs[name], eager[name])


@pytest.mark.slow
def test_a_hook_on_a_compiled_block_leaves_it_compiled(folders, monkeypatch):
    """A block with a hook on it runs as it was compiled."""
    teacher = load(folders("sd"))
    network = unwrap(teacher.denoiser)
    compile_modules(blocks_in(network.backbone, network.BLOCKS))
    name = "backbone.down_blocks.0.resnets.0"
    block = network.get_submodule(name)
    monkeypatch.setattr(vars(block)["forward"], "original", None)  # an eager call would fail
    with running_compiled(), tapped(teacher.denoiser, [name]) as outputs:
        call(teacher.denoiser, teacher)
    assert outputs[name].requires_grad


def test_outside_of_training_compiled_modules_run_eagerly(folders):
    teacher = load(folders("sd"))
    network, graphs = unwrap(teacher.denoiser), counts().graphs
    compile_modules([network.backbone])
    call(teacher.denoiser, teacher)
    assert counts().graphs == graphs


def test_a_copy_of_a_compiled_module_is_compiled_with_its_own_weights():
    layer = torch.nn.Linear(2, 2)
    compile_modules([layer])
    twin = deepcopy(torch.nn.Sequential(layer))[0]
    torch.nn.init.zeros_(twin.weight), torch.nn.init.zeros_(twin.bias)
    with running_compiled():
        assert twin(torch.ones(1, 2)).abs().sum() == 0 < layer(torch.ones(1, 2)).abs().sum()
    assert isinstance(vars(twin)["forward"], Compiled) and twin.state_dict().keys() == {
        "weight",
        "bias",
    }


def engine_of(out, name, source, resume=False, **sections):
    tree = recipe_tree(name, source)
    for key, section in sections.items():
        tree[key] = {**tree.get(key, {}), **section}
    return build.build(Recipe.check(tree), out, resume).engine


RUNS = {
    "critic": ("dmd2", {}),
    "adapters": (
        "dmd2",
        {"adapters": {"rank": 2, "targets": ".*conv1"}, "train": {"checkpointing": True}},
    ),
    "skip": (
        "sid",
        {
            "teacher": {
                "guidance": {"scale": 2, "kind": "skip", "blocks": ["backbone.mid_block.resnets.0"]}
            }
        },
    ),
    "cfg": ("consistency", {"teacher": {"guidance": 2}}),
    "apg": ("sid", {"teacher": {"guidance": {"scale": 2, "kind": "apg"}}}),
    "interval": ("sid", {"teacher": {"guidance": {"scale": 2, "interval": [0.1, 5]}}}),
    "progressive": ("progressive", {}),
}


def weights_of(engine):
    return [p.detach() for player in engine.players.values() for p in player.params]


def played(engine, steps=5):
    """Play steps; how many graphs there were after each."""
    batches, graphs = stream(engine), []
    for _ in range(steps):
        engine.advance(batches)
        graphs.append(counts().graphs)
    batches.close()
    return graphs


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["blocks", "full"])
@pytest.mark.parametrize("case", RUNS)
def test_a_compiled_run_is_the_eager_run_and_compiles_nothing_after_the_third_step(
    pipelines, tmp_path, case, mode
):
    """Critic, adapters with checkpointing, guidances and progressive stages."""
    name, sections = RUNS[case]
    source, graphs, states = pipelines["edm"], {}, {}
    for how in ("off", mode):
        train = {**sections.get("train", {}), "compile": how, "steps": 8}
        engine = engine_of(tmp_path / how, name, source, **{**sections, "train": train})
        graphs[how] = played(engine)
        states[how] = weights_of(engine)
    assert graphs["off"][0] == graphs["off"][-1]
    assert graphs[mode][-1] > graphs["off"][-1]
    if case != "interval":  # a single sample inside the interval has a graph of its own
        assert graphs[mode][2] == graphs[mode][-1]
    for a, b in zip(states[mode], states["off"], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


@pytest.mark.slow
def test_a_compiled_run_is_resumed_bit_for_bit(pipelines, tmp_path):
    """A compiled run, saved and taken up again, ends with the bits of one left alone."""
    source, train = pipelines["edm"], {"compile": "blocks", "steps": 4, "save_every": 2}
    whole = engine_of(tmp_path / "whole", "dmd2", source, train=train)
    whole.train()
    part = engine_of(tmp_path / "part", "dmd2", source, train=train)
    played(part, 2)
    part.save()
    again = engine_of(tmp_path / "part", "dmd2", source, resume=True, train=train)
    again.train()
    assert_same(again, whole)


@pytest.mark.slow
@pytest.mark.parametrize("later", ["off", "full"])
def test_a_run_goes_on_with_another_mode(later, pipelines, tmp_path):
    """A machine that cannot compile says to set it to off, which must be possible."""
    source, train = pipelines["edm"], {"compile": "blocks", "steps": 2, "save_every": 2}
    engine_of(tmp_path / "run", "sid", source, train=train).train()
    train |= {"compile": later, "steps": 4}
    again = engine_of(tmp_path / "run", "sid", source, resume=True, train=train)
    assert again.step == 2
    again.train()


def pictures(folder):
    """A folder of pictures with captions."""
    folder.mkdir()
    for i in range(8):
        save_image(torch.rand(3, 16, 16), folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"picture {i}")
    return folder


@pytest.mark.slow
def test_checkpointed_blocks_are_recomputed_under_their_adapter(folders, tmp_path):
    """SDXL's recipe in small: two adapters on one compiled, recomputed base in 16 bits."""
    data = {"source": str(pictures(tmp_path / "data")), "cache": str(tmp_path / "cache")}
    tree = {
        "data": data,
        "teacher": {"source": folders("sdxl"), "precision": "bf16", "guidance": 2},
        "objective": {"name": "dmd2", "student_every": 2},
        "student": {"steps": 2},
        "adapters": {"rank": 2},
        "critic": {},
    }
    states = {}
    for how in ("off", "blocks"):
        train = {"steps": 2, "batch": 4, "accumulate": 2, "precision": "bf16", "compile": how,
                 "checkpointing": True, "sample_every": 0}  # fmt: skip
        recipe = Recipe.check({**tree, "train": train})
        engine = build.build(recipe, tmp_path / how).engine
        graphs = played(engine, 2)
        states[how] = weights_of(engine)
    assert graphs[0] == graphs[1]
    for a, b in zip(states["blocks"], states["off"], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=5e-4)


def test_a_machine_that_cannot_compile_is_one_line_before_anything_is_written(
    pipelines, tmp_path, monkeypatch
):
    monkeypatch.setattr(compilation, "why_not_compiled", lambda device: "no compiler")
    with refused("train.compile", "no compiler", "off"):
        engine_of(tmp_path / "run", "sid", pipelines["edm"], train={"compile": "blocks"})
    assert not (tmp_path / "run").exists()


def test_off_is_off_as_yaml_reads_it():
    tree = recipe_tree("sid", "digits", compile=False)
    assert Recipe.check(tree).train.compile == "off"


def test_a_module_with_a_forward_of_its_own_is_left_as_it_is():
    layer = torch.nn.Linear(2, 2)
    layer.forward = torch.zeros_like
    assert compile_modules([layer]) == 0
    with running_compiled():
        assert layer(torch.ones(1, 2)).sum() == 0


def test_blocks_of_ones_own_network_are_found_in_lists_of_lists_and_in_dicts():
    block = torch.nn.TransformerEncoderLayer(4, 1)
    stages = torch.nn.ModuleList(torch.nn.ModuleList([deepcopy(block)]) for _ in range(2))
    named = torch.nn.ModuleDict({"last": block})
    layers = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    network = torch.nn.Sequential(torch.nn.Linear(2, 2), stages, named, layers)
    assert listed_blocks(network) == [stages[0][0], stages[1][0], block]


def test_why_a_machine_cannot_compile_is_what_the_backend_says(monkeypatch):
    def backend(graph, inputs):
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(compiled, "BACKEND", backend)
    assert why_not_compiled(torch.device("cpu")) == "no compiler"


def failing(monkeypatch):
    def backend(graph, inputs):
        raise RuntimeError("no space left\non the disk")

    monkeypatch.setattr(compiled, "BACKEND", backend)
    monkeypatch.setattr(compilation, "why_not_compiled", lambda device: None)


def test_a_network_that_cannot_be_compiled_is_one_line(pipelines, tmp_path, monkeypatch):
    failing(monkeypatch)
    engine = engine_of(tmp_path / "run", "sid", pipelines["edm"], train={"compile": "blocks"})
    with refused("train.compile", "no space left", "off"):
        engine.train()


def test_a_signal_that_ends_a_compiler_too_stops_the_run(pipelines, tmp_path, monkeypatch, capsys):
    """Ctrl-C reaches the compilers of the terminal's group."""
    failing(monkeypatch)
    engine = engine_of(tmp_path / "run", "sid", pipelines["edm"], train={"compile": "blocks"})
    real = engine.advance

    def interrupted(stream):
        signal.raise_signal(signal.SIGINT)
        return real(stream)

    monkeypatch.setattr(engine, "advance", interrupted)
    with pytest.raises(Stopped) as stopped:
        engine.train()
    assert not stopped.value.saved and signal_exit_code(stopped.value) == 130
    line = capsys.readouterr().err.splitlines()[-1]
    assert "SIGINT: stopped while compiling" in line and "--resume" in line


def test_a_run_without_a_network_has_nothing_to_compile(capsys):
    compilation.compile_networks(Recipe.check(recipe_tree("sid", "digits")), {}, "blocks")
    assert "train.compile: off" in capsys.readouterr().err


def test_a_second_gradient_through_compiled_code_is_one_line():
    """An objective of one's own may take one; compiled code has none."""
    network = torch.nn.TransformerEncoderLayer(4, 1, dropout=0.0)
    compile_modules([network])
    x = torch.randn(2, 3, 4, requires_grad=True)
    with refused("train.compile", "double backward", "off"), compile_errors(), running_compiled():
        (slope,) = torch.autograd.grad(network(x).square().sum(), x, create_graph=True)
        slope.square().sum().backward()
