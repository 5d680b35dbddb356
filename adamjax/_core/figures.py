"""Figures of matplotlib: their style, and their files."""

import contextlib
import io
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from adamjax._core.optional import require

# The colours of lines in plots.mplstyle. matplotlib looks names such as "C1" up only when it draws, in another style.
BLUE, RED, TEAL, PURPLE, AMBER, GREY = "#1558D6", "#CC2F14", "#08A398", "#8E2F88", "#D28300", "#737373"


@contextlib.contextmanager
def styled(extra: str, purpose: str) -> Iterator[None]:
    """Draw in the style of adamjax, whatever the caller's; a context, and a decorator.

    Raises:
      ImportError: matplotlib is not installed; the message has the command that installs it.
    """
    with require("matplotlib.style", extra, purpose).context("adamjax.plots"):
        yield


def subplots(
    size: tuple[float, float], rows: int = 1, columns: int = 1, *, sharey: bool | Literal["row"] = False
) -> tuple[Any, Any]:
    """Return a figure of `size` inches, and an array of its axes, in the style of the context."""
    figure = require("matplotlib.figure", "demo", "drawing").Figure(size)
    axes = figure.subplots(rows, columns, squeeze=False, sharey=sharey)
    for panel in axes.flat:
        for axis in (panel.xaxis, panel.yaxis):
            _ = axis.majorTicks, axis.minorTicks  # made when they are first read: now, in this style
    return figure, axes


def label_log_axes(panel: Any) -> None:
    """Set ticks that are readable on logarithmic axes of a few decades, once their limits are known."""
    ticker = require("matplotlib.ticker", "demo", "drawing")
    beside = int(1.5 * panel.figure.get_figwidth() / panel.get_gridspec().ncols)  # three labels in two inches
    for axis, count in ((panel.xaxis, beside), (panel.yaxis, None)):
        if axis.get_scale() == "log":
            low, high = sorted(axis.get_view_interval())
            axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,), numticks=count))
            axis.set_major_formatter(ticker.FormatStrFormatter("%g"))
            axis.set_minor_formatter(ticker.NullFormatter())


def shades(count: int) -> Any:
    """Return float[count, 4], the colours of values in order, from dark to light, without those that white hides."""
    return require("matplotlib", "demo", "drawing").colormaps["viridis"](np.linspace(0, 0.8, count))


@styled("demo", "writing a picture")
def png(figure: Any) -> bytes:
    """Return the content of a PNG file of a figure."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    return picture.getvalue()


def suits_logarithm(y: ArrayLike) -> bool:
    """Return whether an axis of these values should be logarithmic: none is negative, and they span a decade."""
    y = np.asarray(y, np.float64)
    positive = y[np.isfinite(y) & (y > 0)]
    return not np.any(y < 0) and positive.size > 0 and bool(positive.max() >= 10 * positive.min())
