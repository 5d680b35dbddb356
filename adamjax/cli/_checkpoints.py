"""Checkpoints of `adamjax train`: written on the way, and gone on from."""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from adamjax import checkpoint, training
from adamjax._core import checks
from adamjax._core.optional import require
from adamjax.problems import Problem
from adamjax.run_folder import Record, read_metrics

FOLDER = "checkpoints"


class Past(NamedTuple):
    """What a run has behind it.

    Fields:
      start: The last checkpoint.
      done: How many updates are not to be done again.
      records: What was measured up to there; None of a run that is new.
    """

    start: checkpoint.Checkpoint | None = None
    done: int = 0
    records: list[Record] | None = None


def past(run: Path, problem: Problem, optimizer: Any, options: dict[str, Any], mesh: Mesh | None) -> Past:
    """What the run in a folder, of these flags and on these devices, has behind it."""
    records, steps = read_metrics(run), options["steps"]
    if not ((run / FOLDER).exists() and checkpoint.steps(run / FOLDER)):
        # Without checkpoints, a run is done as a whole, or again.
        whole = "checkpoint_every" not in options and any(record["step"] == steps for record in records)
        return Past(None, steps, records) if whole else Past(None, 0, [])
    keys = jax.eval_shape(training.run_keys, options["seed"])
    params = jax.eval_shape(partial(training.first_params, problem, options.get("dtype")), keys)
    if mesh is not None:
        everywhere = NamedSharding(mesh, PartitionSpec())
        params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=everywhere), params)
    start = checkpoint.restore(run / FOLDER, optimizer, params)
    records = [record for record in records if record["step"] <= start.step]
    # Ctrl-C evaluates where a run that goes on does not.
    if records and start.step % options["evaluate_every"] and start.step < steps:
        records[-1] = {name: x for name, x in records[-1].items() if not name.startswith("val_")}
    return Past(start, start.step, records)


class Writer:
    """Saves the checkpoints of a run, if any were asked for, in a folder of their own.

    That is done at reports, when there is no loss that is not in `metrics.jsonl` yet.

    Args:
      run: The folder of the run.
      optimizer: Its optimizer.
      options: Its flags.
      done: The updates it has behind it.
    """

    def __init__(self, run: Path, optimizer: Any, options: dict[str, Any], done: int) -> None:
        self._directory, self._optimizer, self._seed, self._last = run / FOLDER, optimizer, options["seed"], done
        self._every: int | None = options.get("checkpoint_every")
        if self._every is not None:
            checks.count("checkpoint_every", self._every)
            require("orbax.checkpoint", "checkpoint", "--checkpoint-every")

    def offer(self, report: training.Report, *, last: bool = False) -> None:
        """Save a report if it is time, or the last one, unless it diverged."""
        if self._every is None or report.diverged_at is not None:
            return
        # At multiples of the distance, wherever a run was interrupted.
        if report.step // self._every > self._last // self._every or (last and report.step > self._last):
            checkpoint.save(
                self._directory, self._optimizer, report.params, report.state, step=report.step, key=self._seed
            )
            self._last = report.step
