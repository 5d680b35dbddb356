"""The command line: `adamjax train` and `adamjax lr-range`."""

import argparse
import importlib
import inspect
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

import adamjax
from adamjax import _checks, problems, schedules, training, tuning
from adamjax._extras import require
from adamjax.run_folder import RunFolder

OPTIMIZERS = ("adam", "adamax", "adamaxw", "adamw", "amsgrad", "nadam", "nadamw", "radam")
PROBLEMS = ("characters", "digits", "digits_convnet")
SCHEDULES = ("constant", "cosine", "inverse_sqrt", "linear", "one_cycle", "warmup_cosine", "warmup_stable_decay")

PROBLEM_HELP = f"{', '.join(PROBLEMS)} (default: digits), or MODULE:OBJECT, a problem or what makes one"
OPTIMIZER_HELP = "Hyperparameters that are not given are adamjax's defaults."

_DTYPES = ("bfloat16", "float16", "float32")
_AMSGRAD = ("torch", "corrected", "paper")

Flags = dict[str, dict[str, Any]]

# Flags by the names that the optimizers' signatures have for them.
HYPERPARAMETERS: Flags = {
    "b1": {"type": float, "help": "decay rate of the first moment"},
    "b2": {"type": float, "help": "decay rate of the second moment"},
    "eps": {"type": float, "help": "added to the root of the second moment"},
    "eps_root": {"type": float, "help": "added under the root of the second moment"},
    "threshold": {"type": float, "help": "radam: length of average from which on the second moment is used"},
    "weight_decay": {"type": float, "help": "weight decay"},
    "decay_schedule": {"choices": ("lr", "independent"), "help": "what the weight decay is multiplied by"},
    "mu_dtype": {"choices": _DTYPES, "help": "how the first moment is stored"},
    "nu_dtype": {"choices": _DTYPES, "help": "how the second moment is stored"},
    "nesterov": {"action": argparse.BooleanOptionalAction, "help": "look ahead by one step"},
    "amsgrad": {"choices": _AMSGRAD, "help": "divide by the largest second moment so far"},
    "variant": {"choices": _AMSGRAD, "help": "amsgrad: which form of it"},
    "maximize": {"action": argparse.BooleanOptionalAction, "help": "ascend instead of descend"},
}

# The same for the schedules.
SCHEDULE_OPTIONS: Flags = {
    "warmup_steps": {"type": int, "help": "steps of warmup (default: a tenth of --steps)"},
    "decay_steps": {"type": int, "help": "warmup_stable_decay: steps of decay (default: a fifth of --steps)"},
    "end": {"type": float, "help": "learning rate at the end (default: 0)"},
}

# The same for functions that make a problem.
PROBLEM_OPTIONS: Flags = {
    "batch_size": {"type": int, "help": "examples per update (default: the problem's own)"},
}


class CommandError(Exception):
    """What was asked for cannot be done; the message says why, and what to do."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0: done. 1: the training diverged, or no learning rate can be suggested. 2: it could not start.
    130: stopped by Ctrl-C.
    """
    try:
        options = _parse(arguments)
        return {"train": _train, "lr-range": _lr_range}[options["command"]](options)
    except CommandError as error:
        print(f"adamjax: error: {error}", file=sys.stderr)
        return 2


