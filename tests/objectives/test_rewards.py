"""How rewards join a loss: weights of samples, balanced gradients, warm-ups, and held-out ones."""

import math

import pytest
import torch

from distill.config.recipe import Recipe
from distill.config.schema import RewardSection
from distill.early_stop.guards import Guards
from distill.early_stop.measurement import Measurement
from distill.early_stop.scores import preferred
from distill.objectives.base import Batch, Loss
from distill.objectives.losses import surrogate
from distill.rewards.rewards import called, held_out_of, rehearse_held_out, reward_of
from distill.rewards.terms import Rewards, Term, ranking, shares, unit
from distill.training import build
from eval.shapes import captions
from teachers import load
from tests.helpers.refusals import refused
from tests.helpers.toys import recipe_tree

D = torch.float64
BATCH = Batch(None, torch.zeros(4, 3), None, torch.tensor([2, 0, 1, 3]))
TARGET = torch.tensor([[1.0, 0, 0], [0, 2, 0], [0, 0, -1], [3, 0, 4]], dtype=D)


def rewards(*sections, score=lambda x, prompts, graph: 2 * x.sum(1)):
    terms = [Term(RewardSection(function="mine.py:f", **keys), score) for keys in sections]
    return Rewards(terms, ["a", "b", "c", "d"])


def gradients(given, step=0, x=None):
    """Of a loss whose own gradient at x is TARGET / 4, with rewards; and what it logs."""
    x = torch.zeros(4, 3, dtype=D) if x is None else x
    leaf = x.clone().requires_grad_(True)
    samples = leaf * 1.0  # a student's samples are no leaf
    loss = Loss(3 * surrogate(samples, TARGET), {}, samples)
    found = given.added(loss, BATCH, step)
    found.value.backward()
    return leaf.grad, found.logs


def test_a_direct_reward_is_a_term_of_the_loss():
    grad, logs = gradients(rewards({"weight": 0.5}))
    torch.testing.assert_close(grad, TARGET / 4 - 0.5 * 2 / 4 * torch.ones(4, 3, dtype=D))
    assert logs["reward"] == 0


def test_a_balanced_reward_is_as_long_as_its_share_of_the_loss_whatever_its_units():
    plain = gradients(rewards())[0]
    for scale in (1.0, 1e4):
        score = lambda x, prompts, graph, scale=scale: scale * x[:, 0]  # noqa: E731
        grad = gradients(rewards({"weight": 0.25, "balance": True}, score=score))[0]
        length = 0.25 * plain.norm(dim=1).mean()
        torch.testing.assert_close(plain - grad, length * torch.eye(3, dtype=D)[0].expand(4, 3))


def test_a_balanced_reward_without_a_gradient_changes_nothing():
    given = rewards({"balance": True}, score=lambda x, prompts, graph: 0 * x.sum(1))
    assert torch.equal(gradients(given)[0], gradients(rewards())[0])
    assert torch.equal(unit(torch.zeros(2, 3)), torch.zeros(2, 3))


def test_a_weighted_reward_multiplies_each_samples_gradient_and_takes_none():
    values = torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=D)

    def score(x, prompts, graph):
        assert prompts == ["c", "a", "b", "d"] and not graph and not x.requires_grad
        return values

    keys = {"kind": "weighted", "temperature": 0.5, "weight": 2.0}
    grad = gradients(rewards(keys, score=score))[0]
    weights = 4 * (2.0 * values / 0.5).softmax(0)
    assert weights.mean().item() == pytest.approx(1)
    torch.testing.assert_close(grad, weights[:, None] * TARGET / 4)


@pytest.mark.parametrize("keys", [{}, {"balance": True}, {"kind": "weighted"}], ids=str)
def test_equal_rewards_change_nothing(keys):
    score = lambda x, prompts, graph: 0 * x.sum(1) + 7.0  # noqa: E731
    grad = gradients(rewards(keys, score=score))[0]
    torch.testing.assert_close(grad, gradients(rewards())[0], rtol=1e-12, atol=0)


