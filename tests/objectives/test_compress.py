"""Compression: its three terms by hand, what they are of equal networks, and whose features."""

from copy import deepcopy

import pytest
import torch

from distill.objectives.base import Batch
from distill.objectives.smaller import compress
from distill.objectives.smaller.compress import Compression
from distill.objectives.smaller.taps import distance, feature_loss, inner, taps_of
from students.architecture.change import changed
from students.architecture.units import skipping, units
from students.critic import image_stream
from students.generator import Generator
from students.schedulers import source_of
from teachers import load
from teachers.denoiser import Guided
from teachers.features import tapped
from tests.helpers.refusals import refused


@pytest.fixture(scope="module")
def teacher():
    loaded = load("shapes")
    loaded.denoiser.requires_grad_(False)
    return loaded


def made(teacher, guidance=1.0, config=None, **keys):
    """An objective of the embedded text teacher and of its copy, or of a smaller one."""
    network = source_of(teacher)
    if config is None:
        backbone = deepcopy(network.backbone)
    else:
        backbone = changed(network.backbone, config, {}, [])
    student = network.twin(backbone.requires_grad_(True).eval(), network.schedule)
    guided = Guided(network, guidance, teacher.codec.null)
    return Compression(teacher=guided, student=Generator(student, (1.0,)), **keys)


