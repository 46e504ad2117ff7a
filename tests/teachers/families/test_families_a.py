"""DiT, PixArt, Stable Diffusion 3, FLUX.1: the stock pipeline's own inputs and predictions."""

from inspect import signature

import pytest
import torch
from torch import Tensor

from students import Critic
from students.export.folder import request
from students.schedulers import student
from teachers import load
from teachers.denoiser import Guided
from teachers.process import Linear
from tests.helpers import families, families_a
from tests.helpers.refusals import refused


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    made = {}

    def teacher(name, **options):
        if name not in made:
            made[name] = families.build(name, tmp_path_factory.mktemp(name))
        return load(str(made[name]), **families_a.OPTIONS.get(name, {}) | options)

    return teacher


GUIDED = {  # how each stock pipeline is asked for guidance of 3
    "dit": {"guidance_scale": 3.0},
    "pixart-alpha": {"guidance_scale": 3.0},
    "pixart-sigma": {"guidance_scale": 3.0},
    "sd3": {"guidance_scale": 3.0},
    "sd3.5": {"guidance_scale": 3.0},
    "flux-dev": {"true_cfg_scale": 3.0, "negative_prompt": ["", ""]},
    "flux-schnell": {"true_cfg_scale": 3.0, "negative_prompt": ["", ""]},
}


def flat(arguments, prefix=""):
    """The tensors among a call's arguments, by name; those of dictionaries as well."""
    found = {}
    for key, value in arguments.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        elif isinstance(value, Tensor):
            found[prefix + key] = value
    return found


def spy(network, seen):
    """Append to `seen` the tensors that each call of the network is given."""
    bind = signature(type(network).forward).bind

    def note(module, args, kwargs):
        seen.append(flat(bind(module, *args, **kwargs).arguments))

    return network.register_forward_pre_hook(note, with_kwargs=True)


def stock_run(teacher, monkeypatch, **more):
    """The calls that the stock pipeline makes in four steps: of its network, of its scheduler."""
    pipe = teacher.codec.pipe
    pipe.set_progress_bar_config(disable=True)
    prompts, arguments = request(student(teacher), teacher)
    prompts = prompts[:2]
    arguments |= {next(iter(arguments)): prompts} | more
    calls, steps, step = [], [], pipe.scheduler.step

    def note(out, t, x, *args, **kwargs):
        steps.append((out.clone(), float(t), x.clone()))
        return step(out, t, x, *args, **kwargs)

    monkeypatch.setattr(pipe.scheduler, "step", note)
    with spy(getattr(pipe, teacher.denoiser.PART), calls):
        rng = torch.Generator().manual_seed(0)
        pipe(**arguments, num_inference_steps=4, generator=rng, output_type="pt")
    return prompts, calls, steps


def time_of(teacher, index):
    """The process's time at the index that a scheduler hands to its network."""
    process = teacher.denoiser.process
    if isinstance(process, Linear):
        sigma = torch.tensor(index / 1000, dtype=torch.float64)
        return process.time(sigma / (1 - sigma)).float()
    return torch.tensor(index / process.last)


@pytest.mark.parametrize("name", families_a.FAMILIES)
def test_the_network_is_given_what_the_stock_pipeline_gives_it(teachers, name, monkeypatch):
    teacher = teachers(name)
    network = teacher.denoiser
    prompts, calls, steps = stock_run(teacher, monkeypatch)
    assert len(calls) == len(steps) == 4
    cond = teacher.codec.condition(prompts)
    for theirs, (_, index, x_t) in zip(calls, steps, strict=True):
        seen = []
        with spy(network.backbone, seen), torch.no_grad():
            x_t = network.unpack(x_t, teacher.shape)
            network(x_t, time_of(teacher, index).expand(2), cond)
        (ours,) = seen
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            gap = (ours[key].double() - value.double()).abs() / (1 + value.double().abs())
            assert gap.max() < 1e-6, key


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("name", families_a.FAMILIES)
def test_predictions_are_the_stock_pipelines(teachers, name, guided, monkeypatch):
    teacher = teachers(name)
    more = GUIDED[name] if guided else {}
    prompts, _, steps = stock_run(teacher, monkeypatch, **more)
    denoiser = Guided(teacher.denoiser, 3.0 if guided else 1.0, teacher.codec.null)
    cond = teacher.codec.condition(prompts)
    for out, index, x_t in steps[:3]:  # at the last, DDIM's σ is nearly 0
        out, x_t = (teacher.denoiser.unpack(v, teacher.shape)[:2] for v in (out, x_t))
        t = time_of(teacher, index).expand(2)
        with torch.no_grad():
            x = denoiser(x_t, t, cond)
        alpha, sigma = denoiser.process.at(t, x_t)
        theirs = x_t - sigma * out  # α times the ε-network's x̂; a flow's x̂ itself
        ours = x if isinstance(denoiser.process, Linear) else alpha * x
        assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()
        assert (sigma * out).abs().max() > 1e-3 * theirs.abs().max()  # the network has a say
    if guided:  # or the two would agree for want of a difference
        with torch.no_grad():
            assert (teacher.denoiser(x_t, t, cond) - x).abs().max() > 1e-3


