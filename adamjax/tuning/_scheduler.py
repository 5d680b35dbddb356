"""The scheduler of trials: it runs a round in one program, prunes it if that pays, and keeps each trial as it ends."""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from adamjax._transforms.base import Transformation
from adamjax.tuning._journal import CONFIRM, DEFAULTS, Journal, Trial
from adamjax.tuning._mesh_runner import Runner
from adamjax.tuning._space import Setting
from adamjax.tuning._spec import Spec
from adamjax.tuning._strategy import Result, Round
from adamjax.tuning._sweep import Curves, evenly_spaced, group_by_structure, make_optimizer

POINTS = 20  # of a learning curve
RUNGS = (0.25, 0.5)  # fractions of a run, after each of which half of a round ends
SAVED_BY_HALVING = 0.5  # fraction of the time


class Candidate(NamedTuple):
    number: int
    stage: str
    setting: Setting


class TrialScheduler:
    """Runs trials and collects their results. Trials that the journal holds are not run again."""

    def __init__(self, spec: Spec, runner: Runner, journal: Journal, bar: Any) -> None:
        self.ended: list[Trial] = []  # every trial so far
        self._spec, self._runner, self._journal, self._bar = spec, runner, journal, bar
        self._eval_steps = evenly_spaced(spec.steps, POINTS)
        self._sign = 1 if spec.mode == "min" else -1
        self._capacity = 1
        points = [int(np.searchsorted(self._eval_steps, fraction * spec.steps)) for fraction in RUNGS]
        self._rungs = [point for point in points if point < len(self._eval_steps) - 1]

    def is_valid(self, setting: Setting) -> bool:
        try:
            make_optimizer(self._spec.optimizer, setting, 0)
        except (TypeError, ValueError):
            return False
        return True

    def prepare(self, *, capacity: int, rounds: int, halving: bool | str) -> None:
        """Decide how to run `rounds` rounds of up to `capacity` settings, unless the journal holds that decision."""
        spec, runner, journal = self._spec, self._runner, self._journal
        self._capacity = capacity
        if "order" not in journal.decisions:
            opts, seeds = [make_optimizer(spec.optimizer, spec.defaults, 0)], np.asarray([spec.seed], np.int32)
            step, compilation, fits = runner.cost(opts, seeds, spec.steps, capacity)
            pays = SAVED_BY_HALVING * rounds * spec.steps * step > len(RUNGS) * compilation
            if halving is True and not fits:
                journal.note("no halving: the settings of a round do not fit in memory at once")
            journal.decide(order=runner.order, halving=fits and (pays if halving == "auto" else halving))
        runner.order = journal.decisions["order"]
        journal.decide(execution=runner.execution)
        if not journal.decisions["halving"]:
            self._rungs = []

    def search(self, proposed: Round) -> list[Result]:
        explored = dict(self._journal.decisions.get("explored", {}))
        for name, (low, high) in proposed.space.bounds.items():
            before = explored.get(name, (low, high))
            explored[name] = [min(low, before[0]), max(high, before[1])]
        self._journal.decide(explored=explored)
        numbered = enumerate(proposed.settings, start=len(self.ended))
        candidates = [Candidate(i, proposed.stage if i else DEFAULTS, setting) for i, setting in numbered]
        return [self._result(trial) for (trial,) in self._run(candidates, [self._spec.seed], self._rungs)]

    def confirm(self, best: Sequence[Trial], seeds: int) -> None:
        """Run the best settings and the defaults with each of so many fresh seeds."""
        settings = {t.number: t.setting for t in best} | {0: self._spec.defaults}
        first = self._spec.seed + 1
        self._run([Candidate(number, CONFIRM, x) for number, x in settings.items()], range(first, first + seeds), [])

    def _result(self, trial: Trial) -> Result:
        value = trial.value(self._runner.metric)
        score = self._sign * value if trial.status == "complete" else math.inf
        return Result(trial.setting, score, value, trial.steps[-1] if trial.status == "pruned" else 0)

    def _run(self, candidates: list[Candidate], seeds: Sequence[int], rungs: list[int]) -> list[list[Trial]]:
        opts = [make_optimizer(self._spec.optimizer, c.setting, c.number) for c in candidates]
        ended: dict[int, list[Trial]] = {}
        for group in group_by_structure(opts):
            ended |= self._run_group([candidates[i] for i in group], [opts[i] for i in group], seeds, rungs)
        trials = [ended[c.number] for c in candidates]
        self.ended += itertools.chain.from_iterable(trials)
        return trials

    def _run_group(
        self, candidates: list[Candidate], opts: list[Transformation], seeds: Sequence[int], rungs: list[int]
    ) -> dict[int, list[Trial]]:
        """Run candidates in one program, unless all have ended before; return the trials of each, by number."""
        eval_steps, runner = self._eval_steps, self._runner
        curves = Curves(runner, len(candidates), len(seeds), eval_steps)
        ended = {c.number: trials for c in candidates if (trials := self._from_journal(c, seeds))}
        wanted = np.asarray([c.number not in ended for c in candidates])
        self._update_bar(len(ended) * len(seeds), 0)

        def survivors(rows: np.ndarray, point: int) -> np.ndarray:
            """Return which rows go on after a point; record the trials of the others."""
            stays = ~(curves.diverged_at(rows, point) > 0).all(axis=1) & (point + 1 < len(eval_steps))
            if point in rungs:
                stays &= np.isin(rows, self._better_half(candidates, curves.metrics[runner.metric][:, 0, point]))
            stopped = rows[~stays & wanted[rows]]
            new = {candidates[i].number: self._trials(candidates[i], i, curves, seeds, point) for i in stopped}
            self._journal.write(itertools.chain.from_iterable(new.values()))
            ended.update(new)
            self._update_bar(len(new) * len(seeds), point + 1)
            return np.asarray(stays)

        capacity = self._capacity_for(len(candidates))
        for rows, point, results in runner.run(
            opts, np.asarray(seeds, np.int32), eval_steps, capacity=capacity, wanted=wanted, survivors=survivors
        ):
            curves.record(rows, point, results)
            self._update_bar(wanted[rows].sum() * len(seeds), point, point + 1)
        return ended

    def _better_half(self, candidates: Sequence[Candidate], values: np.ndarray) -> np.ndarray:
        """Return the rows of the better half of the candidates that have not diverged, the defaults always included."""
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

    def _from_journal(self, candidate: Candidate, seeds: Sequence[int]) -> list[Trial]:
        """Return the trials of a candidate if all have ended before, else none."""
        number, stage, setting = candidate
        trials = [trial for seed in seeds if (trial := self._journal.get(number, seed, stage, setting)) is not None]
        return trials if len(trials) == len(seeds) else []

    def _trials(self, candidate: Candidate, row: int, curves: Curves, seeds: Sequence[int], point: int) -> list[Trial]:
        end, trials = point + 1, []
        for k, (seed, diverged_at) in enumerate(zip(seeds, curves.diverged_at([row], point)[0].tolist(), strict=True)):
            status = "infeasible" if diverged_at else "complete" if end == len(self._eval_steps) else "pruned"
            metrics = {name: curve[row, k, :end].tolist() for name, curve in curves.metrics.items()}
            steps, losses = self._eval_steps[:end].tolist(), curves.losses[row, k, :end].tolist()
            trials.append(Trial(*candidate, seed, status, steps, losses, metrics, diverged_at))
        return trials

    def _update_bar(self, runs: int, done: int, to: int | None = None) -> None:
        """Advance the bar by the steps of `runs` runs from one point to another, or to the end."""
        if self._bar is not None:
            ends = [0, *self._eval_steps.tolist()]
            self._bar.update(runs * (ends[-1 if to is None else to] - ends[done]))
