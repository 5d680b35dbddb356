"""The report of a tuning: the best setting, how certain it is, tables and plots."""

import dataclasses
import itertools
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np

from adamjax import optimizers
from adamjax._core.optional import require
from adamjax._core.typing import GradientTransformation
from adamjax.tuning import _journal, _plots
from adamjax.tuning._html import page
from adamjax.tuning._journal import CONFIRM, Json, TrialRecord
from adamjax.tuning._plots import PlotData
from adamjax.tuning._range_test import LrRange
from adamjax.tuning._space import OptimizerFactory, Setting

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONFIDENCE = 0.95
EDGE = 0.05  # fraction of the searched range
MANY_DIVERGED = 0.1  # fraction of the trials


@dataclasses.dataclass(frozen=True)
class Best:
    """The best setting, and the optimizer that it makes.

    Fields:
      arguments: Keyword arguments of the optimizer.
      call: Name of the function to call with them.
      make: That function; None if it is unknown, which happens in a report read from a folder.
    """

    arguments: Setting
    call: str
    make: OptimizerFactory | None = dataclasses.field(default=None, repr=False)

    @property
    def optimizer(self) -> GradientTransformation:
        """The optimizer.

        Raises:
          ValueError: The function that makes it is unknown.
        """
        if self.make is None:
            raise ValueError(f"the report was read from a folder: call {self.call} with the arguments yourself")
        return self.make(**self.arguments)

    def __str__(self) -> str:
        return f"{self.call}({', '.join(f'{name}={x!r}' for name, x in self.arguments.items())})"


