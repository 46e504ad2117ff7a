"""Frozen weights in fp8 and nf4: against closed forms, bitsandbytes, and the weights themselves."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import norm
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from distill.config.recipe import Recipe
from distill.objectives.tangent import tangent
from distill.training import build
from students import schedulers
from students.checkpointing import checkpointing
from students.export.folder import export, load_student, rehearse
from students.export.unquantised import unquantised
from students.lora import Adapter, adapt, unwrap
from teachers import compiled, load
from teachers.catalogue.outlines import dtype_of_new
from teachers.compiled import blocks_in, compile_modules, counts, running_compiled
from teachers.quantised import (
    BLOCK,
    FORMS,
    NF4,
    Quantised,
    decode,
    encode,
    level_pairs,
    parameters,
    quantise,
)
from tests.helpers import families
from tests.helpers.disturbed import disturbed
from tests.helpers.refusals import refused


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(families.build("sd", tmp_path_factory.mktemp("sd")))


def test_nf4s_levels_are_the_quantiles_of_a_normal():
    """Appendix E of arXiv:2305.14314: 8 steps up to the top offset and 7 down from it, scaled."""
    top = 0.9677083
    up = norm.ppf(torch.linspace(top, 0.5, 9).double())[:-1]
    down = -norm.ppf(torch.linspace(top, 0.5, 8).double())[:-1]
    levels = sorted([*up, 0.0, *down])
    expected = torch.tensor(levels) / max(levels)
    torch.testing.assert_close(torch.tensor(NF4).double(), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("shape", [(32, 48), (5, 7)], ids=["whole blocks", "a rest"])
def test_nf4_gives_each_weight_the_nearest_level_of_its_block(shape):
    weight = torch.randn(shape)
    codes, scales = encode(weight, "nf4")
    assert codes.dtype == torch.uint8 and len(codes) == BLOCK // 2 * len(scales)
    pairs = level_pairs(codes.device)
    found = decode(codes, scales, pairs, shape, torch.float32).flatten()
    levels = torch.tensor(NF4)
    for i in range(0, weight.numel(), BLOCK):
        block = weight.flatten()[i : i + BLOCK]
        largest = block.abs().max()
        nearest = (block[:, None] / largest - levels).abs().argmin(1)
        torch.testing.assert_close(found[i : i + BLOCK], levels[nearest] * largest)


def test_fp8_keeps_three_bits_of_every_mantissa():
    weight = torch.randn(16, 64) * torch.logspace(-6, 3, 16)[:, None]
    codes, scales = encode(weight, "fp8")
    found = decode(codes, scales, None, (16, 64), torch.float32)
    normal = (weight / scales).abs() >= 2**-6  # below it e4m3 has steps of one size
    assert ((found - weight).abs() <= weight.abs() / 16 * 1.0001)[normal].all()
    assert ((found - weight).abs() <= scales * 2**-10 * 1.0001)[~normal].all()
    assert normal.float().mean() > 0.9


def test_nf4_is_bitsandbytes_own():
    functional = pytest.importorskip("bitsandbytes").functional
    weight = torch.randn(64, 192)
    theirs, state = functional.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")
    codes, scales = encode(weight, "nf4")
    torch.testing.assert_close(scales.flatten(), state.absmax.flatten())
    ours = decode(codes, scales, level_pairs(codes.device), (64, 192), torch.float32)
    torch.testing.assert_close(ours, functional.dequantize_4bit(theirs, state))
    assert torch.equal(codes, theirs.flatten())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", ""])
def test_a_product_and_its_gradient_are_those_of_the_decoded_weight(form, bias):
    linear = nn.Linear(48, 40, bias)
    layer = Quantised(linear, form)
    x = torch.randn(3, 5, 48, requires_grad=True)
    twin = x.detach().clone().requires_grad_(True)
    made, plain = layer(x), F.linear(twin, layer.weight, linear.bias)
    torch.testing.assert_close(made, plain)
    made.square().sum().backward(), plain.square().sum().backward()
    torch.testing.assert_close(x.grad, twin.grad)


def by_formula(layer, dtype):
    """The weight, code by code: its level and its scale, each rounded to the type, multiplied."""
    scales = layer.scales.to(dtype)
    if layer.form == "fp8":
        return layer.codes.to(dtype) * scales
    indices = torch.stack([layer.codes >> 4, layer.codes & 15], 1).long()
    flat = torch.tensor(NF4)[indices].view(-1, BLOCK).to(dtype) * scales
    shape = layer.out_features, layer.in_features
    return flat.flatten()[: shape[0] * shape[1]].view(shape)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("dtype", "inside"),
    [(torch.float32, None), (torch.bfloat16, None), (torch.float32, torch.bfloat16)],
    ids=["fp32", "bf16", "autocast"],
)
def test_a_product_has_the_bits_of_the_formula(form, dtype, inside):
    layer = Quantised(nn.Linear(48, 41), form)  # 1968 weights: the last block of nf4 is not full
    x, grad = torch.randn(3, 5, 48, dtype=dtype, requires_grad=True), torch.randn(3, 5, 41)
    kind = inside or dtype
    with torch.autocast("cpu", inside, enabled=inside is not None):
        out = layer(x)
    out.backward(grad.to(out.dtype))
    weight = by_formula(layer, kind)
    assert torch.equal(layer.weight, by_formula(layer, torch.float32))
    assert torch.equal(out, F.linear(x.to(kind), weight) + layer.bias.to(kind))
    with torch.autocast("cpu", inside, enabled=inside is not None), torch.no_grad():
        assert torch.equal(layer(x), out)
    assert torch.equal(x.grad, (grad.to(kind) @ weight).to(dtype))


@pytest.mark.parametrize("form", FORMS)
def test_a_product_has_a_forward_mode(form):
    layer, x, v = Quantised(nn.Linear(64, 8), form), torch.randn(2, 64), torch.randn(2, 64)
    out, slope = tangent(layer, (x,), (v,))
    torch.testing.assert_close(out, layer(x))
    torch.testing.assert_close(slope, v @ layer.weight.mT)


@pytest.mark.parametrize("form", FORMS)
def test_the_pairs_of_levels_are_no_part_of_the_state_and_follow_the_layer(form):
    layer = Quantised(nn.Linear(64, 64), form)
    assert set(layer.state_dict()) == {"codes", "scales", "bias"}
    twin = deepcopy(layer)
    assert torch.equal(twin.weight, layer.weight)
    assert twin.codes.data_ptr() != layer.codes.data_ptr()
    assert {b.device.type for b in (*twin.to("meta").buffers(), twin.weight)} == {"meta"}
    with FakeTensorMode(), dtype_of_new(torch.bfloat16):
        fake = Quantised(nn.Linear(64, 64), form)
        x = torch.zeros(2, 64, requires_grad=True)
        fake(x).sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
    for a, b in zip(fake.buffers(), layer.buffers(), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_between_the_passes_only_codes_are_held(form, how):
    layer, kept = Quantised(nn.Linear(64, 64), form), []
    layer.requires_grad_(False)
    call = torch.compile(layer, backend="aot_eager") if how == "compiled" else layer
    x = torch.randn(2, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = call(x)
    out.sum().backward()
    own = {b.data_ptr() for b in layer.buffers()}
    assert layer.codes.data_ptr() in {t.data_ptr() for t in kept}
    assert all(t.data_ptr() in own or t.numel() <= 64 for t in kept)  # of the rest, the bias
    assert layer.codes.nbytes + layer.scales.nbytes < {"fp8": 1.07, "nf4": 0.57}[form] * 64 * 64
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(2, -1))


def with_gradients(denoiser, teacher):
    """x̂ of three samples without gradients, x̂ of two, its gradients to x and to what learns."""
    torch.manual_seed(0)
    x, t = torch.randn(3, *teacher.shape), torch.linspace(0.3, 0.7, 3)
    with torch.no_grad():
        alone = denoiser(x, t, teacher.codec.condition([0, 1, 2]))
    x = x[:2].clone().requires_grad_(True)
    out = denoiser(x, t[:2], teacher.codec.condition([0, 1]))
    learning = [p for p in denoiser.parameters() if p.requires_grad]
    return [alone, out, *torch.autograd.grad(out.square().sum(), [x, *learning])]


@pytest.mark.parametrize(
    ("precision", "form"),
    [
        (p, f) if (p, f) == ("bf16", "nf4") else pytest.param(p, f, marks=pytest.mark.slow)
        for p in ("fp32", "bf16")
        for f in FORMS
    ],
)
def test_a_compiled_block_on_quantised_weights_computes_what_an_eager_one_does(
    folders, form, precision, monkeypatch
):
    """With an adapter, its gradients included; in whole graphs, each compiled once."""
    torch._dynamo.reset()
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    teacher = load(folders("dit"), precision=precision)
    quantise(unwrap(teacher.denoiser).backbone, form)
    student = disturbed(adapt(teacher, Adapter(rank=2), "student")).requires_grad_(True)
    expected, before = with_gradients(student, teacher), counts()
    network = unwrap(student)
    compile_modules(blocks_in(network.backbone, network.BLOCKS)[:1])  # the others take as long
    with running_compiled():
        for _ in range(2):
            graphs = counts().graphs
            for a, b in zip(with_gradients(student, teacher), expected, strict=True):
                scale = max(1, b.abs().max().item())
                atol = (1e-6 if precision == "fp32" else 2**-8) * scale
                torch.testing.assert_close(a, b, rtol=0, atol=atol)
    assert graphs > before.graphs and counts() == (graphs, before.breaks)


def test_only_the_blocks_linear_layers_are_quantised(folder):
    whole, small = load(folder, precision="bf16"), load(folder, precision="nf4")
    before = dict(whole.denoiser.backbone.named_modules())
    changed = {k for k, m in small.denoiser.backbone.named_modules() if isinstance(m, Quantised)}
    blocks = {k for k, m in before.items() if type(m) is nn.Linear and "time_embedding" not in k}
    assert changed == blocks
    assert parameters(small.denoiser) == parameters(whole.denoiser)


@pytest.mark.parametrize(("form", "gap"), [("fp8", 0.02), ("nf4", 0.08)])
def test_a_quantised_teacher_says_nearly_what_the_whole_one_says(folder, form, gap):
    whole, small = load(folder, precision="bf16"), load(folder, precision=form)
    x, t = torch.randn(2, *whole.shape), torch.full((2,), 0.5)
    cond = whole.codec.condition(["a", "b"])
    with torch.no_grad():
        a, b = (n.denoiser(x, t, cond) for n in (whole, small))
    assert 0 < (a - b).norm() / a.norm() < gap


@pytest.mark.parametrize("form", FORMS)
def test_adapters_on_quantised_weights_have_the_gradients_of_those_on_the_decoded(folder, form):
    def gradients(teacher, recompute):
        torch.manual_seed(2)
        student = adapt(teacher, Adapter(rank=2), "student")
        with torch.no_grad():
            for p in student.parameters():
                p.copy_(0.1 * torch.randn_like(p))
        if recompute:
            checkpointing(unwrap(student).backbone)
            unwrap(student).backbone.train()
        student.requires_grad_(True)
        torch.manual_seed(3)
        x, cond = torch.randn(2, *teacher.shape), teacher.codec.condition(["a", "b"])
        student(x, torch.full((2,), 0.5), cond).square().sum().backward()
        return [p.grad for p in student.parameters()]

    plain = load(folder, precision="bf16")
    quantise(plain.denoiser.backbone, form)
    for name, m in list(plain.denoiser.backbone.named_modules()):
        if isinstance(m, Quantised):
            linear = nn.Linear(m.in_features, m.out_features, m.bias is not None, dtype=m.dtype)
            linear.weight.data = m.weight
            linear.bias = m.bias
            parent, _, leaf = name.rpartition(".")
            setattr(plain.denoiser.backbone.get_submodule(parent), leaf, linear)
    expected = gradients(plain, False)
    for recompute in (False, True):
        found = gradients(load(folder, precision=form), recompute)
        gap = sum((a - b).norm() ** 2 for a, b in zip(found, expected, strict=True)).sqrt()
        assert gap < 0.02 * sum(b.norm() ** 2 for b in expected).sqrt()


def test_a_student_is_merged_into_the_weights_of_the_files_and_not_into_codes(folder):
    small, whole = load(folder, precision="nf4"), load(folder, precision="bf16")
    student = disturbed(schedulers.student(small, 2, None, True, Adapter(rank=4, alpha=8.0)))
    found = unquantised(student, small)
    weights = dict(unwrap(found.denoiser).backbone.named_parameters())
    state = student.denoiser.trainable()
    moved = 0
    for name, base in whole.denoiser.backbone.named_parameters():
        a = state.get(f"backbone.{name.removesuffix('.weight')}.lora_A.student.weight")
        b = state.get(f"backbone.{name.removesuffix('.weight')}.lora_B.student.weight")
        if a is None or b is None or base.ndim != 2:
            expected = base
        else:
            expected, moved = (base.float() + 2 * b @ a).to(base.dtype), moved + 1
        if base.ndim == 2:
            torch.testing.assert_close(weights[name], expected, atol=0, rtol=1e-2)
    assert moved > 10
    assert found.times == student.times and found.denoiser.process == student.denoiser.process


@pytest.mark.slow
def test_a_student_on_quantised_weights_is_rehearsed_and_exported_whole(folder, tmp_path):
    """A student that learnt on quantised weights is exported on the exact ones."""
    teacher = load(folder, precision="nf4")
    student = disturbed(schedulers.student(teacher, 2, None, True, Adapter(rank=4))).eval()
    rehearse(student, teacher)
    export(unquantised(student, teacher), teacher, tmp_path / "student", {})
    again, _ = load_student(tmp_path / "student")
    kinds = {type(m) for m in unwrap(again.denoiser).backbone.modules()}
    assert Quantised not in kinds and nn.Linear in kinds


def test_a_student_of_whole_weights_is_restored_as_it_is(folder):
    teacher = load(folder)
    student = schedulers.student(teacher, 1, None, True, Adapter(rank=2))
    assert unquantised(student, teacher) is student


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ({}, ("teacher.precision", "adapters: {}")),
        ({"adapters": {"players": ["student"]}}, ("teacher.precision", "adapters.players")),
        ({"adapters": {"kind": "dora"}}, ("teacher.precision", "adapters.kind")),
    ],
)
def test_quantised_weights_that_would_have_to_learn_are_refused(folder, more, line):
    tree = {
        "teacher": {"source": folder, "precision": "nf4"},
        "objective": {"name": "sid"},
        "train": {"steps": 1},
    }
    with refused(*line):
        Recipe.check({**tree, **more})


def test_a_run_on_quantised_weights_learns_and_leaves_them_alone(folder, tmp_path):
    tree = {
        "teacher": {"source": folder, "precision": "nf4", "guidance": 2},
        "objective": {"name": "dmd2", "student_every": 1},
        "adapters": {"rank": 4},
        "train": {"steps": 2, "batch": 2, "precision": "bf16", "sample_every": 0},
    }
    run = build.build(Recipe.check(tree), tmp_path / "run")
    layers = [m for m in run.teacher.denoiser.modules() if isinstance(m, Quantised)]
    codes = [m.codes.clone() for m in layers]
    before = [p.clone() for p in run.engine.players["student"].params]
    run.engine.train()
    after = run.engine.players["student"].params
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(torch.equal(a, m.codes) for a, m in zip(codes, layers, strict=True))
