"""The optimizer and the configuration of `adamjax train`, for problems and objectives alike."""

import jax
from jax.sharding import Mesh

import adamjax
from adamjax import schedules
from adamjax._core import checks
from adamjax._core.typing import ScheduleLike
from adamjax.cli import _config, _flags
from adamjax.cli._flags import Options
from adamjax.run_folder import RunFolder
from adamjax.sharding import zero1

# Skipped steps allowed in a row. The initial loss scale needs 15 to come down.
MAX_SKIPPED = 50


def make_schedule(options: Options) -> ScheduleLike:
    peak = checks.number("learning_rate", options["learning_rate"])
    if warmup := _flags.own_warmup(options):
        _flags.schedule_options(options)  # refuses those of other schedules
        return schedules.linear(peak / warmup, peak, total_steps=warmup - 1) if warmup > 1 else schedules.constant(peak)
    schedule: ScheduleLike = getattr(schedules, options["schedule"])(peak, **_flags.schedule_options(options))
    return schedule


def make_optimizer(schedule: ScheduleLike, options: Options, mesh: Mesh | None = None) -> adamjax.Transformation:
    make = getattr(adamjax, options["optimizer"])
    optimizer = make(schedule, **_flags.hyperparameters(make, options))
    if "rounding" in options:
        optimizer = getattr(adamjax, options["rounding"])(optimizer)
    if mesh is not None:
        optimizer = zero1(optimizer, mesh=mesh, axis=mesh.axis_names)
    limit = options.get("skip_nonfinite")
    if options.get("dtype") == "float16":
        return adamjax.dynamic_loss_scale(optimizer, max_consecutive=MAX_SKIPPED if limit is None else limit)
    return optimizer if limit is None else adamjax.skip_nonfinite(optimizer, max_consecutive=limit)


def title(options: Options, optimizer: adamjax.Transformation) -> str:
    """Return the title of a picture of a run: the problem, and the optimizer with its hyperparameters."""
    return f"{_flags.subject(options)}\n{optimizer!r}"


def write_config(folder: RunFolder, options: Options, optimizer: adamjax.Transformation) -> None:
    flags = {name: x for name, x in options.items() if name not in _config.PLACES}
    versions = {"adamjax": adamjax.__version__, "jax": jax.__version__}
    folder.write_config({"flags": flags, "optimizer": repr(optimizer), "versions": versions})
