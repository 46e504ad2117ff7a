"""Inner loop feedback: DeepCache at first, what its block learns, and the pipeline it leaves."""

import json

import pytest
import torch
import yaml

from distill.objectives.base import Batch
from distill.objectives.smaller.ilf import FeedbackBlock, InnerLoopFeedback
from distill.pretrain.feedback import verify
from distill.pretrain.pixels import teach
from students.export.folder import ExportError
from students.generator import Generator
from teachers import load
from teachers.reduced.deepcache import DeepCache
from teachers.reduced.feedback import Feedback, FeedbackUNet2DConditionModel
from teachers.reduced.network import INTERVAL, WIDTH
from teachers.reduced.one_pass import OnePassUNet2DConditionModel
from tests.helpers.refusals import refused


@pytest.fixture(scope="module")
def teacher():
    loaded = load("shapes")
    loaded.denoiser.requires_grad_(False)
    return loaded


def made(teacher, scale=0.0, **keys):
    torch.manual_seed(0)
    objective = InnerLoopFeedback(
        teacher=teacher.denoiser, student=Generator(teacher.denoiser),
        feedback=FeedbackBlock.for_objective(teacher), **keys,
    )  # fmt: skip
    torch.nn.init.constant_(objective.feedback.carry.scale, scale)
    return objective


def batch_of(teacher, n=4):
    torch.manual_seed(0)
    cond = teacher.codec.condition(["a red circle"] * n)
    return Batch(torch.randn(n, *teacher.shape), torch.randn(n, *teacher.shape), cond)


@torch.no_grad()
def chain(backbone, text, z, times, interval, feedback=None):
    """The outputs of a network along a chain of times, its input a little other each time."""
    with DeepCache(backbone, interval, feedback):
        return [backbone(z + i / 10, t, text).sample for i, t in enumerate(times)]


@torch.no_grad()
def test_without_a_scale_it_is_deepcache_and_with_an_interval_of_one_the_network(teacher):
    backbone, batch = teacher.denoiser.backbone, batch_of(teacher)
    feedback = made(teacher).feedback.carry
    some = (batch.cond["text"], batch.noise, (900, 700, 500, 300))
    kept = chain(backbone, *some, 2)
    assert all(map(torch.equal, chain(backbone, *some, 2, feedback), kept))
    feedback.scale.fill_(0.5)
    carried = chain(backbone, *some, 2, feedback)
    assert torch.equal(carried[0], kept[0]) and torch.equal(carried[2], kept[2])
    assert (carried[1] - kept[1]).abs().max() > 1e-2
    whole = [backbone(batch.noise + i / 10, t, some[0]).sample for i, t in enumerate(some[2])]
    assert all(map(torch.equal, chain(backbone, *some, 1, feedback), whole))


@torch.no_grad()
def test_each_shallow_step_carries_on_what_the_one_before_it_made(teacher):
    """Of constant output c, n applications of h + s c give h + n s c."""
    feedback = made(teacher).feedback.carry
    feedback.scale.fill_(2.0)
    feedback.out.weight.zero_()
    feedback.out.bias.fill_(0.25)
    backbone, batch = teacher.denoiser.backbone, batch_of(teacher)
    read = []
    up = backbone.up_blocks[-1]
    hook = up.register_forward_pre_hook(
        lambda m, a, k: read.append(k["hidden_states"]), with_kwargs=True
    )
    chain(backbone, batch.cond["text"], batch.noise, (900, 700, 500), 3, feedback)
    hook.remove()
    for i in (1, 2):
        torch.testing.assert_close(read[i], read[0] + 0.5 * i)


@torch.no_grad()
def test_the_block_reads_the_time_of_the_step_it_carries_to(teacher):
    feedback = made(teacher, 1.0).feedback.carry
    unet = teacher.denoiser.backbone
    h = torch.randn(2, 96, 8, 8)
    early, late = (unet.time_embedding(unet.time_proj(torch.tensor([t, t]))) for t in (900.0, 10.0))
    assert (feedback(h, early) - feedback(h, late)).abs().max() > 1e-3


