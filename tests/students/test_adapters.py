"""One backbone under many adapters: gradients as of separate copies, and a base that stays."""

import copy
import hashlib
import sys

import pytest
import torch
from torch import nn

from distill.config.recipe import Recipe
from distill.evaluation.finish import finish
from distill.profiling import denoisers_in, evaluations_of
from distill.training import build
from students import schedulers
from students.adapter_layers import active_adapter, adapter_layers, using
from students.checkpointing import checkpointing
from students.export.folder import load_student
from students.lora import (
    AdaptedDenoiser,
    Adapter,
    adapt,
    inject,
    merged_backbone,
    merged_weight,
    unwrap,
    with_schedule,
)
from teachers import Denoiser, load
from teachers.features import hooked
from tests.helpers.engines import stream
from tests.helpers.refusals import refused
from tests.helpers.toys import FIVE, recipe_tree

pytestmark = pytest.mark.device

WAYS = {
    "lora": {"rank": 4},
    "dora": {"rank": 2, "kind": "dora"},
    "loha": {"rank": 2, "kind": "loha"},
    "lokr": {"rank": 2, "kind": "lokr"},
    "fake only": {"rank": 4, "players": ["fake"]},
    "student only": {"rank": 4, "players": ["student"]},
}


def made(name, pipelines, out, way="lora", resume=False, **train):
    tree = recipe_tree(name, pipelines["edm"], **train)
    return build.build(Recipe.check({**tree, "adapters": WAYS[way]}), out, resume)


def digest(module):
    """Of every weight that no adapter brought."""
    made = hashlib.sha256()
    for key, p in module.state_dict().items():
        if not any(part.startswith(("lora_", "hada_", "lokr_")) for part in key.split(".")):
            made.update(key.replace(".base_layer", "").encode() + p.cpu().numpy().tobytes())
    return made.hexdigest()


def stirred(network):
    """The network, its adapter moved from where it changes nothing."""
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return network


@pytest.fixture
def teacher(pipelines):
    return load(str(pipelines["cm"]))


def inputs(teacher, n=3):
    x = torch.randn(n, *teacher.shape)
    return x, torch.full((n,), 0.6), teacher.codec.condition(range(n))


@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "lokr"])
def test_an_adapter_begins_as_no_change_and_the_base_is_still_there(teacher, kind):
    x, t, cond = inputs(teacher)
    before = teacher.denoiser(x, t, cond)
    fake = adapt(teacher, Adapter(kind, rank=2), "fake")
    torch.testing.assert_close(fake(x, t, cond), before, atol=1e-6, rtol=1e-6)
    stirred(fake)
    assert (fake(x, t, cond) - before).abs().max() > 1e-3
    assert torch.equal(teacher.denoiser(x, t, cond), before)
    assert torch.equal(AdaptedDenoiser(fake.denoiser, None)(x, t, cond), before)


