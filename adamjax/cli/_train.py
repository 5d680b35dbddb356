"""`adamjax train`."""

import argparse
import inspect
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

import adamjax
from adamjax import safety, schedules, training
from adamjax._core import checks
from adamjax._core.optional import require
from adamjax._core.typing import ScheduleLike
from adamjax.cli import _distributed, _flags, _train_checkpoints
from adamjax.cli._diagnosis import Diagnosis
from adamjax.cli._flags import Options
from adamjax.run_folder import Record, RunFolder, broadcast, next_free
from adamjax.sharding import zero1

# Skipped steps allowed in a row. The initial loss scale needs 15 to come down.
_MAX_SKIPPED = 50

_DIVERGED, _STOPPED = 1, 130

_NOT_IN_CONFIG = ("config", "out", "resume", *_distributed.DISTRIBUTED_FLAGS)


def add_parser(commands: _flags.Subparsers) -> argparse.ArgumentParser:
    """Add the command to the command line, and return its parser."""
    train = commands.add_parser(
        "train",
        help="train a model and draw its curves",
        description="Train a classifier of handwritten digits, or a problem of your own.",
        argument_default=argparse.SUPPRESS,
    )
    _add_run_flags(train.add_argument_group("the run"))
    devices = train.add_argument_group(
        "many devices",
        "Each device takes a part of each batch, and keeps a part of the optimizer's state (ZeRO-1). In a cluster that "
        "JAX knows (Slurm, Open MPI, Kubernetes, GKE, ...), --distributed is enough.",
    )
    add = devices.add_argument
    add("--distributed", action="store_true", help="train on all devices of all processes, which all run this command")
    _flags.add_flags(devices, _distributed.DISTRIBUTED_FLAGS)
    rate = train.add_argument_group("the learning rate")
    add = rate.add_argument
    add("--learning-rate", type=float, default=3e-3, help="peak of the learning rate (default: 3e-3)")
    add("--schedule", choices=_flags.SCHEDULES, default="warmup_cosine", help="schedule (default: warmup_cosine)")
    _flags.add_flags(rate, _flags.SCHEDULE_OPTIONS)
    optimizer = _flags.add_optimizer(train, _flags.OPTIMIZER_HELP)
    optimizer.add_argument(
        "--rounding",
        choices=("stochastic_rounding", "kahan", "master_weights"),
        help="rounding of half precision parameters (default: to nearest)",
    )
    optimizer.add_argument(
        "--skip-nonfinite",
        type=int,
        metavar="N",
        help="skip steps whose gradients are not finite, and stop after N of them in a row (always with float16, where "
        f"N is {_MAX_SKIPPED} by default and the loss scale adapts)",
    )
    return train


def _add_run_flags(run: argparse._ArgumentGroup) -> None:
    add = run.add_argument
    add("--problem", default="digits", help=_flags.PROBLEM_HELP)
    add("--steps", type=int, default=1000, help="updates (default: 1000)")
    _flags.add_flags(run, _flags.PROBLEM_OPTIONS)
    add("--dtype", choices=_flags.DTYPES, help="dtype of the parameters (default: the problem's own)")
    add("--seed", type=int, default=0, help="seed of parameters, data order and loss (default: 0)")
    add("--report-every", type=int, default=10, help="updates between lines of metrics.jsonl (default: 10)")
    add("--evaluate-every", type=int, default=100, help="updates between validations (default: 100)")
    add("--checkpoint-every", type=int, help="updates between checkpoints, which are saved at reports (default: none)")
    add("--out", type=Path, help="folder to write (default: the next free runs/train-N)")
    earlier = run.add_mutually_exclusive_group()
    earlier.add_argument("--config", type=Path, help="config.json of a run to repeat; other flags override it")
    earlier.add_argument(
        "--resume",
        type=Path,
        metavar="FOLDER",
        help="go on with a run from its last checkpoint (from its start, if it has none); the result is that of an "
        "uninterrupted run, so of its flags only --checkpoint-every and those of the processes can be changed",
    )
    diagnose = "measure the update after each report, draw diagnostics.png, and print what is wrong at the end"
    add("--diagnose", action="store_true", help=f"{diagnose} (a resumed run: only since it was resumed)")
    add("--tensorboard", action="store_true", help="also write the measurements for TensorBoard")


def run(options: Options) -> int:
    stopped = threading.Event()
    folder = options.get("resume") or options.get("out")
    with _distributed.process_group(options) as group, group.watched(folder):
        with _flags.errors_for_users(options["problem"]):
            prepared = _prepare(options, group, group.any_process(stopped.is_set))
        with _set_by_ctrl_c(stopped):
            return (_run_as_leader if group.is_leader else _run_as_follower)(prepared, options)


class _PreparedRun(NamedTuple):
    path: Path
    schedule: ScheduleLike
    optimizer: adamjax.Transformation
    history: _train_checkpoints.RunHistory
    reports: Iterator[training.Report]
    checkpoints: _train_checkpoints.Writer


def _prepare(options: Options, group: _distributed.ProcessGroup, stop: Callable[[], bool]) -> _PreparedRun:
    peak = checks.number("learning_rate", options["learning_rate"])
    schedule = getattr(schedules, options["schedule"])(peak, **_flags.schedule_options(options))
    optimizer = _make_optimizer(schedule, options, group.mesh)
    problem = _flags.make_problem(options)
    path = options.get("resume") or options.get("out") or Path(broadcast(str(next_free(Path("runs"), "train"))))
    history = _train_checkpoints.RunHistory()
    if "resume" in options:
        history = _train_checkpoints.load_history(path, problem, optimizer, options, group.mesh)
    checkpoints = _train_checkpoints.Writer(path, optimizer, options, history.done)
    reports = training.train(
        problem,
        optimizer,
        **{name: options[name] for name in ("steps", "seed", "report_every", "evaluate_every")},
        dtype=options.get("dtype"),
        stop=stop,
        start=history.start,
        diagnose=options.get("diagnose", False),
        mesh=group.mesh,
    )
    return _PreparedRun(path, schedule, optimizer, history, reports, checkpoints)


