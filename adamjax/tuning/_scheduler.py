"""The scheduler of trials: it runs a round in one program, prunes it if that pays, and keeps each trial as it ends."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from adamjax._transforms.base import Transformation
from adamjax.tuning._journal import CONFIRM, DEFAULTS, Candidate, TrialRecord
from adamjax.tuning._mesh_runner import Runner
from adamjax.tuning._search import Search
from adamjax.tuning._stop import Check
from adamjax.tuning._sweep import Curves, evenly_spaced, group_by_structure, make_optimizer, undefined

POINTS = 20  # of a learning curve
RUNGS = (0.25, 0.5)  # fractions of a run, after each of which half of a round ends
SAVED_BY_HALVING = 0.5  # fraction of the time


class TrialScheduler:
    """Runs the trials of a problem. Trials that the journal holds are not run again."""

    def __init__(self, search: Search, runner: Runner, check: Check, bar: Any) -> None:
        spec = search.spec
        self._spec, self._journal, self._record = spec, search.journal, search.record
        self._runner, self._check, self._bar = runner, check, bar
        self._steps = spec.steps or 0
        self._eval_steps = evenly_spaced(self._steps, POINTS)
        self._sign = 1 if spec.mode == "min" else -1
        self._capacity = 1
        points = [int(np.searchsorted(self._eval_steps, fraction * self._steps)) for fraction in RUNGS]
        self._rungs = [point for point in points if point < len(self._eval_steps) - 1]

    def prepare(self, *, capacity: int, rounds: int, halving: bool | str) -> None:
        """Decide how to run `rounds` rounds of up to `capacity` settings, unless the journal holds that decision."""
        spec, runner, journal = self._spec, self._runner, self._journal
        self._capacity = capacity
        if "order" not in journal.decisions:
            opts, seeds = [make_optimizer(spec.optimizer, spec.defaults, 0)], np.asarray([spec.seed], np.int32)
            step, compilation, fits = runner.cost(opts, seeds, self._steps, capacity)
            pays = SAVED_BY_HALVING * rounds * self._steps * step > len(RUNGS) * compilation
            if halving is True and not fits:
                journal.note("no halving: the settings of a round do not fit in memory at once")
            journal.decide(order=runner.order, halving=fits and (pays if halving == "auto" else halving))
        order = journal.decisions["order"]
        if (order == "mesh") != (runner.order == "mesh"):
            began = 'with execution="mesh"' if order == "mesh" else 'without execution="mesh"'
            raise ValueError(f"the tuning in {journal.path} began {began}: go on like that, or choose another folder")
        runner.order = order
        journal.decide(execution=runner.execution)
        if not journal.decisions["halving"]:
            self._rungs = []

    def run(self, candidates: Sequence[Candidate]) -> None:
        """Run a round, each setting with each seed; the search is told each trial as it ends.

        Raises:
          Stopped: The check says so.
        """
        seeds = list(dict.fromkeys(c.seed for c in candidates))
        settings = list({c.number: c for c in candidates}.values())
        rungs = [] if candidates[0].stage == CONFIRM else self._rungs
        opts = [make_optimizer(self._spec.optimizer, c.setting, c.number) for c in settings]
        for group in group_by_structure(opts):
            self._run_group([settings[i] for i in group], [opts[i] for i in group], seeds, rungs)

    def _run_group(
        self, candidates: list[Candidate], opts: list[Transformation], seeds: Sequence[int], rungs: list[int]
    ) -> None:
        """Run candidates in one program, unless all have ended before."""
        eval_steps, runner = self._eval_steps, self._runner
        curves = Curves(runner, len(candidates), len(seeds), eval_steps)
        wanted = np.asarray([not self._has_ended(c, seeds) for c in candidates])
        self._update_bar((~wanted).sum() * len(seeds), 0)

        def survivors(rows: np.ndarray, point: int) -> np.ndarray:
            """Return which rows go on after a point; record the trials of the others."""
            diverged = (curves.diverged_at(rows) > 0).all(axis=1)
            stays = ~diverged & (point + 1 < len(eval_steps))
            if point in rungs:
                values = curves.metrics[runner.metric][:, 0, point]
                # A metric that is not defined yet says nothing: it is judged at the end.
                stays &= np.isin(rows, self._better_half(candidates, values)) | ~np.isfinite(values[rows])
            stopped = rows[~stays & wanted[rows]]
            new = [trial for i in stopped for trial in self._trials(candidates[i], i, curves, seeds, point)]
            self._record(*new)
            self._update_bar(len(new), point + 1)
            return np.asarray(stays)

        for rows, point, results in runner.run(
            opts,
            np.asarray(seeds, np.int32),
            eval_steps,
            capacity=self._capacity_for(len(candidates)),
            wanted=wanted,
            survivors=survivors,
            check=self._check,
        ):
            curves.record(rows, point, results)
            self._update_bar(wanted[rows].sum() * len(seeds), point, point + 1)

    def _better_half(self, candidates: Sequence[Candidate], values: np.ndarray) -> np.ndarray:
        """Return the rows of the better half of the candidates with a finite value, the defaults always included."""
        scores = np.where(np.isfinite(values), self._sign * values, math.inf)
        # The defaults run to the end: the others are compared with them.
        scores[[c.stage == DEFAULTS for c in candidates]] = -math.inf
        return np.argsort(scores, kind="stable")[: math.ceil((scores < math.inf).sum() / 2)]

    def _capacity_for(self, settings: int) -> int:
        """Return a capacity of at least `settings`: one of few, so that few programs are compiled."""
        capacity = max(self._capacity, settings)
        while settings <= -(-capacity // 2) < capacity:
            capacity = -(-capacity // 2)
        return capacity

    def _has_ended(self, candidate: Candidate, seeds: Sequence[int]) -> bool:
        """Return whether a candidate has ended before with all seeds."""
        return all(self._journal.get(candidate._replace(seed=seed)) is not None for seed in seeds)

    def _trials(
        self, candidate: Candidate, row: int, curves: Curves, seeds: Sequence[int], point: int
    ) -> list[TrialRecord]:
        end, trials = point + 1, []
        for k, (seed, diverged_at) in enumerate(zip(seeds, curves.diverged_at([row])[0].tolist(), strict=True)):
            status = "infeasible" if diverged_at else "complete" if end == len(self._eval_steps) else "pruned"
            last = float(curves.metrics[self._runner.metric][row, k, point])
            error = undefined(self._runner.metric, last) if status == "complete" and not math.isfinite(last) else ""
            status = "failed" if error else status
            metrics = {name: curve[row, k, :end].tolist() for name, curve in curves.metrics.items()}
            steps, losses = self._eval_steps[:end].tolist(), curves.losses[row, k, :end].tolist()
            run = candidate._replace(seed=seed)
            trials.append(TrialRecord(*run, status, steps, losses, metrics, diverged_at, error))
        return trials

    def _update_bar(self, runs: int, done: int, to: int | None = None) -> None:
        """Advance the bar by the steps of `runs` runs from one point to another, or to the end."""
        if self._bar is not None:
            ends = [0, *self._eval_steps.tolist()]
            self._bar.update(runs * (ends[-1 if to is None else to] - ends[done]))
