"""The engine: plays the objective's turns, and keeps everything that is not the objective."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn

from distill.attempts import FIGURES, Attempts
from distill.config.schema import TrainSection
from distill.console import Progress
from distill.data.encode import decoder_on
from distill.data.stream import AHEAD, Source, Stream
from distill.grids import COLUMNS, save_grid
from distill.objectives.base import Objective, Turn
from distill.objectives.validate import check_loss, check_turn
from distill.profiling import EvaluationCounter, denoisers_in
from distill.seeds import seed_all
from distill.training import checkpoint
from distill.training.ema import EMA
from distill.training.player import Player
from students.export.folder import draw
from teachers.denoiser import Cond
from teachers.errors import UserError
from teachers.teacher import Teacher

Evaluate = Callable[[int], dict[str, Any]]  # student steps -> metrics, for the weights in place


class Stopped(Exception):
    """A signal asked the run to stop; the step was finished and saved."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class StopVote(NamedTuple):
    """Whether any process caught a signal: asked from host to host, and under way."""

    work: dist.Work
    flag: Tensor  # () on the CPU: the signal's number, or 0

    @classmethod
    def of(cls, signal: int, group: Any) -> StopVote:
        flag = torch.tensor(signal)
        work = dist.all_reduce(flag, dist.ReduceOp.MAX, group, async_op=True)
        assert work is not None
        return cls(work, flag)

    def answer(self) -> int:
        self.work.wait()
        return int(self.flag)


