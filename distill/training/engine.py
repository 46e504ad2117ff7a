"""The engine plays the objective's turns, and averages, logs, samples, evaluates and saves."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn

from distill.attempts import FIGURES, Attempts
from distill.config.schema import FlatSection, TrainSection
from distill.console import Progress
from distill.data.encode import decoder_on
from distill.data.stream import AHEAD, Source, Stream
from distill.early_stop.guards import Guards
from distill.files import write
from distill.grids import save_samples
from distill.objectives.base import Batch, Objective, Turn, networks_in
from distill.objectives.validate import check_loss, check_turn
from distill.profiling import EvaluationCounter, denoisers_in, start_peak
from distill.rewards.rewards import rewarded
from distill.rewards.terms import RANKING
from distill.seeds import seed_all
from distill.speed import Speed, Speedometer, Work
from distill.training import checkpoint
from distill.training.ema import EMA, SNAPSHOTS, PowerEMA
from distill.training.player import Player
from students.export.folder import sample_student
from students.lora import AdaptedDenoiser
from teachers.compiled import CompileError, GraphReport, compile_errors, running_compiled
from teachers.denoiser import Cond
from teachers.errors import UserError
from teachers.teacher import Teacher

GUARDED = "guarded"  # the checkpoint of the best check of guards
Evaluate = Callable[[int], dict[str, Any]]  # student steps -> metrics, for the weights in place


ENDS = {  # before the last step
    "flat": "its evaluations improve no more (eval.stop_when_flat)",
    "hours": "its time is over (train.hours)",
}


class Stopped(Exception):
    """A signal asked the run to stop; the step was finished and saved.

    saved: False where it was not, since the signal also ended the compilers that it waited for.
    """

    def __init__(self, number: int, saved: bool = True) -> None:
        super().__init__(signal.Signals(number).name)
        self.number, self.saved = number, saved


class StopVote(NamedTuple):
    """An all-reduce under way between hosts: whether any process caught a signal."""

    work: dist.Work
    flag: Tensor  # () on the CPU: the signal's number, or 0

    @classmethod
    def of(cls, signal: int, group: Any) -> StopVote:
        flag = torch.tensor(signal)
        work = dist.all_reduce(flag, dist.ReduceOp.MAX, group, async_op=True)
        assert work is not None
        return cls(work, flag)

    def answer(self) -> int:
        """The largest signal number that a process caught, or 0; waits for the others."""
        self.work.wait()
        return int(self.flag)


class Engine:
    """Trains the players of one objective.

    Args:
        players: The networks that learn, by the names that the objective's turns use.
        source: Gives the batches.
        teacher: For the sample grids: its codec decodes the student's samples.
        train: The recipe's section.
        out: The run's folder.
        evaluate: Measures the student with its present weights, every `evaluate_every` steps; the
            best one has a checkpoint.
        stop_when_flat: Ends training when these measurements improve no more.
        shown: Labels or prompts of the sample grids.
        sample_flops: FLOPs of one sample through the teacher's network, for the speed.
        guards: Checks of the student that may stop training; it then has the best check's average.
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
        stop_when_flat: FlatSection | None = None,
        shown: Sequence[Any] = (0,) * 80,
        sample_flops: float | None = None,
        guards: Guards | None = None,
    ) -> None:
        self.objective, self.players = objective, players
        self.source, self.teacher = source, teacher
        self.cfg, self.accelerator, self.out = train, accelerator, out
        self.evaluate, self.evaluate_every, self.shown = evaluate, evaluate_every, shown
        self.stop_when_flat = stop_when_flat
        self.guards, self.extras = guards, Attempts(out)
        averaged = players[objective.trains].params
        self.ema = EMA(averaged, train.ema)
        self.power = PowerEMA(averaged, train.ema_lengths or ())
        self._shown: Cond = None  # the grids' condition, encoded at the first grid
        self.step = self.draws = 0
        self.seconds, self.best = 0.0, math.inf
        self.curve: list[float] = []  # of all evaluations, the same on all processes
        self.ended: Literal["", "flat", "hours"] = ""  # why before the last step
        self.latest: dict[str, Tensor] = {}  # each turn's last scalars, some of earlier steps
        self.counter = EvaluationCounter(denoisers_in(networks_in(objective)))
        self.shards = shards_of(train, accelerator.num_processes)
        self.speed = Speedometer(
            accelerator.device,
            train.batch,
            train.precision,
            None if sample_flops is None else partial(self._flops, sample_flops),
        )
        self.graphs = GraphReport()
        self._first: dict[str, Tensor] = {}  # the loss of this process's first turn
        self._checked: set[tuple[Any, ...]] = set()
        self._stop = 0
        self._vote: StopVote | None = None
        # Votes have a group on the hosts: on the devices, reading an answer would wait for them.
        self._hosts = dist.new_group(backend="gloo") if accelerator.num_processes > 1 else None
        if accelerator.num_processes > 1:  # only gradients are averaged later, not weights
            for player in players.values():
                broadcast_weights(player)

    @property
    def root(self) -> Path:
        return self.out / "checkpoints"

    @property
    def evaluations(self) -> dict[str, int]:
        """The samples that went through each network while training."""
        return self.counter.counts

    @property
    def done(self) -> bool:
        """Whether no step is left to play."""
        guarded = self.guards is not None and self.guards.stopped
        return self.step >= self.cfg.steps or bool(self.ended) or guarded

    def train(self) -> None:
        """Play every step that is left, or until an earlier end.

        Raises:
            Stopped: SIGINT or SIGTERM came; the step was finished and a checkpoint saved.
            UserError: a loss is no longer a finite number, or a network could not be compiled.
        """
        if self.accelerator.is_main_process:
            self.extras.clear()
        mine, size = shards_here(self.shards, self.accelerator), self.cfg.batch // self.shards
        device = self.accelerator.device
        start_peak(device)  # of training alone
        stream = Stream(self.source, device, self.draws, mine, self.shards, size)
        self.ended = "" if self.step >= self.cfg.steps else self._early_end()
        began = time.perf_counter() - self.seconds
        handlers = {s: signal.signal(s, self._catch) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            with Progress(self.cfg.steps, self.step, self.accelerator.is_main_process) as progress:
                while not self.done:
                    self.latest |= self._compiled_step(stream)
                    self.seconds = time.perf_counter() - began
                    progress.advance(self.step)
                    self.speed.advance(self.step)
                    self._after_step(progress)
        finally:
            stream.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if self.guards is not None and self.guards.stopped:
            self.ema.load_state_dict(checkpoint.load(self.root / GUARDED)["ema"])

    def _compiled_step(self, stream: Stream) -> dict[str, Tensor]:
        """Play a step, in which networks may be compiled; scalars to log.

        Raises:
            Stopped: a signal came to all processes of a terminal, and so ended a compiler.
            UserError: a network could not be compiled.
        """
        try:
            with compile_errors():
                return self.advance(stream)
        except CompileError:
            if self._stop:
                raise Stopped(self._stop, saved=False) from None
            raise

    def _after_step(self, progress: Progress) -> None:
        """Check, log, sample, evaluate and save where it is time to, and stop on a signal."""
        if self.guards is not None and self.guards.due(self.step):
            with self.speed.paused():
                self._check_guards(self.guards)
                progress.print_above(self.guards.line())
        logged, sampled = self._due(self.cfg.log_every), self._due(self.cfg.sample_every)
        self._report(progress, logged, sampled)
        evaluated = self.evaluate_every > 0 and self.step % self.evaluate_every == 0
        if evaluated:
            with self.speed.paused():
                progress.print_above(self._evaluate())
        if (logged or evaluated) and not self.done:
            self.ended = self._early_end()
            if self.ended:  # this is the last step after all
                progress.steps = self.step
                progress.print_above(f"step {self.step}: training ends: {ENDS[self.ended]}")
                last = self.cfg.sample_every > 0
                self._report(progress, not logged, last and not sampled)
        stop = self._should_stop()
        if stop or self._due(self.cfg.save_every):
            with self.speed.paused():
                self._check(self.latest)  # a bad checkpoint would have the good ones pruned
                self.save()
        if stop:
            raise Stopped(stop)

    def _report(self, progress: Progress, log: bool, sample: bool) -> None:
        """Log the last scalars and save grids, either where it is asked for."""
        if log:
            progress.show(self.step, *self._log(self.latest))
            if (line := self.graphs.line(self.step)) is not None:
                progress.print_above(line)
        if sample:
            with self.speed.paused():
                self.sample()

    def _due(self, every: int) -> bool:
        """Whether the step just played is one in `every`, or the last; never where that is 0."""
        return every > 0 and (self.step % every == 0 or self.done)

    def _early_end(self) -> Literal["", "flat", "hours"]:
        """Why training ends at this step, the same on all processes; empty where it goes on."""
        if self.stop_when_flat is not None and self.stop_when_flat.reached(self.curve):
            return "flat"
        hours = self.cfg.hours
        if hours is not None and self._of_first(self.seconds) >= 3600 * hours:
            return "hours"
        return ""

    def _of_first(self, value: float) -> float:
        """The first process's value, on all."""
        if self._hosts is None:
            return value
        shared = torch.tensor(value, dtype=torch.float64)
        dist.broadcast(shared, 0, self._hosts)  # pyright: ignore[reportArgumentType]
        return float(shared)

    def advance(self, stream: Stream) -> dict[str, Tensor]:
        """Play one step: every turn that the objective yields, then the average. Scalars to log."""
        seed, logs = self.cfg.seed, {}
        with self.counter, running_compiled():
            seed_all(seed, "turns", self.step, 0)
            for i, turn in enumerate(self.objective.turns(self.step)):
                logs |= self.play(turn, i, stream)
                # the code after a yield draws the same numbers on all ranks
                seed_all(seed, "turns", self.step, i + 1)
        self.ema.update()
        self.power.update()
        self.step += 1
        return logs

    def play(self, turn: Turn, place: int, stream: Stream) -> dict[str, Tensor]:
        """One update; its loss is averaged over the batch's shards, here and on other processes.

        Args:
            place: Of the turn in its step, from 0.
        """
        self._check_once(turn, place)
        players = self._learning(turn)
        if not players:
            return {}
        shards, logs = len(stream.mine), {}
        if turn.reset and self.objective.trains in players:
            self.ema.restart()  # so that no weights of the stage before are in the average
            self.power.restart()
        with ExitStack() as stack:
            for player in players.values():
                stack.enter_context(player.turn(self.step, turn.reset))
            for shard in stream.mine:
                batch = next(stream)
                seed_all(self.cfg.seed, self.step, place, shard)
                with self.accelerator.autocast():
                    loss = rewarded(turn.loss(batch), batch, turn, self.objective, self.step)
                check_loss(loss, self.objective)
                self.accelerator.backward(loss.value / shards)
                for key, value in {"loss": loss.value, **loss.logs}.items():
                    logs[key] = logs.get(key, 0) + value.detach() / shards
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.update()
        self.draws += 1
        name = "+".join(turn.players)
        if not self._first:
            self._first = {f"{name}/loss": logs["loss"]}
        norms = {f"{n}/grad_norm": p.grad_norm for n, p in players.items()}
        scalars = {f"{name}/{key}": v for key, v in logs.items()} | norms
        if self.step >= self.objective.last_stage:  # earlier stages may log others
            for waiting, player in self.players.items():
                check_wait(waiting, player, turn, scalars)
        return scalars

    def _learning(self, turn: Turn) -> dict[str, Player]:
        """The players of a turn that learn in this step; the others start anew where it says so.

        A network that orders samples for ranked rewards learns in the student's turns.
        """
        every = self.cfg.log_every
        players = {name: self.players[name] for name in turn.players}
        if "student" in players and RANKING in self.players:
            players[RANKING] = self.players[RANKING]
        found = {n: player for n, player in players.items() if player.learns(self.step, every)}
        for name in turn.players if turn.reset else ():
            if name not in found:
                self.players[name].restart(self.step)
        return found

    def sample(self) -> None:
        """Save a grid of the averaged student's pictures for each step count, on fixed noise.

        Prompts are encoded once. Only the decoder moves to the device, and decodes one picture at a
        time, so that it fits where a step's activations were. A failure is reported, and training
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
        size = self.cfg.batch // self.shards  # fits the device, as training does
        with self.ema.swapped(), decoder_on(self.teacher, self.accelerator.device):
            samples = [
                sample_student(student.at(k), self.teacher, self.shown, 0, size, self._shown)
                for k in student.counts
            ]
            images = [torch.cat([codec.decode(one) for one in x.split(1)]) for x in samples]
        folder = self.out / "samples"
        folder.mkdir(exist_ok=True)
        for steps, grid in zip(student.counts, images, strict=True):
            save_samples(grid, self.shown, folder / f"step-{self.step:06d}-at-{steps}.png")

    def save(self) -> None:
        """Save a checkpoint of everything, and delete all but the newest few."""
        if self.latest:  # after resuming, scalars of earlier steps are logged as means as well
            values = [v.clone() for v in self._over_processes(self.latest)]
            self.latest = dict(zip(self.latest, values, strict=True))
        if self.accelerator.is_main_process:
            about = {"step": self.step, "draws": self.draws}
            checkpoint.save(self.state_dict(), self.root / f"step-{self.step:06d}", about)
            checkpoint.prune(self.root, self.cfg.keep)
            self.power.save(self.out / SNAPSHOTS, self.step)
        self.accelerator.wait_for_everyone()

    def resume(self) -> bool:
        """Load the newest checkpoint; False if there is none yet.

        Raises:
            UserError: the checkpoint is damaged, or is not of this run.
        """
        folders = checkpoint.steps(self.root)
        if not folders:
            return False
        try:
            self.load_state_dict(checkpoint.load(folders[-1]))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(
                f"checkpoint {folders[-1]}: it is not of this run "
                f"({type(error).__name__}: {error}); delete it to resume from the one before it"
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
            "curve": self.curve,
            "evaluations": self.evaluations,
            "guards": None if self.guards is None else self.guards.state_dict(),
            "latest": self.latest,
            "players": {name: player.state_dict() for name, player in self.players.items()},
            "ema": self.ema.state_dict(),
            **({"power": self.power.state_dict()} if self.power.lengths else {}),
            "objective": self.objective.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.draws, self.seconds = state["step"], state["draws"], state["seconds"]
        self.best = math.inf if state["best"] is None else state["best"]
        self.curve = list(state.get("curve", ()))  # earlier versions saved none
        self.evaluations.update(state["evaluations"])
        if self.guards is not None and state.get("guards") is not None:
            self.guards.load_state_dict(state["guards"])
        self.latest = {k: v.to(self.accelerator.device) for k, v in state["latest"].items()}
        for name, player in self.players.items():
            player.load_state_dict(state["players"][name])
        self.ema.load_state_dict(state["ema"])
        if self.power.lengths:
            self.power.load_state_dict(state["power"])
        self.objective.load_state_dict(state["objective"])

    def total_evaluations(self) -> None:
        """Sum the evaluations of all processes, once training has ended."""
        if self.accelerator.num_processes > 1:
            counts = torch.tensor(list(self.evaluations.values()), device=self.accelerator.device)
            total = self.accelerator.reduce(counts, reduction="sum").tolist()  # pyright: ignore
            self.evaluations.update(zip(self.evaluations, total, strict=True))

    def _check_guards(self, guards: Guards) -> None:
        """Check the averaged student, and save it if it is the best so far.

        A failure is reported, and training goes on.
        """
        with self.extras.attempt("guards"), self.ema.swapped():
            best = guards.check(self.step, self.accelerator)
            values = {f"guards/{k}": v for k, v in guards.scores.items()}
            self.accelerator.log(values, step=self.step)
            if best and self.accelerator.is_main_process:
                state = {"ema": self.ema.state_dict(), "step": self.step}
                checkpoint.save(state, self.root / GUARDED, {"step": self.step, **guards.scores})
        self.accelerator.wait_for_everyone()

    def _evaluate(self) -> str:
        """Measure the averaged student, and save it if it is the best so far. A line to show.

        A failure is reported, and training goes on.
        """
        line, value = "", math.nan
        if self.accelerator.is_main_process and self.evaluate is not None:
            with self.extras.attempt(f"{FIGURES} while training"):
                line, value = self._keep_best(self.evaluate, min(self.objective.student.counts))
        self.accelerator.wait_for_everyone()
        if math.isfinite(value := self._of_first(value)):
            self.curve.append(value)
        return line

    def _keep_best(self, evaluate: Evaluate, steps: int) -> tuple[str, float]:
        """A line to show, and the metric with the sign that training lowers; NaN without one."""
        with self.ema.swapped():
            metrics = evaluate(steps)
        values = {f"eval/{k}": v for k, v in metrics.items() if isinstance(v, float)}
        self.accelerator.log(values, step=self.step)
        raised = metrics.get("raised")  # the name of the metric, if training raises it
        name = metrics.get("headline", raised)
        value = math.nan if name is None else -metrics[name] if raised else metrics[name]
        if name is not None and value < self.best:
            self.best = value
            state = {"ema": self.ema.state_dict(), "step": self.step}
            checkpoint.save(state, self.root / "best", {"step": self.step, name: metrics[name]})
        shown = [k for k in dict.fromkeys((name, "coverage", "accuracy")) if k in metrics]
        line = "  ".join(f"{k} {metrics[k]:.3f}" for k in shown) + f" at {steps} step"
        return line, value

    def _log(self, logs: dict[str, Tensor]) -> tuple[dict[str, float], Speed | None]:
        """Average the scalars over processes, fetch them in one transfer, and log them.

        The speed is measured just after the transfer, which waited for the device.
        """
        # With the first loss among them: it may be NaN on another process alone.
        first = {f"first {k}": v for k, v in self._first.items()}
        means = self._over_processes({**logs, **first})
        if first:
            self._first = dict.fromkeys(self._first, means[-1])
        values = dict(zip(logs, means.tolist()))
        speed = self.speed.measure(self.step)
        for name, player in self.players.items():
            values[f"{name}/lr"] = player.rate(self.step - 1)
        columns = self.graphs.columns() | ({} if speed is None else speed.columns())
        self.accelerator.log({"seconds": self.seconds, **values, **columns}, step=self.step)
        self._check(values)
        for player in self.players.values():
            player.hear(values)
        return values, speed

    def _flops(self, sample: float) -> float:
        """The FLOPs of this process until now, roughly: all networks are taken to be the teacher's.

        A backward pass through adapters or frozen weights costs as much as a forward pass, through
        weights that learn twice as much, and one forward pass more where activations are
        recomputed.

        Args:
            sample: FLOPs of one sample through the network.
        """
        again = 1.0 if self.cfg.checkpointing else 0.0
        backward = {
            name: again + (1.0 if name not in self.players or has_adapters(network) else 2.0)
            for name, network in networks_in(self.objective).items()
        }
        work = Work(sample, backward)
        return work.flops(self.evaluations, self.counter.with_gradients)

    def _over_processes(self, logs: Mapping[str, Tensor]) -> Tensor:
        """The scalars (N,), averaged over processes."""
        if not logs:  # before a player begins
            return torch.zeros(0)
        values = torch.stack([v.float() for v in logs.values()])
        if self.accelerator.num_processes > 1:
            values = self.accelerator.reduce(values, reduction="mean")
        return values  # pyright: ignore[reportReturnType]

    def _check(self, logs: Mapping[str, Tensor | float]) -> None:
        """Stop where a loss is not a finite number.

        The message names all of them: one spoils the others within a step, and most steps are not
        logged.

        Raises:
            UserError: naming the losses, and what to change.
        """
        losses = {k: float(v) for k, v in logs.items() if k.endswith("loss")}
        bad = {k: v for k, v in losses.items() if not math.isfinite(v)}
        if not bad:
            return
        folders = checkpoint.steps(self.root)
        last = "no checkpoint was saved"
        if folders:
            last = f"the losses of the newest checkpoint, {folders[-1]}, are finite"
        fault = f"step {self.step}: {' and '.join(f'{k} is {v}' for k, v in bad.items())}"
        first = [k for k, v in self._first.items() if not math.isfinite(v)]
        if first:
            raise UserError(
                f"{fault}; {first[0]} was not finite at the first turn, before any update of this "
                "run, so learning rates are not the cause; check the objective's keys and "
                f"train.precision, and check the teacher with distill doctor ({last})"
            )
        rates = [f"players.{p}.lr" for p in dict.fromkeys(p for k in bad for p in _players(k))]
        raise UserError(f"{fault}; lower {' or '.join(rates)}, or raise the warmup ({last})")

    def _check_once(self, turn: Any, place: int) -> None:
        """Check a turn the first time that one of these players stands at this place of a step.

        Raises:
            UserError: it is no turn that these players can play.
        """
        sound = isinstance(turn, Turn) and isinstance(turn.players, tuple)
        key = (place, *turn.players) if sound else ()
        if key not in self._checked:
            check_turn(turn, self.objective, self.players)
            self._checked.add(key)

    def _catch(self, number: int, frame: Any) -> None:
        self._stop = number

    def _should_stop(self) -> int:
        """The signal to stop on, or 0. A vote of all processes starts at every step and is read at
        the next, so that no step waits for it."""
        if self._hosts is None:
            return self._stop
        stop = self._vote.answer() if self._vote else 0
        self._vote = None if stop else StopVote.of(self._stop, self._hosts)
        if self._vote and self.done:  # there is no next step
            stop, self._vote = self._vote.answer(), None
        return stop


def _players(key: str) -> list[str]:
    """The players of a turn, from the key of a scalar that it logs."""
    return key.split("/")[0].split("+")


def check_wait(name: str, player: Player, turn: Turn, scalars: Iterable[str]) -> None:
    """Refuse a player that waits for a scalar which the turns of that scalar's player do not log.

    Raises:
        UserError: naming the scalars that there are.
    """
    wait = player.config.waits
    if wait is None or wait.player not in turn.players or wait.found(scalars):
        return
    known = ", ".join(f"{wait.player}/{k.partition('/')[2]}" for k in scalars)
    raise UserError(
        f"players.{name}.waits: no scalar {wait.scalar!r} is logged; name one of {known}"
    )


def has_adapters(network: nn.Module) -> bool:
    """Whether a network learns in adapters, on frozen weights."""
    return any(isinstance(m, AdaptedDenoiser) for m in network.modules())


def shards_of(train: TrainSection, processes: int) -> int:
    """Parts that each batch is cut into: `accumulate`, or one for each process where that is more.

    Raises:
        UserError: the batch does not divide into them, or they cannot be shared evenly.
    """
    shards = max(train.accumulate, processes)
    if shards % processes or train.batch % shards:
        raise UserError(
            f"train.accumulate: {train.batch} samples in {shards} parts cannot be shared evenly "
            f"among {processes} processes; make it a multiple of the processes, and batch of it"
        )
    return shards


def shards_here(shards: int, accelerator: Accelerator) -> range:
    """Which of a batch's parts this process computes."""
    per = shards // accelerator.num_processes
    return range(per * accelerator.process_index, per * (accelerator.process_index + 1))


def first_batch(source: Source, train: TrainSection, accelerator: Accelerator) -> Batch:
    """This process's first part of a run's first batch, on its device."""
    shards = shards_of(train, accelerator.num_processes)
    first, size = shards_here(shards, accelerator)[0], train.batch // shards
    mine = range(first, first + 1)
    stream = Stream(source, accelerator.device, 0, mine, shards, size, ahead=0)
    try:
        return next(stream)
    finally:
        stream.close()


@torch.no_grad()
def broadcast_weights(player: Player) -> None:
    """Give all processes the weights of the first."""
    for p in player.params:
        p.copy_(broadcast(p.detach().clone()))  # pyright: ignore


def check_memory(train: TrainSection, shape: tuple[int, ...], shards: int) -> None:
    """Refuse batches of which this machine's memory could not hold the noise.

    Raises:
        UserError: naming the key.
    """
    shard = train.batch // shards * math.prod(shape) * torch.float32.itemsize
    needed, memory = shard * (AHEAD + 1), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise UserError(
            f"train.batch: {train.batch} samples in {shards} parts take {needed / 2**30:,.0f} GiB "
            f"for their noise alone, and this machine has {memory / 2**30:,.0f}; lower it, or "
            "raise train.accumulate"
        )


def forget_after(step: int, out: Path) -> None:
    """Drop what a killed run logged and exported after the step that it resumes from."""
    log = out / "metrics.jsonl"
    if log.exists():
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        write(log, "".join(f"{line}\n" for line in lines if _step_of(line) <= step))
    for snapshot in (out / SNAPSHOTS).glob("step-*"):
        if int(snapshot.stem[5:]) > step:
            snapshot.unlink()
    shutil.rmtree(out / "student", ignore_errors=True)  # it was made from later weights


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError):
        return math.inf  # a kill cut this line short
