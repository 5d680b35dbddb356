"""Checkpoints of `adamjax train`: saved during a run, and restored to resume it."""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from adamjax import Transformation, checkpoint, training
from adamjax._core import checks
from adamjax._core.optional import require
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
    keys = jax.eval_shape(training.keys_of, options["seed"])
    params = jax.eval_shape(partial(training.first_params, problem, options.get("dtype")), keys)
    if mesh is not None:
        replicated = NamedSharding(mesh, PartitionSpec())
        params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=replicated), params)
    start = checkpoint.restore(run / FOLDER, opt, params)
    records = [record for record in records if record["step"] <= start.step]
    # Ctrl-C evaluates at a step at which an uninterrupted run does not.
    if records and start.step % options["evaluate_every"] and start.step < steps:
        records[-1] = {name: x for name, x in records[-1].items() if not name.startswith("val_")}
    return RunHistory(start, start.step, records)


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
            checkpoint.save(self._directory, self._opt, report.params, report.state, step=report.step, key=self._seed)
            self._last = report.step
