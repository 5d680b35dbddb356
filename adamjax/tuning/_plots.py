"""Pictures of a tuning, each a matplotlib figure made from trials."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from adamjax._core.optional import require
from adamjax.tuning._trial import Trial

LONGEST = 20  # name of a value; a longer one would leave no room for the picture
BEST, DEFAULTS, OTHERS, INFEASIBLE = "C0", "C1", "0.75", "C3"


class Axis(NamedTuple):
    """How the values of an argument are drawn."""

    label: str
    scale: str
    positions: np.ndarray  # float[trials], before the scale
    ticks: list[str] | None  # names of the positions 0, 1, ..., where the values are not numbers

    @property
    def fractions(self) -> np.ndarray:
        """The positions after the scale, between 0 and 1."""
        x = np.log(self.positions) if self.scale == "log" else self.positions
        return np.asarray((x - x.min()) / max(np.ptp(x), 1e-12))


class Pictured(NamedTuple):
    """What is drawn: the trials of the search, and how to read them."""

    trials: Sequence[Trial]
    metric: str
    mode: str
    best: Trial | None
    defaults: Trial | None

    @property
    def values(self) -> np.ndarray:
        """float[trials]: the last of the metric; NaN where the trial diverged."""
        return np.asarray([t.value(self.metric) for t in self.trials])

    @property
    def badness(self) -> np.ndarray:
        """float[trials]: the rank of each, 0 for the best and 1 for the worst; those that diverged come last."""
        x = self.values if self.mode == "min" else -self.values
        return np.unique(np.nan_to_num(x, nan=np.inf), return_inverse=True)[1] / max(len(x) - 1, 1)

    @property
    def axes(self) -> dict[str, Axis]:
        """Of the arguments that take more than one value."""
        found = {}
        for name in dict.fromkeys(k for t in self.trials for k in t.setting):
            values = [t.setting[name] for t in self.trials]
            if len({repr(x) for x in values}) > 1:
                found[name] = axis_of(name, values)
        return found

    def where(self, status: str) -> np.ndarray:
        return np.asarray([t.status == status for t in self.trials])


def axis_of(name: str, values: Sequence[Any]) -> Axis:
    """Logarithmic where the values span a decade; the betas by what they lack of 1."""
    if not all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in values):
        names = sorted({repr(x) for x in values})
        shown = [x if len(x) <= LONGEST else f"{x[: LONGEST - 3]}..." for x in names]
        return Axis(name, "linear", np.asarray([float(names.index(repr(x))) for x in values]), shown)
    x = np.asarray(values, float)
    if name in ("b1", "b2"):
        return Axis(f"1 - {name}", "log", 1 - x, None)
    return Axis(name, "log" if x.min() > 0 and x.max() > 10 * x.min() else "linear", x, None)


def hyperparameters(shown: Pictured) -> Any:
    """The metric against each argument; where it has its default value in grey, diverged trials at the bad end."""
    axes = shown.axes
    figure, panels = _panels(len(axes))
    values = shown.values
    feasible = np.isfinite(values)
    limits = _limits(shown)
    worst = limits[1] if shown.mode == "min" else limits[0]
    for panel, (name, axis) in zip(panels, axes.items(), strict=True):
        default = None if shown.defaults is None else shown.defaults.setting[name]
        varied = np.asarray([t.setting[name] != default for t in shown.trials])
        for status, filled in (("complete", True), ("pruned", False)):
            for chosen, colour in ((~varied, OTHERS), (varied, BEST)):
                chosen = chosen & shown.where(status) & feasible
                style = {"c": colour} if filled else {"facecolors": "none", "edgecolors": colour}
                label = status if colour == BEST and chosen.any() else None
                panel.scatter(axis.positions[chosen], values[chosen], s=22, label=label, **style)
        if not feasible.all():
            x = axis.positions[~feasible]
            panel.scatter(x, np.full(len(x), worst), marker="x", c=INFEASIBLE, label="infeasible", clip_on=False)
        for trial, colour, label in ((shown.best, BEST, "best"), (shown.defaults, DEFAULTS, "defaults")):
            if trial is not None and trial in shown.trials:
                at = axis.positions[list(shown.trials).index(trial)]
                panel.axvline(at, color=colour, linestyle="--", linewidth=1, label=label)
        panel.set(xlabel=axis.label, xscale=axis.scale, ylim=limits, yscale=_scale(limits))
        _few_ticks(panel)
        if axis.ticks:
            panel.set_xticks(range(len(axis.ticks)), axis.ticks)
        if name == next(iter(axes)):
            panel.set_ylabel(f"validation {shown.metric}")
            panel.legend(fontsize="small")
    return figure


def curves(shown: Pictured) -> Any:
    """The metric against the step, of each trial."""
    figure, (panel,) = _panels(1, width=7.0)
    limits = _limits(shown, curves=True)
    for trial in shown.trials:
        panel.plot(trial.steps, trial.metrics[shown.metric], color=OTHERS, linewidth=0.8)
    for marked, colour, label in ((shown.defaults, DEFAULTS, "defaults"), (shown.best, BEST, "best")):
        if marked is not None:
            panel.plot(marked.steps, marked.metrics[shown.metric], color=colour, linewidth=2, label=label)
    panel.set(xlabel="step", ylabel=f"validation {shown.metric}", ylim=limits, yscale=_scale(limits))
    _few_ticks(panel)
    if panel.get_legend_handles_labels()[0]:
        panel.legend()
    return figure


def heat_map(shown: Pictured) -> Any:
    """The metric over learning rate and weight decay; None where they were not both searched."""
    axes = shown.axes
    feasible = np.isfinite(shown.values)
    if not {"learning_rate", "weight_decay"} <= axes.keys() or not feasible.any():
        return None
    x, y = axes["learning_rate"], axes["weight_decay"]
    if x.scale != "log" or y.scale != "log":
        return None
    figure, (panel,) = _panels(1, width=6.0)
    limits = _limits(shown)
    colours = {"vmin": limits[0], "vmax": limits[1], "cmap": "viridis_r" if shown.mode == "min" else "viridis"}
    at = np.stack([np.log10(x.positions), np.log10(y.positions)])[:, feasible]
    values = np.clip(shown.values[feasible], *limits)
    if np.linalg.matrix_rank(at - at.mean(axis=1, keepdims=True), tol=0.05) == 2:
        panel.tricontourf(*at, values, levels=np.linspace(*limits, 15), **colours)
    points = panel.scatter(*at, c=values, edgecolors="black", linewidths=0.5, **colours)
    if not feasible.all():
        lost = np.stack([np.log10(x.positions), np.log10(y.positions)])[:, ~feasible]
        panel.scatter(*lost, marker="x", c=INFEASIBLE, label="infeasible")
        panel.legend()
    panel.set(xlabel="log10 learning rate", ylabel="log10 weight decay")
    figure.colorbar(points, label=f"validation {shown.metric}")
    return figure


def parallel(shown: Pictured) -> Any:
    """Parallel coordinates: a line for each trial, the better the darker; None for a single argument."""
    axes = shown.axes
    if len(axes) < 2:
        return None
    figure, (panel,) = _panels(1, width=2.0 + 1.6 * len(axes))
    rows = np.stack([axis.fractions for axis in axes.values()], axis=1)
    colours = require("matplotlib", "tune", "plotting a tuning").colormaps["viridis"]
    badness = shown.badness
    for i in np.argsort(-badness, kind="stable"):
        panel.plot(rows[i], color=colours(badness[i]), alpha=1 - 0.8 * badness[i], linewidth=1.2)
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


def importance(shown: Pictured) -> Any:
    """How much worse a random forest orders the trials without knowing an argument (Breiman, 2001)."""
    axes = shown.axes
    if not axes or len(shown.trials) < 8:
        return None
    shares = importances(shown)
    figure, (panel,) = _panels(1, width=5.0, height=1.2 + 0.35 * len(axes))
    names = sorted(shares, key=lambda name: shares[name])
    panel.barh(names, [shares[name] for name in names], color=BEST)
    panel.set(xlabel=f"share of the variation of {shown.metric}", xlim=(0, 1))
    return figure


def importances(shown: Pictured) -> dict[str, float]:
    """Permutation importances of a random forest that predicts the rank of a trial; they add up to 1."""
    ensemble = require("sklearn.ensemble", "tune", "the importance of hyperparameters")
    inspection = require("sklearn.inspection", "tune", "the importance of hyperparameters")
    axes, target = shown.axes, shown.badness
    rows = np.stack([axis.fractions for axis in axes.values()], axis=1)
    forest = ensemble.RandomForestRegressor(100, random_state=0).fit(rows, target)
    means = inspection.permutation_importance(forest, rows, target, n_repeats=10, random_state=0).importances_mean
    means = np.maximum(means, 0)
    return dict(zip(axes, (means / max(means.sum(), 1e-12)).tolist(), strict=True))


FIGURES = {
    "hyperparameters": hyperparameters,
    "curves": curves,
    "heat_map": heat_map,
    "parallel": parallel,
    "importance": importance,
}


def _panels(count: int, *, width: float = 3.4, height: float = 3.6) -> tuple[Any, Any]:
    """A figure, and its panels in rows of three."""
    figure_module = require("matplotlib.figure", "tune", "plotting a tuning")
    columns, rows = min(count, 3), max(math.ceil(count / 3), 1)
    figure = figure_module.Figure((width * max(columns, 1), height * rows), layout="constrained")
    panels = figure.subplots(rows, max(columns, 1), squeeze=False, sharey=True).ravel()
    for panel in panels[count:]:
        panel.remove()
    return figure, panels[:count]


def _limits(shown: Pictured, *, curves: bool = False) -> tuple[float, float]:
    """From the best to a bit beyond the middle of all values: what is far worse would flatten the rest."""
    values = shown.values
    if curves:
        values = np.concatenate([t.metrics[shown.metric] for t in shown.trials])
    values = values[np.isfinite(values)]
    if not values.size:
        return 0.0, 1.0
    sign = 1 if shown.mode == "min" else -1
    best, reach = (sign * values).min(), np.quantile(sign * values, 0.9)
    if shown.defaults is not None:
        reach = np.nanmax([reach, sign * shown.defaults.value(shown.metric)])
    margin = 0.05 * (reach - best) + 1e-9 * abs(best) + 1e-12
    low, high = best - margin, reach + margin
    if shown.mode == "min" and best > 0:
        low = max(low, best / 1.2)
    return (float(low), float(high)) if sign > 0 else (float(-high), float(-low))


def _scale(limits: tuple[float, float]) -> str:
    return "log" if limits[0] > 0 and limits[1] > 5 * limits[0] else "linear"


def _few_ticks(panel: Any) -> None:
    """Ticks of logarithmic axes that are readable where the axis spans but a few decades."""
    ticker = require("matplotlib.ticker", "tune", "plotting a tuning")
    for axis in (panel.xaxis, panel.yaxis):
        if axis.get_scale() == "log":
            low, high = sorted(axis.get_view_interval())
            axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,), numticks=8))
            axis.set_major_formatter(ticker.FormatStrFormatter("%g"))
            axis.set_minor_formatter(ticker.NullFormatter())
