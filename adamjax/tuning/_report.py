"""The report of a tuning: the best setting, how certain it is, tables and plots."""

import dataclasses
import inspect
import json
import math
import os
import platform
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jaxlib
import numpy as np

from adamjax import optimizers
from adamjax._core import checks, files
from adamjax._core.figures import png, styled
from adamjax._core.files import DamagedFileError
from adamjax._core.optional import require
from adamjax._core.typing import GradientTransformation
from adamjax._core.version import __version__
from adamjax._transforms.schedule import Schedule
from adamjax.tuning import _journal, _plots
from adamjax.tuning._confirmed import Confirmed
from adamjax.tuning._courses import Scheduled, course_schedule, is_scheduled
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
DATE, WALL_TIME = "date", "wall time"  # names of facts that differ between runs of one tuning
HORIZON = (
    "Tuned for {steps} steps: report.best.for_steps(n) stretches the schedule to n steps. "
    "For much longer runs, try half the peak, too."
)
ENDS = {"pruned": "ended early", "complete": "complete"}


@dataclasses.dataclass(frozen=True)
class Best:
    """The best setting, and the optimizer that it makes.

    Fields:
      arguments: Keyword arguments of the optimizer. If the learning rate has a schedule, `learning_rate` is its peak,
        `warmup_fraction` the fraction of the steps that it rises, and `end_fraction` its end as a fraction of the peak.
      call: Name of the function that makes the optimizer.
      make: The function to call with the arguments; None if it is unknown, as can be in a report read from a folder.
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

    def for_steps(self, steps: int) -> "Best":
        """Return the setting for runs of another number of steps: the schedule stretches, its fractions stay.

        The peak does not carry over as well: for 4 times as many steps, half of it was better on most problems that
        were measured, and twice as much was far worse (the guide to tuning has the figures).

        Args:
          steps: Number of updates.

        Raises:
          ValueError: `steps` is not positive, or the learning rate has no schedule, so there is nothing to stretch.
        """
        if not isinstance(self.make, Scheduled):
            raise ValueError(f"{self.call} has a constant learning rate: it trains for any number of steps as it is")
        return dataclasses.replace(self, make=dataclasses.replace(self.make, steps=checks.count("steps", steps)))

    def __str__(self) -> str:
        arguments = self.make.arguments(self.arguments) if isinstance(self.make, Scheduled) else self.arguments
        shown = {
            name: f"adamjax.schedules.{x!r}" if isinstance(x, Schedule) else repr(x) for name, x in arguments.items()
        }
        return f"{self.call}({', '.join(f'{name}={x}' for name, x in shown.items())})"


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
      facts: The versions, the device, the date and the wall time, by name.
      stopped: How far the tuning came, if it was stopped; part of `warnings`, and not saved.
    """

    question: Json
    trials: Sequence[TrialRecord]
    defaults: Setting
    make: OptimizerFactory | None
    range_test: LrRange | None
    explored: Mapping[str, Sequence[float]]
    execution: str
    notes: Sequence[str] = ()
    facts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    stopped: str = ""

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
        """The settings that were run again with fresh seeds, best first.

        The finalists come first, by their means over the seeds that all of them have. Then come those that were
        eliminated: the more seeds, the earlier. Those that diverged come last.
        """
        runs = defaultdict[int, dict[int, float]](dict)  # by number and seed
        settings = dict[int, Setting]()
        for t in sorted((t for t in self.trials if t.stage == CONFIRM), key=lambda t: (t.number, t.seed)):
            runs[t.number][t.seed] = t.value(self._metric)
            settings[t.number] = t.setting
        trials = self.question["trials"]
        others = [n for n, setting in settings.items() if setting != self.defaults and n < trials]
        if not others and len(self.ranking) > 1:
            return []  # the confirmation has just begun, and the defaults alone decide nothing
        final = self._final_seeds({n: len(runs[n]) for n in settings if n < trials}, others)
        finalists = [n for n in settings if len(runs[n]) >= final]
        shared = set[int].intersection(*(set(runs[n]) for n in finalists)) if finalists else set()

        def rank(n: int) -> tuple[bool, int, float]:
            seeds = shared if n in finalists else runs[n]
            mean = self._sign * float(np.mean([runs[n][seed] for seed in seeds]))
            return not math.isfinite(mean), -min(len(runs[n]), final), mean

        order = sorted(settings, key=rank)
        best = runs[order[0]] if order else {}
        return [
            Confirmed(
                number=n,
                name=self._name_of(n, settings[n]),
                setting=settings[n],
                seeds=tuple(runs[n]),
                values=tuple(runs[n].values()),
                finalist=n in finalists,
                tied=n == order[0] or _indistinguishable(runs[n], best, self._sign),
            )
            for n in order
        ]

    def _final_seeds(self, counts: Mapping[int, int], others: Sequence[int]) -> int:
        """Return how many seeds a finalist has at least: those of the last round of the race that has ended.

        Args:
          counts: The number of seeds that each setting of the search has.
          others: Those other than the defaults, which do not compete: they have all seeds.
        """
        confirm = self.question.get("confirm") or []
        rounds = [confirm] if confirm and isinstance(confirm[0], int) else confirm
        ended = [n for size, n in rounds if sum(c >= n for c in counts.values()) >= min(size, len(counts))]
        return max(ended, default=max((counts[n] for n in others or counts), default=0))

    @property
    def best(self) -> Best:
        """The finalist with the best mean over fresh seeds; if no setting was confirmed, the best of the search.

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
    def horizon(self) -> str:
        """A sentence that says how to train for another number of steps; empty if the learning rate has no schedule."""
        if self.question.get("schedule", "constant") == "constant" or not self.ranking:
            return ""
        return HORIZON.format(steps=self.question["steps"])

    @property
    def warnings(self) -> tuple[str, ...]:
        """Reasons to doubt the results, and what to do about them."""
        warnings = [*filter(None, [self.stopped]), *self.notes, *(self.range_test.warnings if self.range_test else ())]
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
            if not isinstance(best.get(name), (int, float)):
                continue
            fraction = _plots.make_axis(name, [low, high, best[name]]).fractions[2]
            # If the default value is the best, nothing suggests looking beyond the edge.
            is_low, is_high = fraction < EDGE and low != 0, fraction > 1 - EDGE  # nothing lies below 0
            if best[name] != self.defaults.get(name) and (is_low or is_high):
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
            seeds = len(set(defaults.seeds) & set(self.confirmed[0].seeds))
            return [f"the difference to the defaults is within noise ({seeds} seed{'s' * (seeds > 1)})"]
        return []

    @property
    def verdict(self) -> str:
        """One or two sentences: why the best is the best, and which settings are indistinguishable from it.

        Settings are named by the numbers of their trials.
        """
        if not self.ranking:
            return f"There is no best setting: {self._none_good}."
        superlative = f"has the {'lowest' if self._sign > 0 else 'highest'}"
        finalists = [c for c in self.confirmed if c.finalist]
        if not finalists or not math.isfinite(finalists[0].mean):
            found = self.ranking[0]
            value = f"{found.value(self._metric):.4g} with the one seed of the search"
            name, tried = self._name_of(found.number, found.setting), _counted(len(self.searched), "trial")
            return _sentence(
                f"{_in_words(name)} {superlative} {self._metric} of {tried}, {value}; no fresh seed confirms it."
            )
        best, *rivals = self.confirmed
        others = sum(c.setting != self.defaults for c in finalists)
        against = [f"{c} for the defaults" for c in rivals if c.setting == self.defaults]
        constant = self.constant
        if constant is not None and constant in rivals and constant.setting != self.defaults:
            against.append(f"{constant} at a constant learning rate")
        compared = f", against {' and '.join(against)}" if against else ""
        reason = _sentence(
            f"{_in_words(best.name)} {superlative} mean {self._metric} of "
            f"{_counted(others, 'finalist')}, {best} over {_counted(len(best.values), 'fresh seed')}{compared}."
        )
        tied = [_in_words(c.name) for c in rivals if c.finalist and c.tied]
        names = " and ".join([", ".join(tied[:-1]), tied[-1]] if tied[1:] else tied) or "no other finalist"
        gone = len(self.confirmed) - len(finalists)
        left = f"; {_counted(gone, 'setting')} left the race earlier" if gone else ""
        verb = "are" if tied[1:] else "is"
        test = f"{verb} indistinguishable from it (paired t-test, {CONFIDENCE:.0%} confidence)"
        return f"{reason} {_sentence(names)} {test}{left}."

    def _name_of(self, number: int, setting: Setting) -> str:
        if number >= self.question["trials"]:
            return f"constant rate {setting['learning_rate']:.2g}"
        return "defaults" if setting == self.defaults else f"trial {number}"

    @property
    def constant(self) -> Confirmed | None:
        """The best of the confirmed settings whose learning rate is constant; None if there are none.

        Where rates are scheduled, it says what the schedule is worth.
        """
        return next((c for c in self.confirmed if not is_scheduled(c.setting) and math.isfinite(c.mean)), None)

    def _result_rows(self) -> list[list[str]]:
        """Return the table of the confirmed settings (if none were, the best of the search), with its head."""
        results = [(c.name, c.number, c.setting, self._shown(c), c.finalist and c.tied) for c in self.confirmed] or [
            (self._name_of(t.number, t.setting), t.number, t.setting, f"{t.value(self._metric):.4g}", False)
            for t in self.ranking[:5]
        ]
        names = dict.fromkeys([*self.defaults, *(name for _, _, setting, *_ in results for name in setting)])
        rows = [["", "trial", self._metric, "", *names]]
        for rank, (name, number, setting, value, tied) in enumerate(results):
            shown = "tuned" if rank == 0 and name != "defaults" else "" if name.startswith("trial") else name
            rows.append([shown, str(number), value, "=" if tied and rank else "", *_cells(setting, names)])
        return rows

    def _shown(self, c: Confirmed) -> str:
        return str(c) if c.finalist else f"{c} ({_counted(len(c.values), 'seed')})"

    def _run_rows(self) -> list[list[str]]:
        """Return the table of all runs, with its head."""
        names = dict.fromkeys(name for t in self.trials for name in t.setting)
        rows = [["trial", "stage", "seed", *names, self._metric, "status"]]
        for t in self._in_order:
            status = f"diverged at step {t.diverged_at}" if t.status == "infeasible" else f"failed: {t.error}"
            value, status = t.value(self._metric), ENDS.get(t.status, status)
            shown = f"{value:.4g}" if math.isfinite(value) else ""
            rows.append([str(t.number), t.stage, str(t.seed), *_cells(t.setting, names), shown, status])
        return rows

    def table(self) -> str:
        """Return a text table of the confirmed settings (if none were, the best of the search) and the defaults."""
        rows = [row[:1] + row[2:] for row in self._result_rows()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        if any(row[2] for row in rows):
            lines.append("= indistinguishable from the best")
        return "\n".join(lines)

    def to_json(self) -> str:
        """Return the whole report as JSON, without date and wall time; numbers that are not finite are null."""
        best = _journal.json_setting(self.best.arguments) if self.ranking else None
        confirmed: list[Json] = []
        for c in self.confirmed:
            (mean, spread), values = _journal.nan_to_null((c.mean, c.spread)), _journal.nan_to_null(c.values)
            found = {"mean": mean, "spread": spread, "values": values, "seeds": list(c.seeds)}
            judged = {"finalist": c.finalist, "indistinguishable": c.tied}
            confirmed.append({"setting": _journal.json_setting(c.setting)} | found | judged)
        content = {
            "question": self.question,
            "best": best,
            "call": str(self.best) if self.ranking else None,
            "defaults": _journal.json_setting(self.defaults),
            "confirmed": confirmed,
            "warnings": self.warnings,
            "range_test": self.range_test and self.range_test.suggestions,
            "execution": self.execution,
            "facts": {name: x for name, x in self.facts.items() if name not in (DATE, WALL_TIME)},
            "trials": [_journal.json_trial(t) for t in self._in_order],
        }
        return json.dumps(content, indent=2, allow_nan=False)

    @styled("tune", "plotting a tuning")
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
          ValueError, FileExistsError: The folder holds another tuning, or is not a folder.
          DamagedFileError: The folder holds a damaged one.
          FolderInUseError: The folder lacks some of the trials, and another process writes to it.
          ImportError: matplotlib, or scikit-learn, is not installed.
        """
        path = Path(directory)
        figures = self.figures() if jax.process_index() == 0 else {}
        decisions = {
            "defaults": _journal.json_setting(self.defaults),
            "range_test": self.range_test and self.range_test.to_json(),
            "explored": {name: list(x) for name, x in self.explored.items()},
            "execution": self.execution,
            "notes": list(self.notes),
        }
        facts = {} if self.stopped else dict(self.facts)
        _journal.keep(path, self.question, decisions, facts, self.trials)
        if jax.process_index() > 0:
            return
        pictures = {name: png(figure) for name, figure in figures.items()}
        for name, picture in pictures.items():
            files.replace(path / f"{name}.png", picture)
        files.replace(path / "report.json", self.to_json() + "\n")
        confirming = sum(t.stage == CONFIRM for t in self.trials)
        runs = f"{len(self.searched)} of the search, {confirming} with fresh seeds"
        content = page(
            f"Tuning of {self.question['problem']}",
            verdict=self.verdict,
            best=str(self.best) if self.ranking else self._none_good,
            horizon=self.horizon,
            settings=self._result_rows(),
            warnings=self.warnings,
            pictures=pictures,
            runs=self._run_rows(),
            question=self.question,
            facts={"runs": runs, "execution": self.execution} | dict(self.facts),
        )
        files.replace(path / "report.html", content.encode(errors="backslashreplace"))

    @classmethod
    def load(cls, directory: str | Path) -> "Report":
        """Return the report of a folder that a tuning wrote, or is still writing.

        Arguments other than numbers, strings, bools and None are read as the text that they print as.

        Raises:
          ValueError: The folder holds no tuning.
          DamagedFileError: A file of it is damaged or cannot be read; the message names it, and the line.
        """
        path = Path(directory)
        decisions, lines = _journal.read_files(path)
        if not decisions:
            raise ValueError(f"{path} holds no tuning: it has no tune.json")
        content = _journal.parse_decisions(decisions, path)
        question, curve = content["question"], content.get("range_test")
        trials, defaults = _journal.parse_trials(lines, path, question), content.get("defaults", {})
        make = _optimizer_named(question["optimizer"])
        course, steps = question.get("schedule", "constant"), question.get("steps")
        if course != "constant":
            _check_courses(trials, course, steps, path)
            make = make and Scheduled(make, course, steps)
        range_test, explored = curve and LrRange.from_json(curve), content.get("explored", {})
        execution, notes, facts = content.get("execution", ""), content["notes"], content.get("facts", {})
        return cls(question, trials, defaults, make, range_test, explored, execution, notes, facts)

    def __repr__(self) -> str:
        best = f"; best {self.best}" if self.ranking else ""
        return f"Report({len(self.searched)} trials of {self.question['problem']}{best})"

    @property
    def _in_order(self) -> list[TrialRecord]:
        """All runs, in an order that does not depend on when they ended."""
        return sorted(self.trials, key=lambda t: (t.stage == CONFIRM, t.number, t.seed))

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
        return PlotData(
            trials=searched,
            metric=self._metric,
            mode=self.question["mode"],
            best=next((t for t in searched if t.setting == best), None),
            defaults=next((t for t in searched if t.setting == self.defaults), None),
            confirmed=self.confirmed,
            schedule=self.question.get("schedule", "constant"),
            steps=self.question.get("steps"),
        )


