"""Checkpoints of `adamjax train`: saved during a run, and restored to resume it."""

import sys
from pathlib import Path
from typing import NamedTuple

from jax.sharding import Mesh

from adamjax import DamagedFileError, Transformation, checkpoint, training
from adamjax._core import checks, processes
from adamjax._core.optional import require
from adamjax._core.typing import PyTree
from adamjax.checkpoint._step_folder import set_aside
from adamjax.cli._flags import Options
from adamjax.problems import Problem
from adamjax.run_folder import Record, read_metrics

FOLDER = "checkpoints"


class RunHistory(NamedTuple):
    """The part of a run that was done before."""

    start: checkpoint.Checkpoint | None = None
    done: int = 0  # number of updates that need not be done again
    records: list[Record] | None = None  # the measurements up to there; None for a new run


def load_history(run: Path, problem: Problem, opt: Transformation, options: Options, mesh: Mesh | None) -> RunHistory:
    """Return the history of the run in a folder, which has these flags, for these devices."""
    records, steps = read_metrics(run), options["steps"]
    if not ((run / FOLDER).exists() and checkpoint.steps(run / FOLDER)):
        # A run without checkpoints is either finished or done again.
        finished = "checkpoint_every" not in options and any(record["step"] == steps for record in records)
        return RunHistory(None, steps, records) if finished else RunHistory(None, 0, [])
    like = training.model_like(problem, options.get("dtype"), mesh)
    start = _restore_newest_whole(run / FOLDER, opt, like.params, like.state)
    records = [record for record in records if record["step"] <= start.step]
    # Ctrl-C evaluates at a step at which an uninterrupted run does not.
    if records and start.step % options["evaluate_every"] and start.step < steps:
        records[-1] = {name: x for name, x in records[-1].items() if not name.startswith("val_")}
    return RunHistory(start, start.step, records)


def _restore_newest_whole(
    directory: Path, opt: Transformation, params: PyTree, model_state: PyTree
) -> checkpoint.Checkpoint:
    """Restore the newest step that is whole; say which are damaged, and rename them so that later ones can be saved."""
    damaged: dict[int, DamagedFileError] = {}
    for step in reversed(checkpoint.steps(directory)):
        try:
            start = checkpoint.restore(directory, opt, params, model_state=model_state, step=step)
        except DamagedFileError as error:
            damaged[step] = error
            continue
        with processes.together():
            for other, why in damaged.items() if processes.is_first() else ():
                aside = set_aside(directory, other)
                # The cause does not offer another step.
                print(f"adamjax: {why.__cause__}: going on from step {step}; see {aside}", file=sys.stderr)
        return start
    first = next(iter(damaged.values()))
    remedy = f"no step is whole: without {directory}, --resume starts the run from its beginning"
    raise DamagedFileError(first.path, f"{first.__cause__}; {remedy}", first.step)


class Writer:
    """Saves checkpoints, if the flags ask for them, at reports: then all losses are in `metrics.jsonl`."""

    def __init__(self, run: Path, opt: Transformation, options: Options, done: int) -> None:
        self._directory, self._opt, self._seed, self._last = run / FOLDER, opt, options["seed"], done
        self._every: int | None = options.get("checkpoint_every")
        if self._every is not None:
            checks.count("checkpoint_every", self._every)
            require("orbax.checkpoint", "checkpoint", "--checkpoint-every")

    def save_if_due(self, report: training.Report, *, last: bool = False) -> None:
        """Save a report if a checkpoint is due or it is the last one, unless it diverged."""
        if self._every is None or report.diverged_at is not None:
            return
        # Due steps are multiples of the interval, wherever a run was interrupted.
        if report.step // self._every > self._last // self._every or (last and report.step > self._last):
            run = {"step": report.step, "key": self._seed, "model_state": report.model_state}
            checkpoint.save(self._directory, self._opt, report.params, report.state, **run)
            self._last = report.step
