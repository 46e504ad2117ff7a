"""The engine, in this process, on a small random UNet: turns, resuming, syncs, counts."""

import math

import pytest
import torch
from accelerate.state import AcceleratorState
from torch.utils._python_dispatch import TorchDispatchMode

from distill.config.optimizer import OptimizerConfig
from distill.config.recipe import Recipe
from distill.objectives.base import Loss, Objective, Turn
from distill.seeds import seed_all
from distill.training import build, checkpoint
from distill.training.ema import EMA
from distill.training.player import Player
from tests.helpers.engines import made, stream
from tests.helpers.refusals import refused
from tests.helpers.toys import FIVE, recipe_tree

pytestmark = pytest.mark.device


@pytest.mark.parametrize("name", [*FIVE, "ect"])
def test_a_turn_moves_its_players_and_no_other_and_leaves_no_gradient(name, pipelines, tmp_path):
    engine = made(name, pipelines, tmp_path / "run").engine
    teacher = [p.clone() for p in engine.objective.teacher.parameters()]
    data = stream(engine)
    for i, turn in enumerate(engine.objective.turns(0)):
        before = {n: [p.clone() for p in q.params] for n, q in engine.players.items()}
        engine.play(turn, i, data)
        for n, q in engine.players.items():
            moved = any(not torch.equal(a, b) for a, b in zip(before[n], q.params))
            assert moved == (n in turn.players), (turn.players, n)
            assert all(p.grad is None and not p.requires_grad for p in q.params)
    data.close()
    for a, b in zip(teacher, engine.objective.teacher.parameters()):
        assert torch.equal(a, b)
        assert b.grad is None


def test_accumulating_is_one_large_batch(pipelines, tmp_path):
    runs = [
        made("consistency", pipelines, tmp_path / str(k), steps=1, accumulate=k) for k in (1, 2)
    ]
    one, two = (r.engine for r in runs)
    noise = [torch.cat([two.source.batch(0, k, 2, 4).noise for k in (0, 1)]), None]
    assert noise[0].shape == one.source.batch(0, 0, 1, 8).noise.shape
    data = torch.cat([two.source.batch(0, k, 2, 4).x for k in (0, 1)])
    torch.testing.assert_close(data, one.source.batch(0, 0, 1, 8).x)  # the same items either way


class Syncs(TorchDispatchMode):
    """Counts the operations that make the host wait for the device."""

    NAMES = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(func.overloadpacket.__name__.startswith(n) for n in self.NAMES):
            self.seen.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [*FIVE, "ect"])
def test_nothing_between_two_log_steps_waits_for_the_device(name, pipelines, tmp_path):
    engine = made(name, pipelines, tmp_path / "run").engine
    data = stream(engine)
    engine.advance(data)
    with Syncs() as syncs:
        for _ in range(2):
            engine.advance(data)
    data.close()
    assert syncs.seen == []


def test_the_counter_of_syncs_counts_them():
    with Syncs() as syncs:
        torch.ones(()).item()
        bool(torch.ones(()) > 0)
    assert len(syncs.seen) == 2


def test_network_evaluations_are_counted_by_network(pipelines, tmp_path):
    engine = made("sid", pipelines, tmp_path / "run", steps=3).engine
    engine.train()
    # a step is a fake turn (student, fake) and a student turn (student, teacher, fake), of 8 each
    assert engine.evaluations == {"teacher": 3 * 8, "student": 3 * 16, "fake": 3 * 16}
    engine.sample()  # looking costs nothing
    assert engine.evaluations["student"] == 3 * 16


def test_a_network_of_two_names_is_counted_once(pipelines, tmp_path):
    tree = recipe_tree("ect", pipelines["edm"], steps=2)  # its target is the student itself
    engine = build.build(Recipe.check(tree), tmp_path / "run").engine
    engine.train()
    assert sum(engine.evaluations.values()) == 2 * 16


def spoilt_after_a_step(engine):
    """The student's weights hold NaN from its second step on."""
    advance = engine.advance

    def spoiling(data):
        if engine.step == 1:
            with torch.no_grad():
                engine.players["student"].params[0].fill_(math.nan)
        return advance(data)

    engine.advance = spoiling
    return engine


def test_a_loss_that_is_not_finite_stops_the_run_with_its_remedy(pipelines, tmp_path):
    engine = spoilt_after_a_step(made("consistency", pipelines, tmp_path / "run").engine)
    with refused("step 2", "student/loss is nan", "players.student.lr", "no checkpoint"):
        engine.train()


