"""`adamjax train`."""

import argparse
import contextlib
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

import adamjax
from adamjax import safety, schedules, training
from adamjax._core.optional import require
from adamjax._core.processes import broadcast
from adamjax._core.progress import is_live, progress_bar
from adamjax._core.signals import STOPPED
from adamjax._core.text import printable
from adamjax._core.typing import ScheduleLike
from adamjax.cli import _arguments, _distributed, _flags, _subject, _train_checkpoints, _train_objective, _train_setup
from adamjax.cli._diagnosis import Diagnosis
from adamjax.cli._flags import CommandError, Options
from adamjax.problems import Problem
from adamjax.run_folder import Record, RunFolder, claim

_FAILED, _DIVERGED = 1, 1

# Flags of a problem. Whether an objective was given them matters, so the parser does not know these values.
_DEFAULTS: Options = {"steps": 1000, "schedule": "warmup_cosine", "report_every": 10, "evaluate_every": 100}


def add_parser(commands: _flags.Subparsers) -> None:
    train = commands.add_parser(
        "train",
        help="train a model and draw its curves",
        description="Train a classifier of handwritten digits, or a model of your own. Writes config.json (the flags), "
        f"metrics.jsonl (the losses) and curves.png to a folder. {_subject.KINDS} An objective is called once; its "
        "reports are the metrics.",
        argument_default=argparse.SUPPRESS,
    )
    _subject.add_argument(train, old_flag=True)
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
    add("--learning-rate", "--lr", type=float, default=3e-3, help="learning rate, at its peak (default: 3e-3)")
    schedule = "course of the learning rate (default: warmup_cosine; of an objective: constant; schedule_free_adamw: "
    add("--schedule", choices=_flags.SCHEDULES, help=schedule + "constant, after a warmup)")
    _flags.add_flags(rate, _flags.SCHEDULE_OPTIONS)
    optimizer = _flags.add_optimizer(train, _flags.OPTIMIZER_HELP)
    _arguments.add_fix(optimizer)
    optimizer.add_argument(
        "--rounding",
        choices=("stochastic_rounding", "kahan", "master_weights"),
        help="rounding of half precision parameters (default: to nearest)",
    )
    optimizer.add_argument(
        "--skip-nonfinite",
        type=int,
        metavar="N",
        help="skip updates whose gradients are not finite, and stop after N of them in a row (default: skip none; "
        f"with float16 {_train_setup.MAX_SKIPPED}, and the loss scale adapts)",
    )


def _add_run_flags(run: argparse._ArgumentGroup) -> None:
    add = run.add_argument
    add("--steps", type=int, help="updates (default: 1000; an objective finds them in trial.budget, by default None)")
    add("--dtype", choices=_flags.DTYPES, help="dtype of the parameters (default: the problem's own)")
    add("--seed", type=int, default=0, help="seed of parameters, data order and dropout (default: 0)")
    add("--report-every", type=int, help="updates between lines of metrics.jsonl (default: 10)")
    add("--evaluate-every", type=int, help="updates between validations (default: 100)")
    add("--checkpoint-every", type=int, help="updates between checkpoints, which are saved at reports (default: none)")
    add("--out", type=Path, metavar="FOLDER", help="folder to write (default: the next free runs/train-N)")
    earlier = run.add_mutually_exclusive_group()
    earlier.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="config.json of a run to repeat; other flags override it (default: none)",
    )
    earlier.add_argument(
        "--resume",
        type=Path,
        metavar="FOLDER",
        help="continue a run from its last checkpoint (from its start, if it has none); the result is that of an "
        "uninterrupted run, so of its flags only --checkpoint-every and those of the processes can be changed "
        "(default: a new run)",
    )
    trust = "import the module of the problem that a config.json names, which runs its code"
    add("--allow-import", action="store_true", help=trust)
    diagnose = "measure the update after each report, draw diagnostics.png, and say at the end, and in diagnostics.html"
    diagnose += ", what is wrong"
    add("--diagnose", action="store_true", help=f"{diagnose} (a resumed run: only since it was resumed)")
    add("--tensorboard", action="store_true", help="also write the measurements for TensorBoard")


