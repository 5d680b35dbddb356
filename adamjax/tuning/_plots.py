"""Plots of a tuning: matplotlib figures drawn from its trials."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from adamjax._core.optional import require
from adamjax.tuning._journal import TrialRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_TICK_LENGTH = 20  # characters; longer labels would leave no room for the plot
BEST, DEFAULTS, OTHERS, INFEASIBLE = "C0", "C1", "0.75", "C3"


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

    @property
    def values(self) -> np.ndarray:
        """float[trials]: the last value of the metric; NaN for diverged and failed trials."""
        return np.asarray([t.value(self.metric) for t in self.trials])

    @property
    def rank_fraction(self) -> np.ndarray:
        """float[trials]: the rank of each trial, from 0 for the best to 1 for the worst; diverged trials come last."""
        x = self.values if self.mode == "min" else -self.values
        return np.unique(np.nan_to_num(x, nan=np.inf), return_inverse=True)[1] / max(len(x) - 1, 1)

    @property
    def axes(self) -> dict[str, Axis]:
        """The axes of the arguments that take more than one value, by name."""
        names = dict.fromkeys(k for t in self.trials for k in t.setting)
        values = {name: [t.setting[name] for t in self.trials] for name in names}
        return {name: make_axis(name, x) for name, x in values.items() if len(set(map(repr, x))) > 1}

    def has_status(self, status: str) -> np.ndarray:
        return np.asarray([t.status == status for t in self.trials])


def make_axis(name: str, values: Sequence[object]) -> Axis:
    """Return an axis for the values: logarithmic if they span a decade; for the betas, of 1 - beta."""
    if not all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in values):
        names = sorted({repr(x) for x in values})
        ticks = [x if len(x) <= MAX_TICK_LENGTH else f"{x[: MAX_TICK_LENGTH - 3]}..." for x in names]
        return Axis(name, "linear", np.asarray([float(names.index(repr(x))) for x in values]), ticks)
    x = np.asarray(values, float)
    if name in ("b1", "b2"):
        return Axis(f"1 - {name}", "log", 1 - x, None)
    return Axis(name, "log" if x.min() > 0 and x.max() > 10 * x.min() else "linear", x, None)


def hyperparameters(data: PlotData) -> "Figure":
    """Plot the metric against each argument: default values in grey, diverged trials at the worst end of the axis."""
    axes = data.axes
    figure, panels = _panels(len(axes))
    values = data.values
    feasible = np.isfinite(values)
    limits = _limits(data)
    worst = limits[1] if data.mode == "min" else limits[0]
    for panel, (name, axis) in zip(panels, axes.items(), strict=True):
        default = None if data.defaults is None else data.defaults.setting[name]
        varied = np.asarray([t.setting[name] != default for t in data.trials])
        for status, filled in (("complete", True), ("pruned", False)):
            for chosen, colour in ((~varied, OTHERS), (varied, BEST)):
                chosen = chosen & data.has_status(status) & feasible
                label, fill = status if colour == BEST and chosen.any() else None, colour if filled else "none"
                x, y = axis.positions[chosen], values[chosen]
                panel.scatter(x, y, s=22, facecolors=fill, edgecolors=colour, label=label)
        if not feasible.all():
            x = axis.positions[~feasible]
            panel.scatter(x, np.full(len(x), worst), marker="x", c=INFEASIBLE, label="infeasible", clip_on=False)
        for trial, colour, label in ((data.best, BEST, "best"), (data.defaults, DEFAULTS, "defaults")):
            if trial is not None and trial in data.trials:
                at = axis.positions[list(data.trials).index(trial)]
                panel.axvline(at, color=colour, linestyle="--", linewidth=1, label=label)
        panel.set(xlabel=axis.label, xscale=axis.scale, ylim=limits, yscale=_scale(limits))
        _label_log_axes(panel)
        if axis.ticks:
            panel.set_xticks(range(len(axis.ticks)), axis.ticks)
        if name == next(iter(axes)):
            panel.set_ylabel(f"validation {data.metric}")
            panel.legend(fontsize="small")
    return figure


def curves(data: PlotData) -> "Figure | None":
    """Plot the metric of each trial against the step; return None if no trial was evaluated on its way."""
    if not any(trial.curve(data.metric) for trial in data.trials):
        return None
    figure, (panel,) = _panels(1, width=7.0)
    limits = _limits(data, curves=True)
    for trial in data.trials:
        panel.plot(*_curve(trial, data.metric), color=OTHERS, linewidth=0.8)
    for marked, colour, label in ((data.defaults, DEFAULTS, "defaults"), (data.best, BEST, "best")):
        if marked is not None:
            panel.plot(*_curve(marked, data.metric), color=colour, linewidth=2, label=label)
    panel.set(xlabel="step", ylabel=f"validation {data.metric}", ylim=limits, yscale=_scale(limits))
    _label_log_axes(panel)
    if panel.get_legend_handles_labels()[0]:
        panel.legend()
    return figure


def _curve(trial: TrialRecord, metric: str) -> tuple[Sequence[int], Sequence[float]]:
    values = trial.curve(metric)
    return trial.steps[: len(values)], values


def heat_map(data: PlotData) -> "Figure | None":
    """Plot the metric over learning rate and weight decay; return None unless both were searched."""
    axes = data.axes
    feasible = np.isfinite(data.values)
    if not {"learning_rate", "weight_decay"} <= axes.keys() or not feasible.any():
        return None
    rate, decay = axes["learning_rate"], axes["weight_decay"]
    if rate.scale != "log" or decay.scale != "log":
        return None
    figure, (panel,) = _panels(1, width=6.0)
    low, high = _limits(data)
    cmap = "viridis_r" if data.mode == "min" else "viridis"
    at = np.log10(np.stack([rate.positions, decay.positions]))
    inside, values = at[:, feasible], np.clip(data.values[feasible], low, high)
    x, y = inside
    if np.linalg.matrix_rank(inside - inside.mean(axis=1, keepdims=True), tol=0.05) == 2:
        panel.tricontourf(x, y, values, levels=np.linspace(low, high, 15), vmin=low, vmax=high, cmap=cmap)
    points = panel.scatter(x, y, c=values, edgecolors="black", linewidths=0.5, vmin=low, vmax=high, cmap=cmap)
    if not feasible.all():
        panel.scatter(at[0, ~feasible], at[1, ~feasible], marker="x", c=INFEASIBLE, label="infeasible")
        panel.legend()
    panel.set(xlabel="log10 learning rate", ylabel="log10 weight decay")
    figure.colorbar(points, label=f"validation {data.metric}")
    return figure


def parallel(data: PlotData) -> "Figure | None":
    """Plot parallel coordinates, a line for each trial, the better the darker; return None for a single argument."""
    axes = data.axes
    if len(axes) < 2:
        return None
    figure, (panel,) = _panels(1, width=2.0 + 1.6 * len(axes))
    rows = np.stack([axis.fractions for axis in axes.values()], axis=1)
    colours = require("matplotlib", "tune", "plotting a tuning").colormaps["viridis"]
    ranks = data.rank_fraction
    for i in np.argsort(-ranks, kind="stable"):
        panel.plot(rows[i], color=colours(ranks[i]), alpha=1 - 0.8 * ranks[i], linewidth=1.2)
    for at, axis in enumerate(axes.values()):
        panel.axvline(at, color="0.4", linewidth=0.8)
        ends = axis.ticks or [f"{axis.positions.min():.3g}", f"{axis.positions.max():.3g}"]
        for text, height, side in ((ends[0], 0.0, "top"), (ends[-1], 1.0, "bottom")):
            panel.text(at, height, text, ha="center", va=side, fontsize="small")
    panel.set_xticks(range(len(axes)), [axis.label for axis in axes.values()])
    panel.tick_params(axis="x", length=0, pad=16)
    panel.set(yticks=[], ylim=(-0.02, 1.02))
    panel.spines[:].set_visible(False)
    return figure


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
    panel.barh([list(axes)[i] for i in order], means[order] / max(means.sum(), 1e-12), color=BEST)
    panel.set(xlabel=f"share of the variation of {data.metric}", xlim=(0, 1))
    return figure


FIGURES = {plot.__name__: plot for plot in (hyperparameters, curves, heat_map, parallel, importance)}


def _panels(count: int, *, width: float = 3.4, height: float = 3.6) -> tuple["Figure", "Sequence[Axes]"]:
    """Return a figure and its panels, in rows of three."""
    figure_module = require("matplotlib.figure", "tune", "plotting a tuning")
    columns, rows = min(count, 3), max(math.ceil(count / 3), 1)
    figure = figure_module.Figure((width * max(columns, 1), height * rows), layout="constrained")
    panels = figure.subplots(rows, max(columns, 1), squeeze=False, sharey=True).ravel()
    for panel in panels[count:]:
        panel.remove()
    return figure, panels[:count]


def _limits(data: PlotData, *, curves: bool = False) -> tuple[float, float]:
    """Return limits from the best value to the 90 % quantile: far worse values would flatten the rest."""
    values = np.concatenate([t.curve(data.metric) for t in data.trials]) if curves else data.values
    values = values[np.isfinite(values)]
    if not values.size:
        return 0.0, 1.0
    sign = 1 if data.mode == "min" else -1
    best, reach = (sign * values).min(), np.quantile(sign * values, 0.9)
    if data.defaults is not None:
        reach = np.nanmax([reach, sign * data.defaults.value(data.metric)])
    margin = 0.05 * (reach - best) + 1e-9 * abs(best) + 1e-12
    low, high = best - margin, reach + margin
    if data.mode == "min" and best > 0:
        low = max(low, best / 1.2)
    return (float(low), float(high)) if sign > 0 else (float(-high), float(-low))


def _scale(limits: tuple[float, float]) -> str:
    return "log" if limits[0] > 0 and limits[1] > 5 * limits[0] else "linear"


def _label_log_axes(panel: "Axes") -> None:
    """Set ticks that are readable on logarithmic axes of a few decades."""
    ticker = require("matplotlib.ticker", "tune", "plotting a tuning")
    for axis in (panel.xaxis, panel.yaxis):
        if axis.get_scale() == "log":
            low, high = sorted(axis.get_view_interval())
            axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,), numticks=8))
            axis.set_major_formatter(ticker.FormatStrFormatter("%g"))
            axis.set_minor_formatter(ticker.NullFormatter())
