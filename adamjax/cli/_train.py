"""`adamjax train`."""

import argparse
import inspect
import signal
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

import adamjax
from adamjax import safety, schedules, training
from adamjax._core import checks
from adamjax._core.optional import require
from adamjax.cli import _checkpoints, _distributed, _flags
from adamjax.cli._diagnosis import Diagnosis
from adamjax.run_folder import RunFolder, next_free
from adamjax.sharding import zero1

# In a row. The scale of the loss needs 15 to come down from where it begins.
_MOST_SKIPPED = 50

_DIVERGED, _STOPPED = 1, 130

# Not kept with a run.
_OF_THIS_START = ("config", "out", "resume", *_distributed.PLACE)


def add_parser(commands: Any) -> argparse.ArgumentParser:
    train = commands.add_parser(
        "train",
        help="train a model and draw its curves",
        description="Train a classifier of handwritten digits, or a problem of your own.",
        argument_default=argparse.SUPPRESS,
    )
    run = train.add_argument_group("the run")
    run.add_argument(
        "--problem",
        default="digits",
        help=_flags.PROBLEM_HELP,
    )
    run.add_argument("--steps", type=int, default=1000, help="updates (default: 1000)")
    _flags.add_flags(run, _flags.PROBLEM_OPTIONS)
    run.add_argument("--dtype", choices=_flags.DTYPES, help="dtype of the parameters (default: the problem's own)")
    run.add_argument("--seed", type=int, default=0, help="of parameters, data order and loss (default: 0)")
    run.add_argument(
        "--report-every", type=int, default=10, help="updates between lines of metrics.jsonl (default: 10)"
    )
    run.add_argument("--evaluate-every", type=int, default=100, help="updates between validations (default: 100)")
    run.add_argument(
        "--checkpoint-every", type=int, help="updates between checkpoints, which are made at reports (default: none)"
    )
    run.add_argument("--out", type=Path, help="folder to write (default: the next free runs/train-N)")
    earlier = run.add_mutually_exclusive_group()
    earlier.add_argument("--config", type=Path, help="config.json of a run to do again; other flags override it")
    earlier.add_argument(
        "--resume",
        type=Path,
        metavar="FOLDER",
        help="go on with a run from its last checkpoint (from its start, if it has none) to the result it would have "
        "had; of its flags, only --checkpoint-every and the place (on how many processes) can be changed: all others "
        "are part of that result",
    )
    run.add_argument(
        "--diagnose",
        action="store_true",
        help="measure the update after each report, draw diagnostics.png, and say in the end what is wrong "
        "(of a resumed run, since it was resumed)",
    )
    run.add_argument(
        "--tensorboard", action="store_true", help="write what is measured for TensorBoard, too, into the folder"
    )
    many = train.add_argument_group(
        "many devices",
        "Each takes a part of each batch, and keeps a part of the optimizer's state (ZeRO-1). In a cluster that JAX "
        "knows (Slurm, Open MPI, Kubernetes, GKE, ...), --distributed is enough.",
    )
    many.add_argument(
        "--distributed", action="store_true", help="train on all devices of all processes, which all run this command"
    )
    _flags.add_flags(many, _distributed.PLACE)
    rate = train.add_argument_group("the learning rate")
    rate.add_argument("--learning-rate", type=float, default=3e-3, help="its peak (default: 3e-3)")
    rate.add_argument(
        "--schedule", choices=_flags.SCHEDULES, default="warmup_cosine", help="its course (default: warmup_cosine)"
    )
    _flags.add_flags(rate, _flags.SCHEDULE_OPTIONS)
    optimizer = train.add_argument_group("the optimizer", _flags.OPTIMIZER_HELP)
    optimizer.add_argument("--optimizer", choices=_flags.OPTIMIZERS, default="adamw", help="which (default: adamw)")
    _flags.add_flags(optimizer, _flags.HYPERPARAMETERS)
    optimizer.add_argument(
        "--rounding",
        choices=("stochastic_rounding", "kahan", "master_weights"),
        help="how half precision parameters are rounded (default: to nearest)",
    )
    optimizer.add_argument(
        "--skip-nonfinite",
        type=int,
        metavar="N",
        help="skip steps whose gradients are not finite, and stop after N of them in a row (float16: always, and "
        f"{_MOST_SKIPPED} by default, with a scale of the loss that adapts)",
    )
    return train


def run(options: dict[str, Any]) -> int:
    """Train, and leave a folder."""
    stop = CtrlC()
    folder = options.get("resume") or options.get("out")
    with _distributed.joined(options) as group, group.watched(folder):
        with _flags.refusals(options["problem"]):
            prepared = _prepare(options, group, group.any(stop))
        with stop:
            return _lead(prepared, options) if group.leads else _follow(prepared, options)


class _Run(NamedTuple):
    """A run that is to begin, or to go on."""

    path: Path
    schedule: Any
    optimizer: adamjax.Transformation
    past: _checkpoints.Past
    reports: Iterator[training.Report]
    checkpoints: _checkpoints.Writer


