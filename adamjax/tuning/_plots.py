"""Plots of a tuning: matplotlib figures drawn from its trials."""

import itertools
import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from adamjax._core.figures import AMBER, BLUE, GREY, PURPLE, RED, TEAL, label_log_axes, subplots
from adamjax._core.optional import require
from adamjax._core.text import drawable
from adamjax.tuning._confirmed import Confirmed
from adamjax.tuning._courses import COURSES, course_schedule, is_scheduled
from adamjax.tuning._journal import DEFAULTS as DEFAULTS_STAGE
from adamjax.tuning._journal import TrialRecord
from adamjax.tuning._limits import MAX_STEPS
from adamjax.tuning._space import Setting

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

COLUMNS = 3  # of panels
MAX_LABEL_LENGTH = 20  # characters; longer labels would leave no room for the plot
COLUMN_WIDTH = 13  # characters of a label below the column of a setting
BEST, DEFAULTS, OTHERS, INFEASIBLE = "black", AMBER, "0.75", RED  # colours that the scale of the metric has not
UNUSED = (BLUE, TEAL, PURPLE, GREY)  # colours that stand for nothing else


class Axis(NamedTuple):
    """The positions of the values of an argument along an axis."""

    label: str
    scale: str
    positions: np.ndarray  # float[trials], before scaling
    ticks: list[str] | None  # labels of the positions 0, 1, ... if the values are not numbers

    @property
    def fractions(self) -> np.ndarray:
        """float[trials]: the scaled positions, between 0 and 1."""
        x = np.log(self.positions) if self.scale == "log" else self.positions
        return np.asarray((x - x.min()) / max(np.ptp(x), 1e-12))


class PlotData(NamedTuple):
    """The trials of a search, and how to judge them."""

    trials: Sequence[TrialRecord]
    metric: str
    mode: str
    best: TrialRecord | None
    defaults: TrialRecord | None
    confirmed: Sequence[Confirmed] = ()
    schedule: str = "constant"
    steps: int | None = None

    @property
    def metric_label(self) -> str:
        return f"validation {_short(self.metric)}"

    @property
    def sign(self) -> int:
        """The factor that makes the lowest value the best."""
        return 1 if self.mode == "min" else -1

    @property
    def values(self) -> np.ndarray:
        """float[trials]: the last value of the metric; NaN for diverged and failed trials."""
        return np.asarray([t.value(self.metric) for t in self.trials])

    @property
    def rank_fraction(self) -> np.ndarray:
        """float[trials]: the rank of each trial, from 0 for the best to 1 for the worst; diverged trials come last."""
        x = self.sign * self.values
        return np.unique(np.nan_to_num(x, nan=np.inf), return_inverse=True)[1] / max(len(x) - 1, 1)

    @property
    def axes(self) -> dict[str, Axis]:
        """The axes of the arguments that take more than one value, by name."""
        names = dict.fromkeys(k for t in self.trials for k in t.setting)
        values = {name: [t.setting.get(name) for t in self.trials] for name in names}
        return {name: make_axis(name, x) for name, x in values.items() if len(set(map(repr, x))) > 1}

    @property
    def limits(self) -> tuple[float, float]:
        """The lowest and the highest value of the metric that plots distinguish."""
        return _limits(self, self.values)

    @property
    def worst(self) -> float:
        """The limit at the worse end."""
        return self.limits[1] if self.mode == "min" else self.limits[0]

    @property
    def beyond(self) -> np.ndarray:
        """bool[trials]: whether a value is worse than the limit."""
        return self.sign * self.values > self.sign * self.worst

    @property
    def colours(self) -> "ScalarMappable":
        """The colours of the metric, the same in all plots: the darker, the better."""
        colors = require("matplotlib.colors", "tune", "plotting a tuning")
        norm = colors.LogNorm if _scale(self.limits) == "log" else colors.Normalize
        mappable = require("matplotlib.cm", "tune", "plotting a tuning").ScalarMappable
        coloured: ScalarMappable = mappable(
            norm(*self.limits, clip=True), "viridis" if self.mode == "min" else "viridis_r"
        )
        return coloured

    def has_status(self, status: str) -> np.ndarray:
        return np.asarray([t.status == status for t in self.trials])