def test_all_losses_that_are_lost_by_a_step_that_is_read_are_named(pipelines, tmp_path):
    """The fake's is seen first; it may be the student's that spoilt it."""
    engine = spoilt_after_a_step(made("sid", pipelines, tmp_path / "run").engine)
    lost, rates = (
        "fake/loss is nan and student/loss is nan",
        "players.fake.lr or players.student.lr",
    )
    with refused("step 2", lost, rates):
        engine.train()


@pytest.mark.parametrize("name", ["consistency", "sid"])
def test_for_a_loss_that_never_was_a_number_no_learning_rate_is_blamed(name, pipelines, tmp_path):
    engine = made(name, pipelines, tmp_path / "run").engine
    for player in engine.players.values():
        with torch.no_grad():
            player.params[0].fill_(math.nan)
    with refused("step 2", "/loss", "first turn", "train.precision", "distill doctor") as error:
        engine.train()
    assert ".lr" not in str(error.value) and "warmup" not in str(error.value)


class Nobody:
    params = ()


@pytest.mark.parametrize("name", FIVE)
def test_half_precision_has_the_gradients_of_full(name, pipelines, tmp_path):
    found = {}
    for precision in ("fp32", "bf16"):
        AcceleratorState._reset_state(True)
        engine = made(name, pipelines, tmp_path / precision, precision=precision).engine
        data, grads = stream(engine), {}
        for player in engine.players.values():
            player._apply = lambda: None  # leave the gradients to be looked at
            player.optimizer.zero_grad = lambda: None
        seed_all(0)
        with torch.no_grad():  # a fake that equals the teacher would leave only rounding
            for p in engine.players.get("fake", Nobody).params:
                p.add_(0.1 * torch.randn_like(p))
        seed_all(1)  # draws a chain of two steps: one under no_grad before the one with gradients
        for i, turn in enumerate(engine.objective.turns(0)):
            engine.play(turn, i, data)
            for n in turn.players:
                grads[n] = torch.cat([p.grad.flatten() for p in engine.players[n].params])
        data.close()
        found[precision] = grads
    for n, full in found["fp32"].items():
        half = found["bf16"][n]
        assert half.dtype == torch.float32
        assert torch.cosine_similarity(full, half, 0) > 0.95, n


def test_a_checkpoint_is_never_saved_over_good_ones_once_the_loss_is_lost(pipelines, tmp_path):
    run = made("consistency", pipelines, tmp_path / "run", steps=9, save_every=1, log_every=9)
    engine, advance = run.engine, run.engine.advance

    def poisoned(data):
        if engine.step == 3:
            with torch.no_grad():
                engine.players["student"].params[0].fill_(math.nan)
        return advance(data)

    engine.advance = poisoned
    with refused("step 4", "student/loss", "step-000003"):
        engine.train()
    assert checkpoint.steps(engine.root)[-1].name == "step-000003"


def test_checkpoints_are_ordered_by_number(tmp_path):
    for step in (999_500, 1_000_000, 1_000_500):
        checkpoint.save({"step": step}, tmp_path / f"step-{step:06d}")
    (tmp_path / "step-9x").mkdir()
    checkpoint.prune(tmp_path, 2)
    assert [p.name for p in checkpoint.steps(tmp_path)] == ["step-1000000", "step-1000500"]


def test_a_checkpoint_of_another_network_is_refused(pipelines, tmp_path):
    made("consistency", pipelines, tmp_path / "run", steps=2).engine.train()
    newest = checkpoint.steps(tmp_path / "run" / "checkpoints")[-1]
    state = checkpoint.load(newest)
    state["players"]["student"]["params"][0] = torch.zeros(3)
    checkpoint.save(state, newest)
    with refused("checkpoint */run/checkpoints/step-000002", "3", "8", "1"):
        made("consistency", pipelines, tmp_path / "run", resume=True, steps=2)


def test_only_the_newest_checkpoints_are_kept(pipelines, tmp_path):
    engine = made("consistency", pipelines, tmp_path / "run", steps=5, save_every=1, keep=2).engine
    engine.train()
    assert [p.name for p in checkpoint.steps(engine.root)] == ["step-000004", "step-000005"]


def test_tensorboard_is_fed_through_accelerate(pipelines, tmp_path):
    run = made("consistency", pipelines, tmp_path / "run", trackers=["tensorboard"])
    run.engine.train()
    run.engine.accelerator.end_training()
    assert list((tmp_path / "run").rglob("events.out.tfevents.*"))
    assert (tmp_path / "run" / "metrics.jsonl").exists()