@pytest.mark.parametrize(
    ("adapter", "line"),
    [
        ({"targets": "(unclosed"}, ("adapters.targets", "(unclosed", "0")),
        ({"targets": ""}, ("adapters.targets",)),
        (
            {"targets": ".*norm.*", "kind": "loha"},
            ("adapters.targets", ".*norm.*", "torch.nn.modules.normalization.GroupNorm"),
        ),
        ({"players": []}, ("adapters.players", "name")),
        ({"players": ["fake"]}, ("adapters.players", "fake")),
    ],
)
def test_adapters_that_cannot_be_are_one_line(pipelines, tmp_path, adapter, line):
    tree = recipe_tree("consistency", pipelines["edm"])
    with refused(*line):
        build.build(Recipe.check({**tree, "adapters": adapter}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_full_copies_of_a_half_precision_teacher_learn_in_full_precision(tmp_path):
    from tests.helpers import families

    folder = families.build("sd", tmp_path / "sd")
    teacher = load(str(folder), precision="bf16")
    student = schedulers.student(teacher)
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    assert {p.dtype for p in teacher.denoiser.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "lokr"])
def test_a_merged_adapter_is_an_ordinary_network(teacher, kind):
    x, t, cond = inputs(teacher)
    fake = stirred(adapt(teacher, Adapter(kind, rank=2), "fake"))
    plain = with_schedule(unwrap(fake), unwrap(fake).schedule)
    plain.backbone = merged_backbone(fake)
    torch.testing.assert_close(plain(x, t, cond), fake(x, t, cond), atol=1e-5, rtol=1e-5)
    assert not any("lora" in k or "base_layer" in k for k in plain.state_dict())


@pytest.mark.parametrize("recompute", [False, True], ids=["", "checkpointed"])
def test_shared_gradients_are_those_of_separate_merged_copies(teacher, recompute):
    """G, the gradient at a merged weight, gives B's as s G Aᵀ and A's as s Bᵀ G."""
    student = schedulers.student(teacher, 1, None, True, Adapter(rank=3, alpha=6.0)).denoiser
    fake = adapt(teacher, Adapter(rank=3, alpha=6.0), "fake")
    stirred(student), stirred(fake)
    copies = [with_schedule(unwrap(n), unwrap(n).schedule) for n in (student, fake)]
    for twin, network in zip(copies, (student, fake)):
        twin.backbone = merged_backbone(network).requires_grad_(True)
    base = load(teacher.source).denoiser
    if recompute:
        checkpointing(unwrap(student).backbone)
        student.denoiser.backbone.train()
    x, t, cond = inputs(teacher)

    def loss(student, fake, teacher):
        made = student(10 * x, t, cond)
        real, judged = teacher(made, 0.8 * t, cond), fake(made, 0.8 * t, cond)
        return ((real - judged) * (real - made)).sum()  # both are in the graph, as SiD has it

    for network in (student, fake):
        network.requires_grad_(True)
    loss(student, fake, teacher.denoiser).backward()
    loss(*copies, base).backward()
    compared = 0
    for twin, network in zip(copies, (student, fake)):
        full = dict(twin.backbone.named_parameters())
        mine = network.trainable()
        for key, b in mine.items():
            if "lora_B" not in key:
                continue
            a = mine[key.replace("lora_B", "lora_A")]
            layer = key.removeprefix("backbone.").split(".lora_B")[0]
            grad = full[f"{layer}.weight"].grad
            if grad.ndim == 2:
                torch.testing.assert_close(b.grad, 2 * grad @ a.T, atol=1e-5, rtol=1e-5)
                torch.testing.assert_close(a.grad, 2 * b.T @ grad, atol=1e-5, rtol=1e-5)
            else:  # B is 1×1 over the rank, A has the kernel
                by_b = 2 * torch.einsum("oikl,rikl->or", grad, a)
                by_a = 2 * torch.einsum("oikl,or->rikl", grad, b[:, :, 0, 0])
                torch.testing.assert_close(b.grad[:, :, 0, 0], by_b, atol=1e-5, rtol=1e-4)
                torch.testing.assert_close(a.grad, by_a, atol=1e-5, rtol=1e-4)
            compared += 1
    assert compared > 10
    assert all(p.grad is None for p in teacher.denoiser.parameters() if not p.requires_grad)


def test_a_forward_pass_may_be_followed_by_another_adapters_before_its_backward(teacher):
    x, t, cond = inputs(teacher)
    student, fake = (stirred(adapt(teacher, Adapter(rank=2), n)) for n in ("student", "fake"))
    student.requires_grad_(True)

    def gradient(between):
        made = student(x, t, cond).sum()
        between()
        grads = torch.autograd.grad(made, list(student.parameters()))
        return grads

    alone, crossed = gradient(lambda: None), gradient(lambda: fake(x, t, cond))
    assert all(torch.equal(a, b) for a, b in zip(alone, crossed))
    assert any(g.any() for g in alone)


def test_using_never_touches_requires_grad(teacher):
    student = adapt(teacher, Adapter(rank=2), "student")
    adapt(teacher, Adapter(rank=2), "fake")
    student.requires_grad_(True)
    flags = [p.requires_grad for p in teacher.denoiser.parameters()]
    with using(teacher.denoiser, "fake"):
        assert [p.requires_grad for p in teacher.denoiser.parameters()] == flags
    assert [p.requires_grad for p in teacher.denoiser.parameters()] == flags


def test_an_adapter_used_within_anothers_use_gives_it_back(teacher):
    x, t, cond = inputs(teacher)
    student, fake = (stirred(adapt(teacher, Adapter(rank=2), n)) for n in ("student", "fake"))
    shared = student.denoiser
    assert active_adapter(shared) is None
    with using(shared, "student"):
        before = shared(x, t, cond)
        with pytest.raises(KeyError), using(shared, "fake"):
            assert active_adapter(shared) == "fake"
            raise KeyError
        with using(shared, None):
            assert active_adapter(shared) is None
        assert active_adapter(shared) == "student"
        assert torch.equal(shared(x, t, cond), before)
    assert active_adapter(shared) is None
    assert torch.equal(student(x, t, cond), before) and not torch.equal(fake(x, t, cond), before)


def test_an_adapter_is_added_to_half_precision_weights_in_float32():
    from peft import LoraConfig

    base = torch.nn.Sequential(torch.nn.Linear(64, 48)).to(torch.bfloat16)
    weight = base[0].weight.detach().clone()
    inject(base, "mine", LoraConfig(r=4, lora_alpha=8, target_modules="0"))
    layer = base[0]
    a, b = layer.lora_A["mine"].weight, layer.lora_B["mine"].weight
    assert a.dtype == b.dtype == torch.float32
    with torch.no_grad():
        b.normal_()
    expected = (weight.float() + 2 * b @ a).to(torch.bfloat16)
    found = merged_weight(layer, "mine")
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected)
    assert torch.equal(layer.base_layer.weight, weight)


