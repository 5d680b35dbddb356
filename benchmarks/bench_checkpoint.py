"""Cost of digests and of fsync in checkpoints:  python -m benchmarks.bench_checkpoint [--quick]

Parameters of normal noise and the two moments of Adam, all in float32, are saved and restored: by orbax's manager
alone, and by `adamjax.checkpoint`, which also writes all files to disk before a step counts, and verifies what it
restores. They lie in a folder of the working directory, which is removed at the end.
"""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

import adamjax
from adamjax import checkpoint
from benchmarks._measure import Run, interleaved, ratio
from benchmarks._report import Table, command, show

LEAVES = 8
OPT = adamjax.adam()


def state_of(size: int) -> tuple[Any, Any]:
    """Return parameters and a state of so many bytes."""
    keys = jax.random.split(jax.random.key(0), 3 * LEAVES)
    leaves = [jax.random.normal(key, (size // (12 * LEAVES * 1000), 1000)) for key in keys]
    params, mu, nu = (dict(enumerate(leaves[i::3])) for i in range(3))
    inner, *rest = OPT.init(params)
    return params, (inner._replace(mu=mu, nu=nu), *rest)


def runs(folder: Path, size: int) -> dict[str, Run]:
    params, state = state_of(size)
    arrays = {"params": params, "state": state}
    ours, theirs = folder / "adamjax", folder / "orbax"
    checkpoint.save(ours, OPT, params, state, step=0)

    def save() -> None:
        checkpoint.save(ours, OPT, params, state, step=checkpoint.steps(ours)[-1] + 1, keep=1)

    def manager() -> Any:
        options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False, max_to_keep=1)
        return ocp.CheckpointManager(theirs, options=options)

    def orbax_save() -> None:
        with manager() as orbax:
            orbax.save((orbax.latest_step() or 0) + 1, args=ocp.args.StandardSave(arrays), force=True)

    def orbax_restore() -> None:
        with manager() as orbax:
            jax.block_until_ready(orbax.restore(orbax.latest_step(), args=ocp.args.StandardRestore(arrays)))

    def restore(verify: bool) -> None:
        jax.block_until_ready(checkpoint.restore(ours, OPT, params, state=state, verify=verify).params)

    orbax_save()
    return {
        "orbax saves": orbax_save,
        "save": save,
        "orbax restores": orbax_restore,
        "restore": lambda: restore(True),
        "restore, verify=False": lambda: restore(False),
    }


def tables(quick: bool) -> Iterator[Table]:
    for size in (10**6,) if quick else (200 * 10**6, 10**9):
        folder = Path(tempfile.mkdtemp(prefix="checkpoints-", dir=Path.cwd()))
        try:
            seconds = interleaved(runs(folder, size), 0 if quick else 7)
        finally:
            shutil.rmtree(folder)
        rows: list[list[Any]] = []
        for name, times in seconds.items():
            base = seconds["orbax saves" if "save" in name else "orbax restores"]
            rows.append([name, ratio(times, base), float(np.median(times))])
        columns = ["", "time / orbax alone", "seconds"]
        yield Table(f"checkpoint_{size}", f"checkpoints of {size // 10**6} MB", columns, rows, seconds)


if __name__ == "__main__":
    show(tables(command(__doc__).parse_args().quick))