def test_the_best_sample_alone_counts_at_temperature_zero_and_all_alike_at_infinity():
    values = torch.tensor([0.3, -1.0, 2.0, 0.0])
    assert shares(values, 1e-4, 1.0).tolist() == [0, 0, 4, 0]
    torch.testing.assert_close(shares(values, 1e9, 1.0), torch.ones(4))


def test_a_reward_begins_and_warms_up():
    term = rewards({"weight": 2.0, "begins": 10, "warmup": 3}).terms[0]
    assert [term.weight(k) for k in (0, 9, 10, 11, 13, 99)] == [0, 0, 0.5, 1.0, 2.0, 2.0]

    def never(x, prompts, graph):
        raise AssertionError

    silent = rewards({"begins": 1}, score=never)
    grad, logs = gradients(silent)
    assert torch.equal(grad, gradients(rewards())[0]) and "reward" not in logs


def test_kinds_add_up_in_one_loss():
    """Weights act on what reaches the samples, a direct reward's term too; balance comes after."""
    values = torch.arange(4.0, dtype=D)
    first = RewardSection(function="a.py:f", weight=0.5)
    second = RewardSection(function="b.py:f", kind="weighted")
    third = RewardSection(function="c.py:f", weight=0.1, balance=True)
    given = Rewards([
        Term(first, lambda x, prompts, graph: x.sum(1)),
        Term(second, lambda x, prompts, graph: values),
        Term(third, lambda x, prompts, graph: -x[:, 1]),
    ], "abcd")  # fmt: skip
    expected = (4 * values.softmax(0))[:, None] * (TARGET - 0.5) / 4
    expected[:, 1] += 0.1 * expected.norm(dim=1).mean()
    torch.testing.assert_close(gradients(given)[0], expected)


def test_in_a_run_each_kind_moves_the_student_and_only_as_it_should(tmp_path, pipelines):
    """A weighted reward needs no gradient, also before training, when rewards are tried."""
    file = tmp_path / "mine.py"
    file.write_text(
        "def bright(images, labels):\n    return images.flatten(1).mean(1)\n"
        "def counted(images, labels):\n    return images.detach().flatten(1).mean(1).round()\n"
    )
    moved = {}
    kinds = {
        "none": None,
        "direct": {"function": f"{file}:bright", "weight": 5.0},
        "balanced": {"function": f"{file}:bright", "balance": True},
        "weighted": {"function": f"{file}:counted", "kind": "weighted", "temperature": 0.1},
    }
    for name, section in kinds.items():
        tree = recipe_tree("ect", pipelines["edm"], steps=2, seed=4)
        tree["rewards"] = {} if section is None else {"mine": section}
        engine = build.build(Recipe.check(tree), tmp_path / name).engine
        engine.train()
        weights = torch.cat([p.detach().flatten() for p in engine.players["student"].params])
        assert weights.isfinite().all()
        moved[name] = weights
    for name in ("direct", "balanced"):
        assert not torch.equal(moved[name], moved["none"])


# ---- ranked


class Line(torch.nn.Module):
    """A surrogate that is linear in the samples."""

    def __init__(self):
        super().__init__()
        self.slope = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=D))

    def forward(self, x, cond):
        return x @ self.slope


def ranked(surrogate, score, **keys):
    section = RewardSection(function="mine.py:f", kind="ranked", **keys)
    return Rewards([Term(section, score, surrogate)], ["a", "b", "c", "d"])


def test_scores_that_are_the_reward_over_the_temperature_are_perfect():
    reward = torch.tensor([0.3, -1.0, 2.0, 0.0])
    scores = (reward / 0.5 + 3).requires_grad_(True)
    loss = ranking(scores, reward, 0.5)
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert torch.autograd.grad(loss, scores)[0].abs().max() < 1e-6
    assert ranking(-scores, reward, 0.5) > 1
    p, q = torch.sigmoid(torch.tensor([1.3 / 0.5, 0.7])).tolist()  # of one pair
    kl = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    two = ranking(torch.tensor([0.7, 0.0]), reward[:2], 0.5)
    assert two.item() == pytest.approx(kl, rel=1e-5)


