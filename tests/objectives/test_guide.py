"""A guide: what it learns, and the stock pipeline that draws with it."""

import json

import pytest
import torch
import yaml
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, StableDiffusionPipeline
from torch import nn

from distill.config.recipe import Recipe
from distill.objectives.base import Batch
from distill.objectives.noise_levels import Uniform
from distill.objectives.smaller.guide import Beside, ControlGuide, Guide
from distill.pretrain import guide as saving
from distill.pretrain.pixels import teach
from students.generator import Generator
from students.lora import network_of
from teachers import load
from teachers.denoiser import Denoiser, Guided
from teachers.process import Karras
from tests.helpers.disturbed import disturbed
from tests.helpers.refusals import refused


@pytest.fixture(scope="module")
def teacher():
    loaded = load("shapes")
    loaded.denoiser.requires_grad_(False)
    return loaded


@pytest.fixture(scope="module")
def guide(teacher):
    return ControlGuide.for_objective(teacher)


def made(teacher, guide, scale=3.0, **keys):
    denoiser = teacher.denoiser
    return Guide(
        teacher=Guided(denoiser, scale, teacher.codec.null),
        student=Generator(denoiser), guide=guide, **keys,
    )  # fmt: skip


def batch_of(teacher, n=4):
    torch.manual_seed(0)
    cond = teacher.codec.condition(["one red circle on the left"] * n)
    return Batch(torch.randn(n, *teacher.shape), torch.randn(n, *teacher.shape), cond)


def test_at_the_start_it_adds_nothing_and_learns_what_guidance_moves(teacher, guide):
    batch, t = batch_of(teacher), torch.full((4,), 0.7)
    x_t = teacher.denoiser.process.noise(batch.x, t, batch.noise)
    with torch.no_grad():
        plain = teacher.denoiser(x_t, t, batch.cond)
        assert torch.equal(guide.beside(x_t, t, batch.cond), plain)
        objective = made(teacher, guide, times=Uniform(0.7, 0.7))
        apart = objective.teacher(x_t, t, batch.cond) - plain
        expected = teacher.denoiser.weight(t)[0] * apart.square().mean()
    loss = objective.guide_loss(batch)
    torch.testing.assert_close(loss.value.detach(), expected)
    loss.value.backward()
    assert all(p.grad is None for p in teacher.denoiser.parameters())
    moved = [n for n, p in guide.controlnet.named_parameters() if p.grad.abs().sum() > 0]
    assert moved and all("controlnet_" in name for name in moved)  # behind the zero layers: 0
    guide.zero_grad()