def batch_of(teacher, n=6):
    torch.manual_seed(0)
    cond = teacher.codec.condition(["a red circle", "two boats"] * (n // 2))
    return Batch(torch.randn(n, *teacher.shape), torch.randn(n, *teacher.shape), cond)


MIDDLE = {"mid_block_type": None}


@pytest.mark.parametrize("scale", ["none", "norm", "masked"])
@pytest.mark.parametrize("taps", [("blocks",), ("self-attention",)])
def test_a_student_that_keeps_everything_has_only_the_task_left(teacher, taps, scale):
    objective = made(teacher, taps=taps, scale=scale)
    torch.manual_seed(1)
    loss = objective.loss(batch_of(teacher), 0)
    assert loss.logs["output"] == 0 and loss.logs["features"] == 0
    torch.testing.assert_close(loss.value, loss.logs["task"])
    assert loss.logs["task"] > 0.01


def test_the_loss_is_the_weighted_sum_of_its_terms(teacher):
    """By hand, at the time and noise that the loss draws, in the units of the network's output."""
    objective = made(teacher, config=MIDDLE, task=0.5, output=2.0, features=3.0, drop=0.0)
    batch, network = batch_of(teacher), source_of(teacher)
    torch.manual_seed(1)
    loss = objective.loss(batch, 0)
    torch.manual_seed(1)
    t = objective.times.sample(batch.x, network.process)
    noise = torch.randn_like(batch.x)
    x_t = network.process.noise(batch.x, t, noise)
    student, names = objective.student.denoiser, [*objective.pairs]
    alpha, sigma = (v.view(-1, 1, 1, 1) for v in network.process.scales(t))
    velocity = alpha * noise - sigma * batch.x  # what this teacher's network predicts
    with torch.no_grad(), tapped(student, names) as ours:
        out = student.call(x_t, t, batch.cond, None)
    with torch.no_grad(), tapped(network, names) as theirs:
        target = network.call(x_t, t, batch.cond, None)
    features = sum((image_stream(ours[k]) - image_stream(theirs[k])).square().mean() for k in names)
    task, output = ((out - v).square().mean() for v in (velocity, target))
    torch.testing.assert_close(loss.logs["task"], task, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(loss.logs["output"], output, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(loss.logs["features"], features, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        loss.value.detach(), 0.5 * task + 2 * output + 3 * features, rtol=1e-3, atol=1e-5
    )


def test_before_the_first_layer_that_went_features_are_equal(teacher):
    """Where only the middle goes, the encoder's features are the teacher's."""
    for tap, equal in (("down_blocks.0", True), ("down_blocks.1", True), ("up_blocks.0", False)):
        objective = made(teacher, config=MIDDLE, taps=(tap,), task=0, output=0)
        assert (objective.loss(batch_of(teacher), 0).logs["features"] == 0) == equal


def test_a_guided_teachers_output_is_the_guided_one_and_its_features_are_not(teacher):
    plain, guided = (made(teacher, g, config=MIDDLE, task=0, drop=0.0) for g in (1.0, 3.0))
    found = []
    for objective in (plain, guided):
        torch.manual_seed(2)
        found.append(objective.loss(batch_of(teacher), 0).logs)
    assert found[1]["output"] > 2 * found[0]["output"]
    torch.testing.assert_close(found[0]["features"], found[1]["features"])


def test_a_share_of_conditions_is_the_null_one_where_nothing_is_guided(teacher):
    batch = batch_of(teacher, 400)
    null = teacher.codec.null["text"]
    objective = made(teacher, drop=0.25)
    found = objective.dropped(batch.cond)["text"]
    lost = (found == null).flatten(1).all(1)
    assert 0.15 < lost.float().mean() < 0.35
    assert torch.equal(found[~lost], batch.cond["text"][~lost])
    assert made(teacher, 3.0, drop=0.25).dropped(batch.cond) is batch.cond
    scale = torch.rand(400)
    ranged = made(teacher, drop=1.0).dropped({**batch.cond, "guidance_scale": scale})
    assert torch.equal(ranged["guidance_scale"], scale)
    assert torch.equal(ranged["text"], null.expand_as(ranged["text"]))


def test_layers_are_left_out_as_often_as_skip_says(teacher, monkeypatch):
    objective = made(teacher, skip=0.3, features=0)
    drawn = []
    monkeypatch.setattr(compress, "skipping", lambda backbone, names: drawn.append([*names]))
    for _ in range(400):
        objective.skipping()
    found = [n for names in drawn for n in names]
    assert {*found} == {*units(source_of(teacher).backbone)}
    assert len(found) / (7 * 400) == pytest.approx(0.3, abs=0.04)


def test_only_the_student_runs_without_layers(teacher):
    """With every layer left out, the loss is that of a student without them; then all are back."""
    whole, none = made(teacher, skip=1.0, features=0), made(teacher, features=0)
    batch, network = batch_of(teacher), none.student.denoiser
    for objective in (whole, none):
        torch.manual_seed(1)
        objective.found = objective.loss(batch, 0).logs["output"]
    assert none.found == 0 and whole.found > 0.1
    torch.manual_seed(1)
    with skipping(network.backbone, units(network.backbone)):
        torch.testing.assert_close(none.loss(batch, 0).logs["output"], whole.found)
    x_t, t = batch.x, torch.full((6,), 0.5)
    assert torch.equal(whole.student.denoiser(x_t, t, batch.cond), network(x_t, t, batch.cond))


def test_taps_inside_layers_that_are_left_out_are_refused(teacher):
    with refused("objective.skip", "down_blocks.0.attentions.0", "name blocks"):
        made(teacher, skip=0.1, taps=("self-attention",))
    made(teacher, skip=0.1, taps=("self-attention",), features=0)


def test_distances_of_features_by_hand():
    ours, theirs = torch.tensor([[1.0, 2.0], [3.0, 5.0]]), torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    assert distance(ours, theirs, "none") == (0 + 1 + 4 + 16) / 4
    assert distance(ours, theirs, "norm") == (0 + 1 + 4 + 16) / 4
    assert distance(50 * ours, 50 * theirs, "norm") == distance(ours, theirs, "norm")
    assert distance(2 * ours, 2 * theirs, "none") == 4 * distance(ours, theirs, "none")
    pairs = {"a": "b", "c": "d"}
    mine, other = {"a": ours, "c": ours}, {"b": theirs, "d": theirs}
    assert feature_loss(mine, other, pairs, "none") == 2 * 21 / 4
    assert feature_loss(mine, other, pairs, "masked") == distance(ours, theirs, "masked")


def test_what_is_two_deviations_away_is_masked_on_its_own_side():
    x = torch.zeros(1, 100)
    x[0, 0], x[0, 1:] = 50.0, torch.linspace(-1, 1, 99)
    assert inner(x)[0].tolist() == [0.0, *[1.0] * 99]
    gaussian = inner(torch.randn(1, 100_000, generator=torch.Generator().manual_seed(0)))
    assert 1 - gaussian.mean().item() == pytest.approx(0.0455, abs=0.003)
    assert distance(x, torch.zeros_like(x), "masked") < 0.5  # without the outlier's 25


def test_fewer_blocks_are_compared_with_those_that_they_stand_for(folders):
    network = source_of(load(folders("dit")))
    config = {"num_layers": 1}
    small = network.twin(changed(network.backbone, config, {}, []), network.schedule)
    blocks = network.backbone.config.num_layers
    expected = {"backbone.transformer_blocks.0": f"backbone.transformer_blocks.{blocks - 1}"}
    assert taps_of(("blocks",), small, network) == expected
    assert taps_of(("transformer_blocks.0=transformer_blocks.0",), small, network) == {
        "backbone.transformer_blocks.0": "backbone.transformer_blocks.0"
    }


def test_what_has_no_features_in_both_is_refused(teacher):
    with refused("objective.taps", "teacher", "'nosuch'"):
        made(teacher, taps=("mid_block=nosuch",))
    with refused("objective.taps", "student", "'mid_block'"):
        made(teacher, config=MIDDLE, taps=("mid_block",))
    with refused("objective", "all 0"):
        made(teacher, task=0, output=0, features=0)
    digits = load("digits")
    with refused("objective.taps", "self-attention"):
        made(digits, taps=("self-attention",))


def test_a_wrong_sign_of_the_output_would_be_seen(teacher):
    """A step against the gradient lowers each term."""
    for term in ("task", "output", "features"):
        weights = {"task": 0.0, "output": 0.0, "features": 0.0, term: 1.0}
        objective = made(teacher, config=MIDDLE, drop=0.0, **weights)
        values = []
        for _ in range(2):
            torch.manual_seed(3)
            loss = objective.loss(batch_of(teacher), 0)
            values.append(loss.logs[term].item())
            if not loss.value.requires_grad:
                break
            loss.value.backward()
            with torch.no_grad():
                for p in objective.student.parameters():
                    if p.grad is not None:
                        p -= 1e-3 * p.grad
        assert values[1] < values[0]
