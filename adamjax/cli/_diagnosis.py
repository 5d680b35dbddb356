"""What `adamjax train --diagnose` and `--tensorboard` add to a run."""

from pathlib import Path
from typing import Any

from adamjax.diagnostics import AdamStats, History, LogWriter

PICTURE = "diagnostics.png"


class Diagnosis:
    """Collects what is measured in a run; does nothing if that was not asked for.

    Args:
      run: The folder of the run.
      options: Its flags.

    Raises:
      ImportError: The log for TensorBoard needs something that is not installed.
    """

    def __init__(self, run: Path, options: dict[str, Any]) -> None:
        self._picture = run / PICTURE
        self._history = History()
        self._writer = LogWriter(run / "tensorboard") if options.get("tensorboard") else None

    def offer(self, step: int, record: dict[str, Any], stats: AdamStats | None) -> list[str]:
        """Take what is known of a step; what of it is to be shown in a line."""
        if self._writer is not None:
            self._writer.scalars(step, {name: x for name, x in record.items() if name != "step"})
        if stats is None:
            return []
        self._history.append(stats)
        if self._writer is not None:
            self._writer.write(stats)
        found = stats.overall
        return [
            f"gradient {found.gradient_norm:.2g}",
            f"update/parameter {found.update_ratio:.2g}",
            f"eps dominates {100 * found.eps_dominated:.0f} %",
            f"lost {100 * found.lost:.0f} %",
        ]

    def finish(self) -> None:
        """Draw the picture, and say what was found."""
        if self._writer is not None:
            self._writer.close()
        if not len(self._history):
            return
        self._history.plot(self._picture)
        findings = self._history.explain()
        for finding in findings:
            print(finding)
        print(f"diagnosis: {len(findings) or 'no'} finding{'' if len(findings) == 1 else 's'}; see {self._picture}")