def _parse(arguments: Sequence[str] | None) -> dict[str, Any]:
    """The flags by name; those that have no value are absent."""
    parser = argparse.ArgumentParser("adamjax", description="Adam for JAX.")
    parser.add_argument("--version", action="version", version=f"adamjax {version('adamjax')}")
    commands = parser.add_subparsers(dest="command", required=True)
    train = _train_parser(commands)
    _lr_range_parser(commands)
    options = vars(parser.parse_args(arguments))
    if "config" in options:
        try:
            train.set_defaults(**json.loads(options["config"].read_text())["flags"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CommandError(f"--config {options['config']} is not the config.json of a run ({error!r})") from error
        options = vars(parser.parse_args(arguments))
    return options


def _train_parser(commands: Any) -> argparse.ArgumentParser:
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
        help=PROBLEM_HELP,
    )
    run.add_argument("--steps", type=int, default=1000, help="updates (default: 1000)")
    _add_flags(run, PROBLEM_OPTIONS)
    run.add_argument("--dtype", choices=_DTYPES, help="dtype of the parameters (default: the problem's own)")
    run.add_argument("--seed", type=int, default=0, help="of parameters, data order and loss (default: 0)")
    run.add_argument(
        "--report-every", type=int, default=10, help="updates between lines of metrics.jsonl (default: 10)"
    )
    run.add_argument("--evaluate-every", type=int, default=100, help="updates between validations (default: 100)")
    run.add_argument("--out", type=Path, help="folder to write (default: the next free runs/train-N)")
    run.add_argument("--config", type=Path, help="config.json of a run to do again; other flags override it")
    rate = train.add_argument_group("the learning rate")
    rate.add_argument("--learning-rate", type=float, default=3e-3, help="its peak (default: 3e-3)")
    rate.add_argument(
        "--schedule", choices=SCHEDULES, default="warmup_cosine", help="its course (default: warmup_cosine)"
    )
    _add_flags(rate, SCHEDULE_OPTIONS)
    optimizer = train.add_argument_group("the optimizer", OPTIMIZER_HELP)
    optimizer.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw", help="which (default: adamw)")
    _add_flags(optimizer, HYPERPARAMETERS)
    return train


def _lr_range_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "lr-range",
        help="find the range of usable learning rates",
        description="Train with learning rates from far too small to far too large, and watch the training loss.",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("problem", nargs="?", default="digits", help=PROBLEM_HELP)
    _add_flags(parser, PROBLEM_OPTIONS)
    parser.add_argument("--min-lr", type=float, default=1e-6, help="the smallest (default: 1e-6)")
    parser.add_argument("--max-lr", type=float, default=1.0, help="the largest (default: 1)")
    parser.add_argument("--steps", type=int, default=200, help="updates of each run (default: 200)")
    parser.add_argument(
        "--mode", choices=("ramp", "constant"), default="ramp", help="one run, or one for each rate (default: ramp)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of parameters, data order and loss (default: 0)")
    parser.add_argument("--plot", type=Path, help="where to draw the curve, a .png, .pdf or .svg")
    parser.add_argument("--format", choices=("table", "json"), default="table", help="of the output (default: table)")
    optimizer = parser.add_argument_group("the optimizer", OPTIMIZER_HELP)
    optimizer.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw", help="which (default: adamw)")
    _add_flags(optimizer, HYPERPARAMETERS)


def _add_flags(group: Any, flags: Flags) -> None:
    for name, keywords in flags.items():
        group.add_argument(f"--{name.replace('_', '-')}", **keywords)


def _train(options: dict[str, Any]) -> int:
    stop = CtrlC()
    with _refusals():
        tqdm = require("tqdm", "demo", "the progress bar").tqdm
        require("matplotlib", "demo", "drawing curves.png")
        schedule = _schedule(options)
        make = getattr(adamjax, options["optimizer"])
        optimizer = make(schedule, **_accepted(make, options, HYPERPARAMETERS, options["optimizer"]))
        reports = training.train(
            _problem(options),
            optimizer,
            steps=options["steps"],
            seed=options["seed"],
            dtype=options.get("dtype"),
            report_every=options["report_every"],
            evaluate_every=options["evaluate_every"],
            stop=stop,
        )
        folder = RunFolder(options["out"]) if "out" in options else RunFolder.new(Path("runs"))
    folder.write_config(
        {
            "flags": {name: x for name, x in options.items() if name not in ("command", "config", "out")},
            "optimizer": repr(optimizer),
            "versions": {"adamjax": version("adamjax"), "jax": jax.__version__},
        }
    )
    rate = jax.jit(schedule)
    with stop, tqdm(total=options["steps"], unit="step", dynamic_ncols=True) as bar:
        try:
            for report in reports:
                record = _record(report, rate)
                folder.log(record)
                shown = (f"{name} {record[name]:.3g}" for name in ("loss", "learning_rate") if name in record)
                bar.set_postfix_str(", ".join(shown), refresh=False)
                bar.update(report.step - bar.n)
        finally:
            folder.plot()
    metrics = ", ".join(f"{name} {x:.4g}" for name, x in (report.metrics or {}).items())
    print(f"validation after {report.step} steps: {metrics}")
    print(f"wrote config.json, metrics.jsonl and curves.png to {folder.path}")
    if report.diverged_at is not None:
        print(_advice(report.diverged_at, float(rate(report.diverged_at - 1)), options), file=sys.stderr)
        return 1
    return 130 if stop() else 0


def _lr_range(options: dict[str, Any]) -> int:
    with _refusals():
        make = getattr(adamjax, options["optimizer"])
        found = tuning.lr_range_test(
            _problem(options),
            min_lr=options["min_lr"],
            max_lr=options["max_lr"],
            num_steps=options["steps"],
            mode=options["mode"],
            optimizer=partial(make, **_accepted(make, options, HYPERPARAMETERS, options["optimizer"])),
            seed=options["seed"],
        )
        if "plot" in options:
            found.plot(options["plot"])
    suggestions = found.suggestions
    if options["format"] == "json":
        band = found.band if suggestions else None
        print(json.dumps({"suggestions": suggestions, "band": band, "warnings": found.warnings}))
    else:
        for method, rate in suggestions.items():
            print(f"{method:12} {rate:.3g}")
        if suggestions:
            print(f"{'usable':12} {found.band[0]:.3g} to {found.band[1]:.3g}")
        for warning in found.warnings:
            print(f"adamjax: {warning}", file=sys.stderr)
    return 0 if suggestions else 1


def _record(report: training.Report, rate: Callable[[int], Any]) -> dict[str, Any]:
    record: dict[str, Any] = {"step": report.step}
    if len(report.losses):
        record["loss"] = float(np.mean(report.losses))
        record["learning_rate"] = float(rate(report.step - 1))
    return record | {f"val_{name}": x for name, x in (report.metrics or {}).items()}


def _advice(step: int, rate: float, options: dict[str, Any]) -> str:
    tries = [f"a --learning-rate below {options['learning_rate']:g} (a tenth, say)"]
    if "warmup_steps" in inspect.signature(getattr(schedules, options["schedule"])).parameters:
        tries.append("more --warmup-steps")
    if options.get("dtype", "float32") == "float16":
        tries.append("--dtype bfloat16 or float32, whose range is larger")
    return f"adamjax: the loss was not finite at step {step} (learning rate {rate:.3g}). Try {', or '.join(tries)}."


def _schedule(options: dict[str, Any]) -> schedules.Schedule:
    make, steps = getattr(schedules, options["schedule"]), options["steps"]
    peak = _checks.number("learning_rate", options["learning_rate"])
    chosen = _accepted(make, options, SCHEDULE_OPTIONS, f"the schedule {options['schedule']}")
    defaults = {"total_steps": steps, "warmup_steps": -(-steps // 10), "decay_steps": steps // 5, "end": 0.0}
    accepted = inspect.signature(make).parameters
    return make(peak, **{k: x for k, x in defaults.items() if k in accepted} | chosen)


def _problem(options: dict[str, Any]) -> problems.Problem:
    name = options["problem"]
    if name in PROBLEMS:
        made = getattr(problems, name)
    else:
        module, _, attribute = name.partition(":")
        if not attribute:
            raise CommandError(f"problem {name} is neither one of {', '.join(PROBLEMS)} nor MODULE:OBJECT")
        # As for `python -m`, modules of the folder one stands in can be named.
        sys.path.insert(0, os.getcwd())
        try:
            made = getattr(importlib.import_module(module), attribute)
        except (ModuleNotFoundError, AttributeError) as error:
            raise CommandError(f"problem {name}: {error}") from error
    if isinstance(made, type) or not isinstance(made, problems.Problem):
        if not callable(made):
            raise CommandError(f"problem {name} is {made!r}, neither a problem nor what makes one")
        return made(**_accepted(made, options, PROBLEM_OPTIONS, name))
    _accepted(lambda: made, options, PROBLEM_OPTIONS, f"{name}, which is a problem already made")
    return made


def _accepted(make: Callable[..., Any], options: dict[str, Any], flags: Flags, who: str) -> dict[str, Any]:
    """Those of `flags` that were given, all of which `make` must take."""
    given = {name: options[name] for name in flags if name in options}
    for name in given:
        if name not in inspect.signature(make).parameters:
            raise CommandError(f"--{name.replace('_', '-')} means nothing to {who}: leave it out")
    return given


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


@contextmanager
def _refusals() -> Iterator[None]:
    """What the library says of bad arguments is for the user to read, without a traceback."""
    try:
        yield
    except (ImportError, OSError, TypeError, ValueError) as error:
        raise CommandError(str(error)) from error