def run(options: Options) -> int:
    folder = options.get("resume") or options.get("out")
    with _distributed.process_group(options) as group, group.watched(folder):
        with _flags.errors_for_users(options["problem"]):
            subject = _subject.load(options)
        if _subject.is_objective(subject):
            return _train_objective.run(subject, options)
        options = _DEFAULTS | ({"schedule": "constant"} if _flags.has_own_warmup(options) else {}) | options
        with group.stop_on_signals() as stop:
            with _flags.errors_for_users(options["problem"]):
                prepared = _prepare(subject, options, group, stop)
            if prepared.folder is None:
                return _run_as_follower(prepared, options)
            with contextlib.closing(prepared.folder):
                return _run_as_leader(prepared, prepared.folder, options)


class _PreparedRun(NamedTuple):
    folder: RunFolder | None  # of the process that writes for all
    path: Path
    schedule: ScheduleLike
    optimizer: adamjax.Transformation
    history: _train_checkpoints.RunHistory
    reports: Iterator[training.Report]
    checkpoints: _train_checkpoints.Writer


def _prepare(
    problem: Problem, options: Options, group: _distributed.ProcessGroup, stop: Callable[[], bool]
) -> _PreparedRun:
    if options.get("diagnose") and _flags.has_own_warmup(options):
        raise CommandError(
            f"--diagnose measures first moments, and {options['optimizer']} keeps none: leave --diagnose out"
        )
    schedule = _train_setup.make_schedule(options)
    optimizer = _train_setup.make_optimizer(schedule, options, group.mesh)
    folder, history = None, _train_checkpoints.RunHistory()
    if "resume" in options:
        folder = _open(options["resume"]) if group.is_leader else None
        history = _train_checkpoints.load_history(options["resume"], problem, optimizer, options, group.mesh)
    checkpoints = _train_checkpoints.Writer(optimizer, options, history.done)
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
    if group.is_leader:
        if is_live():
            require("tqdm", "demo", "the progress bar")
        require("matplotlib", "demo", "drawing curves.png")
        folder = folder or _open(options["out"] if "out" in options else claim(Path("runs"), "train"))
    path = Path(broadcast(str(folder.path if folder else "")))
    return _PreparedRun(folder, path, schedule, optimizer, history, reports, checkpoints)


def _open(path: Path) -> RunFolder:
    folder = RunFolder(path)
    if folder.stale is not None:
        print(f"adamjax: {path} was in use by {folder.stale}, which ended without a word", file=sys.stderr)
    return folder


def _run_as_leader(run: _PreparedRun, folder: RunFolder, options: Options) -> int:
    """Train in the process that prints and writes for all."""
    with _flags.errors_for_users():
        folder.begin(run.history.records)
        diagnosis = Diagnosis(run.path, options)
        if run.history.done == options["steps"]:
            folder.plot(_train_setup.title(options, run.optimizer))
            print(f"{run.path} is finished: all its {run.history.done} steps are done")
            return 0
        _train_setup.write_config(folder, options, run.optimizer)
    rate = jax.jit(run.schedule)
    failure: FloatingPointError | None = None
    failed = False
    with progress_bar(options["steps"], "step", "demo", done=run.history.done) as bar:
        try:
            for report in run.reports:
                record = _record(report, rate)
                try:
                    if report.stopped and report.metrics is None and _is_between_records(report.step, options):
                        folder.keep_losses(report.step, report.losses.tolist())
                    folder.log(record)
                    if run.checkpoints.is_due(report):
                        folder.sync()
                        run.checkpoints.save(report, run.path)
                    measured = diagnosis.add(report.step, record, report.stats)
                except OSError as error:  # a full disk, say
                    raise CommandError(str(error)) from error
                shown = [f"{name} {record[name]:.3g}" for name in ("loss", "learning_rate") if name in record]
                shown += measured
                bar.set_postfix_str(", ".join(shown), refresh=False)
                bar.update(report.step - bar.n)
        except FloatingPointError as error:
            failure = error
        except Exception as error:
            known = error if isinstance(error, CommandError) else _out_of_memory(error)
            # Of many processes, the group says how to resume.
            if jax.process_count() > 1 or ("checkpoint_every" not in options and known is None):
                raise
            bar.close()
            if known is None:
                traceback.print_exc()
            else:
                known.show("train")
            failed = True
        finally:
            with _flags.without("curves.png"):
                folder.plot(_train_setup.title(options, run.optimizer))
    if failed and run.checkpoints.has_saved:
        print(f"adamjax: failed, see above; adamjax train --resume {run.path} goes on", file=sys.stderr)
    if failed:
        return _FAILED
    diagnosis.finish()
    if failure is not None:
        print(f"adamjax: {failure}", file=sys.stderr)
        return _DIVERGED
    return _summarize(run, report, rate, options)


