"""A trial while it runs: what an objective is given, and what it reports."""

import bisect
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from adamjax._core import checks
from adamjax._transforms.base import Transformation
from adamjax.tuning._journal import Candidate, TrialRecord
from adamjax.tuning._space import Setting
from adamjax.tuning._traceable import traceable

MIN_CURVES = 4  # that a median is taken of
FIRST_PRUNED = 0.25  # fraction of a run, before which no trial is pruned
PRUNED = "pruned"
MAX_UNDEFINED = 4  # first reports that are not finite, after which a range test gives a trial up

Value = Any  # a number, or a mapping of numbers by the names of metrics


class Pruned(Exception):  # noqa: N818
    """Raised by `Trial.report` where it is not worth going on with a trial.

    Let it pass through the objective; a loop of one's own catches it, and tells the search "pruned".
    """


class Medians(NamedTuple):
    """The medians of the curves of other trials; a trial that is worse is not worth going on with."""

    steps: tuple[int, ...] = ()
    values: tuple[float, ...] = ()
    first: float = 0.0  # the first step at which a trial may end

    @classmethod
    def of(cls, records: Iterable[TrialRecord], metric: str) -> "Medians":
        """Return the medians at each step that at least `MIN_CURVES` of the trials got to."""
        reported = [(r, np.asarray(r.curve(metric))) for r in records if r.steps and r.curve(metric)]
        complete = [r.steps[-1] for r, _ in reported if r.status == "complete"]
        steps = np.unique([step for r, _ in reported for step in r.steps])
        rows = np.full((len(reported), len(steps)), np.nan)
        for row, (r, curve) in zip(rows, reported, strict=True):
            # A trial that did not report at this very step has the value that it reported last.
            last = np.searchsorted(r.steps, steps, side="right") - 1
            known = (last >= 0) & (steps <= r.steps[-1]) & np.isfinite(curve[last])
            row[:] = np.where(known, curve[last], np.nan)
        enough = np.isfinite(rows).sum(axis=0) >= MIN_CURVES
        values = np.nanmedian(rows[:, enough], axis=0) if enough.any() else np.zeros(0)
        first = FIRST_PRUNED * max(complete, default=0) or math.inf
        return cls(tuple(steps[enough].tolist()), tuple(values.tolist()), first)

    def at(self, step: int) -> float:
        """Return the median at a step; NaN if the trials do not suffice for one."""
        i = bisect.bisect_right(self.steps, step) - 1
        return self.values[i] if i >= 0 and self.first <= step <= self.steps[-1] else math.nan


NO_MEDIANS = Medians()