@pytest.mark.parametrize("name", families_a.FAMILIES)
def test_conditions_never_change_shape(teachers, name):
    codec = teachers(name).codec
    prompts = [1, 2, 3] if codec.classes else ["", "a", "a long prompt of many words"]
    whole = codec.condition(prompts)
    for i, prompt in enumerate(prompts):
        for key, value in codec.condition([prompt]).items():
            torch.testing.assert_close(value[0], whole[key][i], atol=1e-5, rtol=1e-5)
    for key, value in codec.null.items():
        assert value.shape == (1, *whole[key].shape[1:])


@pytest.mark.parametrize("name", families_a.FAMILIES)
def test_half_precision_weights_give_full_precision_predictions(teachers, name):
    whole, half = teachers(name), teachers(name, precision="bf16")
    cond = whole.codec.condition(request(student(whole), whole)[0][:2])
    x_t, t = torch.randn(2, *whole.shape), torch.tensor([0.3, 0.6])
    with torch.no_grad():
        x, rough = whole.denoiser(x_t, t, cond), half.denoiser(x_t, t, cond)
    assert half.denoiser.dtype == torch.bfloat16
    assert rough.dtype == torch.float32
    assert 0 < (x - rough).abs().max() < 0.1


@pytest.mark.parametrize("name", families_a.FAMILIES)
def test_a_critic_reads_the_middle_block(teachers, name):
    teacher = teachers(name)
    fake = teacher.denoiser.requires_grad_(True)
    cond = teacher.codec.condition(request(student(teacher), teacher)[0][:2])
    one = {k: v[:1] for k, v in cond.items()}
    judge = Critic(fake, teacher.shape, one, (teacher.denoiser.middle,))
    x_t, t = torch.randn(2, *teacher.shape, requires_grad=True), torch.tensor([0.3, 0.6])
    (feature,) = judge.features(x_t, t, cond)
    assert feature.shape[:2] == (2, teacher.shape[1] * teacher.shape[2] // 4)  # the picture's
    logits = judge(x_t, t, cond)
    assert logits.shape == (2,)
    torch.testing.assert_close(judge(x_t[:1], t[:1], one), logits[:1], atol=1e-5, rtol=1e-5)
    logits.sum().backward()
    assert x_t.grad is not None and x_t.grad.any()
    assert any(p.grad is not None and p.grad.any() for p in fake.parameters())


def test_labels_are_checked_and_the_null_one_follows_them(teachers):
    codec = teachers("dit").codec
    assert codec.null["class_labels"].tolist() == [1000]
    with refused("labels", "1000", "999"):
        codec.condition([1000])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dit", {"size": 32}, ("size", "16")),
        ("dit", {"negative_prompt": "blurry"}, ("teacher '*'", "negative_prompt")),
        ("sd3", {"size": 18}, ("teacher '*'", "4")),
        ("pixart-sigma", {"size": 18}, ("teacher '*'", "4")),
        ("flux-dev", {"size": 18}, ("teacher '*'", "4")),
        (
            "flux-schnell",
            {"embedded_guidance": 3.5},
            ("teacher '*'", "embedded_guidance"),
        ),
        ("sd3", {"embedded_guidance": 3.5}, ("teacher '*'", "embedded_guidance")),
    ],
)
def test_options_that_a_family_cannot_follow_are_refused(teachers, name, options, message):
    with refused(*message):
        teachers(name, **options)


def test_a_null_t5_is_read_as_zeros(teachers):
    text = teachers("sd3").codec.condition(["a"])["text"]
    clip = 40  # tokens of CLIP, whose 64 channels are padded to the network's 72
    assert text.shape == (1, clip + 256, 72)
    assert text[:, :clip, :64].all(1).any()
    assert not text[:, clip:].any()
    assert teachers("sd3.5").codec.condition(["a"])["text"][:, clip:].any()


def test_embedded_guidance_is_what_the_stock_pipeline_takes_by_default(teachers):
    cond = teachers("flux-dev", embedded_guidance=None).codec.condition(["a"])
    assert cond["guidance"].tolist() == [3.5]
    assert "guidance" not in teachers("flux-schnell").codec.condition(["a"])
