"""The folder of a training run: its configuration, its measurements and their picture."""

import json
import math
from pathlib import Path
from typing import Any

from adamjax._extras import require


class RunFolder:
    """Writes `config.json`, `metrics.jsonl` and `curves.png`.

    Measurements are written as they come, so whatever ends the run leaves those before it.

    Raises:
      FileExistsError: The folder holds a run already; nothing is overwritten.
    """

    def __init__(self, path: Path) -> None:
        if (path / "metrics.jsonl").exists():
            raise FileExistsError(f"{path} already holds a run: choose another --out, or remove it")
        path.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.records: list[dict[str, Any]] = []
        (path / "metrics.jsonl").touch()

    def write_config(self, config: dict[str, Any]) -> None:
        (self.path / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    def log(self, record: dict[str, Any]) -> None:
        """Append a line to `metrics.jsonl`; what is not finite becomes null, for JSON has no NaN."""
        self.records.append(record)
        line = {k: None if isinstance(x, float) and not math.isfinite(x) else x for k, x in record.items()}
        with open(self.path / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")

    def plot(self) -> None:
        """Draw everything logged against the step, one panel a quantity, into `curves.png`."""
        require("matplotlib", "demo", "drawing curves.png").use("Agg")
        import matplotlib.pyplot as plt

        # A validation metric shares the panel of the training metric of the same name.
        names = [name for record in self.records for name in record if name != "step"]
        panels = dict.fromkeys(["loss", *(name.removeprefix("val_") for name in names)])
        figure, axes = plt.subplots(
            1, len(panels), figsize=(4.5 * len(panels), 3.5), squeeze=False, layout="constrained"
        )
        for axis, panel in zip(axes[0], panels, strict=True):
            for name, style in ((panel, "-"), (f"val_{panel}", "o-")):
                points = [(r["step"], r[name]) for r in self.records if name in r]
                if points:
                    axis.plot(*zip(*points, strict=True), style, label="validation" if name != panel else "training")
            axis.set(xlabel="step", title=panel.replace("_", " "))
        axes[0][0].set_yscale("log")
        if axes[0][0].lines:
            axes[0][0].legend()
        figure.savefig(self.path / "curves.png", dpi=120)
        plt.close(figure)


def next_free(parent: Path, kind: str) -> Path:
    """The first of kind-1, kind-2, ... that is not in `parent`."""
    number = 1
    while (parent / f"{kind}-{number}").exists():
        number += 1
    return parent / f"{kind}-{number}"
