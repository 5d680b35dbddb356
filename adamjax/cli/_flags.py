"""What the commands share: flags, problems by name, and errors for people to read."""

import argparse
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from adamjax import problems, schedules, storage

OPTIMIZERS = ("adam", "adamax", "adamaxw", "adamw", "amsgrad", "nadam", "nadamw", "radam")
PROBLEMS = ("characters", "digits", "digits_convnet")
SCHEDULES = ("constant", "cosine", "inverse_sqrt", "linear", "one_cycle", "warmup_cosine", "warmup_stable_decay")

PROBLEM_HELP = f"{', '.join(PROBLEMS)} (default: digits), or MODULE:OBJECT, a problem or what makes one"
OPTIMIZER_HELP = "Hyperparameters that are not given are adamjax's defaults."

DTYPES = ("bfloat16", "float16", "float32")
FORMATS = (*DTYPES, "int8", "int4")
AMSGRAD = ("torch", "corrected", "paper")

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
    "mu_dtype": {"choices": FORMATS, "help": "how the first moment is stored"},
    "nu_dtype": {"choices": FORMATS, "help": "how the second moment is stored"},
    "nesterov": {"action": argparse.BooleanOptionalAction, "help": "look ahead by one step"},
    "amsgrad": {"choices": AMSGRAD, "help": "divide by the largest second moment so far"},
    "variant": {"choices": AMSGRAD, "help": "amsgrad: which form of it"},
    "maximize": {"action": argparse.BooleanOptionalAction, "help": "ascend instead of descend"},
    "fused": {"action": argparse.BooleanOptionalAction, "help": "step in one pass over memory"},
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

    def report(self) -> int:
        """Say so, and return the exit code."""
        print(f"adamjax: error: {self}", file=sys.stderr)
        return 2


def flag(name: str) -> str:
    """As it is written on the command line."""
    return "--" + name.replace("_", "-")


def add_flags(group: Any, flags: Flags) -> None:
    """Give a parser, or a group of its flags, all of `flags`."""
    for name, keywords in flags.items():
        group.add_argument(flag(name), **keywords)


def schedule_options(options: dict[str, Any]) -> dict[str, Any]:
    """The arguments, beside the peak, of the schedule that is named."""
    make, steps = getattr(schedules, options["schedule"]), options["steps"]
    given = accepted(make, options, SCHEDULE_OPTIONS, f"the schedule {options['schedule']}")
    defaults = {"total_steps": steps, "warmup_steps": -(-steps // 10), "decay_steps": steps // 5, "end": 0.0}
    return {k: x for k, x in defaults.items() if k in inspect.signature(make).parameters} | given


def problem(options: dict[str, Any]) -> problems.Problem:
    """The problem that is named, made.

    Raises:
      CommandError: There is none of that name, or a flag means nothing to it.
    """
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
        return made(**accepted(made, options, PROBLEM_OPTIONS, name))
    accepted(lambda: made, options, PROBLEM_OPTIONS, f"{name}, which is a problem already made")
    return made


def hyperparameters(make: Callable[..., Any], options: dict[str, Any]) -> dict[str, Any]:
    """Those that were given, as the optimizer takes them."""
    given = accepted(make, options, HYPERPARAMETERS, options["optimizer"])
    for name in ("mu_dtype", "nu_dtype"):
        if given.get(name) in ("int8", "int4"):
            given[name] = storage.quantized(given[name])
    return given


def accepted(make: Callable[..., Any], options: dict[str, Any], flags: Flags, who: str) -> dict[str, Any]:
    """Those of `flags` that were given, all of which `make` must take."""
    given = {name: options[name] for name in flags if name in options}
    for name in given:
        if name not in inspect.signature(make).parameters:
            raise CommandError(f"{flag(name)} means nothing to {who}: leave it out")
    return given


@contextmanager
def refusals(problem: str = "") -> Iterator[None]:
    """What the library says of bad arguments is for the user to read, without a traceback.

    Of an error in the module of a problem of the user's own, named `problem`, it is said where.
    """
    try:
        yield
    except (ImportError, OSError, TypeError, ValueError) as error:
        raise CommandError(f"{error}{_place(error, problem)}") from error


def _place(error: Exception, problem: str) -> str:
    """The last place in the package of the problem that the error went through; empty where it did not, or is ours."""
    module, _, attribute = problem.partition(":")
    package = module.partition(".")[0]
    if not attribute or package == __package__.partition(".")[0]:
        return ""
    found = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        if frame.f_globals.get("__name__", "").partition(".")[0] == package:
            found = f" ({frame.f_code.co_filename}, line {line}, in {frame.f_code.co_name})"
    return found