@pytest.mark.parametrize("balance", [False, True])
def test_the_student_raises_the_surrogate_which_learns_the_order_alone(balance):
    surrogate, x = Line(), torch.randn(4, 3, dtype=D)

    def score(x, prompts, graph):
        assert not graph and not x.requires_grad
        return x[:, 0]

    given = ranked(surrogate, score, weight=0.3, balance=balance)
    grad, logs = gradients(given, x=x)
    plain = gradients(rewards({"begins": 1}), x=x)[0]
    slope = surrogate.slope.detach().expand(4, 3)
    if balance:
        expected = 0.3 * plain.norm(dim=1).mean() * slope / slope.norm(dim=1).mean()
    else:
        expected = 0.3 * slope / 4
    torch.testing.assert_close(plain - grad, expected)
    learnt = surrogate.slope.grad.clone()
    surrogate.zero_grad()
    ranking(surrogate(x, None), x[:, 0], 1.0).backward()
    torch.testing.assert_close(learnt, surrogate.slope.grad)
    assert logs["reward"].item() == pytest.approx(0.3 * x[:, 0].mean().item())


def test_the_surrogate_learns_before_the_reward_begins():
    surrogate, x = Line(), torch.randn(4, 3, dtype=D)
    grad, _ = gradients(ranked(surrogate, lambda x, p, g: x[:, 0], begins=5), x=x)
    assert torch.equal(grad, gradients(rewards({"begins": 1}), x=x)[0])
    assert surrogate.slope.grad.abs().max() > 0


def test_descent_on_the_ranking_finds_the_reward():
    surrogate = Line()
    optimizer = torch.optim.Adam(surrogate.parameters(), 0.1)
    torch.manual_seed(0)
    for _ in range(200):
        x = torch.randn(16, 3, dtype=D)
        optimizer.zero_grad()
        ranking(surrogate(x, None), x @ torch.tensor([0.0, 1.0, 2.0], dtype=D), 2.0).backward()
        optimizer.step()
    wanted = torch.tensor([0.0, 0.5, 1.0], dtype=D)
    torch.testing.assert_close(surrogate.slope.detach(), wanted, atol=0.05, rtol=0)


def test_a_run_trains_its_ranking_with_the_student_and_resumes_it(tmp_path, pipelines):
    file = tmp_path / "mine.py"
    file.write_text("def bright(images, labels):\n    return images.flatten(1).mean(1).round()\n")
    tree = recipe_tree("dmd2", pipelines["edm"], steps=4)
    tree["rewards"] = {"mine": {"function": f"{file}:bright", "kind": "ranked"}}
    tree["players"] = {"ranking": {"lr": 1e-2}}
    run = build.build(Recipe.check(tree), tmp_path / "run")
    mover = run.engine.players["ranking"]
    before = [p.clone() for p in mover.params]
    run.engine.train()
    assert not all(torch.equal(a, b) for a, b in zip(before, mover.params, strict=True))
    again = build.build(Recipe.check(tree), tmp_path / "run", resume=True)
    again.engine.resume()
    for a, b in zip(mover.params, again.engine.players["ranking"].params, strict=True):
        assert torch.equal(a, b)
    with refused("players.ranking"):
        Recipe.check({**tree, "rewards": {}})


# ---- held out


def test_the_share_of_won_pairs():
    student = torch.tensor([[1.0, 2.0], [0.0, float("nan")]])
    teacher = torch.tensor([[1.5, 0.0], [0.0, -1.0]])
    # prompt 1: 1 > 0, 2 > 1.5, 2 > 0 won, 1 < 1.5 lost; prompt 2: a tie, a win, two lost by NaN
    assert preferred(student, teacher) == pytest.approx((3 + 0.5 + 1) / 8)
    assert preferred(teacher, teacher) == 0.5


@pytest.fixture(scope="module")
def shapes():
    return load("shapes")


def watched(**keys):
    tree = recipe_tree("ect", "shapes", guards={"prompts": 2, "samples": 2})
    tree["teacher"], tree["data"] = "shapes", {"source": "shapes"}
    tree["eval"] = {"teacher_steps": 1, "teacher_solver": "ddim"}
    tree["rewards"] = {"watch": {"function": "shapes", "held_out": True, **keys}}
    return tree


