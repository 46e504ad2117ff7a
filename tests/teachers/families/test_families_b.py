"""The later families: what stock pipelines feed their networks, how they guide, what they shift."""

import inspect
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from students import schedulers
from students.export.folder import pictures, pipeline, request, sample_student
from students.lora import Adapter, merged_backbone, unwrap
from teachers import load
from teachers.denoiser import Denoiser, Guided
from teachers.families.qwen import QwenImage
from teachers.process import Linear
from tests.helpers import families_b
from tests.helpers.refusals import refused

# How each pipeline is asked for guidance of g = 3, as published; Lumina's without its norm.
GUIDED = {
    "sana": {"guidance_scale": 3.0, "negative_prompt": ""},
    "lumina": {"guidance_scale": 3.0, "negative_prompt": ["", ""], "cfg_normalization": False},
    "qwen": {"true_cfg_scale": 3.0, "negative_prompt": ["", ""]},
    "zimage": {"guidance_scale": 2.0, "negative_prompt": ["", ""]},  # counts from 0
    "wan": {"guidance_scale": 3.0, "negative_prompt": ["", ""]},
}
PROMPTS = ["a red circle", "two boats on a lake"]


def opened(folders, name, by=0.05, **options):
    """The small teacher, with weights far enough from their first values that all inputs count."""
    teacher = load(str(folders(name)), **families_b.OPTIONS.get(name, {}), **options)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in teacher.denoiser.parameters():
            p.add_(by * torch.randn_like(p))
    return teacher


def walk(pipe, steps=2, output_type="pt", **arguments):
    """The stock pipeline's pictures or latents, its noise being that of `draw`."""
    pipe.set_progress_bar_config(disable=True)
    rng = torch.Generator().manual_seed(0)
    out = pipe(num_inference_steps=steps, generator=rng, output_type=output_type, **arguments)
    return next(iter(out.values()))


def recorded(backbone, run):
    """The arguments of every call of the network during run(), by name."""
    calls = []
    names = inspect.signature(backbone.forward)

    def keep(module, args, kwargs):
        calls.append(dict(names.bind(*args, **kwargs).arguments))

    hook = backbone.register_forward_pre_hook(keep, with_kwargs=True)
    run()
    hook.remove()
    return calls


@pytest.mark.parametrize("name", families_b.FAMILIES)
def test_the_network_reads_what_its_pipeline_feeds_it(folders, name):
    teacher = opened(folders, name)
    student = schedulers.student(teacher, 2, None, False).eval()
    backbone = unwrap(student.denoiser).backbone
    _, arguments = request(student, teacher)
    theirs = recorded(backbone, lambda: walk(pipeline(student, teacher), **arguments))
    ours = recorded(backbone, lambda: pictures(student, teacher, 2, PROMPTS))
    assert len(theirs) == len(ours) == 2
    for a, b in zip(theirs, ours, strict=True):
        skipped = {"return_dict", "attention_kwargs", "joint_attention_kwargs", "guidance"}
        assert a.keys() - skipped == b.keys() - skipped
        if name == "qwen":  # theirs is as long as the longest prompt, ours as the longest allowed
            n = a["encoder_hidden_states"].shape[1]
            assert not b["encoder_hidden_states_mask"][:, n:].any()
            for key in ("encoder_hidden_states", "encoder_hidden_states_mask"):
                assert b[key].shape[1] == 512
                b[key] = b[key][:, :n]
        for key in a.keys() - skipped:
            torch.testing.assert_close(b[key], a[key], atol=1e-5, rtol=1e-5)


class Renormed(Guided):
    """Guidance under which each token's flow keeps the length of the conditional one."""

    def forward(self, x_t, t, cond=None, s=None):
        _, sigma = self.process.at(t, x_t)
        towards, plain = (x_t - super().forward(x_t, t, cond)) / sigma, self.denoiser(x_t, t, cond)
        kept = QwenImage.pack((x_t - plain) / sigma).norm(dim=-1, keepdim=True)
        flow = QwenImage.pack(towards)
        flow = flow * kept / flow.norm(dim=-1, keepdim=True)
        return x_t - sigma * QwenImage.unpack(flow, tuple(x_t.shape[1:]))


