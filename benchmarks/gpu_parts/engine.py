"""What the engine's steps of a row take: time, memory, waits, compilation."""

from __future__ import annotations

import gc
import logging
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill.config.recipe import Recipe
from distill.data.stream import Stream
from distill.objectives.base import Batch, Turn
from distill.profiling import unique
from distill.seeds import seed_all
from distill.training import build
from distill.training.compilation import compile_run, mode_of
from distill.training.engine import Engine
from distill.training.networks import objective_of
from distill.training.optimizers import OffloadedAdamW
from gpu_parts.rows import Row, source_of, teacher_of
from students.critic import Critic
from teachers.denoiser import computes

GB = 1e9
SECONDS = 8.0  # that the timed cycles of a row take at most, where one cycle takes less
SLOW = 10_000.0  # milliseconds of a cycle; beyond it less is measured


class Clock:
    """Marks points in the device's queue, and gives the milliseconds between two of them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def ms(self, first: Any, last: Any) -> float:
        """Call `wait` before."""
        if isinstance(first, float):
            return 1e3 * (last - first)
        return first.elapsed_time(last)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def time(self, run: Callable[[], Any], times: int = 0) -> float:
        """The median milliseconds of a call, each timed alone after calls that do not count."""
        cuda = self.device.type == "cuda"
        times = times or (5 if cuda else 3)
        for _ in range(3 if cuda else 1):
            run()
        spans = []
        for _ in range(times):
            self.wait()
            start = time.perf_counter()
            run()
            self.wait()
            spans.append(1e3 * (time.perf_counter() - start))
        return statistics.median(spans)


def release() -> None:
    """Free what nothing refers to any more, on the device too; forget all compiled code."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


# ---- the engine


def engine_of(row: Row, recipe: Recipe, small: bool, out: Path, device: torch.device) -> Engine:
    """The engine of a run of this recipe, by the functions of `distill.training`.

    What `build.build` does beside these needs files: it loads the teacher, encodes the data and
    rehearses the export.
    """
    accelerator = build.accelerator_of(recipe.train, out)
    seed_all(recipe.train.seed, "init")
    teacher = teacher_of(row, recipe, small, device)
    objective = objective_of(recipe, teacher, accelerator.device)
    players = build.players_of(objective, recipe.players, recipe.train.steps, accelerator)
    source = source_of(recipe, teacher, small)
    return Engine(objective, players, source, teacher, recipe.train, accelerator, out)


def compiled(engine: Engine, recipe: Recipe) -> dict[str, Any]:
    """Compile the engine's networks as a run of the recipe does; how, and in how many seconds.

    "chains_s" is the part of the compilation that is done before the first step.
    """
    fresh_graphs()
    began, accelerator = time.perf_counter(), engine.accelerator
    mode = mode_of(recipe, accelerator.device)
    student = engine.players["student"]
    compile_run(recipe, engine.objective, student, engine.source, accelerator, mode)
    return {"compile": mode, "chains_s": time.perf_counter() - began if mode != "off" else 0.0}


def stream_of(engine: Engine) -> Stream:
    device, shards = engine.accelerator.device, engine.shards
    size = engine.cfg.batch // shards
    return Stream(engine.source, device, engine.draws, range(shards), shards, size)


class Constant:
    """A stream that gives one batch, which lies on the device."""

    def __init__(self, stream: Stream) -> None:
        self.mine, self.batch = stream.mine, next(stream)

    def __next__(self) -> Batch:
        return self.batch


