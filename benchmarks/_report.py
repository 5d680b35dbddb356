"""Results of a benchmark as tables, and their text.

A benchmark is a module with a function `tables(quick)`, which yields each `Table` as soon as it is measured. `show`
prints the tables; `python -m benchmarks` also writes them.
"""

import argparse
import importlib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax

from benchmarks._measure import Ratio, Seconds


class Bars(NamedTuple):
    """A plot of a column of ratios: a bar for each row, and a mark at the limit in another column."""

    column: str
    limit: str | None = None


class Curves(NamedTuple):
    """A plot of lines through points, with logarithmic axes."""

    x: str
    y: str
    lines: dict[str, dict[float, float]]


@dataclass(frozen=True)
class Table:
    """Figures of a benchmark.

    Fields:
      name: A short, unique name.
      title: What was measured, and what the figures are.
      columns: The headings; the first is that of the names of the rows.
      rows: The name and the figures of each row: ratios, numbers, text, or None for figures that do not exist.
      seconds: The timings, by name and round.
      picture: The plot of the table, if it has one.
    """

    name: str
    title: str
    columns: list[str]
    rows: list[list[Any]]
    seconds: Seconds = field(default_factory=dict)
    picture: Bars | Curves | None = None

    def column(self, heading: str) -> list[Any]:
        return [row[self.columns.index(heading)] for row in self.rows]

    def markdown(self) -> str:
        lines = [self.columns, *([shown(cell) for cell in row] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
        padded.insert(1, ["-" * width for width in widths])
        return "\n".join([f"{self.title}:", "", *(f"| {' | '.join(cells)} |" for cells in padded), ""])


def shown(cell: Any) -> str:
    """Return a figure as text."""
    if isinstance(cell, Ratio):
        return f"{_number(cell.median)} ({_number(cell.low)} to {_number(cell.high)})"
    if isinstance(cell, float):
        return _number(cell)
    return "-" if cell is None else str(cell)


def _number(x: float) -> str:
    if not 0.01 <= abs(x) < math.inf:
        return f"{x:.2g}"
    return f"{x:.{2 - min(int(math.log10(max(abs(x), 1))), 2)}f}"


def command(doc: str | None) -> argparse.ArgumentParser:
    """Return the command line of a benchmark that runs alone."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="use small sizes, to see that it runs")
    return parser


def measured(name: str, quick: bool) -> tuple[str, list[Table]]:
    """Run a benchmark, on the CPU unless it is `gpu`, and return its description and tables. Once in a process."""
    if name != "gpu":
        jax.config.update("jax_platforms", "cpu")
    module = importlib.import_module(f"benchmarks.bench_{name}")
    return module.__doc__ or "", show(module.tables(quick))


def show(tables: Iterable[Table]) -> list[Table]:
    """Print each table as soon as it is measured, and return them."""
    shown_tables = []
    for table in tables:
        print(table.markdown(), flush=True)
        shown_tables.append(table)
    return shown_tables
