"""Speed: what is timed and counted, where doubling stops, and what is written of it."""

import json

import pytest
import torch

from distill import __main__ as cli
from distill.evaluation import subject
from distill.sampling import speed
from distill.sampling.speed import (
    Timer,
    Timing,
    evaluated_module,
    measure,
    quantile,
    saturate,
    timing,
)
from distill.sampling.teacher_sampler import counted
from students.lora import unwrap
from teachers.catalogue.loading import load
from tests.helpers.refusals import refused


class Machine:
    """A clock that only drawing moves: a fixed cost and one for each picture, if there is memory.

    Args:
        slow: Factors on the cost, of each call in turn; 1 once they are used up.
    """

    def __init__(self, fixed=0.9, each=0.1, memory=10**9, slow=()):
        self.fixed, self.each, self.memory, self.slow = fixed, each, memory, list(slow)
        self.now, self.held, self.emptied, self.calls = 0.0, 0.0, 0, []

    def sample(self, n):
        if n > self.memory:
            raise torch.cuda.OutOfMemoryError(f"{n} pictures")
        self.calls.append(n)
        self.held = max(self.held, 2.0 + n)
        self.now += (self.fixed + self.each * n) * (self.slow.pop(0) if self.slow else 1)

    def empty(self):
        self.emptied += 1
        self.held = 0.0

    @property
    def timer(self):
        return Timer(lambda: self.now, lambda: None, self.empty, lambda: self.held)


def test_latency_is_the_median_of_warm_calls_and_what_nine_in_ten_do_not_exceed():
    machine = Machine(slow=[100, 100, *(1 + i / 10 for i in range(11))])  # two that are not warm
    found = timing(machine.sample, 1, machine.timer)
    assert found.calls == 8  # 1 + 1.1 + … + 1.7 s are enough
    assert found.latency_ms == pytest.approx(1350)
    assert found.latency_p90_ms == pytest.approx(1630)
    assert found.images_per_s == pytest.approx(1 / 1.35)
    assert (found.batch, found.peak_memory_gb) == (1, 3.0)


@pytest.mark.parametrize(
    ("each", "calls"), [(0.001, speed.MAX_CALLS), (0.5, 20), (7.0, speed.MIN_CALLS)]
)
def test_quick_calls_are_timed_more_often_than_slow_ones(each, calls):
    machine = Machine(fixed=0.0, each=each)
    assert timing(machine.sample, 1, machine.timer).calls == calls
    assert len(machine.calls) == calls + speed.WARM_UP


def test_quantiles_are_linear_between_neighbours():
    assert quantile([4.0, 1.0, 3.0, 2.0], 0.9) == pytest.approx(3.7)
    assert quantile([2.0], 0.9) == 2.0


def test_a_batch_is_doubled_until_twice_as_many_gain_less_than_a_tenth():
    """n pictures take 0.9 + n/10 seconds: 2n of them are worth 2 (0.9 + n/10) / (0.9 + n/5)."""
    machine = Machine()
    one = timing(machine.sample, 1, machine.timer)
    best, why = saturate(machine.sample, one, machine.timer)
    first = next(n for n in (1, 2, 4, 8, 16, 32, 64, 128)
                 if 2 * (0.9 + n / 10) / (0.9 + n / 5) < speed.GAIN)  # fmt: skip
    assert best.batch == first == 64
    assert best.images_per_s == pytest.approx(64 / 7.3)
    assert why == f"a batch of 128 gives {2 * 7.3 / 13.7:.2f}× the images/s"
    assert max(machine.calls) == 128


@pytest.mark.parametrize(("memory", "batch"), [(1, 1), (20, 16)])
def test_out_of_memory_the_last_batch_that_fitted_stands(memory, batch):
    machine = Machine(memory=memory)
    best, why = saturate(machine.sample, timing(machine.sample, 1, machine.timer), machine.timer)
    assert (best.batch, why) == (batch, f"out of memory at {2 * batch}")
    assert best.peak_memory_gb == 2.0 + batch
    assert machine.held == 0.0  # what was held in vain was given back


def test_no_batch_exceeds_the_cap():
    machine = Machine(fixed=1000.0)
    one = timing(machine.sample, 1, machine.timer)
    best, why = saturate(machine.sample, one, machine.timer, max_batch=12)
    assert (best.batch, why, max(machine.calls)) == (8, "batches of more than 12 are not tried", 8)


def test_one_picture_is_one_picture_however_slow_the_next_batch():
    machine = Machine(fixed=0.0, each=1.0)  # nothing is gained by any batch
    net = torch.nn.Identity()

    def sample(n):
        machine.sample(n)
        for _ in range(3):
            net(torch.zeros(2 * n, 1))  # as guidance does

    found = measure(sample, net, machine.timer, 8)
    assert found["evaluations"] == 6
    assert found["single"] == found["saturated"]
    assert found["single"]["batch"] == 1
    assert set(found["single"]) == set(Timing.__dataclass_fields__)