def _short(name: str) -> str:
    return drawable(name if len(name) <= MAX_LABEL_LENGTH else f"{name[: MAX_LABEL_LENGTH - 3]}...")


def make_axis(name: str, values: Sequence[object]) -> Axis:
    """Return an axis for the values: logarithmic if they span a decade; for the betas, of 1 - beta."""
    if not all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in values):
        names = sorted({repr(x) for x in values})
        ticks = list(map(_short, names))
        return Axis(drawable(name), "linear", np.asarray([float(names.index(repr(x))) for x in values]), ticks)
    x = np.asarray(values, float)
    if name in ("b1", "b2", "b3", "beta") and x.max() < 1:
        return Axis(f"1 - {name}", "log", 1 - x, None)
    return Axis(drawable(name), "log" if x.min() > 0 and x.max() > 10 * x.min() else "linear", x, None)


def confirmation(data: PlotData) -> "Figure | None":
    """Plot every run with a fresh seed, a column for each setting; return None if no setting was confirmed.

    A line joins the runs of one seed, since settings are compared seed by seed.
    """
    columns = data.confirmed
    if not columns:
        return None
    seeds = sorted({seed for c in columns for seed in c.seeds})
    values = np.full((len(seeds), len(columns)), np.nan)
    for i, c in enumerate(columns):
        values[[seeds.index(seed) for seed in c.seeds], i] = c.values
    figure, (panel,) = _panels(1, width=2.5 + 0.8 * len(columns), height=4.2)
    at = np.arange(len(columns))
    for runs in values:
        panel.plot(at, runs, color=OTHERS, linewidth=0.8, zorder=1)
    limits = _spread(values[np.isfinite(values)])
    for i, c in enumerate(columns):
        colour = _colour_of(c.setting, data, BLUE)
        finite = np.isfinite(values[:, i])
        x = np.full(finite.sum(), i)
        panel.scatter(x, values[finite, i], s=26, facecolors=colour if c.finalist else "none", edgecolors=colour)
        if math.isfinite(c.mean):
            panel.plot([i - 0.3, i + 0.3], [c.mean, c.mean], color=colour, linewidth=2)
        diverged = len(c.values) - finite.sum()
        if diverged:
            end = limits[1] if data.mode == "min" else limits[0]
            panel.scatter(np.full(diverged, i), np.full(diverged, end), marker="x", c=INFEASIBLE, clip_on=False)
    labels = [_column_label(c, data) for c in columns]
    panel.set_xticks(at, labels, fontsize="small")
    panel.set(xlim=(-0.6, len(columns) - 0.4), ylim=limits, yscale=_scale(limits), ylabel=data.metric_label)
    label_log_axes(panel)
    return figure


def _column_label(c: Confirmed, data: PlotData) -> str:
    verdict = "best" if c.number == data.confirmed[0].number else "= best" if c.finalist and c.tied else ""
    return f"{textwrap.fill(c.name, COLUMN_WIDTH)}\n{len(c.values)} seed{'s' * (len(c.values) > 1)}\n{verdict}"


def progress(data: PlotData) -> "Figure":
    """Plot the metric of each trial by its number, in the colour of its stage, and the best so far."""
    figure, (panel,) = _panels(1, width=8.0)
    limits, numbers = data.limits, np.asarray([t.number for t in data.trials])
    beyond = ~np.isfinite(data.values) | data.beyond
    y = np.where(beyond, data.worst, data.values)
    stages = list(dict.fromkeys(t.stage for t in data.trials))
    for i, stage in enumerate(stages):
        chosen = np.asarray([t.stage == stage for t in data.trials])
        colour = DEFAULTS if stage == DEFAULTS_STAGE else UNUSED[i % len(UNUSED)]
        panel.scatter(numbers[chosen & ~beyond], y[chosen & ~beyond], s=26, color=colour, label=drawable(stage))
    if beyond.any():
        marker = "^" if data.mode == "min" else "v"
        label = "beyond the axis, or diverged"
        panel.scatter(numbers[beyond], y[beyond], marker=marker, c=OTHERS, label=label, clip_on=False)
    complete = np.where(data.has_status("complete"), data.sign * data.values, np.inf)
    best = data.sign * np.fmin.accumulate(complete)
    panel.step(
        numbers, np.where(np.isfinite(best), best, np.nan), where="post", color=BEST, linewidth=1, label="best so far"
    )
    panel.set(xlabel="trial", ylabel=data.metric_label, ylim=limits, yscale=_scale(limits))
    label_log_axes(panel)
    _legend(figure, panel)
    return figure