@pytest.mark.parametrize("name", families_b.FAMILIES)
def test_guidance_is_what_its_pipeline_means_by_it(folders, name):
    teacher = opened(folders, name, by=0.2)
    network = unwrap(teacher.denoiser)
    form = schedulers.form(network, 2, renoise=False)
    kind = Renormed if name == "qwen" else Guided
    guided = form.generator(kind(network, 3.0, teacher.codec.null)).eval()
    plain = form.generator(network).eval()
    _, arguments = request(plain, teacher)
    arguments |= {"output_type": "latent", **GUIDED[name]}
    theirs = walk(pipeline(plain, teacher), **arguments)
    ours, unguided = (network.pack(sample_student(g, teacher, PROMPTS, 0)) for g in (guided, plain))
    assert (theirs - unguided).abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", families_b.FAMILIES)
@pytest.mark.parametrize("renoise", [True, False], ids=["renoise", "ode"])
def test_one_step_students_are_sampled_by_their_pipelines(folders, name, renoise):
    teacher = opened(folders, name)
    student = schedulers.student(teacher, 1, None, renoise).eval()
    _, arguments = request(student, teacher)
    theirs = walk(pipeline(student, teacher), 1, **arguments)
    torch.testing.assert_close(pictures(student, teacher, 1, PROMPTS), theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", families_b.FAMILIES)
def test_conditions_are_as_long_for_every_prompt_and_depend_on_it_alone(folders, name):
    teacher = opened(folders, name)
    codec, prompts = teacher.codec, ["a", "a red circle on the left of two blue squares " * 3]
    both, null = codec.condition(prompts), codec.null
    assert codec.null is null and prompts[0] == "a"
    for i, prompt in enumerate(prompts):
        alone = codec.condition([prompt])
        for key, value in both.items():
            assert value.shape[1:] == alone[key].shape[1:] == null[key].shape[1:]
            # padding is read by no token before it, and by the network not at all
            kept = both["mask"][i].bool() if key == "text" and "mask" in both else slice(None)
            torch.testing.assert_close(value[i][kept], alone[key][0][kept], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", families_b.FAMILIES)
def test_weights_in_bfloat16_are_fed_bfloat16_and_answer_in_float32(folders, name):
    whole, half = opened(folders, name), opened(folders, name, precision="bf16")
    for a, b in zip(half.denoiser.parameters(), whole.denoiser.parameters(), strict=True):
        a.data.copy_(b)
    torch.manual_seed(2)
    x_t, t = torch.randn(2, *whole.shape), torch.tensor([0.4, 0.9])
    cond = whole.codec.condition(PROMPTS)
    with torch.no_grad():
        x, y = (teacher.denoiser(x_t, t, cond) for teacher in (whole, half))
    assert y.dtype == torch.float32 and unwrap(half.denoiser).dtype == torch.bfloat16
    assert 0 < (x - y).square().mean().sqrt() < 0.06 * (x - x_t).square().mean().sqrt()


def test_merging_an_adapter_keeps_every_weight_in_its_own_precision(folders):
    teacher = opened(folders, "wan", precision="bf16")
    before = {k: p.dtype for k, p in unwrap(teacher.denoiser).backbone.named_parameters()}
    assert set(before.values()) == {torch.bfloat16, torch.float32}
    student = schedulers.student(teacher, 2, None, True, Adapter(rank=2))
    assert {k: p.dtype for k, p in merged_backbone(student.denoiser).named_parameters()} == before


@pytest.mark.parametrize("name", families_b.FAMILIES)
def test_every_adapter_weight_learns_and_a_critic_finds_its_block(folders, name):
    teacher = opened(folders, name)
    student = schedulers.student(teacher, 2, None, True, Adapter(rank=2))
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.1 * torch.randn_like(p)).requires_grad_(True)
    cond = teacher.codec.condition(PROMPTS)
    seen = []
    network: Denoiser = unwrap(student.denoiser)
    block = dict(network.named_modules())[unwrap(student.denoiser).middle]
    hook = block.register_forward_hook(lambda module, args, out: seen.append(out))
    x = student(torch.randn(2, *teacher.shape), cond, 1)
    hook.remove()
    out = seen[0][-1] if isinstance(seen[0], tuple) else seen[0]
    assert len(seen) == 1 and isinstance(out, Tensor) and out.shape[0] == 2 and out.ndim == 3
    x.square().sum().backward()
    names = student.denoiser.trainable()
    still = [k for k, p in names.items() if p.grad is None or not p.grad.abs().max() > 0]
    # a last block's text leaves no trace in the picture
    assert len(names) > 20 and all(name == "qwen" and "blocks.1" in k for k in still), still


@pytest.mark.parametrize("name", ["qwen", "wan"])
def test_latents_are_normalised_channel_by_channel(folders, name):
    teacher = opened(folders, name)
    vae, frames = teacher.codec.pipe.vae, (5,) if name == "wan" else ()
    torch.manual_seed(3)
    images = torch.rand(2, 3, *frames, 32, 32) * 2 - 1
    with torch.no_grad():
        raw = vae.encode(images if name == "wan" else images[:, :, None]).latent_dist.mode()
    mean, std = (torch.tensor(v).view(4, 1, 1, 1) for v in (families_b.MEAN, families_b.STD))
    expected = (raw - mean) / std
    encoded = teacher.codec.encode(images)
    assert encoded.shape == (2, *teacher.shape)
    torch.testing.assert_close(encoded, expected.view_as(encoded), atol=1e-5, rtol=1e-5)
    assert teacher.codec.decode(encoded).shape == images.shape


@pytest.mark.parametrize("name", ["lumina", "qwen"])
def test_times_shifted_by_resolution_are_those_of_the_pipeline(folders, name, tmp_path):
    """Lumina's pipeline takes the number of channels for the length of the sequence."""
    if name == "lumina":
        families_b.lumina(tmp_path, use_dynamic_shifting=True)
        teacher = load(str(tmp_path))
    else:
        teacher = opened(folders, name)
    pipe = teacher.codec.pipe
    config = {**pipe.scheduler.config, "shift_terminal": None}
    pipe.scheduler = type(pipe.scheduler).from_config(config)
    _, arguments = request(schedulers.student(teacher, 1), teacher)
    walk(pipe, 4, **arguments)
    process = teacher.denoiser.process
    assert isinstance(process, Linear) and process.shift > 1.2
    even = torch.tensor([1, 0.75, 0.5, 0.25], dtype=torch.float64)
    expected = process.shift * even / (1 + (process.shift - 1) * even)
    torch.testing.assert_close(pipe.scheduler.sigmas[:4].double(), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("sana", {"size": 48}, ("teacher '*'", "48", "32")),
        ("lumina", {"size": 24}, ("teacher '*'", "24", "16")),
        ("zimage", {"size": 28}, ("teacher '*'", "28")),
        ("wan", {"size": 24}, ("teacher '*'", "24", "16")),
        ("wan", {"frames": 4}, ("teacher '*'", "4", "1", "2")),
        ("sana", {"frames": 4}, ("teacher '*'", "SanaPipeline", "frames")),
    ],
)
def test_sizes_that_do_not_fill_latents_are_refused(folders, name, options, reason):
    with refused(*reason):
        load(str(folders(name)), **options)


def test_sizes_are_those_of_the_published_pipelines_unless_told(folders):
    assert load(str(folders("sana"))).codec.size == (32, 32)  # its own sample_size, 8, by 4
    assert load(str(folders("sana")), size=64).shape == (4, 16, 16)
    assert load(str(folders("qwen"))).shape == (4, 128, 128)
    assert load(str(folders("zimage"))).codec.size == (1024, 1024)
    assert load(str(folders("wan"))).codec.size == (81, 480, 832)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("boundary_ratio", 0.9, ("teacher '*'", "networks")),
        ("expand_timesteps", True, ("teacher '*'", "time")),
    ],
)
def test_videos_of_two_networks_or_of_token_times_are_refused(
    folders, tmp_path, key, value, reason
):
    index = json.loads((Path(folders("wan")) / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {key: value}))
    with refused(*reason):
        load(str(tmp_path))