def test_sample_grids_are_of_every_count(pipelines, tmp_path):
    tree = recipe_tree("dmd2", pipelines["edm"], steps=2, sample_every=5)
    for counts, names in ((None, ["at-2"]), ([1, 2], ["at-1", "at-2"])):
        tree["student"] = {"steps": 2, "counts": counts}
        out = tmp_path / f"run-{len(names)}"
        build.build(Recipe.check(tree), out).engine.train()
        found = sorted(p.name for p in (out / "samples").iterdir())
        assert found == [f"step-000002-{name}.png" for name in names]


def test_the_student_of_step_k_moves_every_kth_step(pipelines, tmp_path):
    objective = made("dmd2", pipelines, tmp_path / "run").engine.objective
    turns = [[t.players for t in objective.turns(step)] for step in range(4)]
    rival = ("fake", "critic")
    assert turns == [[("student",), rival], [rival]] * 2


# ---- players


def player(moves, steps=10):
    from accelerate import Accelerator

    weight = torch.nn.Parameter(torch.ones(3))
    return weight, Player([weight], Accelerator(cpu=True), moves, steps)


def test_learning_rates_warm_up_and_decay():
    linear = OptimizerConfig(lr=1.0, warmup=4, decay="linear")
    assert linear.rate(0, 10) == pytest.approx(0.2)
    assert linear.rate(5, 10) == pytest.approx(0.5)
    assert linear.rate(10, 10) == 0
    cosine = OptimizerConfig(lr=2.0, decay="cosine", lr_end=0.5, decay_steps=4)
    assert cosine.rate(0, 99) == 2
    assert cosine.rate(2, 99) == pytest.approx(1.5)
    assert cosine.rate(50, 99) == pytest.approx(1.0)


def test_a_turn_clips_applies_and_forgets_the_gradient():
    weight, p = player(OptimizerConfig(lr=0.1, clip=1.0, weight_decay=0))
    with p.turn(0):
        (30 * weight.sum()).backward()
    assert p.grad_norm.item() == pytest.approx(30 * 3**0.5)
    torch.testing.assert_close(weight.detach(), torch.full((3,), 0.9))
    assert weight.grad is None
    assert not weight.requires_grad


def test_a_fresh_turn_starts_the_schedule_and_the_optimiser_over():
    weight, p = player(OptimizerConfig(lr=1.0, decay="linear", decay_steps=4, weight_decay=0))
    for step in range(3):
        with p.turn(step):
            weight.sum().backward()
    assert p.optimizer.param_groups[0]["lr"] == pytest.approx(0.5)
    with p.turn(3, reset=True):
        weight.sum().backward()
    assert p.optimizer.param_groups[0]["lr"] == 1.0
    assert p.optimizer.state[weight]["step"].item() == 1


class Stages(Objective):
    """Two stages of two steps; the second begins afresh."""

    def turns(self, step):
        yield Turn(("student",), lambda batch: self.loss(batch, step), reset=step == 2)

    def loss(self, batch, step):
        return Loss(self.student(batch.noise, batch.cond).square().mean())


def test_a_stages_average_holds_no_weights_of_the_one_before(pipelines, tmp_path):
    run = made("sid", pipelines, tmp_path / "run", ema=0.9).engine
    old = run.objective
    run.objective = Stages(teacher=old.teacher, student=old.student)
    batches, seen = stream(run), []
    for _ in range(4):
        run.advance(batches)
        seen.append([p.detach().clone() for p in run.ema.params])
    batches.close()
    rates = [1 / 10, 2 / 11]  # β of the first two updates after a start: (n + 1) / (n + 10)
    for mean, *weights in zip(run.ema.mean, *seen):
        want = weights[1]  # where the second stage began
        for beta, now in zip(rates, weights[2:]):
            want = beta * want + (1 - beta) * now
        torch.testing.assert_close(mean, want)
    assert run.ema.updates == 2


def test_the_average_has_a_short_memory_at_first():
    weight = torch.nn.Parameter(torch.zeros(1))
    ema = EMA([weight], 0.9)
    with torch.no_grad():
        weight.fill_(1.0)
    ema.update()
    assert ema.mean[0].item() == pytest.approx(0.9)  # β = 1/10
    with ema.swapped():
        assert weight.item() == pytest.approx(0.9)
    assert weight.item() == 1.0


@pytest.mark.parametrize("name", FIVE)
def test_the_students_loss_comes_with_its_samples_and_their_graph(name, pipelines, tmp_path):
    """What a reward adds to it reaches the student's weights, and no others."""
    run = made(name, pipelines, tmp_path / "run")
    objective, batch = run.engine.objective, next(stream(run.engine))
    network = objective.student.denoiser.requires_grad_(True)
    turn = next(t for t in objective.turns(0) if "student" in t.players)
    samples = turn.loss(batch).samples
    assert samples.shape == batch.noise.shape
    samples.square().mean().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())
