"""What a tuning found: the best setting, how sure that is, and how it looks."""

import dataclasses
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np

from adamjax import optimizers
from adamjax._core.optional import require
from adamjax.tuning import _plots, _trial
from adamjax.tuning._page import page
from adamjax.tuning._plots import Pictured
from adamjax.tuning._range_test import LrRange
from adamjax.tuning._space import Setting
from adamjax.tuning._trial import CONFIRM, Trial

CERTAINTY = 0.95
EDGE = 0.05  # of what was searched
MANY = 0.1  # diverged trials, of all


@dataclasses.dataclass(frozen=True)
class Best:
    """A setting, and the optimizer it makes.

    Fields:
      arguments: Keyword arguments of the optimizer.
      call: What is to be called with them, by its name.
      make: The same; None where it is not known (of a report read from a folder).
    """

    arguments: Setting
    call: str
    make: Callable[..., Any] | None = dataclasses.field(default=None, repr=False)

    @property
    def optimizer(self) -> Any:
        """The optimizer.

        Raises:
          ValueError: It is not known how to make it.
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
      number: Which trial it was.
      setting: Keyword arguments of the optimizer.
      values: The metric at the end, for each seed; NaN where it diverged.
      tied: Whether it is indistinguishable from the best: the difference, seed by seed, is within
        what Student's t allows of noise at 95 % certainty. Where all values are positive it is that
        of the logarithms, since the noise of a loss shrinks with it.
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
        """The standard deviation over the seeds; NaN of one seed."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else math.nan

    def __str__(self) -> str:
        if not math.isfinite(self.mean):
            return "diverged"
        return f"{self.mean:.4g}" + (f" ± {self.spread:.2g}" if math.isfinite(self.spread) else "")


