"""The measurements that `adamjax train --diagnose` and `--tensorboard` add to a run."""

from pathlib import Path

from adamjax.cli._flags import Options, subject, without
from adamjax.diagnostics import AdamStats, History, LogWriter
from adamjax.run_folder import Record


class Diagnosis:
    """Collects the measurements of a run in its folder, if the flags ask for them."""

    def __init__(self, run: Path, options: Options) -> None:
        self._run, self._title = run, f"Diagnosis of {subject(options)}"
        self._history = History()
        self._writer = LogWriter(run / "tensorboard") if options.get("tensorboard") else None

    def add(self, step: int, record: Record, stats: AdamStats | None) -> list[str]:
        """Add the measurements of a step; return those that the progress bar shows."""
        if self._writer is not None:
            self._writer.scalars(step, {name: x for name, x in record.items() if name != "step"})
        if stats is None:
            return []
        self._history.append(stats)
        if self._writer is not None:
            self._writer.write(stats)
        overall = stats.overall
        return [
            f"gradient {overall.gradient_norm:.2g}",
            f"update/parameter {overall.update_ratio:.2g}",
            f"eps dominates {100 * overall.eps_dominated:.0f} %",
            f"lost {100 * overall.lost:.0f} %",
        ]

    def finish(self) -> None:
        if self._writer is not None:
            with without("the end of the log for TensorBoard"):
                self._writer.close()
        if not len(self._history):
            return
        seen = ""
        with without("diagnostics.html"):
            self._history.save(self._run, title=self._title)
            seen = f"; see {self._run / 'diagnostics.html'}"
        findings = self._history.explain()
        for finding in findings:
            print(finding)
        print(f"diagnosis: {len(findings) or 'no'} finding{'' if len(findings) == 1 else 's'}{seen}")