@pytest.mark.parametrize("interval", [2, 4])
def test_the_loss_is_the_networks_own_of_the_steps_between(teacher, interval):
    objective, batch = made(teacher, 0.3, steps=4, interval=interval), batch_of(teacher)
    torch.manual_seed(1)
    found = objective.carried_loss(batch)
    torch.manual_seed(1)
    places = interval * torch.randint(4 // interval, (4,))
    process, backbone = teacher.denoiser.process, teacher.denoiser.backbone
    times = process.grid(4).float()
    expected = 0
    with torch.no_grad(), DeepCache(backbone, interval, objective.feedback.carry) as cache:
        t = times[places]
        x_t = process.noise(batch.x, t, batch.noise)
        x = teacher.denoiser(x_t, t, batch.cond)
        states = []
        for k in range(1, interval):
            s = times[places + k]
            x_t, t = process.step(x_t, x, t, s), s
            x = teacher.denoiser(x_t, t, batch.cond)
            states.append((x_t, t, x))
        assert (cache.whole, cache.shallow) == (4, 4 * (interval - 1))
    for x_t, t, x in states:  # v's loss: (x̂ - x̂')² (α² + σ²)² / σ²
        with torch.no_grad():
            whole = teacher.denoiser(x_t, t, batch.cond)
        sigma = process.scales(t)[1]
        expected += ((x - whole).square().flatten(1).mean(1) / sigma**2).mean() / len(states)
    torch.testing.assert_close(found.value.detach(), expected, rtol=1e-4, atol=1e-6)
    found.value.backward()
    assert all(p.grad is not None for p in objective.feedback.carry.parameters())
    assert all(p.grad is None for p in backbone.parameters())


def test_the_error_falls_as_the_block_learns(teacher):
    objective, batch = made(teacher, steps=8), batch_of(teacher)
    optimizer = torch.optim.Adam(objective.feedback.carry.parameters(), lr=5e-3)
    values = []
    for _ in range(20):
        torch.manual_seed(1)
        loss = objective.carried_loss(batch).value
        values.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert values[-1] < 0.9 * values[0]


@torch.no_grad()
def test_the_network_of_the_folder_begins_a_chain_where_the_time_does_not_fall(teacher):
    backbone, batch = teacher.denoiser.backbone, batch_of(teacher)
    config = {**backbone.config, INTERVAL: 2, WIDTH: 24}
    own = FeedbackUNet2DConditionModel.from_config(config).eval()
    feedback = made(teacher, 0.5).feedback.carry
    carried = {f"feedback.{k}": v for k, v in feedback.state_dict().items()}
    own.load_state_dict({**backbone.state_dict(), **carried})
    text, times = batch.cond["text"], torch.tensor([900, 600, 300])
    want = chain(backbone, text, batch.noise, times, 2, feedback)
    for _ in range(2):  # a second chain is whole at first
        found = [own(batch.noise + i / 10, t, text).sample for i, t in enumerate(times)]
        assert all(map(torch.equal, found, want))
    own(batch.noise, 900, text)
    other = own(batch.noise[:2], 600, text[:2]).sample  # as is another batch
    torch.testing.assert_close(other, backbone(batch.noise[:2], 600, text[:2]).sample)
    assert isinstance(own.feedback, Feedback) and not isinstance(own, OnePassUNet2DConditionModel)


def tree_of(**keys):
    return {
        "teacher": {"source": "shapes"},
        "objective": {"name": "ilf", "steps": 4, **keys},
        "data": {"source": "shapes"},
        "train": {"steps": 3, "batch": 4, "log_every": 1, "save_every": 2},
        "eval": {"protocol": None},
    }


def test_what_is_taught_is_a_pipeline_that_brings_its_network(teacher, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(tree_of()))
    summary = teach(str(file), tmp_path / "run", [], False)
    assert summary["objective"] == "ilf" and summary["steps"] == 3
    folder = tmp_path / "run" / "student"
    index = json.loads((folder / "model_index.json").read_text())
    kind = FeedbackUNet2DConditionModel.__name__
    assert index["unet"] == [kind.lower(), kind]
    loaded = load(str(folder)).denoiser.backbone
    assert isinstance(loaded, FeedbackUNet2DConditionModel) and loaded.config[INTERVAL] == 2
    objective = made(teacher, 0.9, steps=4)  # another block than the folder's
    with pytest.raises(ExportError):
        verify(folder, objective.feedback.carry, teacher, objective)


def test_what_has_no_inner_levels_is_refused(teacher, tmp_path):
    with refused("objective.name", "UNet2DModel"):
        made(load("digits"))
    with refused("objective.interval", "3"):
        made(teacher, steps=8, interval=3)
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(tree_of(interval=1)))
    with refused("*objective.interval"):
        teach(str(file), tmp_path / "run", [], False)
