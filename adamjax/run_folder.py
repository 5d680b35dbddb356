"""The folder of a training run: its configuration, its measurements and a plot of them."""

import itertools
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from adamjax._core import files
from adamjax._core.optional import require
from adamjax._core.processes import broadcast as broadcast

Record = dict[str, Any]  # a step and the measurements made there, by name


class RunFolder:
    """Writes `config.json`, `metrics.jsonl` and `curves.png`.

    Measurements are written as they come, so they survive however the run ends. `records` are those to keep of a
    run that is resumed, or None for a new run, which overwrites nothing.
    """

    def __init__(self, path: Path, records: Iterable[Record] | None = None) -> None:
        metrics = path / "metrics.jsonl"
        if records is None and metrics.exists():
            raise FileExistsError(f"{path} already holds a run: choose another --out, or remove it")
        path.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.records: list[Record] = list(records or ())
        if records is not None:
            files.replace(metrics, "".join(map(_line, self.records)))

    def write_config(self, config: Record) -> None:
        files.replace(self.path / "config.json", json.dumps(config, indent=2) + "\n")

    def log(self, record: Record) -> None:
        self.records.append(record)
        with open(self.path / "metrics.jsonl", "a") as file:
            file.write(_line(record))

    def plot(self) -> None:
        """Plot all measurements against the step into `curves.png`, with a panel for each quantity."""
        figures = require("matplotlib.figure", "demo", "drawing curves.png")
        # A validation metric shares the panel of the training metric of that name.
        names = [name for record in self.records for name in record if name != "step"]
        panels = dict.fromkeys(["loss", *(name.removeprefix("val_") for name in names)])
        figure = figures.Figure((4.5 * len(panels), 3.5), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axis, panel in zip(axes, panels, strict=True):
            for name, style in ((panel, "-"), (f"val_{panel}", "o-")):
                points = [(r["step"], r[name]) for r in self.records if name in r]
                if points:
                    axis.plot(*zip(*points, strict=True), style, label="validation" if name != panel else "training")
            axis.set(xlabel="step", title=panel.replace("_", " "))
        losses = [y for line in axes[0].lines for y in line.get_ydata() if math.isfinite(y)]
        if min(losses, default=0) >= 0 and any(losses):  # a logarithmic axis has no place for losses below 0
            axes[0].set_yscale("log")
        if axes[0].lines:
            axes[0].legend()
        figure.savefig(self.path / "curves.png", dpi=120)


def read_metrics(path: Path) -> list[Record]:
    """Return the records in the `metrics.jsonl` of a folder, without a last line that was not finished."""
    metrics = path / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{k: math.nan if x is None else x for k, x in record.items()} for record in records]


def _line(record: Record) -> str:
    """Return a record as a line of JSON; numbers that are not finite become null, since JSON has no NaN."""
    line = {k: None if isinstance(x, float) and not math.isfinite(x) else x for k, x in record.items()}
    return json.dumps(line) + "\n"


def next_free(parent: Path, kind: str) -> Path:
    """Return the first path of `kind`-1, `kind`-2, ... that does not exist in `parent`."""
    return next(path for i in itertools.count(1) if not (path := parent / f"{kind}-{i}").exists())