def test_a_deep_copy_is_another_adapter_on_the_same_weights(teacher):
    x, t, cond = inputs(teacher)
    one = stirred(adapt(teacher, Adapter(rank=2), "student"))
    two = copy.deepcopy(one)
    assert unwrap(two).backbone is unwrap(one).backbone
    assert torch.equal(one(x, t, cond), two(x, t, cond))
    stirred(two)
    assert not torch.equal(one(x, t, cond), two(x, t, cond))


FAKELESS = ("consistency", "ect", "progressive")  # which refuse an adapter for a fake score
CASES = [(n, w) for n in (*FIVE, "ect") for w in WAYS if not (n in FAKELESS and w == "fake only")]


@pytest.mark.parametrize(("name", "way"), CASES)
def test_every_objective_learns_in_every_way_and_the_base_never_changes(
    name, way, pipelines, tmp_path
):
    run = made(name, pipelines, tmp_path / "run", way)
    before = digest(unwrap(run.teacher.denoiser).backbone)
    engine = run.engine
    data = stream(engine)
    for i, turn in enumerate(engine.objective.turns(0)):
        was = {n: [p.clone() for p in q.params] for n, q in engine.players.items()}
        engine.play(turn, i, data)
        for n, q in engine.players.items():
            moved = any(not torch.equal(a, b) for a, b in zip(was[n], q.params))
            assert moved == (n in turn.players), (turn.players, n)
    data.close()
    assert digest(unwrap(run.teacher.denoiser).backbone) == before


def test_an_adapter_run_is_exported_merged(pipelines, tmp_path):
    run = made("sid", pipelines, tmp_path / "run", steps=2)
    run.engine.train()
    summary = finish(run)
    assert summary["steps"] == 2
    student, teacher = load_student(tmp_path / "run" / "student")
    z, cond = torch.randn(2, 1, 8, 8), teacher.codec.condition([1, 2])
    device = run.engine.accelerator.device
    with run.engine.ema.swapped():
        ours = run.student(z.to(device), {k: v.to(device) for k, v in cond.items()})
    torch.testing.assert_close(student(z, cond), ours.cpu(), atol=1e-4, rtol=1e-4)