class Trial:
    """A trial that is to be run: `tune` passes it to an objective, and `Search.ask` returns it.

    It can be pickled, and decides whether to go on by results that were known when it was made: no process has to be
    asked.

    Fields:
      number: Number of the setting, in the order in which settings are tried; 0 for the defaults, -1 in a range test.
      seed: The seed to draw everything random of the run from: parameters, the order of the data, dropout.
      stage: Name of the stage it belongs to.
      arguments: Keyword arguments of the optimizer.
      budget: The `steps` that the search was given; None if there were none.
      optimizer: The optimizer to train with. Those of all trials that differ in numbers alone have one structure: a
        jitted function that takes the optimizer as an argument compiles once for them. Where Flax NNX or Equinox is in
        use, its numbers are arrays, so that an `nnx.Optimizer` around it and `eqx.filter_jit` compile once as well.
      metric, mode: The metric that settings are judged by, and whether its "min" or its "max" is best.
    """

    def __init__(
        self,
        candidate: Candidate,
        optimizer: Transformation,
        *,
        budget: int | None = None,
        metric: str = "loss",
        mode: str = "min",
        medians: Medians = NO_MEDIANS,
        first_only: bool = False,
        search: str = "",
    ) -> None:
        self.number: int = candidate.number
        self.stage: str = candidate.stage
        self.seed: int = candidate.seed
        self.arguments: Setting = dict(candidate.setting)
        self.budget: int | None = budget
        self.metric: str = metric
        self.mode: str = mode
        self._optimizer, self._medians, self._first_only = optimizer, medians, first_only
        self._search = search  # the digest of its question
        self._error = ""  # why it failed, if it did
        self._steps: list[int] = []
        self._reports: list[dict[str, float]] = []

    @property
    def optimizer(self) -> Transformation:
        """The optimizer to train with."""
        return traceable(self._optimizer)

    def report(self, step: int, value: Value) -> None:
        """Report a value in the course of training.

        The trial is pruned if it is worse than the median of the others at that step. At least four other trials
        of the search must have got to this step, which must be at least a quarter of the last step of the longest
        complete trial. The defaults, the trials that confirm and those of a search without halving are never pruned.
        A metric that is NaN or infinite is not judged, for it may be defined later; but the trial fails if that happens
        twice in a row where a median is known.

        Args:
          step: The number of the update or of the epoch, above that of the report before.
          value: The metric, a number; or a dict of metrics, the one that settings are judged by among them.

        Raises:
          Pruned: It is not worth going on.
          ValueError: `step` does not rise, or the metric is missing.
          TypeError: `step` is not an int, or a value is not a number.
        """
        step = checks.count("step", step, 0)
        if self._steps and step <= self._steps[-1]:
            last = self._steps[-1]
            raise ValueError(f"Invalid step value: {step}; step must be above that of the last report, {last}")
        metrics = as_metrics(value, self.metric, "the report")
        self._steps.append(step)
        self._reports.append(metrics)
        x = metrics[self.metric]
        if self._first_only and (math.isfinite(x) or len(self._reports) == MAX_UNDEFINED):
            raise Pruned("a range test needs the first report only")
        median = self._medians.at(step)
        if not math.isfinite(x):
            again = len(self._reports) > 1 and not math.isfinite(self._reports[-2][self.metric])
            if again and math.isfinite(median):
                self._error = f"{not_finite(x)} at step {step}"
                raise Pruned(self._error)
            return
        if (x > median) if self.mode == "min" else (x < median):
            raise Pruned(f"{self.metric} {x:.4g} at step {step} is worse than the median of the others, {median:.4g}")

    def first_report(self) -> float:
        """Return the first finite value that was reported; NaN if there is none."""
        values = (report[self.metric] for report in self._reports)
        return next(filter(math.isfinite, values), math.nan)

    def record(self, value: Value, error: str = "") -> TrialRecord:
        """Return the record of the trial.

        Args:
          value: The final value, a number or a dict of metrics; None for a trial that failed; or "pruned".
          error: The reason why it failed.
        """
        final: Mapping[str, float] = {}
        if isinstance(value, str) and value == PRUNED:
            status = PRUNED
        elif value is None:
            status, error = "failed", error or "no value"
        else:
            final, status = as_metrics(value, self.metric, "the value"), "complete"
            if not math.isfinite(final[self.metric]):
                status, error = "failed", not_finite(final[self.metric])
        if self._error:
            status, error = "failed", self._error
        names = dict.fromkeys([*(name for report in self._reports for name in report), *final])
        metrics = {name: [report.get(name, math.nan) for report in self._reports] for name in names}
        for name, x in final.items():
            if not metrics[name] or metrics[name][-1] != x:
                metrics[name].append(x)
        setting, steps = self.arguments, list(self._steps)
        error = error if status == "failed" else ""
        return TrialRecord(self.number, self.stage, setting, self.seed, status, steps, [], metrics, 0, error)

    def __repr__(self) -> str:
        return f"Trial({self.number}, {self.stage!r}, seed {self.seed}, {self.arguments})"


def as_metrics(value: Value, metric: str, who: str) -> dict[str, float]:
    """Return a number, or a mapping of numbers that has `metric`, as a dict of floats."""
    if not isinstance(value, Mapping):
        return {metric: _as_number(metric, value, who)}
    if metric not in value:
        raise ValueError(f"{who} has {', '.join(map(str, value)) or 'no metrics'}, but not {metric!r}: add it")
    return {str(name): _as_number(name, x, who) for name, x in value.items()}


def not_finite(x: float) -> str:
    return f"the metric is {'NaN' if math.isnan(x) else x}"


def _as_number(name: str, x: Any, who: str) -> float:
    if not isinstance(x, (str, bytes)) and np.shape(x) == ():
        try:
            return float(x)
        except (TypeError, ValueError):
            pass
    raise TypeError(f"{who} has {x!r} for {name!r}, expected a number, or a dict of numbers by name")
