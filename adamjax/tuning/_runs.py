"""Batches of trials: run in one program, ended early where it pays, written as they end."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from adamjax.tuning._population import Runner
from adamjax.tuning._space import Setting
from adamjax.tuning._strategy import Batch, Result
from adamjax.tuning._sweep import Curves, alike, make
from adamjax.tuning._trial import CONFIRM, DEFAULTS, Journal, Trial

RUNGS = (0.25, 0.5)  # of a run, after each of which half of a batch ends
SAVED = 0.5  # of the time, by these


class Planned(NamedTuple):
    """A setting to run."""

    number: int
    stage: str
    setting: Setting


class Runs:
    """Runs batches of trials, and keeps what they give; those that the journal has are not run again.

    Fields:
      ended: Every trial so far.
    """

    def __init__(
        self, runner: Runner, optimizer: Callable[..., Any], journal: Journal, marks: np.ndarray, mode: str, bar: Any
    ) -> None:
        self.ended: list[Trial] = []
        self._runner, self._optimizer, self._journal, self._marks, self._bar = runner, optimizer, journal, marks, bar
        self._sign = 1 if mode == "min" else -1
        self._room = 1
        points = [int(np.searchsorted(marks, fraction * marks[-1])) for fraction in RUNGS]
        self._rungs = [point for point in points if point < len(marks) - 1]

    def valid(self, setting: Setting) -> bool:
        """Whether there is such an optimizer."""
        try:
            make(self._optimizer, setting, 0)
        except (TypeError, ValueError):
            return False
        return True

    def prepare(self, defaults: Setting, *, room: int, batches: int, seed: int, halving: bool | str) -> None:
        """Decide how to run `batches` of up to `room` settings, unless the journal says how."""
        runner, journal = self._runner, self._journal
        self._room = room
        if "order" not in journal.found:
            steps = int(self._marks[-1])
            opts, seeds = [make(self._optimizer, defaults, 0)], np.asarray([seed], np.int32)
            step, compilation, fits = runner.cost(opts, seeds, steps, room)
            pays = SAVED * batches * steps * step > len(RUNGS) * compilation
            if halving is True and not fits:
                journal.note("no halving: a batch needs more memory than there is")
            journal.decide(order=runner.order, halving=fits and (pays if halving == "auto" else halving))
        runner.order = journal.found["order"]
        journal.decide(execution=runner.execution)
        if not journal.found["halving"]:
            self._rungs = []

    def search(self, batch: Batch, seed: int) -> list[Result]:
        """Run a batch of the search."""
        explored = self._journal.found.get("explored", {})
        for name, (low, high) in batch.within.bounds.items():
            before = explored.get(name, (low, high))
            explored |= {name: [min(low, before[0]), max(high, before[1])]}
        self._journal.decide(explored=explored)
        first = len(self.ended)
        planned = [Planned(i, batch.stage if i else DEFAULTS, x) for i, x in enumerate(batch.settings, start=first)]
        return [self._result(trials[0]) for trials in self._run(planned, [seed], self._rungs)]

    def confirm(self, best: Sequence[Trial], defaults: Setting, seeds: Sequence[int]) -> None:
        """Run the best, and the defaults, with each of the seeds."""
        settings = {t.number: t.setting for t in best} | {0: defaults}
        self._run([Planned(number, CONFIRM, x) for number, x in settings.items()], seeds, [])

    def _result(self, trial: Trial) -> Result:
        value = trial.value(self._runner.metric)
        score = self._sign * value if trial.status == "complete" else math.inf
        return Result(trial.setting, score, value, trial.steps[-1] if trial.status == "pruned" else 0)

    def _run(self, planned: Sequence[Planned], seeds: Sequence[int], rungs: Sequence[int]) -> list[list[Trial]]:
        """The trials of each, seed by seed."""
        opts = [make(self._optimizer, p.setting, p.number) for p in planned]
        ended: dict[int, list[Trial]] = {}
        for group in alike(opts):
            ended |= self._run_alike([planned[i] for i in group], [opts[i] for i in group], seeds, rungs)
        found = [ended[p.number] for p in planned]
        self.ended += itertools.chain.from_iterable(found)
        return found

    def _run_alike(
        self, planned: Sequence[Planned], opts: Sequence[Any], seeds: Sequence[int], rungs: Sequence[int]
    ) -> dict[int, list[Trial]]:
        """Run them in one program, unless all have ended before; the trials of each, by number."""
        marks, runner = self._marks, self._runner
        curves = Curves(runner, len(planned), len(seeds), marks)
        judged = curves.metrics[runner.metric]
        ended = {p.number: known for p in planned if (known := self._known(p, seeds))}
        wanted = np.asarray([p.number not in ended for p in planned])
        self._progress(len(ended) * len(seeds), 0)

        def keep(rows: np.ndarray, point: int) -> np.ndarray:
            """Those that go on after a point; the others have ended."""
            stays = ~(curves.diverged_at(rows, point) > 0).all(axis=1) & (point + 1 < len(marks))
            if point in rungs:
                values = judged[:, 0, point]
                scores = np.where(np.isfinite(values), self._sign * values, math.inf)
                # What the others are compared with is run to its end.
                scores[[p.stage == DEFAULTS for p in planned]] = -math.inf
                better = np.argsort(scores, kind="stable")[: math.ceil((scores < math.inf).sum() / 2)]
                stays &= np.isin(rows, better)
            new = {
                planned[i].number: self._trials(planned[i], i, curves, seeds, point)
                for i in rows[~stays & wanted[rows]]
            }
            self._journal.write(itertools.chain.from_iterable(new.values()))
            ended.update(new)
            self._progress(len(new) * len(seeds), point + 1)
            return np.asarray(stays)

        ints = np.asarray(seeds, np.int32)
        for rows, point, results in runner.run(
            opts, ints, marks, room=self._room_for(len(planned)), wanted=wanted, keep=keep
        ):
            curves.record(rows, point, results)
            self._progress(wanted[rows].sum() * len(seeds), point, point + 1)
        return ended

    def _room_for(self, settings: int) -> int:
        """At least `settings`, of few sizes, so that programs are compiled for few."""
        room = max(self._room, settings)
        while settings <= -(-room // 2) < room:
            room = -(-room // 2)
        return room

    def _known(self, planned: Planned, seeds: Sequence[int]) -> list[Trial]:
        """The trials, if all have ended before; else nothing."""
        found = [self._journal.get(planned.number, seed, planned.stage, planned.setting) for seed in seeds]
        trials = [trial for trial in found if trial is not None]
        return trials if len(trials) == len(seeds) else []

    def _trials(self, planned: Planned, i: int, curves: Curves, seeds: Sequence[int], point: int) -> list[Trial]:
        """The trials of setting `i`, which ends after `point`."""
        end, found = point + 1, []
        for k, (seed, diverged_at) in enumerate(zip(seeds, curves.diverged_at([i], point)[0].tolist(), strict=True)):
            status = "infeasible" if diverged_at else "complete" if end == len(self._marks) else "pruned"
            metrics = {name: curve[i, k, :end].tolist() for name, curve in curves.metrics.items()}
            steps, losses = self._marks[:end].tolist(), curves.losses[i, k, :end].tolist()
            found.append(Trial(*planned[:3], seed, status, steps, losses, metrics, diverged_at))
        return found

    def _progress(self, runs: int, done: int, to: int | None = None) -> None:
        """Move the bar by the steps of so many runs from a point on, to another or the end."""
        if self._bar is not None:
            ends = [0, *self._marks.tolist()]
            self._bar.update(runs * (ends[-1 if to is None else to] - ends[done]))
