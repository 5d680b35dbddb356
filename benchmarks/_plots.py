"""Plots of tables, each in a file."""

from pathlib import Path
from typing import Any

import numpy as np

from adamjax._core.optional import require
from benchmarks._measure import Ratio
from benchmarks._report import Bars, Curves, Table, shown

# By the start of a name; longer starts come first.
COLOURS = {
    "adamjax fused": "#1d4f80",
    "adamjax": "#4c8fc7",
    "optax": "#f0983c",
    "torch": "#c0504d",
}
STYLES = ("-", "--", ":", "-.")


def draw(table: Table, path: Path) -> None:
    """Plot a table that has a picture."""
    figure_module = require("matplotlib.figure", "demo", "plotting the results of the benchmarks")
    if isinstance(table.picture, Bars):
        figure = figure_module.Figure((8, 1.3 + 0.32 * len(table.rows)), layout="constrained")
        bars(figure.subplots(), table, table.picture)
    elif isinstance(table.picture, Curves):
        figure = figure_module.Figure((9, 4.5), layout="constrained")
        curves(figure.subplots(), table.picture)
        figure.legend(loc="outside right upper", fontsize="small")
    figure.suptitle(table.title, fontsize="medium")
    figure.savefig(path, dpi=130)


def bars(axis: Any, table: Table, picture: Bars) -> None:
    """Draw a bar for each row that has a figure, the first on top; cut those that are far longer than most."""
    limits = table.column(picture.limit) if picture.limit else [None] * len(table.rows)
    figures = zip(table.column(table.columns[0]), table.column(picture.column), limits, strict=True)
    rows: list[tuple[str, Ratio, float | None]] = [row for row in figures if row[1] is not None]
    medians = [ratio.median for _, ratio, _ in rows]
    end = 1.15 * min(max(medians), 2.5 * float(np.median(medians)))
    for i, (label, (median, low, high), limit) in enumerate(rows):
        colour = next((colour for start, colour in COLOURS.items() if label.startswith(start)), "0.5")
        axis.barh(i, median, color=colour, height=0.7)
        if median < end:
            axis.plot([low, high], [i, i], color="black", linewidth=1)
        text = shown(median) + (" →" if median >= end else "")
        axis.text(min(max(median, high), end) + 0.01 * end, i, text, va="center", fontsize="small", clip_on=False)
        if limit is not None:
            axis.plot([limit, limit], [i - 0.42, i + 0.42], color="black", linewidth=2, label="" if i else "limit")
    axis.set_yticks(range(len(rows)), [label for label, _, _ in rows])
    axis.set(xlabel=picture.column, xlim=(0, end), ylim=(len(rows) - 0.4, -0.6))
    axis.spines[["top", "right"]].set_visible(False)
    if picture.limit:
        axis.legend(loc="lower right", bbox_to_anchor=(1, 1), frameon=False)


def curves(axis: Any, picture: Curves) -> None:
    """Draw curves: the colour stands for the part of the name before a colon, the style for the rest."""
    names = [name.partition(": ") for name in picture.lines]
    heads, tails = list(dict.fromkeys(n[0] for n in names)), list(dict.fromkeys(n[2] for n in names))
    for (name, points), (head, _, tail) in zip(picture.lines.items(), names, strict=True):
        style = STYLES[tails.index(tail) % len(STYLES)]
        colour = COLOURS.get(head, f"C{4 + heads.index(head)}")
        axis.plot(list(points), list(points.values()), style, color=colour, marker="o", markersize=4, label=name)
    ticks = list(dict.fromkeys(x for points in picture.lines.values() for x in points))
    axis.set(xlabel=picture.x, ylabel=picture.y, xscale="log", yscale="log")
    axis.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