def _prepare(options: dict[str, Any], group: _distributed.Group, stop: Callable[[], bool]) -> _Run:
    peak = checks.number("learning_rate", options["learning_rate"])
    schedule = getattr(schedules, options["schedule"])(peak, **_flags.schedule_options(options))
    optimizer = _optimizer(schedule, options, group.mesh)
    problem = _flags.problem(options)
    path = options.get("resume") or options.get("out") or group.agreed(next_free(Path("runs"), "train"))
    past = _checkpoints.Past()
    if "resume" in options:
        past = _checkpoints.past(path, problem, optimizer, options, group.mesh)
    checkpoints = _checkpoints.Writer(path, optimizer, options, past.done)
    reports = training.train(
        problem,
        optimizer,
        steps=options["steps"],
        seed=options["seed"],
        dtype=options.get("dtype"),
        report_every=options["report_every"],
        evaluate_every=options["evaluate_every"],
        stop=stop,
        start=past.start,
        diagnose=options.get("diagnose", False),
        mesh=group.mesh,
    )
    return _Run(path, schedule, optimizer, past, reports, checkpoints)


def _lead(run: _Run, options: dict[str, Any]) -> int:
    """Do all of it that is done in one process only."""
    with _flags.refusals():
        tqdm = require("tqdm", "demo", "the progress bar").tqdm
        require("matplotlib", "demo", "drawing curves.png")
        folder = RunFolder(run.path, run.past.records)
        diagnosis = Diagnosis(run.path, options)
    if run.past.done == options["steps"]:
        folder.plot()
        print(f"{run.path} is finished: all its {run.past.done} steps are done")
        return 0
    folder.write_config(
        {
            "flags": {name: x for name, x in options.items() if name not in _OF_THIS_START},
            "optimizer": repr(run.optimizer),
            "versions": {"adamjax": version("adamjax"), "jax": jax.__version__},
        }
    )
    rate = jax.jit(run.schedule)
    hopeless: FloatingPointError | None = None
    with tqdm(total=options["steps"], initial=run.past.done, unit="step", dynamic_ncols=True) as bar:
        try:
            for report in run.reports:
                record = _record(report, rate)
                folder.log(record)
                shown = [f"{name} {record[name]:.3g}" for name in ("loss", "learning_rate") if name in record]
                shown += diagnosis.offer(report.step, record, report.stats)
                bar.set_postfix_str(", ".join(shown), refresh=False)
                bar.update(report.step - bar.n)
                run.checkpoints.offer(report)
            run.checkpoints.offer(report, last=True)
        except FloatingPointError as error:
            hopeless = error
        finally:
            folder.plot()
    diagnosis.finish()
    if hopeless is not None:
        print(f"adamjax: {hopeless}", file=sys.stderr)
        return _DIVERGED
    if (skipped := safety.skipped(report.state)) is not None:
        print(f"{skipped} steps were skipped, whose gradients were not finite")
    metrics = ", ".join(f"{name} {x:.4g}" for name, x in (report.metrics or {}).items())
    print(f"validation after {report.step} steps: {metrics}")
    print(f"wrote config.json, metrics.jsonl and curves.png to {folder.path}")
    code = _code(report, options)
    if code == _DIVERGED:
        print(_advice(report, rate, options), file=sys.stderr)
    if code == _STOPPED and "checkpoint_every" in options:
        print(f"adamjax: stopped; adamjax train --resume {run.path} goes on", file=sys.stderr)
    return code


def _follow(run: _Run, options: dict[str, Any]) -> int:
    """Do all of it that is done in every process."""
    if run.past.done == options["steps"]:
        return 0
    try:
        for report in run.reports:
            run.checkpoints.offer(report)
        run.checkpoints.offer(report, last=True)
    except FloatingPointError:
        return _DIVERGED
    return _code(report, options)


def _code(report: training.Report, options: dict[str, Any]) -> int:
    """The exit code of a run by its last report."""
    if report.diverged_at is not None:
        return _DIVERGED
    return 0 if report.step == options["steps"] else _STOPPED


def _optimizer(schedule: Any, options: dict[str, Any], mesh: Mesh | None) -> adamjax.Transformation:
    make = getattr(adamjax, options["optimizer"])
    optimizer = make(schedule, **_flags.hyperparameters(make, options))
    if "rounding" in options:
        optimizer = getattr(adamjax, options["rounding"])(optimizer)
    if mesh is not None:
        optimizer = zero1(optimizer, mesh=mesh, axis=mesh.axis_names)
    most = options.get("skip_nonfinite")
    if options.get("dtype") == "float16":
        return adamjax.dynamic_loss_scale(optimizer, max_consecutive=_MOST_SKIPPED if most is None else most)
    return optimizer if most is None else adamjax.skip_nonfinite(optimizer, max_consecutive=most)


def _record(report: training.Report, rate: Callable[[int], Any]) -> dict[str, Any]:
    record: dict[str, Any] = {"step": report.step}
    if len(report.losses):
        record["loss"] = float(np.mean(report.losses))
        record["learning_rate"] = float(rate(report.step - 1))
    return record | {f"val_{name}": x for name, x in (report.metrics or {}).items()}


def _advice(report: training.Report, rate: Callable[[int], Any], options: dict[str, Any]) -> str:
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


class CtrlC:
    """Within its context, the first Ctrl-C makes it true; the second interrupts as ever."""

    def __init__(self) -> None:
        self._pressed = False

    def __call__(self) -> bool:
        return self._pressed

    def __enter__(self) -> None:
        self._before = signal.signal(signal.SIGINT, self._press)

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _press(self, *_: object) -> None:
        self._pressed = True
        signal.signal(signal.SIGINT, self._before)