def schedules(data: PlotData) -> "Figure | None":
    """Plot the learning rate in the course of a run, of the best settings; return None if all rates are constant."""
    finalists = {c.name: c.setting for c in data.confirmed if c.finalist}
    shown = finalists or {f"trial {t.number}": t.setting for t in (data.best, data.defaults) if t is not None}
    shown = {name: setting for name, setting in shown.items() if "learning_rate" in setting}
    if not data.steps or data.steps > MAX_STEPS:  # which a report that was read from a file may say
        return None
    if not (data.schedule in COURSES and any(map(is_scheduled, shown.values()))):
        return None
    figure, (panel,) = _panels(1, width=7.0)
    steps = np.unique(np.linspace(0, data.steps, 401).round().astype(int))
    others = itertools.cycle(UNUSED)
    for name, setting in shown.items():
        colour = _colour_of(setting, data, "")
        label = {BEST: f"{name}, the best", DEFAULTS: "defaults"}.get(colour, name)
        rate = course_schedule(data.schedule, data.steps, setting)(steps)
        width = 2.5 if colour == BEST else 1.5
        panel.plot(steps, rate, color=colour or next(others), linewidth=width, label=label)
    panel.set(xlabel="step", ylabel="learning rate", ylim=(0, None))
    panel.legend()
    return figure


def hyperparameters(data: PlotData) -> "Figure":
    """Plot the metric against each argument; diverged trials are at the worst end of the axis."""
    axes = data.axes
    figure, panels = _panels(len(axes))
    beyond, limits, worst = data.beyond, data.limits, data.worst
    y = np.where(np.isfinite(data.values), np.where(beyond, np.nan, data.values), worst)
    for i, (panel, axis) in enumerate(zip(panels, axes.values(), strict=True)):
        _draw_trials(panel, axis.positions, y, data)
        if beyond.any():
            x, marker = axis.positions[beyond], "^" if data.mode == "min" else "v"
            panel.scatter(x, np.full(len(x), worst), marker=marker, c=OTHERS, label="beyond the axis", clip_on=False)
        panel.set(xlabel=axis.label, xscale=axis.scale, ylim=limits, yscale=_scale(limits))
        label_log_axes(panel)
        if axis.ticks:
            panel.set_xticks(range(len(axis.ticks)), axis.ticks)
        if i % COLUMNS == 0:
            panel.set_ylabel(data.metric_label)
    if len(panels):
        _legend(figure, panels[0])
    return figure


def heat_map(data: PlotData) -> "Figure | None":
    """Plot the other arguments against the learning rate, points in the colour of the metric.

    Return None unless the learning rate and another argument were searched.
    """
    axes = data.axes
    rate = axes.pop("learning_rate", None)
    if rate is None or not axes or not np.isfinite(data.values).any():
        return None
    figure, panels = _panels(len(axes), sharey=False)
    for panel, axis in zip(panels, axes.values(), strict=True):
        _draw_trials(panel, rate.positions, axis.positions, data)
        panel.set(xlabel=rate.label, xscale=rate.scale, ylabel=axis.label, yscale=axis.scale)
        label_log_axes(panel)
        if axis.ticks:
            panel.set_yticks(range(len(axis.ticks)), axis.ticks)
    worse_end = "max" if data.mode == "min" else "min"
    extend = worse_end if data.beyond.any() else "neither"
    figure.colorbar(data.colours, ax=list(panels), label=data.metric_label, extend=extend, format="%g")
    _legend(figure, panels[0])
    return figure


