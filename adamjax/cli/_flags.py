"""Flags, problems by name, and errors for users: what the commands share."""

import argparse
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

from adamjax import problems, schedules, storage

OPTIMIZERS = ("adam", "adamax", "adamaxw", "adamw", "amsgrad", "nadam", "nadamw", "radam")
PROBLEMS = ("characters", "digits", "digits_convnet")
SCHEDULES = ("constant", "cosine", "inverse_sqrt", "linear", "one_cycle", "warmup_cosine", "warmup_stable_decay")

PROBLEM_HELP = f"{', '.join(PROBLEMS)} (default: digits), or MODULE:OBJECT, a problem or a function that makes one"
OPTIMIZER_HELP = "Hyperparameters that are not given are adamjax's defaults."

DTYPES = ("bfloat16", "float16", "float32")
FORMATS = (*DTYPES, "int8", "int4")
AMSGRAD = ("torch", "corrected", "paper")

Options = dict[str, Any]  # the values of the flags that were given, by name
Flags = dict[str, dict[str, Any]]  # keyword arguments of `add_argument`, by name of the flag
Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

# Flags by the names of the optimizers' arguments.
HYPERPARAMETERS: Flags = {
    "b1": {"type": float, "help": "decay rate of the first moment"},
    "b2": {"type": float, "help": "decay rate of the second moment"},
    "eps": {"type": float, "help": "number added to the root of the second moment"},
    "eps_root": {"type": float, "help": "number added to the second moment under the root"},
    "threshold": {"type": float, "help": "radam: length of the moving average from which the second moment is used"},
    "weight_decay": {"type": float, "help": "weight decay"},
    "decay_schedule": {"choices": ("lr", "independent"), "help": "factor of the weight decay"},
    "mu_dtype": {"choices": FORMATS, "help": "storage format of the first moment"},
    "nu_dtype": {"choices": FORMATS, "help": "storage format of the second moment"},
    "nesterov": {"action": argparse.BooleanOptionalAction, "help": "look ahead by one step"},
    "amsgrad": {"choices": AMSGRAD, "help": "divide by the largest second moment so far"},
    "variant": {"choices": AMSGRAD, "help": "amsgrad: form of the maximum"},
    "maximize": {"action": argparse.BooleanOptionalAction, "help": "ascend instead of descend"},
    "fused": {"action": argparse.BooleanOptionalAction, "help": "step in one pass over memory"},
}

# Flags by the names of the schedules' arguments.
SCHEDULE_OPTIONS: Flags = {
    "warmup_steps": {"type": int, "help": "steps of warmup (default: a tenth of --steps)"},
    "decay_steps": {"type": int, "help": "warmup_stable_decay: steps of decay (default: a fifth of --steps)"},
    "end": {"type": float, "help": "learning rate at the end (default: 0)"},
}

# Flags by the arguments of functions that make a problem.
PROBLEM_OPTIONS: Flags = {"batch_size": {"type": int, "help": "examples per update (default: the problem's own)"}}


class CommandError(Exception):
    """A command cannot be carried out; the message says why, and what to do."""

    def show(self) -> int:
        print(f"adamjax: error: {self}", file=sys.stderr)
        return 2


def flag(name: str) -> str:
    """Return the name of a flag as it is written on the command line."""
    return "--" + name.replace("_", "-")


def add_flags(group: argparse._ActionsContainer, flags: Flags) -> None:
    for name, keywords in flags.items():
        group.add_argument(flag(name), **keywords)


def add_optimizer(parser: argparse.ArgumentParser, description: str) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("the optimizer", description)
    group.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw", help="name (default: adamw)")
    add_flags(group, HYPERPARAMETERS)
    return group


def schedule_options(options: Options) -> Options:
    """Return the arguments of the chosen schedule, without its peak."""
    make, steps = getattr(schedules, options["schedule"]), options["steps"]
    given = accepted(make, options, SCHEDULE_OPTIONS, f"the schedule {options['schedule']}")
    defaults = {"total_steps": steps, "warmup_steps": -(-steps // 10), "decay_steps": steps // 5, "end": 0.0}
    return {k: x for k, x in defaults.items() if k in inspect.signature(make).parameters} | given


def make_problem(options: Options) -> problems.Problem:
    name = options["problem"]
    if name in PROBLEMS:
        named = getattr(problems, name)
    else:
        module, _, attribute = name.partition(":")
        if not attribute:
            raise CommandError(f"problem {name} is neither one of {', '.join(PROBLEMS)} nor MODULE:OBJECT")
        # As with `python -m`, modules of the current folder can be named.
        sys.path.insert(0, os.getcwd())
        try:
            named = getattr(importlib.import_module(module), attribute)
        except (ModuleNotFoundError, AttributeError) as error:
            raise CommandError(f"problem {name}: {error}") from error
    if isinstance(named, type) or not isinstance(named, problems.Problem):
        if not callable(named):
            raise CommandError(f"problem {name} is {named!r}, neither a problem nor what makes one")
        return named(**accepted(named, options, PROBLEM_OPTIONS, name))
    accepted(lambda: named, options, PROBLEM_OPTIONS, f"{name}, which is a problem already made")
    return named


def hyperparameters(make: Callable[..., object], options: Options) -> Options:
    """Return the hyperparameters that were given, as arguments of the optimizer."""
    given = accepted(make, options, HYPERPARAMETERS, options["optimizer"])
    for name in ("mu_dtype", "nu_dtype"):
        if given.get(name) in ("int8", "int4"):
            given[name] = storage.quantized(given[name])
    return given


def accepted(make: Callable[..., object], options: Options, flags: Flags, who: str) -> Options:
    """Return the options among `flags`; refuse any that `make` does not take."""
    given = {name: options[name] for name in flags if name in options}
    for name in given:
        if name not in inspect.signature(make).parameters:
            raise CommandError(f"{flag(name)} means nothing to {who}: leave it out")
    return given


@contextmanager
def errors_for_users(problem: str = "") -> Iterator[None]:
    """Turn the library's errors about arguments into a `CommandError`, which is shown without a traceback.

    If an error went through the module of the user's own `problem`, the message names the line.
    """
    try:
        yield
    except (ImportError, OSError, TypeError, ValueError) as error:
        raise CommandError(f"{error}{_line_in_problem(error, problem)}") from error


def _line_in_problem(error: Exception, problem: str) -> str:
    """Return the last line in the package of the user's problem that the error went through; empty if there is none."""
    module, _, attribute = problem.partition(":")
    package = module.partition(".")[0]
    if not attribute or package == __package__.partition(".")[0]:
        return ""
    found = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        if frame.f_globals.get("__name__", "").partition(".")[0] == package:
            found = f" ({frame.f_code.co_filename}, line {line}, in {frame.f_code.co_name})"
    return found
