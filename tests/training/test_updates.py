"""One update of the engine: its scale, its seeds, its average, and the best that it keeps."""

import pytest
import torch

from distill.objectives.base import Loss, Turn
from distill.training import checkpoint
from tests.helpers.engines import made, stream


def update(pipelines, out, accumulate, loss):
    """The engine and its logs after one turn of the student's."""
    engine = made("consistency", pipelines, out, accumulate=accumulate).engine
    data = stream(engine)
    logs = engine.play(Turn(("student",), lambda batch: loss(engine, batch)), 0, data)
    data.close()
    return engine, logs


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_the_gradient_of_an_update_is_the_mean_over_its_shards(accumulate, pipelines, tmp_path):
    shards = iter(range(100))

    def loss(engine, batch):
        assert len(batch.noise) == 8 // accumulate
        slope = 1.0 + next(shards)
        return Loss(slope * sum(p.sum() for p in engine.players["student"].params),
                    {"slope": torch.tensor(slope)})  # fmt: skip

    engine, logs = update(pipelines, tmp_path / "run", accumulate, loss)
    mean = (1 + accumulate) / 2  # of 1, 2, …
    size = sum(p.numel() for p in engine.players["student"].params)
    assert logs["student/grad_norm"].item() == pytest.approx(mean * size**0.5, rel=1e-4)
    assert logs["student/slope"].item() == pytest.approx(mean)
    assert next(shards) == accumulate


def test_every_shard_of_every_turn_and_step_draws_noise_of_its_own_and_always_the_same(
    pipelines, tmp_path
):
    found = []
    for run in ("a", "b"):
        engine = made("consistency", pipelines, tmp_path / run, accumulate=2).engine
        data, drawn = stream(engine), []

        def loss(batch, engine=engine, drawn=drawn):
            drawn.append(torch.rand(()).item())
            return Loss(sum(p.sum() for p in engine.players["student"].params))

        for step in range(2):
            engine.step = step
            for place in range(2):
                torch.manual_seed(0 if run == "a" else 1)  # what was drawn before is of no account
                engine.play(Turn(("student",), loss), place, data)
        data.close()
        found.append(drawn)
    assert found[0] == found[1]
    assert len(set(found[0])) == 8


def test_each_step_moves_the_average_once_and_after_the_student(pipelines, tmp_path):
    engine = made("dmd2", pipelines, tmp_path / "run", ema=0.5).engine
    params = engine.players["student"].params
    data, mean = stream(engine), [p.detach().clone() for p in params]
    for step, decay in enumerate((0.1, 2 / 11, 3 / 12)):  # short of 0.5: (n + 1) / (n + 10)
        with torch.no_grad():  # further than one step goes, so that shares show
            for p in params:
                p.add_(0.1)
        before = [p.detach().clone() for p in params]
        engine.advance(data)
        moved = any(not torch.equal(a, b) for a, b in zip(before, params, strict=True))
        assert moved == (step % 2 == 0)  # the student's steps
        assert engine.step == step + 1
        mean = [decay * m + (1 - decay) * p.detach() for m, p in zip(mean, params, strict=True)]
        for got, want in zip(engine.ema.mean, mean, strict=True):
            torch.testing.assert_close(got, want)
    data.close()


def test_the_checkpoint_that_is_kept_as_the_best_has_the_lowest_headline(pipelines, tmp_path):
    engine = made("consistency", pipelines, tmp_path / "run", steps=4, save_every=4).engine
    figures = iter([3.0, 1.0, 2.0, 1.5])
    engine.evaluate_every = 1
    engine.evaluate = lambda steps: {"headline": "fd", "fd": next(figures)}
    engine.train()
    assert engine.best == 1.0
    about = checkpoint.about(engine.root / "best")
    assert (about["step"], about["fd"]) == (2, 1.0)