def test_only_the_adapters_are_averaged_and_saved(pipelines, tmp_path):
    engine = made("sid", pipelines, tmp_path / "run").engine
    base = sum(p.numel() for p in unwrap(engine.objective.teacher).backbone.parameters())
    learns = sum(p.numel() for p in engine.players["student"].params)
    assert sum(m.numel() for m in engine.ema.mean) == learns < base / 2


def test_targets_that_match_nothing_are_named(pipelines, tmp_path):
    tree = recipe_tree("sid", pipelines["edm"])
    tree["adapters"] = {"rank": 4, "targets": "no_such_layer"}
    with refused("adapters.targets", "no_such_layer"):
        build.build(Recipe.check(tree), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_adapter_for_a_player_that_is_not_there_is_refused(pipelines):
    tree = recipe_tree("sid", pipelines["edm"])
    with refused("adapters.players", "fakes"):
        Recipe.check({**tree, "adapters": {"players": ["fakes"]}})


def test_a_copy_of_an_adapter_is_counted_as_its_original_is():
    from copy import deepcopy

    teacher = load("shapes")
    student = schedulers.student(teacher, 1, adapter=Adapter(rank=2)).denoiser
    x, t = torch.randn(3, *teacher.shape), torch.ones(3)
    with evaluations_of(denoisers_in({"student": student})) as counts, torch.no_grad():
        deepcopy(student)(x, t, teacher.codec.condition(["a red circle"] * 3))
    assert counts == {"student": 3}


class Stack(Denoiser):
    """A denoiser of `depth` linear layers."""

    def __init__(self, depth):
        super().__init__()
        self.backbone = nn.Sequential(*(nn.Linear(2, 2) for _ in range(depth)))


def calls_to_choose(depth):
    """Python calls that `using` an adapter and leaving it takes, once layers are known."""
    network = Stack(depth)
    config = Adapter(rank=1, targets=r".*backbone\.\d+").config("")
    for name in ("student", "fake"):
        inject(network, name, config)
    assert len(adapter_layers(network)) == depth
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event == "call"

    with using(network, "fake"):
        pass
    sys.setprofile(count)
    try:
        with using(network, "student"):
            assert active_adapter(network) == "student"
    finally:
        sys.setprofile(None)
    return calls


def test_choosing_an_adapter_costs_the_same_for_any_number_of_layers():
    assert calls_to_choose(200) == calls_to_choose(2) < 40


class Drawing(torch.nn.Module):
    """A block that draws from the generator, and computes in autocast's type."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, x, options):
        return self.linear(x) * torch.rand_like(x) * options["gain"], None


class Recomputing(torch.nn.Module):
    """A backbone of one block that takes diffusers' hook for checkpointing."""

    def __init__(self):
        super().__init__()
        self.block, self.call = Drawing(), None

    def enable_gradient_checkpointing(self, call):
        self.call = call

    def forward(self, x, gain):
        options = {"gain": gain}
        out, _ = self.call(self.block, x, options) if self.call else self.block(x, options)
        return out


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "autocast"])
def test_a_recomputed_block_draws_and_rounds_as_it_did(half):
    network, x = Recomputing(), torch.randn(3, 4, requires_grad=True)
    gain = torch.randn(4, requires_grad=True)
    sources, gradients = [x, gain, *network.parameters()], []
    for recompute in (False, True):
        if recompute:
            checkpointing(network)
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = network(x, gain).float().square().sum()
        torch.manual_seed(1)
        gradients.append(torch.autograd.grad(loss, sources))
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain, rtol=0, atol=0)


def test_a_hook_inside_a_recomputed_block_sees_a_graph():
    network = Recomputing()
    checkpointing(network)
    with hooked(network.block.linear, lambda block, args, kwargs, output: outputs.append(output)):
        outputs = []
        network(torch.randn(2, 4), torch.ones(4))
    (gradient,) = torch.autograd.grad(outputs[0].sum(), network.block.linear.bias)
    assert torch.equal(gradient, torch.full((4,), 2.0))