@pytest.mark.parametrize(
    ("solver", "guidance", "want"),
    [("ddim", 1.0, 3), ("ddim", 3.0, 6), ("heun", 1.0, 5), ("DDIMScheduler", 3.0, 6),
     ("DDIMScheduler", 1.0, 3)],
)  # fmt: skip
def test_evaluations_are_counted_under_solvers_and_stock_pipelines_alike(solver, guidance, want):
    found = subject.teacher("shapes", torch.device("cpu"), solver, guidance)
    with counted([evaluated_module(found.denoiser)]) as counts:
        found.sampler([], 3, 2)(["a red circle", "a blue square"], 0)
    assert sum(counts) == 2 * want
    assert not evaluated_module(found.denoiser)._forward_pre_hooks


def test_the_whole_batch_goes_through_the_networks_at_once(monkeypatch):
    monkeypatch.setattr(
        "distill.sampling.student_sampler.BATCH", 2
    )  # what measuring quality keeps to
    found = subject.teacher("digits", torch.device("cpu"), "ddim")
    for batch, want in ((None, [2, 2, 1]), (5, [5])):
        with counted([evaluated_module(found.denoiser)]) as counts:
            found.sampler([], 1, batch)(["1"] * 5, 0)
        assert counts == want


def test_prompts_are_labels_in_turn_or_texts():
    assert speed.prompts(load("digits"), 12)[8:] == ["8", "9", "0", "1"]
    texts = speed.prompts(load("shapes"), 3)
    assert len(set(texts)) == 3 and all(" " in t for t in texts)
    assert speed.prompts(load("analytic:gaussian"), 2) == ["0", "0"]


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(speed, "MAX_BATCH", 4)
    monkeypatch.setattr(speed, "MAX_CALLS", speed.MIN_CALLS)


def evaluate(capsys, *words):
    cli.app(["eval", *map(str, words)], standalone_mode=False)
    return capsys.readouterr().out


def test_speed_alone_draws_for_no_protocol_and_records_the_machine(quick, tmp_path, capsys):
    out = evaluate(capsys, "digits", "--speed", "--steps", "1,2", "--json", tmp_path / "f.json")
    assert "evaluations" in out and "FD" not in out
    tree = json.loads((tmp_path / "f.json").read_text())
    assert set(tree) == {"of", "speed", "kept"} and not tree["kept"]
    found = tree["speed"]["teacher"]
    assert (found["dtype"], found["torch"]) == ("float32", torch.__version__)
    assert found["threads"] == torch.get_num_threads()
    assert found["device"] and found["memory"] == "of the process, from its start"
    assert {k: v["evaluations"] for k, v in found["steps"].items()} == {"1": 1, "2": 3}
    for row in found["steps"].values():
        assert row["single"]["batch"] == 1 and row["saturated"]["batch"] in (1, 2, 4)
        assert row["stopped"]
        for found in (row["single"], row["saturated"]):
            assert found["latency_p90_ms"] >= found["latency_ms"] > 0
            want = found["batch"] / found["latency_ms"] * 1e3
            assert found["images_per_s"] == pytest.approx(want)
            assert found["calls"] == speed.MIN_CALLS


@pytest.mark.slow
def test_speed_beside_a_protocol_and_a_teacher(quick, tmp_path, capsys):
    """One call measures quality and speed, of a teacher beside another."""
    words = ("digits", "--speed", "--protocol", "digits", "--steps", "1", "--seeds", "1",
             "--solver", "ddim", "--against", "digits", "--against-steps", "2")  # fmt: skip
    out = evaluate(capsys, *words, "--json", tmp_path / "f.json")
    assert "FD" in out and out.count("from prompts to images") == 2
    tree = json.loads((tmp_path / "f.json").read_text())
    assert tree["protocol"] == "digits" and "fd" in tree["teacher"]["1"]
    assert tree["speed"]["against"]["steps"]["2"]["evaluations"] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["f.json"]


def test_weights_of_half_precision_are_timed_as_such(quick, tmp_path, capsys):
    words = ("shapes", "--speed", "--steps", "1", "--solver", "ddim", "--precision", "bf16")
    evaluate(capsys, *words, "--json", tmp_path / "f.json")
    tree = json.loads((tmp_path / "f.json").read_text())
    assert tree["speed"]["teacher"]["dtype"] == "bfloat16"
    assert unwrap(load("shapes", precision="bf16").denoiser).dtype == torch.bfloat16


def test_a_device_without_room_for_one_picture_is_said_in_one_line(monkeypatch):
    found = subject.teacher("digits", torch.device("cpu"))

    def full(*_):
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(speed, "measure", full)
    with refused("--speed", "image"):
        subject.speeds(found, [1], torch.device("cpu"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--precision", "bf61"], ("--precision", "bf61", "bf16")),
        (["--precision", "bf16"], ("teacher 'digits'", "precision")),
        (["--steps", "0"], ("--steps", "0")),
    ],
)
def test_mistakes_are_said_before_anything_is_timed(words, said, monkeypatch):
    monkeypatch.setattr(speed, "measure", lambda *_: pytest.fail("it was timed"))
    with refused(*said):
        cli.app(["eval", "digits", "--speed", *words], standalone_mode=False)


def test_a_speed_is_of_one_process(monkeypatch):
    class Two:
        process_index, num_processes = 0, 2

    monkeypatch.setattr("distill.evaluation.evaluate.PartialState", lambda cpu: Two())
    with refused("--speed", "process"):
        cli.app(["eval", "digits", "--speed"], standalone_mode=False)