@dataclasses.dataclass(frozen=True)
class Confirmed:
    """A setting that was run again with fresh seeds.

    Fields:
      number: Number of its trial.
      setting: Keyword arguments of the optimizer.
      values: The metric at the end, for each seed; NaN for a run that diverged.
      tied: Whether it is indistinguishable from the best by a paired t-test at 95 % confidence. If all values are
        positive, the test compares their logarithms, since the noise of a loss is in proportion to the loss.
    """

    number: int
    setting: Setting
    values: tuple[float, ...]
    tied: bool

    @property
    def mean(self) -> float:
        """The mean over the seeds."""
        return float(np.mean(self.values))

    @property
    def spread(self) -> float:
        """The standard deviation over the seeds; NaN for a single seed."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else math.nan

    def __str__(self) -> str:
        if not math.isfinite(self.mean):
            return "diverged"
        return f"{self.mean:.4g}" + (f" ± {self.spread:.2g}" if math.isfinite(self.spread) else "")


@dataclasses.dataclass(frozen=True, eq=False)
class Report:
    """The results of a tuning.

    Fields:
      question: The specification by name: problem, optimizer, space, steps and so on.
      trials: Every run that ended, including those with fresh seeds.
      defaults: The setting that the others are compared with.
      make: The function that makes an optimizer from a setting; None if it is unknown.
      range_test: The range test of the learning rate; None if there was none.
      explored: The smallest and the largest value searched of each argument.
      execution: How the runs were executed, in words.
      notes: Further remarks, which are part of `warnings`.
    """

    question: Json
    trials: Sequence[TrialRecord]
    defaults: Setting
    make: OptimizerFactory | None
    range_test: LrRange | None
    explored: Mapping[str, Sequence[float]]
    execution: str
    notes: Sequence[str] = ()

    @property
    def searched(self) -> list[TrialRecord]:
        """The trials of the search, in order."""
        return sorted((t for t in self.trials if t.stage != CONFIRM), key=lambda t: t.number)

    @property
    def ranking(self) -> list[TrialRecord]:
        """The complete trials of the search, best first."""
        complete = [t for t in self.searched if t.status == "complete"]
        return sorted(complete, key=lambda t: self._sign * t.value(self._metric))

    @cached_property
    def confirmed(self) -> list[Confirmed]:
        """The settings that were run again with fresh seeds, best first; those that diverged come last."""
        confirming = sorted((t for t in self.trials if t.stage == CONFIRM), key=lambda t: (t.number, t.seed))
        runs = {n: list(trials) for n, trials in itertools.groupby(confirming, key=lambda t: t.number)}
        # A tuning that was interrupted may have confirmed some settings with fewer seeds than others.
        seeds = max(map(len, runs.values()), default=0)
        values = {n: tuple(t.value(self._metric) for t in ts) for n, ts in runs.items() if len(ts) == seeds}
        means = {n: np.nan_to_num(self._sign * np.mean(x), nan=np.inf) for n, x in values.items()}
        order = sorted(means, key=means.__getitem__)
        tied = {n: n == order[0] or _indistinguishable(values[n], values[order[0]], self._sign) for n in order}
        return [Confirmed(n, runs[n][0].setting, values[n], tied[n]) for n in order]

    @property
    def best(self) -> Best:
        """The setting with the best mean among those confirmed; if none was, the best of the search.

        Raises:
          ValueError: Every trial diverged or failed, or none has ended yet.
        """
        confirmed = [c.setting for c in self.confirmed if math.isfinite(c.mean)]
        settings = confirmed or [t.setting for t in self.ranking]
        searched = self.searched
        if not settings and not searched:
            raise ValueError("no trial has ended yet")
        if not settings and (failed := self._failed):
            raise ValueError(f"all {len(searched)} trials failed, most often with: {_commonest_error(failed)}")
        if not settings:
            raise ValueError(
                f"all {len(self.searched)} trials diverged: lower the range of the learning rate, "
                "or look at the problem (adamjax lr-range shows which learning rates train)"
            )
        return Best(settings[0], self.question["optimizer"], self.make)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Reasons to doubt the results, and what to do about them."""
        warnings = list(self.notes)
        searched = self.searched
        diverged = sum(t.status == "infeasible" for t in searched) / max(len(searched), 1)
        if diverged >= MANY_DIVERGED:
            warnings.append(f"{diverged:.0%} of the trials diverged: the ranges are too wide, or training is unstable")
        if failed := self._failed:
            share = len(failed) / len(searched)
            warnings.append(f"{share:.0%} of the trials failed, most often with: {_commonest_error(failed)}")
        if not self.ranking:
            return (*warnings, f"{self._none_good}: there is no best setting")
        best = self.best.arguments
        for name, (low, high) in self.explored.items():
            fraction = _plots.make_axis(name, [low, high, best[name]]).fractions[2]
            # If the default value is the best, nothing suggests looking beyond the edge.
            if best[name] != self.defaults[name] and not EDGE <= fraction <= 1 - EDGE:
                ends = f"{low:.3g} to {high:.3g}"
                warnings.append(f"the best {name}, {best[name]:.3g}, lies on the edge of what was searched ({ends})")
        return (*warnings, *self._doubts(best))

    def _doubts(self, best: Setting) -> list[str]:
        """Return the reasons to doubt that the best setting is better than the defaults."""
        if not self.confirmed:
            tried = len(self.searched)
            return [f"the best was not confirmed with fresh seeds: it may be the luckiest of {tried} trials"]
        defaults = next((c for c in self.confirmed if c.setting == self.defaults), None)
        if best == self.defaults:
            return ["nothing that was tried is better than the defaults"]
        if defaults is not None and defaults.tied:
            seeds = len(defaults.values)
            return [f"the difference to the defaults is within noise ({seeds} seed{'s' * (seeds > 1)})"]
        return []

    def table(self) -> str:
        """Return a text table of the confirmed settings (if none were, the best of the search) and the defaults."""
        rows = [["", self._metric, "", *self.defaults]]
        results = [(c.setting, str(c), c.tied) for c in self.confirmed] or [
            (t.setting, f"{t.value(self._metric):.4g}", False) for t in self.ranking[:5]
        ]
        for rank, (setting, value, tied) in enumerate(results):
            name = "defaults" if setting == self.defaults else "tuned" if rank == 0 else ""
            cells = (f"{x:.4g}" if isinstance(x, float) else str(x) for x in setting.values())
            rows.append([name, value, "=" if tied and rank else "", *cells])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        if any(row[2] for row in rows):
            lines.append("= indistinguishable from the best")
        return "\n".join(lines)

    def to_json(self) -> str:
        """Return the whole report as JSON; numbers that are not finite are null."""
        best = _journal.json_setting(self.best.arguments) if self.ranking else None
        confirmed: list[Json] = []
        for c in self.confirmed:
            (mean, spread), values = _journal.nan_to_null((c.mean, c.spread)), _journal.nan_to_null(c.values)
            facts = {"mean": mean, "spread": spread, "values": values, "indistinguishable": c.tied}
            confirmed.append({"setting": _journal.json_setting(c.setting)} | facts)
        # A folder has them in the order in which they ended.
        in_order = sorted(self.trials, key=lambda t: (t.stage == CONFIRM, t.number, t.seed))
        content = {
            "question": self.question,
            "best": best,
            "call": str(self.best) if self.ranking else None,
            "defaults": _journal.json_setting(self.defaults),
            "confirmed": confirmed,
            "warnings": self.warnings,
            "range_test": self.range_test and self.range_test.suggestions,
            "execution": self.execution,
            "trials": [_journal.json_trial(t) for t in in_order],
        }
        return json.dumps(content, indent=2, allow_nan=False)

    def figures(self) -> dict[str, "Figure"]:
        """Return the plots that the trials suffice for, as matplotlib figures, by name.

        Raises:
          ImportError: matplotlib, or scikit-learn, is not installed.
        """
        figures = {name: plot(self._plot_data) for name, plot in _plots.FIGURES.items()} if self.searched else {}
        if self.range_test is not None:
            figures["range_test"] = self.range_test.plot()
        return {name: figure for name, figure in figures.items() if figure is not None}

    def save(self, directory: str | Path) -> None:
        """Write `tune.json`, `trials.jsonl`, `report.json`, the plots and `report.html`, which contains them.

        Trials that the folder holds already are left as they are. All processes must call this; the first one writes.

        Raises:
          ValueError, FileExistsError: The folder holds another tuning.
          ImportError: matplotlib, or scikit-learn, is not installed.
        """
        path = Path(directory)
        figures = self.figures() if jax.process_index() == 0 else {}
        journal = _journal.Journal(path, self.question, resume=True)
        journal.decide(
            defaults=_journal.json_setting(self.defaults),
            range_test=self.range_test and self.range_test.to_json(),
            explored={name: list(x) for name, x in self.explored.items()},
            execution=self.execution,
            notes=list(self.notes),
        )
        journal.write(self.trials)
        if jax.process_index() > 0:
            return
        for name, figure in figures.items():
            figure.savefig(path / f"{name}.png", dpi=120)
        pictures = {name: (path / f"{name}.png").read_bytes() for name in figures}
        (path / "report.json").write_text(self.to_json() + "\n")
        best = str(self.best) if self.ranking else self._none_good
        question = self.question | {"execution": self.execution}
        (path / "report.html").write_text(page(best, self.table(), self.warnings, pictures, question), encoding="utf-8")

    @classmethod
    def load(cls, directory: str | Path) -> "Report":
        """Return the report of a folder that a tuning wrote, or is still writing.

        Arguments other than numbers, strings, bools and None are read as the text that they print as.

        Raises:
          ValueError: The folder holds no tuning, or is damaged.
        """
        path = Path(directory)
        decisions, lines = _journal.read_files(path)
        if not decisions:
            raise ValueError(f"{path} holds no tuning: it has no tune.json")
        content = _journal.parse_decisions(decisions, path)
        question, curve = content["question"], content.get("range_test")
        package, _, name = question["optimizer"].rpartition(".")
        make = getattr(optimizers, name, None) if package == "adamjax" else None
        trials, defaults = _journal.parse_trials(lines, path), content.get("defaults", {})
        range_test, explored = curve and LrRange.from_json(curve), content.get("explored", {})
        execution, notes = content.get("execution", ""), content["notes"]
        return cls(question, trials, defaults, make, range_test, explored, execution, notes)

    def __repr__(self) -> str:
        best = f"; best {self.best}" if self.ranking else ""
        return f"Report({len(self.searched)} trials of {self.question['problem']}{best})"

    @property
    def _failed(self) -> list[TrialRecord]:
        return [t for t in self.searched if t.status == "failed"]

    @property
    def _none_good(self) -> str:
        """The reason why there is no best setting."""
        if not self.searched:
            return "no trial has ended yet"
        return "every trial failed" if self._failed else "every trial diverged"

    @property
    def _metric(self) -> str:
        return str(self.question["metric"])

    @property
    def _sign(self) -> int:
        return 1 if self.question["mode"] == "min" else -1

    @cached_property
    def _plot_data(self) -> PlotData:
        searched = self.searched
        best = self.best.arguments if self.ranking else None
        marked = [next((t for t in searched if t.setting == setting), None) for setting in (best, self.defaults)]
        return PlotData(searched, self._metric, self.question["mode"], *marked)


def _commonest_error(failed: Sequence[TrialRecord]) -> str:
    return Counter(t.error for t in failed).most_common(1)[0][0]


def _indistinguishable(values: Sequence[float], best: Sequence[float], sign: int) -> bool:
    """Return whether a paired t-test cannot tell values from the best."""
    x, y = np.asarray(values), np.asarray(best)
    if not np.isfinite(x).all() or len(x) < 2:
        return bool(np.isfinite(x).all())
    if min(*x, *y) > 0:
        x, y = np.log(x), np.log(y)
    differences = sign * (x - y)
    stats = require("scipy.stats", "tune", "telling a difference from noise")
    bound = stats.t.ppf((1 + CONFIDENCE) / 2, len(x) - 1) * np.std(differences, ddof=1) / math.sqrt(len(x))
    return bool(np.mean(differences) <= bound)