def _draw_trials(panel: "Axes", x: np.ndarray, y: np.ndarray, data: PlotData) -> None:
    """Draw a point for each trial in the colour of its metric, and mark the best and the defaults."""
    values = data.values
    finite = np.isfinite(values)
    for status, label in (("complete", "complete"), ("pruned", "ended early")):
        chosen = finite & data.has_status(status)
        if chosen.any():
            colours = list(data.colours.to_rgba(values[chosen]))
            faces, edges = (colours, "0.4") if status == "complete" else ("none", colours)
            widths = 0.5 if status == "complete" else 1.5
            panel.scatter(
                x[chosen], y[chosen], s=26, linewidths=widths, facecolors=faces, edgecolors=edges, label=label
            )
    if not finite.all():
        panel.scatter(x[~finite], y[~finite], marker="x", c=INFEASIBLE, label="diverged or failed", clip_on=False)
    for trial, colour, marker, label in ((data.best, BEST, "s", "best"), (data.defaults, DEFAULTS, "D", "defaults")):
        if trial is not None:
            i = list(data.trials).index(trial)
            panel.scatter(x[i], y[i], s=90, marker=marker, facecolors="none", edgecolors=colour, label=label)


def parallel(data: PlotData) -> "Figure | None":
    """Plot parallel coordinates, a line for each trial, which ends at its metric; return None for a single argument."""
    axes = data.axes
    finite = np.isfinite(data.values)
    if len(axes) < 2 or not finite.any():
        return None
    figure, (panel,) = _panels(1, width=3 + len(axes))
    colours, limits = data.colours, data.limits
    worst = 1.0 if data.mode == "min" else 0.0
    ends = np.where(finite, colours.norm(np.where(finite, data.values, limits[0])), worst)
    rows = np.stack([*(axis.fractions for axis in axes.values()), ends], axis=1)
    rgba = colours.to_rgba(data.values)
    for i in np.argsort(-data.rank_fraction, kind="stable"):
        style = ":" if data.trials[i].status == "pruned" else "-"
        panel.plot(
            rows[i], style, color=rgba[i] if finite[i] else INFEASIBLE, linewidth=1, alpha=1 if finite[i] else 0.4
        )
    for trial, colour in ((data.defaults, DEFAULTS), (data.best, BEST)):
        if trial is not None:
            panel.plot(rows[list(data.trials).index(trial)], color=colour, linewidth=2)
    shown = [
        (axis.label, axis.ticks or [f"{x:.3g}" for x in (axis.positions.min(), axis.positions.max())])
        for axis in axes.values()
    ]
    shown.append((data.metric_label, [f"{x:.3g}" for x in limits]))
    for at, (_, ticks) in enumerate(shown):
        panel.axvline(at, color="0.4", linewidth=0.8)
        for text, height, side in ((ticks[0], -0.02, "top"), (ticks[-1], 1.02, "bottom")):
            panel.text(at, height, text, ha="center", va=side, fontsize="small")
    panel.set_xticks(range(len(shown)), [label for label, _ in shown])
    panel.tick_params(axis="x", length=0, pad=16)
    panel.set(yticks=[], ylim=(-0.02, 1.02))
    panel.spines[:].set_visible(False)
    return figure


def curves(data: PlotData) -> "Figure | None":
    """Plot the metric of each trial against the step; return None if no trial was evaluated on its way."""
    if not any(trial.curve(data.metric) for trial in data.trials):
        return None
    figure, (panel,) = _panels(1, width=7.0)
    limits = _limits(data, np.concatenate([t.curve(data.metric) for t in data.trials]))
    for trial in data.trials:
        panel.plot(*_curve(trial, data.metric), ".-", color=OTHERS, linewidth=0.8, markersize=2)
    for marked, colour, label in ((data.defaults, DEFAULTS, "defaults"), (data.best, BEST, "best")):
        if marked is not None:
            panel.plot(*_curve(marked, data.metric), ".-", color=colour, linewidth=2, label=label)
    panel.set(xlabel="step", ylabel=data.metric_label, ylim=limits, yscale=_scale(limits))
    label_log_axes(panel)
    if panel.get_legend_handles_labels()[0]:
        panel.legend()
    return figure


