"""Figures of a whole run: collect, plot and log them."""

import os
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from adamjax._core import files, html
from adamjax._core.figures import label_log_axes, png, shades, styled, subplots, suits_logarithm
from adamjax._core.optional import require
from adamjax._core.text import drawable
from adamjax.diagnostics._explain import Finding, Series, explain, series
from adamjax.diagnostics._measure import AdamStats, LeafStats, check_stats

# The panels of the plot, and columns of the table: figure, title, and True for a logarithmic scale.
_PANELS = (
    ("gradient_norm", "norm of the gradient", True),
    ("update_norm", "norm of the update", True),
    ("update_ratio", "update / parameter", True),
    ("rate_median", "effective learning rate (median)", True),
    ("eps_dominated", "elements that eps dominates", False),
    ("lost", "updates lost to rounding", False),
)
_MOST_LABELS = 12
_LETTERS = 140  # of labels, that fit side by side below the panels


class History:
    """The measurements of a run, on the host.

    >>> import adamjax, jax, jax.numpy as jnp
    >>> opt, params = adamjax.adam(0.1), {"w": jnp.array([1.0, -2.0])}
    >>> state, history = opt.init(params), adamjax.diagnostics.History()
    >>> for _ in range(20):
    ...     grads = jax.tree.map(lambda p: 2 * p, params)
    ...     updates, state = opt.update(grads, state, params)
    ...     history.append(adamjax.diagnostics.measure(grads, updates, state, params, opt=opt))
    ...     params = adamjax.apply_updates(params, updates)
    >>> len(history), [finding.rule for finding in history.explain()]
    (20, ['rate_high'])
    """

    def __init__(self) -> None:
        self._stats: list[AdamStats] = []

    def append(self, stats: AdamStats) -> None:
        """Add a measurement. This waits for the device."""
        self._stats.append(jax.device_get(check_stats(stats)))

    def __iter__(self) -> Iterator[AdamStats]:
        return iter(self._stats)

    def __len__(self) -> int:
        return len(self._stats)

    def explain(self) -> list[Finding]:
        """Return the findings about the run; see `adamjax.diagnostics.explain`."""
        return explain(self._stats)

    @styled("demo", "drawing a history")
    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Plot norms, ratios, and the losses to eps and rounding over time, with a line for each parameter.

        Args:
          path: The file to write, such as "diagnostics.png". None: only return the figure.

        Returns:
          The matplotlib figure.

        Raises:
          ImportError: matplotlib is not installed.
          ValueError: Nothing has been measured.
        """
        overall, leaves = series(self._stats)
        figure, axes = subplots((12, 6.5), 2, 3)
        for axis, (name, title, logarithmic) in zip(axes.flat, _PANELS, strict=True):
            for color, leaf in zip(shades(len(leaves)), leaves, strict=True):
                _draw(axis, leaf, name, color=color, label=drawable(leaf.path or "the parameter"))
            _draw(axis, overall, name, color="black", label=drawable(overall.path), linestyle="--")
            axis.set(xlabel="step", title=title)
            if not logarithmic:
                axis.set_ylim(-0.02, 1.02)
            elif suits_logarithm(np.concatenate([line.get_ydata() for line in axis.lines])):
                axis.set_yscale("log", nonpositive="mask")
                label_log_axes(axis)
        handles, labels = axis.get_legend_handles_labels()
        if len(labels) > _MOST_LABELS:  # the first and last parameter suffice to read the colours
            handles, labels = [[x[0], *x[-2:]] for x in (handles, labels)]
        labels = [textwrap.fill(label, _LETTERS) for label in labels]
        ncols = min(5, max(1, _LETTERS // max(map(len, labels))))
        figure.legend(handles, labels, loc="outside lower center", ncols=ncols)
        if path is not None:
            figure.savefig(path, dpi=120)
        return figure

    def save(self, directory: str | os.PathLike[str], *, title: str = "Diagnosis of a run") -> None:
        """Write the plot, and a page with it, with the findings, and with the last figures of each parameter.

        The page is one file, which loads nothing, on paper and on screens, light or dark, of any width.

        Args:
          directory: The folder, which gets `diagnostics.png` and `diagnostics.html`. It is made if it does not exist.
          title: The heading of the page.

        Raises:
          ImportError: matplotlib is not installed.
          OSError: A file cannot be written.
          ValueError: Nothing has been measured.
        """
        path, picture = Path(directory), png(self.plot())
        findings, last = list(map(str, self.explain())), self._stats[-1]
        page = html.document(
            title,
            f"""<h2>Findings</h2>
{html.items(findings) if findings else "<p>None.</p>"}
{html.figure("The run", "A line is a parameter.", picture)}
<h2>Parameters</h2>
<p>{len(self)} measurements, the last at step {int(last.count)}.</p>
{html.table("Parameters", _rows(last))}""",
        )
        files.make_folder(path)
        files.replace(path / "diagnostics.png", picture)
        files.replace(path / "diagnostics.html", page)


def _rows(stats: AdamStats) -> html.Rows:
    """Return the table of the figures of all parameters together, and of each."""
    rows = [["parameter", "shape", "dtype", *(title for _, title, _ in _PANELS)]]
    rows.append(["all parameters", "", "", *_shown(stats.overall)])
    for path, shape, dtype in zip(stats.paths, stats.shapes, stats.dtypes, strict=True):
        rows.append([path or "the parameter", str(list(shape)), dtype, *_shown(stats[path])])
    return rows


def _shown(figures: LeafStats) -> list[str]:
    return [f"{float(getattr(figures, name)):.3g}" for name, _, _ in _PANELS]


def _draw(axis: Any, figures: Series, name: str, **style: Any) -> None:
    y = getattr(figures.of, name)
    axis.plot(figures.counts, np.where(np.isfinite(y), y, np.nan), marker="." if len(y) < 2 else None, **style)


def scalars(stats: AdamStats) -> dict[str, float]:
    """Return the figures by their tags in a log: "gradient_norm/all", "gradient_norm/layer_0/kernel", ...

    Args:
      stats: The result of `measure` for one step of one run.

    Returns:
      A Python float per tag: each figure for all parameters together, and for each one. If `measure` was given the
      optimizer, "learning_rate" is that of the next step; of groups, "learning_rate/bias", "learning_rate/default", ...

    Raises:
      TypeError: `stats` is something else.

    >>> import adamjax, jax.numpy as jnp
    >>> p = {"w": jnp.ones(2)}
    >>> opt = adamjax.adam(0.25)
    >>> updates, state = opt.update(p, opt.init(p), p)
    >>> tags = adamjax.diagnostics.scalars(adamjax.diagnostics.measure(p, updates, state, p, opt=opt))
    >>> list(tags)[:3], tags["learning_rate"]
    (['learning_rate', 'gradient_norm/all', 'gradient_norm/w'], 0.25)
    """
    stats = jax.device_get(check_stats(stats))
    figures = zip(LeafStats._fields, stats.overall, stats.leaves, strict=True)
    rates = stats.learning_rate if isinstance(stats.learning_rate, dict) else {"": stats.learning_rate}
    return {f"learning_rate/{group}".removesuffix("/"): float(x) for group, x in rates.items() if x is not None} | {
        f"{name}/{path}": float(x)
        for name, overall, leaves in figures
        if name not in ("size", "b2", "eps")
        for path, x in zip(("all", *stats.paths), (overall, *leaves), strict=True)
    }


class LogWriter:
    """A log for TensorBoard, with the tags of `scalars`; a context manager.

    Args:
      folder: The folder of the log.

    Raises:
      ImportError: tensorboardX is not installed.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        writers = require("tensorboardX", "tensorboard", "writing a log for TensorBoard")
        self._writer = writers.SummaryWriter(os.fspath(folder))

    def write(self, stats: AdamStats) -> None:
        """Add the measurements of one step."""
        self.scalars(int(stats.count), scalars(stats))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Add other numbers, by their tags."""
        for tag, x in values.items():
            self._writer.add_scalar(tag, x, step)

    def close(self) -> None:
        """Flush and close the file."""
        self._writer.close()

    def __enter__(self) -> "LogWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