def test_a_held_out_reward_is_no_part_of_the_loss_and_ends_training_when_it_falls(shapes, tmp_path):
    recipe = Recipe.check(watched())
    source = type("S", (), {"prompts": ["a"]})()
    assert reward_of(recipe, shapes, source) is None
    judge = held_out_of(recipe, shapes)
    seen = []

    def judged(x, prompts, graph):
        seen.append((len(x), tuple(prompts)))
        return judge(x, prompts, graph)

    student = build.networks(recipe, tmp_path / "run", False).objective.student
    prompts = captions(3, seed=1)
    measurement = Measurement(recipe, shapes, student, prompts, batch=3, judge=judged)
    found = measurement()
    assert 0 <= found["held_out"] <= 1
    assert [n for n, _ in seen] == [3, 1, 3, 1]  # the teacher's samples once, and the student's
    assert seen[0][1] == (prompts[0], prompts[0], prompts[1])
    measurement()
    assert len(seen) == 6
    guards = Guards(recipe.train.guards, dict)
    guards.judge(1, {"held_out": 0.5})
    guards.judge(2, {"held_out": 0.46})
    assert not guards.stopped
    guards.judge(3, {"held_out": 0.44})
    assert guards.stopped and "held_out" in guards.reason


@pytest.mark.parametrize(("change", "words"), [
    ({"train": {"steps": 4}}, ("rewards.watch.held_out", "train.guards")),
    ({"rewards": {"watch": {"function": "shapes", "held_out": True, "balance": True}}},
     ("rewards.watch.balance",)),
    ({"rewards": {"w": {"function": "shapes", "kind": "weighted", "balance": True}}},
     ("rewards.w.balance",)),
    ({"rewards": {"w": {"function": "shapes", "temperature": 2.0}}}, ("rewards.w.temperature",)),
    ({"rewards": {"w": {"function": "shapes", "begins": 4}}}, ("rewards.w.begins", "step 4")),
    ({"objective": {"name": "draft"}, "rewards": {"w": {"function": "shapes", "warmup": 2}}},
     ("rewards.w.warmup", "draft")),
    ({"objective": {"name": "draft"}}, ("rewards",)),
    ({"train": {"steps": 4, "guards": {"held_out": 0.5}}, "rewards": {}},
     ("train.guards.held_out", "no reward is held out")),
])  # fmt: skip
def test_keys_of_rewards_without_effect_are_refused(change, words):
    with refused(*words):
        Recipe.check({**watched(), **change})


def test_whole_numbers_are_rewards_and_complex_ones_are_not():
    images = torch.zeros(2, 3, 4, 4)
    counts = called(lambda images, prompts: torch.tensor([1, 2]), "mine", images, ["a", "b"])
    assert counts.is_floating_point() and counts.tolist() == [1, 2]
    with refused("rewards.mine.function", "complex", "return real"):
        called(lambda images, prompts: torch.ones(2) * 1j, "mine", images, ["a", "b"])


def test_a_held_out_reward_of_no_numbers_is_refused_before_training(shapes, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def none(images, prompts):\n    return images.mean((1, 2, 3)) / 0 * 0\n")
    recipe = Recipe.check(watched(function=f"{file}:none"))
    with refused("rewards", "nan", "return finite numbers"):
        rehearse_held_out(recipe, shapes, captions(2, seed=1))


def test_a_network_of_a_built_in_reward_is_refused(shapes):
    with refused("rewards.watch.network", "shapes", "remove it"):
        held_out_of(Recipe.check(watched(network="mine/other")), shapes)


def test_the_gradient_of_emds_loss_reaches_its_samples(pipelines, tmp_path):
    recipe = Recipe.check(recipe_tree("emd", pipelines["edm"]))
    run = build.build(recipe, tmp_path / "run")
    objective, batch = run.engine.objective, run.engine.source.batch(0, 0, 1, 2)
    objective.student.requires_grad_(True)
    loss = objective.student_loss(batch, objective.student)
    found = []
    loss.samples.register_hook(lambda grad: found.append(grad.abs().sum() > 0))
    loss.value.backward()
    assert found and all(found)