def _curve(trial: TrialRecord, metric: str) -> tuple[Sequence[int], Sequence[float]]:
    values = trial.curve(metric)
    return trial.steps[: len(values)], values


def importance(data: PlotData) -> "Figure | None":
    """Plot how much worse a random forest predicts the ranks of trials without an argument (Breiman, 2001)."""
    axes = data.axes
    if not axes or len(data.trials) < 8:
        return None
    ensemble = require("sklearn.ensemble", "tune", "the importance of hyperparameters")
    inspection = require("sklearn.inspection", "tune", "the importance of hyperparameters")
    rows, ranks = np.stack([axis.fractions for axis in axes.values()], axis=1), data.rank_fraction
    forest = ensemble.RandomForestRegressor(100, random_state=0).fit(rows, ranks)
    permuted = inspection.permutation_importance(forest, rows, ranks, n_repeats=10, random_state=0)
    means = np.maximum(permuted.importances_mean, 0)
    order = np.argsort(means, kind="stable")
    figure, (panel,) = _panels(1, width=5.0, height=1.2 + 0.35 * len(axes))
    shares = means[order] / max(means.sum(), 1e-12)
    bars = panel.barh([drawable(list(axes)[i]) for i in order], shares, color=BLUE)
    panel.bar_label(bars, [f"{share:.0%}" for share in shares], padding=4)
    panel.set(xlabel=f"share of the variation of {_short(data.metric)}", xlim=(0, 1))
    panel.grid(False)
    return figure


PLOTS = (progress, confirmation, schedules, hyperparameters, heat_map, parallel, curves, importance)
FIGURES = {plot.__name__: plot for plot in PLOTS}


def _colour_of(setting: Setting, data: PlotData, other: str) -> str:
    """Return the colour of the best setting, of the defaults, or of another one."""
    for trial, colour in ((data.best, BEST), (data.defaults, DEFAULTS)):
        if trial is not None and trial.setting == setting:
            return colour
    return other


def _panels(
    count: int, *, width: float = 3.4, height: float = 3.3, sharey: bool = True
) -> tuple["Figure", "Sequence[Axes]"]:
    """Return a figure and its panels, in rows of three."""
    columns, rows = max(min(count, COLUMNS), 1), max(math.ceil(count / COLUMNS), 1)
    figure, panels = subplots((width * columns, height * rows), rows, columns, sharey=sharey)
    panels = panels.ravel()
    for panel in panels[count:]:
        panel.remove()
    return figure, panels[:count]


def _legend(figure: "Figure", panel: "Axes") -> None:
    """Explain the points of a panel below the figure."""
    figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=COLUMNS, fontsize="small")


def _limits(data: PlotData, values: np.ndarray) -> tuple[float, float]:
    """Return limits from the best value to the 90 % quantile: far worse values would flatten the rest."""
    values = values[np.isfinite(values)]
    if not values.size:
        return 0.0, 1.0
    worst = data.sign * np.quantile(data.sign * values, 0.9)
    if data.defaults is not None:
        worst = data.sign * np.nanmax([data.sign * worst, data.sign * data.defaults.value(data.metric)])
    return _spread(np.asarray([data.sign * (data.sign * values).min(), worst]))


def _spread(values: np.ndarray) -> tuple[float, float]:
    """Return limits with a margin around the values, above 0 if they are."""
    if not values.size:
        return 0.0, 1.0
    low, high = values.min(), values.max()
    margin = 0.05 * (high - low) + 1e-9 * abs(low) + 1e-12
    return float(max(low - margin, low / 1.2) if low > 0 else low - margin), float(high + margin)


def _scale(limits: tuple[float, float]) -> str:
    return "log" if limits[0] > 0 and limits[1] > 5 * limits[0] else "linear"