class Toy(Denoiser):
    """x̂ = W_c x_t + b_c of the labels 0, 1 and, for no label, 2."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.process = Karras()
        self.w = nn.Parameter(torch.randn(3, 2, 2, dtype=torch.float64))
        self.b = nn.Parameter(torch.randn(3, 2, dtype=torch.float64))

    def forward(self, x_t, t, cond=None, s=None):
        label = cond["class_labels"]
        return (self.w[label] @ x_t[..., None])[..., 0] + self.b[label]

    def weight(self, t):
        return torch.ones_like(t)


class Sum(Toy):
    """A frozen toy and one beside it, whose x̂ are added."""

    def __init__(self, base):
        super().__init__(1)
        self.base = (base,)
        nn.init.zeros_(self.w), nn.init.zeros_(self.b)

    def forward(self, x_t, t, cond=None, s=None):
        return self.base[0](x_t, t, cond) + super().forward(x_t, t, cond)


def test_the_optimum_of_a_linear_toy_is_guidance_exactly():
    base, scale = Toy(0).requires_grad_(False), 2.5
    toy = ControlGuide(Sum(base))
    null = {"class_labels": torch.tensor([2])}
    objective = Guide(
        teacher=Guided(base, scale, null), student=Generator(base), guide=toy,
        times=Uniform(0.5, 0.5),
    )  # fmt: skip
    torch.manual_seed(2)
    labels = torch.arange(64) % 2
    noise = torch.randn(64, 2, dtype=torch.float64)
    batch = Batch(torch.randn(64, 2, dtype=torch.float64), noise, {"class_labels": labels})
    learner = torch.optim.LBFGS(toy.parameters(), 1.0, 200, line_search_fn="strong_wolfe",
                                tolerance_grad=1e-14, tolerance_change=1e-18)  # fmt: skip

    def closure():
        learner.zero_grad()
        value = objective.guide_loss(batch).value
        value.backward()
        return value

    learner.step(closure)
    for c in (0, 1):  # W_c + W = W_∅ + g (W_c - W_∅)
        for found, of in ((toy.beside.w, base.w), (toy.beside.b, base.b)):
            expected = of[2] + scale * (of[c] - of[2])
            torch.testing.assert_close((of[c] + found[c]).detach(), expected, atol=1e-4, rtol=1e-4)


def test_the_pipeline_draws_what_we_call(teacher):
    """The stock pipeline's networks, as it calls them, are our denoiser's; before training its
    pictures are the unguided base's, bit for bit."""
    controlnet = ControlGuide.for_objective(teacher).controlnet.eval()
    pipe, prompts = saving.pipeline(teacher, controlnet), ["one red circle on the left"] * 2
    pipe.set_progress_bar_config(disable=True)
    keys = {"num_inference_steps": 2, "output_type": "latent"}
    given = saving.arguments_of(teacher, prompts)
    base = StableDiffusionPipeline(**teacher.codec.pipe.components, requires_safety_checker=False)
    base.set_progress_bar_config(disable=True)
    plain = teacher.codec.arguments(prompts)
    rng = lambda: torch.Generator().manual_seed(3)  # noqa: E731
    ours, theirs = pipe(**given, **keys, generator=rng()), base(**plain, **keys, generator=rng())
    assert torch.equal(ours.images, theirs.images)
    disturbed(controlnet)
    calls = []
    hook = pipe.unet.register_forward_hook(
        lambda m, args, words, out: calls.append((*args[:2], words["encoder_hidden_states"], out)),
        with_kwargs=True,
    )
    pipe(**given, **keys, generator=rng())
    hook.remove()
    network = Beside(network_of(teacher.denoiser), controlnet)
    for x_t, time, text, out in calls:
        with torch.no_grad():
            found = network(x_t, time, text, return_dict=False)[0]
            alone = pipe.unet(x_t, time, text, return_dict=False)[0]
        torch.testing.assert_close(found, out[0], rtol=1e-4, atol=1e-5)
        assert (alone - out[0]).abs().max() > 1e-2


def test_what_is_taught_is_a_stock_pipeline(tmp_path):
    """The command's folder; another process, of stock diffusers, draws from it as this one does."""
    tree = {
        "teacher": {"source": "shapes", "guidance": 3},
        "objective": {"name": "guide"},
        "data": {"source": "shapes"},
        "train": {"steps": 2, "batch": 4, "log_every": 1, "save_every": 1},
        "eval": {"protocol": None},
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(tree))
    summary = teach(str(file), tmp_path / "run", [], False)
    assert summary["guide"]["guide"] < summary["guide"]["base"] and summary["steps"] == 2
    folder = tmp_path / "run" / saving.NAME
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionControlNetPipeline"
    pipe = StableDiffusionControlNetPipeline.from_pretrained(folder)
    assert isinstance(pipe.controlnet, ControlNetModel)
    assert any(v.abs().max() > 0 for n, v in pipe.controlnet.named_parameters() if "_down" in n)
    assert not list((tmp_path / "run").glob(".guided*"))
    again = teach(str(file), tmp_path / "run", ["train.steps=3"], True)
    assert again["steps"] == 3


def test_what_has_no_guide_is_refused(teacher, guide):
    with refused("objective.name", "StableDiffusionPipeline"):
        ControlGuide.for_objective(load("digits"))
    with refused("teacher.guidance"):
        made(teacher, guide, scale=1.0)
    config = network_of(teacher.denoiser).backbone.config
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(config.__dict__, "time_cond_proj_dim", 8)
        patch.setitem(config, "time_cond_proj_dim", 8)
        with refused("objective.name", "guidance_scale"):
            ControlGuide.for_objective(teacher)
    tree = {"teacher": {"source": "shapes", "guidance": {"scale": [1, 3]}}, "train": {"steps": 1}}
    with refused("teacher.guidance.scale"):
        Recipe.check({**tree, "objective": {"name": "guide"}, "data": {"source": "shapes"}})