def test_a_recomputed_block_calls_its_own_hooks_once():
    network, calls = Recomputing(), []
    checkpointing(network)
    network.block.register_forward_hook(lambda *_: calls.append(1))
    network(torch.randn(2, 4), torch.ones(4)).sum().backward()
    assert calls == [1]


def test_a_second_gradient_through_a_recomputed_block_is_an_error():
    """It would be that of the rest of the network, without a word."""
    network, x = Recomputing(), torch.randn(2, 4, requires_grad=True)
    checkpointing(network)
    out = network(x, torch.ones(4)).square().sum()
    (slope,) = torch.autograd.grad(out, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.square().sum().backward()


class Gain:
    """An argument that is an object with a tensor."""

    def __init__(self, value):
        self.value = value


class Scaling(torch.nn.Module):
    """A block whose gain is an argument, inside an object or not, or a tensor of someone else's."""

    def __init__(self):
        super().__init__()
        self.linear, self.gain = torch.nn.Linear(4, 4), None

    def forward(self, x, gain=None):
        gain = self.gain if gain is None else gain
        return self.linear(x) * (gain.value if isinstance(gain, Gain) else gain)


WAYS_IN = {
    "object": lambda call, block, x, gain: call(block, x, Gain(gain)),
    "keyword": lambda call, block, x, gain: call(block, x, gain=gain, use_reentrant=False),
}


@pytest.mark.parametrize("way", WAYS_IN)
def test_tensors_in_objects_and_keywords_of_a_recomputed_block_keep_their_gradients(way):
    """Hooks of PyTorch's checkpoint are accepted, which backbones of one's own may pass."""
    network, gain = Recomputing(), torch.randn(4, requires_grad=True)
    network.block = Scaling()
    checkpointing(network)
    x = torch.randn(2, 4)
    WAYS_IN[way](network.call, network.block, x, gain).sum().backward()
    torch.testing.assert_close(gain.grad, network.block.linear(x).detach().sum(0))


def test_a_recomputed_block_that_computes_with_what_is_not_given_to_it_is_refused():
    """Its gradients would be missing, without a word."""
    network, outside = Recomputing(), torch.nn.Linear(4, 4)
    network.block = Scaling()
    checkpointing(network)
    network.block.gain = outside(torch.ones(4))
    with refused("train.checkpointing", "Scaling", "arguments"):
        network.call(network.block, torch.randn(2, 4, requires_grad=True)).sum().backward()


def test_a_pass_does_not_walk_through_the_layers(pipelines, monkeypatch):
    """diffusers' UNet2DModel looks for its floating type in all of them, unless it is told.

    The first few are looked at for the first weight.
    """
    teacher = load(str(pipelines["edm"]), null_label=10)
    student = adapt(teacher, Adapter(rank=2), "student")
    x, t, cond = torch.randn(2, 1, 8, 8), torch.rand(2), teacher.codec.condition([1, 2])
    walks, walk = [], nn.Module.named_modules

    def counted(self, *args, **kwargs):
        walks.append(self)
        return walk(self, *args, **kwargs)

    with torch.no_grad():
        student(x, t, cond), teacher.denoiser(x, t, cond)  # layers are looked up once
        monkeypatch.setattr(nn.Module, "named_modules", counted)
        student(x, t, cond)
        teacher.denoiser(x, t, cond)
    assert len(walks) < 10 < len(list(walk(student.denoiser)))


def test_the_type_of_a_network_is_that_of_its_weights_now(pipelines):
    backbone = unwrap(load(str(pipelines["edm"]), null_label=10).denoiser).backbone
    twin = copy.deepcopy(backbone).to(torch.bfloat16)
    assert type(twin).__name__ == "UNet2DModel" and type(twin) is type(backbone)
    assert (twin.dtype, backbone.dtype) == (torch.bfloat16, torch.float32)
    made = type(backbone).from_config(backbone.config).half()
    assert made.dtype == torch.float16