def _out_of_memory(error: Exception) -> CommandError | None:
    """Return the error in one line, if the device has too little memory for the run."""
    first = str(error).partition("\n")[0].rstrip(".")
    if not isinstance(error, jax.errors.JaxRuntimeError) or "RESOURCE_EXHAUSTED" not in first:
        return None
    return CommandError(f"{first}: try a smaller --batch-size, or moments of fewer bits (--mu-dtype, --nu-dtype)")


def _summarize(run: _PreparedRun, report: training.Report, rate: Callable[[int], jax.Array], options: Options) -> int:
    """Print the result of a run, and return its exit code."""
    if (skipped := safety.skipped(report.state)) is not None:
        print(f"{skipped} steps were skipped because their gradients were not finite")
    metrics = ", ".join(f"{name} {x:.4g}" for name, x in (report.metrics or {}).items())
    print(printable(f"validation after {report.step} steps: {metrics}"))
    print(f"wrote config.json, metrics.jsonl and curves.png to {run.path}")
    code = _exit_code(report, options)
    if code == _DIVERGED:
        print(_advice(report, rate, options), file=sys.stderr)
    if code == STOPPED and run.checkpoints.can_save:
        print(f"adamjax: stopped; adamjax train --resume {run.path} goes on", file=sys.stderr)
    return code


def _run_as_follower(run: _PreparedRun, options: Options) -> int:
    """Train in a process that neither prints nor writes."""
    if run.history.done == options["steps"]:
        return 0
    try:
        for report in run.reports:
            if run.checkpoints.is_due(report):
                run.checkpoints.save(report, run.path)
    except FloatingPointError:
        return _DIVERGED
    return _exit_code(report, options)


def _exit_code(report: training.Report, options: Options) -> int:
    if report.diverged_at is not None:
        return _DIVERGED
    return 0 if report.step == options["steps"] else STOPPED


def _record(report: training.Report, rate: Callable[[int], jax.Array]) -> Record:
    record: Record = {"step": report.step}
    if report.stopped and report.metrics is not None:  # the report that comes again
        return record | _validation(report)
    if len(report.losses):
        record["loss"] = float(np.mean(report.losses))
        record["learning_rate"] = float(rate(report.step - 1))
    return record | _validation(report)


def _is_between_records(step: int, options: Options) -> bool:
    return bool(step % options["report_every"] and step % options["evaluate_every"])


def _validation(report: training.Report) -> Record:
    return {f"val_{name}": x for name, x in (report.metrics or {}).items()}


def _advice(report: training.Report, rate: Callable[[int], jax.Array], options: Options) -> str:
    """Return a message that says where a run diverged, and what to try."""
    step = report.diverged_at or 0
    if step == 1:
        return "adamjax: the loss was not finite before the first update: look at the problem's data, init and loss."
    tries = [f"a --learning-rate below {options['learning_rate']:g} (a tenth, say)"]
    takes = inspect.signature(getattr(schedules, options["schedule"])).parameters
    if "warmup_steps" in takes or _flags.has_own_warmup(options):
        tries.append("more --warmup-steps")
    if options.get("dtype", "float32") == "float16":
        tries.append("--dtype bfloat16 or float32, whose range is larger")
    at = f"at step {step} (learning rate {float(rate(step - 1)):.3g})"
    return f"adamjax: the loss was not finite {at}. Try {', or '.join(tries)}."