def _optimizer_named(name: str) -> OptimizerFactory | None:
    """Return the optimizer of this package that an expression names; None for any other."""
    package, _, attribute = name.rpartition(".")
    found = getattr(optimizers, attribute, None) if package == "adamjax" else None
    return found if inspect.isfunction(found) else None


def _check_courses(trials: Sequence[TrialRecord], course: str, steps: int, path: Path) -> None:
    """Check that the learning rate of each setting can take its course."""
    for t in trials:
        try:
            course_schedule(course, steps, t.setting)
        except (KeyError, OverflowError, TypeError, ValueError) as error:
            file = path / _journal.TRIALS
            message = f"the setting of trial {t.number} in {file} has no schedule ({error}): remove its lines"
            raise DamagedFileError(file, message) from error


def _commonest_error(failed: Sequence[TrialRecord]) -> str:
    return Counter(t.error for t in failed).most_common(1)[0][0]


def _cells(setting: Setting, names: Iterable[str]) -> list[str]:
    """Return the arguments of a setting as text, with four digits."""
    values = (setting.get(name, "") for name in names)
    return [f"{x:.4g}" if isinstance(x, float) else str(x) for x in values]


def _in_words(name: str) -> str:
    """Return the name of a setting for a sentence."""
    return "the default setting" if name == "defaults" else f"the {name}" if name.startswith("constant") else name


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def _indistinguishable(runs: Mapping[int, float], best: Mapping[int, float], sign: int) -> bool:
    """Return whether a paired t-test cannot tell runs, by their seeds, from those of the best."""
    seeds = [seed for seed in runs if seed in best]
    x, y = np.asarray([runs[seed] for seed in seeds]), np.asarray([best[seed] for seed in seeds])
    if not np.isfinite([*x, *y]).all() or len(x) < 2:
        return bool(np.isfinite([*runs.values()]).all())
    if min(*x, *y) > 0:
        x, y = np.log(x), np.log(y)
    differences = sign * (x - y)
    stats = require("scipy.stats", "tune", "telling a difference from noise")
    bound = stats.t.ppf((1 + CONFIDENCE) / 2, len(x) - 1) * np.std(differences, ddof=1) / math.sqrt(len(x))
    return bool(np.mean(differences) <= bound)


def run_facts() -> dict[str, str]:
    """Return the facts of this run for a report: the versions, the device of this process, and the date."""
    device, count = jax.devices()[0], jax.device_count()
    kind = f"CPU, {os.cpu_count()} cores, {platform.machine()}" if device.platform == "cpu" else device.device_kind
    return {
        "adamjax": __version__,
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "Python": platform.python_version(),
        "device": kind if count == 1 else f"{count} devices of {kind}",
        DATE: f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    }
