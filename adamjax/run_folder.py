"""The folder of a training run: its configuration, its measurements and a plot of them."""

import json
import math
import os
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from adamjax._core import files
from adamjax._core.figures import BLUE, RED, label_log_axes, png, styled, subplots, suits_logarithm
from adamjax._core.locks import FolderLock
from adamjax._core.text import printable

Record = dict[str, Any]  # a step and the measurements made there, by name
# The losses since the last record, by the step at which a run was stopped between two: the next record has them, too.
_STOPS = "stops.json"
_LETTERS = 60  # of a title, that fit above a panel


class RunFolder:
    """Writes `config.json`, `metrics.jsonl` and `curves.png`, as the only process that writes to the folder.

    Measurements are written as they come, so they survive however the run ends.

    Raises:
      FolderInUseError: Another process writes to the folder.
    """

    def __init__(self, path: Path) -> None:
        files.make_folder(path)
        self.path = path
        self.records: list[Record] = []
        self._metrics = path / "metrics.jsonl"
        self._lock = FolderLock(path)
        self.stale: str | None = self._lock.stale

    def begin(self, records: Iterable[Record] | None = None) -> None:
        """Begin to write. `records` are those to keep of a run that is resumed; a new run overwrites nothing.

        Raises:
          FileExistsError: This is a new run, and the folder has one already.
        """
        if records is None and os.path.lexists(self._metrics):
            raise FileExistsError(f"{self.path} already holds a run: choose another --out, or remove it")
        if records is not None:
            self.records = list(records)
            files.replace(self._metrics, "".join(map(_line, self.records)))

    def write_config(self, config: Record) -> None:
        files.replace(self.path / "config.json", json.dumps(config, indent=2) + "\n")

    def log(self, record: Record) -> None:
        self.records.append(record)
        with files.naming(self._metrics), open(self._metrics, "a", encoding="utf-8") as file:
            file.write(_line(record))

    def sync(self) -> None:
        """Write the measurements to disk: a checkpoint counts on those before it."""
        files.append(self._metrics, b"")

    def keep_losses(self, step: int, losses: Iterable[float]) -> None:
        """Keep the losses since the last record, for the next record of a run that is stopped at this step."""
        kept = {str(i): x for i, x in read_stops(self.path).items()} | {str(step): list(map(_finite, losses))}
        files.replace(self.path / _STOPS, json.dumps(kept))

    def close(self) -> None:
        """Let other processes write to the folder."""
        self._lock.release()

    @styled("demo", "drawing curves.png")
    def plot(self, title: str = "") -> None:
        """Plot all measurements against the step into `curves.png`, a panel for each quantity, below a title."""
        # A validation metric shares the panel of the training metric of that name.
        names = [name for record in self.records for name in record if name != "step"]
        panels = dict.fromkeys(["loss", *(name.removeprefix("val_") for name in names)])
        lines = [part for line in title.splitlines() for part in textwrap.wrap(printable(line), _LETTERS * len(panels))]
        figure, (axes,) = subplots((4.5 * len(panels), 3.5 + 0.2 * len(lines)), 1, len(panels))
        figure.suptitle("\n".join(lines), fontsize=9, parse_math=False, x=0.01, ha="left")
        for axis, panel in zip(axes, panels, strict=True):
            for name, style, color, label in (
                (panel, "-", BLUE, "training"),
                (f"val_{panel}", "o-", RED, "validation"),
            ):
                points = [(r["step"], r[name]) for r in self.records if name in r]
                if points:
                    axis.plot(*zip(*points, strict=True), style, color=color, label=label)
            axis.set_xlabel("step")
            axis.set_title(panel.replace("_", " "), parse_math=False)
            if f"val_{panel}" in names:
                axis.legend()
        if suits_logarithm([y for line in axes[0].lines for y in line.get_ydata()]):
            axes[0].set_yscale("log")
            label_log_axes(axes[0])
        files.replace(self.path / "curves.png", png(figure))


def read_metrics(path: Path) -> list[Record]:
    """Return the records in the `metrics.jsonl` of a folder: one for each step, in the order of their steps.

    Lines at the end that a crash left unfinished are left out; lines of the same step are one record.

    Raises:
      DamagedFileError: A line before others is no record.
    """
    metrics = path / "metrics.jsonl"
    try:
        lines = files.read(metrics).split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    found = [_record(line) for line in lines]
    last = max((i for i, record in enumerate(found) if record), default=-1)
    records = dict[int, Record]()
    for number, record in enumerate(found[: last + 1], start=1):
        if record is None:
            raise files.DamagedFileError(
                metrics, f"line {number} of {metrics} is not a record of a run: remove it, or restore the file"
            )
        if record:
            records[record["step"]] = records.get(record["step"], {}) | record
    return [records[step] for step in sorted(records)]


def read_stops(path: Path) -> dict[int, list[float]]:
    """Return the losses that `RunFolder.keep_losses` kept, by step.

    Raises:
      DamagedFileError: The file is damaged.
    """
    stops = path / _STOPS
    remedy = "remove it; then the next loss in metrics.jsonl is the mean of fewer updates"
    try:
        found = files.json_object(files.read(stops), stops, remedy)
        return {int(step): list(map(_number, losses)) for step, losses in found.items()}
    except FileNotFoundError:
        return {}
    except files.DamagedFileError:
        raise
    except (TypeError, ValueError, OverflowError) as error:
        raise files.DamagedFileError(stops, f"{stops} is damaged (it has no losses by step): {remedy}") from error


def _record(line: bytes) -> Record | None:
    """Return the record that a line has, {} for a blank line, and None for anything else."""
    if not line.strip():
        return {}
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or type(record.get("step")) is not int or record["step"] < 0:
        return None
    try:
        return {name: _number(x) for name, x in record.items()}
    except (TypeError, OverflowError):
        return None


def _number(x: Any) -> Any:
    if x is None:
        return math.nan
    if type(x) not in (int, float):
        raise TypeError
    float(x)  # an int may be too large for one
    return x


def _line(record: Record) -> str:
    """Return a record as a line of JSON; numbers that are not finite become null, since JSON has no NaN."""
    return json.dumps({name: _finite(x) for name, x in record.items()}) + "\n"


def _finite(x: Any) -> Any:
    return None if isinstance(x, float) and not math.isfinite(x) else x


def claim(parent: Path, kind: str) -> Path:
    """Make the first of the folders `kind`-1, `kind`-2, ... in `parent` that does not exist, and return its path.

    Of several processes that ask at once, each gets its own.
    """
    files.make_folder(parent)
    number = 1
    while True:
        path = parent / f"{kind}-{number}"
        try:
            path.mkdir()
        except FileExistsError:
            number += 1
        else:
            files.sync_folder(parent)
            return path