class Engine:
    """Trains the players of one objective.

    Args:
        objective: Who learns from what.
        players: The networks that move, by the names the objective's turns use.
        source: Where batches come from.
        teacher: For the sample grids: its codec turns what the student makes into pictures.
        train: How long, how large, how often.
        out: The run's folder.
        evaluate: Measures the student as it is, for `evaluate_every` and the best checkpoint.
        shown: The labels or prompts of the sample grids.
    """

    def __init__(
        self,
        objective: Objective,
        players: dict[str, Player],
        source: Source,
        teacher: Teacher,
        train: TrainSection,
        accelerator: Accelerator,
        out: Path,
        evaluate: Evaluate | None = None,
        evaluate_every: int = 0,
        shown: Sequence[Any] = (0,) * 80,
    ) -> None:
        self.objective, self.players, self.source, self.teacher = (
            objective,
            players,
            source,
            teacher,
        )
        self.cfg, self.accelerator, self.out = train, accelerator, out
        self.evaluate, self.evaluate_every, self.shown = evaluate, evaluate_every, shown
        self.extras = Attempts(out)
        self.ema = EMA(players["student"].params, train.ema)
        self._shown: Cond = None  # the grids' condition, once it is known
        self.step = self.draws = 0
        self.seconds, self.best = 0.0, math.inf
        self.latest: dict[str, Tensor] = {}  # of each turn: the student's may not be this step's
        networks = {k: v for k, v in vars(objective).items() if isinstance(v, nn.Module)}
        self.counter = EvaluationCounter(denoisers_in(networks))
        self.shards = shards_of(train, accelerator.num_processes)
        self._first: dict[str, Tensor] = {}  # the loss of the first turn that is played here
        self._stop = 0
        self._asked: StopVote | None = None
        # Its own group, for gloo keeps to the hosts: on the devices' an answer would be a sync.
        self._hosts = dist.new_group(backend="gloo") if accelerator.num_processes > 1 else None
        for player in players.values():  # ranks that began apart would never meet again
            if accelerator.num_processes > 1:
                with torch.no_grad():
                    for p in player.params:
                        p.copy_(broadcast(p.detach().clone()))  # pyright: ignore

    @property
    def root(self) -> Path:
        return self.out / "checkpoints"

    @property
    def evaluations(self) -> dict[str, int]:
        """The samples that went through each network while training."""
        return self.counter.counts

    def train(self) -> None:
        """Play every step that is left.

        Raises:
            Stopped: SIGINT or SIGTERM came; the step was finished and a checkpoint saved.
            UserError: a loss is no longer a finite number.
        """
        if self.accelerator.is_main_process:
            self.extras.forget()
        per = self.shards // self.accelerator.num_processes
        first = self.accelerator.process_index * per
        stream = Stream(
            self.source,
            self.accelerator.device,
            self.draws,
            range(first, first + per),
            self.shards,
            self.cfg.batch // self.shards,
        )
        began = time.perf_counter() - self.seconds
        handlers = {s: signal.signal(s, self._catch) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            with Progress(self.cfg.steps, self.step, self.accelerator.is_main_process) as progress:
                while self.step < self.cfg.steps:
                    self.latest |= self.advance(stream)
                    self.seconds = time.perf_counter() - began
                    progress.advance(self.step)
                    if self.step % self.cfg.log_every == 0 or self.step == self.cfg.steps:
                        progress.show(self.step, self._log(self.latest))
                    every, last = self.cfg.sample_every, self.step == self.cfg.steps
                    if every and (last or self.step % every == 0):
                        self.sample()
                    if self.evaluate_every and self.step % self.evaluate_every == 0:
                        progress.note(self._evaluate())
                    stop = self._should_stop()
                    if stop or self.step % self.cfg.save_every == 0 or self.step == self.cfg.steps:
                        self._check(self.latest)  # or the last good checkpoints would be pruned
                        self.save()
                    if stop:
                        raise Stopped(stop)
        finally:
            stream.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def advance(self, stream: Stream) -> dict[str, Tensor]:
        """One step: every turn that the objective names, then the average. Scalars to log."""
        seed, logs = self.cfg.seed, {}
        with self.counter:
            seed_all(seed, "turns", self.step, 0)
            for i, turn in enumerate(self.objective.turns(self.step)):
                logs |= self.play(turn, i, stream)
                # the code after a yield draws the same numbers on all ranks
                seed_all(seed, "turns", self.step, i + 1)
        self.ema.update()
        self.step += 1
        return logs

    def play(self, turn: Turn, place: int, stream: Stream) -> dict[str, Tensor]:
        """One update, its loss averaged over this batch's shards, here and on other processes."""
        check_turn(turn, self.objective, self.players)
        players = {name: self.players[name] for name in turn.players}
        shards, logs = len(stream.mine), {}
        if turn.reset and "student" in players:
            self.ema.restart()  # or this stage's average would hold the last one's weights
        with ExitStack() as stack:
            for player in players.values():
                stack.enter_context(player.turn(self.step, turn.reset))
            for shard in stream.mine:
                batch = next(stream)
                seed_all(self.cfg.seed, self.step, place, shard)
                with self.accelerator.autocast():
                    loss = turn.loss(batch)
                check_loss(loss, self.objective)
                self.accelerator.backward(loss.value / shards)
                for key, value in {"loss": loss.value, **loss.logs}.items():
                    logs[key] = logs.get(key, 0) + value.detach() / shards
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.update()
        self.draws += 1
        name = "+".join(players)
        if not self._first:
            self._first = {f"{name}/loss": logs["loss"]}
        norms = {f"{n}/grad_norm": p.grad_norm for n, p in players.items()}
        return {f"{name}/{key}": v for key, v in logs.items()} | norms

    def sample(self) -> None:
        """A grid of the averaged student's pictures, on the same noise every time.

        What is shown is encoded once; only the decoder comes to the device, one picture at a time,
        into room that a step's activations have left. Where that fails, it is said and training
        goes on.
        """
        if self.accelerator.is_main_process:
            with self.extras.attempt("samples"):
                self._save_grids()
        self.accelerator.wait_for_everyone()

    def _save_grids(self) -> None:
        student, codec = self.objective.student, self.teacher.codec
        if self._shown is None:
            self._shown = codec.condition(list(self.shown))
        size = self.cfg.batch // self.shards  # what the device has held in training
        with self.ema.swapped(), decoder_on(self.teacher, self.accelerator.device):
            found = [
                draw(student.at(k), self.teacher, self.shown, 0, size, self._shown)
                for k in student.counts
            ]
            images = [torch.cat([codec.decode(one) for one in x.split(1)]) for x in found]
        folder = self.out / "samples"
        folder.mkdir(exist_ok=True)
        for steps, grid in zip(student.counts, images, strict=True):
            save_grid(grid, folder / f"step-{self.step:06d}-at-{steps}.png", COLUMNS)

    def save(self) -> None:
        """A checkpoint of everything, of which the newest few are kept."""
        if self.latest:  # what is logged of turns that were not this step's is of all processes
            values = [v.clone() for v in self._over_processes(self.latest)]
            self.latest = dict(zip(self.latest, values, strict=True))
        if self.accelerator.is_main_process:
            about = {"step": self.step, "draws": self.draws}
            checkpoint.save(self.state_dict(), self.root / f"step-{self.step:06d}", about)
            checkpoint.prune(self.root, self.cfg.keep)
        self.accelerator.wait_for_everyone()

    def resume(self) -> bool:
        """Take up the newest checkpoint; False if there is none yet."""
        found = checkpoint.steps(self.root)
        if not found:
            return False
        try:
            self.load_state_dict(checkpoint.load(found[-1]))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(
                f"checkpoint {found[-1]}: it is not of this run ({type(error).__name__}: {error}); "
                f"delete it to resume from the one before it"
            ) from None
        if self.accelerator.is_main_process:
            forget_after(self.step, self.out)
        self.accelerator.wait_for_everyone()
        return True

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "draws": self.draws,
            "seconds": self.seconds,
            "best": self.best if math.isfinite(self.best) else None,
            "evaluations": self.evaluations,
            "latest": self.latest,
            "players": {name: player.state_dict() for name, player in self.players.items()},
            "ema": self.ema.state_dict(),
            "objective": self.objective.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.draws, self.seconds = state["step"], state["draws"], state["seconds"]
        self.best = math.inf if state["best"] is None else state["best"]
        self.evaluations.update(state["evaluations"])
        self.latest = {k: v.to(self.accelerator.device) for k, v in state["latest"].items()}
        for name, player in self.players.items():
            player.load_state_dict(state["players"][name])
        self.ema.load_state_dict(state["ema"])
        self.objective.load_state_dict(state["objective"])

    def total_evaluations(self) -> None:
        """Add up the counts of all processes, once training has ended."""
        if self.accelerator.num_processes > 1:
            counts = torch.tensor(list(self.evaluations.values()), device=self.accelerator.device)
            total = self.accelerator.reduce(counts, reduction="sum").tolist()  # pyright: ignore
            self.evaluations.update(zip(self.evaluations, total, strict=True))

    def _evaluate(self) -> str:
        """Measure the averaged student; keep it if it is the best so far. A line to show.

        Where that fails, it is said and training goes on.
        """
        line = ""
        if self.accelerator.is_main_process and self.evaluate is not None:
            with self.extras.attempt(f"{FIGURES} while training"):
                line = self._keep_best(self.evaluate, min(self.objective.student.counts))
        self.accelerator.wait_for_everyone()
        return line

    def _keep_best(self, evaluate: Evaluate, steps: int) -> str:
        with self.ema.swapped():
            metrics = evaluate(steps)
        kept = {f"eval/{k}": v for k, v in metrics.items() if isinstance(v, float)}
        self.accelerator.log(kept, step=self.step)
        headline = metrics.get("headline")  # the name of the figure to be lowered
        shown = [k for k in (headline, "coverage", "accuracy") if k in metrics]
        if headline is not None and metrics[headline] < self.best:
            self.best = metrics[headline]
            state = {"ema": self.ema.state_dict(), "step": self.step}
            checkpoint.save(state, self.root / "best", {"step": self.step, headline: self.best})
        return "  ".join(f"{k} {metrics[k]:.3f}" for k in shown) + f" at {steps} step"

    def _log(self, logs: dict[str, Tensor]) -> dict[str, float]:
        """Fetch the scalars, averaged over processes, in one transfer; write them down."""
        # With them goes the first loss, which some other process may have had no number for.
        told = self._over_processes({**logs, **{f"first {k}": v for k, v in self._first.items()}})
        self._first = dict.fromkeys(self._first, told[-1])
        values = dict(zip(logs, told.tolist()))
        for name, player in self.players.items():
            values[f"{name}/lr"] = player.rate(self.step - 1)
        self.accelerator.log({"seconds": self.seconds, **values}, step=self.step)
        self._check(values)
        return values

    def _over_processes(self, logs: Mapping[str, Tensor]) -> Tensor:
        """The scalars (N,), averaged over processes."""
        values = torch.stack([v.float() for v in logs.values()])
        if self.accelerator.num_processes > 1:
            values = self.accelerator.reduce(values, reduction="mean")
        return values  # pyright: ignore[reportReturnType]

    def _check(self, logs: Mapping[str, Tensor | float]) -> None:
        """Refuse to go on from losses that are not finite numbers.

        All of them are named: one spoils the others within a step, and only some steps are read.
        """
        losses = {k: float(v) for k, v in logs.items() if k.endswith("loss")}
        lost = {k: v for k, v in losses.items() if not math.isfinite(v)}
        if not lost:
            return
        found = checkpoint.steps(self.root)
        kept = f"the newest checkpoint, {found[-1]}, is of finite losses" if found else (
            "no checkpoint had been saved"
        )  # fmt: skip
        said = f"step {self.step}: {' and '.join(f'{k} is {v}' for k, v in lost.items())}; "
        first = {k: v for k, v in self._first.items() if not math.isfinite(v)}
        if first:
            key = next(iter(first))
            raise UserError(
                f"{said}{key} was so at the first turn, before any update of this run, so no "
                "learning rate is to blame; look at the objective's own keys, at train.precision, "
                f"and at the teacher by distill doctor ({kept})"
            )
        rates = [f"players.{p}.lr" for p in dict.fromkeys(p for k in lost for p in _players(k))]
        raise UserError(f"{said}lower {' or '.join(rates)}, or raise the warmup ({kept})")

    def _catch(self, number: int, frame: Any) -> None:
        self._stop = number

    def _should_stop(self) -> int:
        """The signal to stop on. Processes ask one another at every step, and hear at the next."""
        if self._hosts is None:
            return self._stop
        stop = self._asked.answer() if self._asked else 0
        self._asked = None if stop else StopVote.of(self._stop, self._hosts)
        if self._asked and self.step == self.cfg.steps:  # there is no next
            stop, self._asked = self._asked.answer(), None
        return stop


def _players(key: str) -> list[str]:
    """The players of a turn, of the name of something that it logs."""
    return key.split("/")[0].split("+")


def shards_of(train: TrainSection, processes: int) -> int:
    """Parts that each batch is cut into: what accumulate says, or one for each process."""
    shards = max(train.accumulate, processes)
    if shards % processes or train.batch % shards:
        raise UserError(
            f"train.accumulate: {train.batch} samples in {shards} parts cannot be shared evenly "
            f"among {processes} processes; make it a multiple of the processes, and batch of it"
        )
    return shards


def check_memory(train: TrainSection, shape: tuple[int, ...], shards: int) -> None:
    """Refuse batches that this machine could not even hold the noise of."""
    shard = train.batch // shards * math.prod(shape) * torch.float32.itemsize
    needed, there = shard * (AHEAD + 1), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise UserError(
            f"train.batch: {train.batch} samples in {shards} parts take {needed / 2**30:,.0f} GiB "
            f"for their noise alone, and this machine has {there / 2**30:,.0f}; lower it, or raise "
            f"train.accumulate"
        )


def forget_after(step: int, out: Path) -> None:
    """Drop what a killed run logged after the step that is taken up again."""
    log = out / "metrics.jsonl"
    if log.exists():
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        kept = [line for line in lines if _step_of(line) <= step]
        draft = log.with_suffix(".draft")
        draft.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        draft.replace(log)
    shutil.rmtree(out / "student", ignore_errors=True)  # it was made from later weights


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError):
        return math.inf  # the line that the kill cut short