class Calls:
    """Records what each network evaluation of an engine was, while `active`.

    counts: Samples, by kind: "forward", without a gradient; "input", whose gradient goes to the
        input alone; "full", whose gradient goes to the network's weights; and the same with
        "critic ", where the pass ends at the critic's block.
    """

    def __init__(self, engine: Engine) -> None:
        self.counts: Counter[str] = Counter()
        self.active = False
        self._critic: Tensor | None = None
        self._known = {m for v in vars(engine.objective).values() if isinstance(v, nn.Module)
                       for m in v.modules()}  # fmt: skip
        for module in self._known:
            if isinstance(module, Critic):
                module.register_forward_pre_hook(self._enter)
                module.register_forward_hook(self._leave)
            elif computes(module):
                module.register_forward_hook(self._hook)

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._critic = args[0]

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        denoiser: Any = module._denoiser[0]  # pyright: ignore
        self._count("critic ", denoiser, len(args[0]), output, args[0])
        self._critic = None

    def _hook(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # A twin with another schedule shares the teacher's hooks; its adapter's denoiser counts it.
        # Calls by a critic end early and do not come here.
        if module in self._known and self._critic is None:
            self._count("", module, len(output), output, None)

    def _count(self, who: str, module: nn.Module, n: int, output: Tensor, x: Any) -> None:
        if not self.active:
            return
        learns = any(p.requires_grad for p in module.parameters())
        # a critic's heads learn even where nothing behind them does
        grad = output.requires_grad and (x is None or learns or x.requires_grad)
        self.counts[f"{who}{('full' if learns else 'input') if grad else 'forward'}"] += n


class Watch:
    """Times the turns and the steps of an engine, and records its network evaluations."""

    def __init__(self, engine: Engine, clock: Clock) -> None:
        self.engine, self.clock, self.calls = engine, clock, Calls(engine)
        self.spans: list[tuple[str, Any, Any]] = []
        self._play = engine.play
        engine.play = self._timed  # pyright: ignore[reportAttributeAccessIssue]

    def _timed(self, turn: Turn, place: int, stream: Stream) -> dict[str, Tensor]:
        start = self.clock.mark()
        logs = self._play(turn, place, stream)
        self.spans.append(("+".join(turn.players), start, self.clock.mark()))
        return logs

    def run(self, stream: Any, steps: int) -> float:
        """Play steps; the milliseconds that they took together."""
        self.clock.wait()
        start = time.perf_counter()
        for _ in range(steps):
            self.engine.advance(stream)
        self.clock.wait()
        return 1e3 * (time.perf_counter() - start)

    def turns(self) -> dict[str, float]:
        """The mean milliseconds of a turn, by its players."""
        spans: dict[str, list[float]] = {}
        for name, first, last in self.spans:
            spans.setdefault(name, []).append(self.clock.ms(first, last))
        return {name: statistics.mean(v) for name, v in spans.items()}


class LimitHits(logging.Handler):
    """Counts the functions that torch.compile gives up on: it runs them eagerly from then on."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.count = 0
        logging.getLogger("torch._dynamo.convert_frame").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.count += "recompile_limit" in record.getMessage()


LIMIT_HITS = LimitHits()


def graphs() -> Counter[str]:
    """What torch.compile has done so far: graphs, those of code that already had one, breaks."""
    from torch._dynamo import utils

    ids = [str(m.compile_id) for m in utils.get_compilation_metrics()]
    return Counter(
        graphs=utils.counters["stats"]["unique_graphs"],
        recompiles=sum(not name.endswith("/0") for name in ids if "/" in name),
        breaks=sum(utils.counters["graph_break"].values()),
        limits=LIMIT_HITS.count,
    )


def fresh_graphs() -> None:
    """Forget all compiled code and its counts."""
    import torch._dynamo
    from torch._dynamo import utils

    torch._dynamo.reset()
    utils.counters.clear()
    LIMIT_HITS.count = 0
    utils.set_compilation_metrics_limit(100_000)  # by default the last 64
    utils.clear_compilation_metrics()


def state_gb(engine: Engine) -> float:
    """GB of weights, moments and the average on the device, as `distill plan` counts them."""
    networks = [v for v in vars(engine.objective).values() if isinstance(v, nn.Module)]
    tensors = [t for n in networks for t in (*n.parameters(), *n.buffers())]
    optimizers = [q.optimizer for q in engine.players.values()]
    moments = [v for o in optimizers if not isinstance(o, OffloadedAdamW)
               for s in o.state.values() for v in s.values()
               if isinstance(v, Tensor) and v.dim()]  # fmt: skip
    return unique([*tensors, *moments, *engine.ema.mean]) / GB


def syncs_in(watch: Watch, stream: Any, steps: int) -> tuple[int, list[str]]:
    """How often the host waits for the device in so many steps, and where: at most four lines."""
    watch.clock.wait()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for _ in range(steps):
                watch.engine.advance(stream)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in caught if "called a synchronizing" in str(w.message)]
    places = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in waits)
    return len(waits), [f"{place} × {n}" for place, n in places.most_common(4)]


def engine_figures(watch: Watch, steps: int | None) -> dict[str, Any]:
    """What the engine's steps take: time, memory, waits, compilation, the share of the data.

    Args:
        steps: How many are timed at least, in whole cycles; None chooses by their time.
    """
    engine, clock = watch.engine, watch.clock
    cycle = int(getattr(engine.objective, "student_every", 2))
    cuda = clock.device.type == "cuda"
    stream = stream_of(engine)
    try:
        early = min(3, cycle)
        first = watch.run(stream, early)
        after_three = graphs()
        first += watch.run(stream, cycle - early)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        start, watch.spans, watch.calls.active = engine.step, [], True
        times = [watch.run(stream, cycle)]
        wanted = max(1, round(SECONDS * 1e3 / times[0])) if steps is None else -(-steps // cycle)
        times += [watch.run(stream, cycle) for _ in range(min(wanted, 8) - 1)]
        watch.calls.active = False
        played = cycle * len(times)
        step = sum(times) / played
        figures = {
            "cycle": cycle,
            "steps": played,
            "step_ms": step,
            "turns_ms": watch.turns(),
            "first_cycle_s": first / 1e3,
            "compile_s": max(0.0, (first - cycle * step) / 1e3),
            "state_gb": state_gb(engine),
            "peak_gb": torch.cuda.max_memory_allocated() / GB if cuda else None,
            "samples": {k: v / played for k, v in watch.calls.counts.items()},
        }
        slow = times[0] > SLOW
        figures["syncs"], figures["syncs_at"] = None, []
        if cuda:  # two steps have every kind of turn
            found = syncs_in(watch, stream, min(cycle, 2) if slow else cycle)
            figures["syncs"], figures["syncs_at"] = found
        figures["data_share"] = None if slow else data_share(watch, stream, start, cycle, times)
        late = graphs()
        figures["graphs"], figures["graph_breaks"] = late["graphs"], late["breaks"]
        figures["recompiles"], figures["limit_hits"] = late["recompiles"], late["limits"]
        figures["recompiles_late"] = late["graphs"] - after_three["graphs"]
    finally:
        stream.close()
    return figures


def data_share(watch: Watch, stream: Stream, start: int, cycle: int, times: list[float]) -> float:
    """The share of a step's time that goes away when every batch is one that lies on the device.

    The same steps are played again, as steps are seeded by their number.
    """
    constant = Constant(stream)
    watch.engine.step = start
    again = [watch.run(constant, cycle) for _ in times[:3]]
    real = sum(times[: len(again)])
    return (real - sum(again)) / real
