"""Checkpoints of `adamjax train`: saved during a run, and restored to resume it."""

import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from adamjax import DamagedFileError, Transformation, checkpoint, training
from adamjax._core import checks, processes
from adamjax._core.optional import is_installed, require
from adamjax._core.typing import PyTree
from adamjax.checkpoint._step_folder import set_aside
from adamjax.cli._flags import Options
from adamjax.problems import Problem
from adamjax.run_folder import Record, read_metrics, read_stops

FOLDER = "checkpoints"


class RunHistory(NamedTuple):
    """The part of a run that was done before."""

    start: training.Report | None = None
    done: int = 0  # number of updates that need not be done again
    records: list[Record] | None = None  # the measurements up to there; None for a new run


def load_history(run: Path, problem: Problem, opt: Transformation, options: Options, mesh: Mesh | None) -> RunHistory:
    """Return the history of the run in a folder, which has these flags, for these devices."""
    records, steps = read_metrics(run), options["steps"]
    # A run without --checkpoint-every has a checkpoint only if it was stopped before its end.
    if "checkpoint_every" not in options and any(record["step"] == steps for record in records):
        return RunHistory(None, steps, records)
    if not ((run / FOLDER).exists() and checkpoint.steps(run / FOLDER)):
        return RunHistory(None, 0, [])
    like = training.model_like(problem, options.get("dtype"), mesh)
    found = _restore_newest_whole(run / FOLDER, opt, like.params, like.state)
    stops = read_stops(run)
    kept = _records_until(found.step, records, stops, options)
    losses = np.asarray(stops.get(found.step, ()), np.float64)
    start = training.Report(found.step, losses, None, found.params, found.state, model_state=found.model_state)
    return RunHistory(start, found.step, kept)


def _records_until(step: int, records: list[Record], stops: dict[int, list[float]], options: Options) -> list[Record]:
    """Return the records up to a checkpoint as an uninterrupted run has them.

    A run that was stopped has a record and an evaluation where it would have none.
    """
    kept = [record for record in records if record["step"] <= step]
    if not (kept and kept[-1]["step"] == step < options["steps"]):
        return kept
    if step in stops:
        return kept[:-1]
    if step % options["evaluate_every"]:
        kept[-1] = {name: x for name, x in kept[-1].items() if not name.startswith("val_")}
    return kept


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
    """Saves checkpoints at reports: as often as the flags ask for, at the end, and where the run is stopped."""

    def __init__(self, opt: Transformation, options: Options, done: int) -> None:
        self._opt, self._seed, self._steps, self._last = opt, options["seed"], options["steps"], done
        self._every: int | None = options.get("checkpoint_every")
        if self._every is not None:
            checks.count("checkpoint_every", self._every)
            require("orbax.checkpoint", "checkpoint", "--checkpoint-every")

    @property
    def can_save(self) -> bool:
        """Whether a run that is stopped is saved."""
        return self._every is not None or is_installed("orbax.checkpoint")

    @property
    def has_saved(self) -> bool:
        return self._last > 0

    def is_due(self, report: training.Report) -> bool:
        """Return whether a report is to be saved; none is that diverged, or that was saved before."""
        if report.diverged_at is not None or report.step <= self._last:
            return False
        if report.stopped:
            return self.can_save
        # Due steps are multiples of the interval, wherever a run was interrupted.
        every = self._every
        return every is not None and (report.step == self._steps or report.step // every > self._last // every)

    def save(self, report: training.Report, run: Path) -> None:
        about = {"step": report.step, "key": self._seed, "model_state": report.model_state}
        checkpoint.save(run / FOLDER, self._opt, report.params, report.state, **about)
        self._last = report.step
