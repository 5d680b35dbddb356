"""What a benchmark found, as data, and how it is shown.

A benchmark is a module with a function `tables(quick)` that yields a `Table` as soon as it has one. `show` prints them,
`python -m benchmarks` also keeps them.
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
    """A picture of a column of ratios, a bar for each row, with a mark where another column has its limit."""

    column: str
    limit: str | None = None


class Curves(NamedTuple):
    """A picture of lines through points, both axes logarithmic."""

    x: str
    y: str
    lines: dict[str, dict[float, float]]


@dataclass(frozen=True)
class Table:
    """Figures, with what they are.

    Fields:
      name: Short, of its own.
      title: What was done with what, and what the figures are.
      columns: The headings; the first is of the names of the rows.
      rows: Of each, its name and its figures: ratios, numbers, text, or None where there is nothing to measure.
      seconds: What was timed, by name and round.
      picture: What is drawn of it.
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
    """A figure, as text."""
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
    """The command line of a benchmark that runs alone."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes: to see that it runs")
    return parser


def measured(name: str, quick: bool) -> tuple[str, list[Table]]:
    """What a benchmark says of itself, and what it finds, on the CPU if it is not that of a GPU: once in a process."""
    if name != "gpu":
        jax.config.update("jax_platforms", "cpu")
    module = importlib.import_module(f"benchmarks.bench_{name}")
    return module.__doc__ or "", show(module.tables(quick))


def show(tables: Iterable[Table]) -> list[Table]:
    """Print each when it is there."""
    found = []
    for table in tables:
        print(table.markdown(), flush=True)
        found.append(table)
    return found