@dataclasses.dataclass(frozen=True, eq=False)
class Report:
    """What a tuning found.

    Fields:
      question: What was tuned: problem, optimizer, space, steps and so on, by name.
      trials: Every run that ended, those that confirm included.
      defaults: The setting that the others are compared with.
      make: What makes an optimizer of a setting; None where it is not known.
      range_test: The range test of the learning rate; None where there was none.
      explored: The smallest and the largest value of each argument that was searched.
      execution: How the runs were executed, in words.
      notes: What else is to be said.
    """

    question: dict[str, Any]
    trials: Sequence[Trial]
    defaults: Setting
    make: Callable[..., Any] | None
    range_test: LrRange | None
    explored: Mapping[str, Sequence[float]]
    execution: str
    notes: Sequence[str] = ()

    @property
    def searched(self) -> list[Trial]:
        """The trials of the search, in order."""
        return sorted((t for t in self.trials if t.stage != CONFIRM), key=lambda t: t.number)

    @property
    def ranking(self) -> list[Trial]:
        """The complete trials of the search, best first."""
        complete = [t for t in self.searched if t.status == "complete"]
        return sorted(complete, key=lambda t: self._sign * t.value(self._metric))

    @cached_property
    def confirmed(self) -> list[Confirmed]:
        """What was run again with fresh seeds, best first; those that diverged come last."""
        runs: dict[int, list[Trial]] = {}
        for trial in sorted((t for t in self.trials if t.stage == CONFIRM), key=lambda t: (t.number, t.seed)):
            runs.setdefault(trial.number, []).append(trial)
        # A tuning that was stopped may have confirmed some settings with fewer seeds than others.
        seeds = max(map(len, runs.values()), default=0)
        values = {n: tuple(t.value(self._metric) for t in ts) for n, ts in runs.items() if len(ts) == seeds}
        means = {n: np.nan_to_num(self._sign * np.mean(x), nan=np.inf) for n, x in values.items()}
        order = sorted(means, key=lambda n: means[n])
        tied = {n: n == order[0] or _indistinguishable(values[n], values[order[0]], self._sign) for n in order}
        return [Confirmed(n, runs[n][0].setting, values[n], tied[n]) for n in order]

    @property
    def best(self) -> Best:
        """The best setting: of those confirmed the best on average; else of the search.

        Raises:
          ValueError: Every trial diverged.
        """
        confirmed = [c.setting for c in self.confirmed if math.isfinite(c.mean)]
        found = confirmed or [t.setting for t in self.ranking]
        if not found:
            raise ValueError(
                f"all {len(self.searched)} trials diverged: lower the range of the learning rate, "
                "or look at the problem (adamjax lr-range shows where it trains)"
            )
        return Best(found[0], self.question["optimizer"], self.make)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What to be careful with."""
        found = list(self.notes)
        searched = self.searched
        diverged = sum(t.status == "infeasible" for t in searched) / max(len(searched), 1)
        if diverged >= MANY:
            found.append(f"{diverged:.0%} of the trials diverged: the ranges reach too far, or the problem is fragile")
        if not self.ranking:
            return (*found, "every trial diverged: there is no best setting")
        best = self.best.arguments
        for name, (low, high) in self.explored.items():
            place = _plots.axis_of(name, [low, high, best[name]]).fractions[2]
            # Where the default itself is best there is nothing that points beyond.
            if best[name] != self.defaults[name] and not EDGE <= place <= 1 - EDGE:
                ends = f"{low:.3g} to {high:.3g}"
                found.append(f"the best {name}, {best[name]:.3g}, lies on the edge of what was searched ({ends})")
        return (*found, *self._doubts(best))

    def _doubts(self, best: Setting) -> list[str]:
        """Whether the best is better than the defaults."""
        if not self.confirmed:
            return [
                f"the best was not confirmed with fresh seeds: it may be the luckiest of {len(self.searched)} trials"
            ]
        defaults = next((c for c in self.confirmed if c.setting == self.defaults), None)
        if best == self.defaults:
            return ["nothing that was tried is better than the defaults"]
        if defaults is not None and defaults.tied:
            seeds = len(defaults.values)
            return [f"the difference to the defaults is within noise ({seeds} seed{'s' * (seeds > 1)})"]
        return []

    def table(self) -> str:
        """The settings confirmed (else the best of the search) beside the defaults, as text."""
        rows = [["", self._metric, "", *self.defaults]]
        found = [(c.setting, str(c), c.tied) for c in self.confirmed] or [
            (t.setting, f"{t.value(self._metric):.4g}", False) for t in self.ranking[:5]
        ]
        for place, (setting, value, tied) in enumerate(found):
            name = "defaults" if setting == self.defaults else "tuned" if place == 0 else ""
            shown = (f"{x:.4g}" if isinstance(x, float) else str(x) for x in setting.values())
            rows.append([name, value, "=" if tied and place else "", *shown])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        if any(row[2] for row in rows):
            lines.append("= indistinguishable from the best")
        return "\n".join(lines)

    def to_json(self) -> str:
        """All of it, as JSON; what is not finite is null."""
        best = _trial.plain(self.best.arguments) if self.ranking else None
        confirmed = [
            {"setting": _trial.plain(c.setting)}
            | dict(zip(("mean", "spread"), _trial.nulls((c.mean, c.spread)), strict=True))
            | {"values": _trial.nulls(c.values), "indistinguishable": c.tied}
            for c in self.confirmed
        ]
        content = {
            "question": self.question,
            "best": best,
            "call": str(self.best) if self.ranking else None,
            "defaults": _trial.plain(self.defaults),
            "confirmed": confirmed,
            "warnings": self.warnings,
            "range_test": self.range_test and self.range_test.suggestions,
            "execution": self.execution,
            "trials": [_trial.to_json(t) for t in self.trials],
        }
        return json.dumps(content, indent=2, allow_nan=False)

    def figures(self) -> dict[str, Any]:
        """The pictures that there is something to draw for, as matplotlib figures, by title.

        Raises:
          ImportError: matplotlib, or scikit-learn, is not installed.
        """
        found = {name: draw(self._pictured) for name, draw in _plots.FIGURES.items()} if self.searched else {}
        if self.range_test is not None:
            found["range_test"] = self.range_test.plot()
        return {name: figure for name, figure in found.items() if figure is not None}

    def save(self, directory: str | Path) -> None:
        """Write `tune.json`, `trials.jsonl`, `report.json`, the pictures and `report.html`, which contains them.

        Trials that the folder has already are left as they are. Of several processes, all must call
        this, and the first one writes.

        Raises:
          ValueError, FileExistsError: The folder holds another tuning.
          ImportError: matplotlib, or scikit-learn, is not installed.
        """
        path = Path(directory)
        figures = self.figures() if jax.process_index() == 0 else {}
        journal = _trial.Journal(path, self.question, resume=True)
        curve = self.range_test and self.range_test.to_json()
        defaults, explored = _trial.plain(self.defaults), {name: list(x) for name, x in self.explored.items()}
        journal.decide(
            defaults=defaults, range_test=curve, explored=explored, execution=self.execution, notes=list(self.notes)
        )
        journal.write(self.trials)
        if jax.process_index() > 0:
            return
        pictures = {}
        for name, figure in figures.items():
            buffer = io.BytesIO()
            figure.savefig(buffer, dpi=120, format="png")
            pictures[name] = buffer.getvalue()
            (path / f"{name}.png").write_bytes(pictures[name])
        (path / "report.json").write_text(self.to_json() + "\n")
        best = str(self.best) if self.ranking else "every trial diverged"
        asked = self.question | {"execution": self.execution}
        (path / "report.html").write_text(page(best, self.table(), self.warnings, pictures, asked), encoding="utf-8")

    @classmethod
    def load(cls, directory: str | Path) -> "Report":
        """The report of a folder that a tuning wrote, or is still writing.

        Arguments that are no numbers, strings, bools or None are read as the text they print as.

        Raises:
          ValueError: The folder holds none, or is damaged.
        """
        path = Path(directory)
        found, lines = _trial.read(path)
        if not found:
            raise ValueError(f"{path} holds no tuning: it has no tune.json")
        content = _trial.decided(found, path)
        curve = content.get("range_test")
        name = content["question"]["optimizer"]
        return cls(
            content["question"],
            _trial.parse(lines, path),
            content.get("defaults", {}),
            getattr(optimizers, name.removeprefix("adamjax."), None) if name.startswith("adamjax.") else None,
            curve and LrRange.from_json(curve),
            content.get("explored", {}),
            content.get("execution", ""),
            content["notes"],
        )

    def __repr__(self) -> str:
        best = f"; best {self.best}" if self.ranking else ""
        return f"Report({len(self.searched)} trials of {self.question['problem']}{best})"

    @property
    def _metric(self) -> str:
        return str(self.question["metric"])

    @property
    def _sign(self) -> int:
        return 1 if self.question["mode"] == "min" else -1

    @cached_property
    def _pictured(self) -> Pictured:
        searched = self.searched
        best = self.best.arguments if self.ranking else None
        marked = [next((t for t in searched if t.setting == setting), None) for setting in (best, self.defaults)]
        return Pictured(searched, self._metric, self.question["mode"], *marked)


def _indistinguishable(values: Sequence[float], best: Sequence[float], sign: int) -> bool:
    """Whether values may differ from the best by noise alone: a paired t-test."""
    x, y = np.asarray(values), np.asarray(best)
    if not np.isfinite(x).all() or len(x) < 2:
        return bool(np.isfinite(x).all())
    if min(*x, *y) > 0:
        x, y = np.log(x), np.log(y)
    differences = sign * (x - y)
    stats = require("scipy.stats", "tune", "telling a difference from noise")
    bound = stats.t.ppf((1 + CERTAINTY) / 2, len(x) - 1) * np.std(differences, ddof=1) / math.sqrt(len(x))
    return bool(np.mean(differences) <= bound)