def _run_as_leader(run: _PreparedRun, options: Options) -> int:
    """Train in the process that prints and writes for all."""
    with _flags.errors_for_users():
        tqdm = require("tqdm", "demo", "the progress bar").tqdm
        require("matplotlib", "demo", "drawing curves.png")
        folder = RunFolder(run.path, run.history.records)
        diagnosis = Diagnosis(run.path, options)
    if run.history.done == options["steps"]:
        folder.plot()
        print(f"{run.path} is finished: all its {run.history.done} steps are done")
        return 0
    flags = {name: x for name, x in options.items() if name not in _NOT_IN_CONFIG}
    versions = {"adamjax": version("adamjax"), "jax": jax.__version__}
    folder.write_config({"flags": flags, "optimizer": repr(run.optimizer), "versions": versions})
    rate = jax.jit(run.schedule)
    failure: FloatingPointError | None = None
    with tqdm(total=options["steps"], initial=run.history.done, unit="step", dynamic_ncols=True) as bar:
        try:
            for report in run.reports:
                record = _record(report, rate)
                folder.log(record)
                shown = [f"{name} {record[name]:.3g}" for name in ("loss", "learning_rate") if name in record]
                shown += diagnosis.add(report.step, record, report.stats)
                bar.set_postfix_str(", ".join(shown), refresh=False)
                bar.update(report.step - bar.n)
                run.checkpoints.save_if_due(report)
            run.checkpoints.save_if_due(report, last=True)
        except FloatingPointError as error:
            failure = error
        finally:
            folder.plot()
    diagnosis.finish()
    if failure is not None:
        print(f"adamjax: {failure}", file=sys.stderr)
        return _DIVERGED
    return _summarize(run, report, rate, options)


def _summarize(run: _PreparedRun, report: training.Report, rate: Callable[[int], jax.Array], options: Options) -> int:
    """Print the result of a run, and return its exit code."""
    if (skipped := safety.skipped(report.state)) is not None:
        print(f"{skipped} steps were skipped because their gradients were not finite")
    metrics = ", ".join(f"{name} {x:.4g}" for name, x in (report.metrics or {}).items())
    print(f"validation after {report.step} steps: {metrics}")
    print(f"wrote config.json, metrics.jsonl and curves.png to {run.path}")
    code = _exit_code(report, options)
    if code == _DIVERGED:
        print(_advice(report, rate, options), file=sys.stderr)
    if code == _STOPPED and "checkpoint_every" in options:
        print(f"adamjax: stopped; adamjax train --resume {run.path} goes on", file=sys.stderr)
    return code


def _run_as_follower(run: _PreparedRun, options: Options) -> int:
    """Train in a process that neither prints nor writes."""
    if run.history.done == options["steps"]:
        return 0
    try:
        for report in run.reports:
            run.checkpoints.save_if_due(report)
        run.checkpoints.save_if_due(report, last=True)
    except FloatingPointError:
        return _DIVERGED
    return _exit_code(report, options)


def _exit_code(report: training.Report, options: Options) -> int:
    if report.diverged_at is not None:
        return _DIVERGED
    return 0 if report.step == options["steps"] else _STOPPED


def _make_optimizer(schedule: ScheduleLike, options: Options, mesh: Mesh | None) -> adamjax.Transformation:
    make = getattr(adamjax, options["optimizer"])
    optimizer = make(schedule, **_flags.hyperparameters(make, options))
    if "rounding" in options:
        optimizer = getattr(adamjax, options["rounding"])(optimizer)
    if mesh is not None:
        optimizer = zero1(optimizer, mesh=mesh, axis=mesh.axis_names)
    limit = options.get("skip_nonfinite")
    if options.get("dtype") == "float16":
        return adamjax.dynamic_loss_scale(optimizer, max_consecutive=_MAX_SKIPPED if limit is None else limit)
    return optimizer if limit is None else adamjax.skip_nonfinite(optimizer, max_consecutive=limit)


def _record(report: training.Report, rate: Callable[[int], jax.Array]) -> Record:
    record: Record = {"step": report.step}
    if len(report.losses):
        record["loss"] = float(np.mean(report.losses))
        record["learning_rate"] = float(rate(report.step - 1))
    return record | {f"val_{name}": x for name, x in (report.metrics or {}).items()}


def _advice(report: training.Report, rate: Callable[[int], jax.Array], options: Options) -> str:
    """Return a message that says where a run diverged, and what to try."""
    step = report.diverged_at or 0
    if step == 1:
        return "adamjax: the loss was not finite before the first update: look at the problem's data, init and loss."
    tries = [f"a --learning-rate below {options['learning_rate']:g} (a tenth, say)"]
    if "warmup_steps" in inspect.signature(getattr(schedules, options["schedule"])).parameters:
        tries.append("more --warmup-steps")
    if options.get("dtype", "float32") == "float16":
        tries.append("--dtype bfloat16 or float32, whose range is larger")
    at = f"at step {step} (learning rate {float(rate(step - 1)):.3g})"
    return f"adamjax: the loss was not finite {at}. Try {', or '.join(tries)}."


@contextmanager
def _set_by_ctrl_c(stopped: threading.Event) -> Iterator[None]:
    """Set the event at a first Ctrl-C. A second one interrupts as usual."""

    def press(*_: object) -> None:
        stopped.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, press)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
