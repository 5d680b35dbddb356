"""The problem or the objective that a command names."""

import argparse
import importlib
import inspect
import os
import reprlib
import sys
from typing import Any

from adamjax import problems
from adamjax.cli import _flags
from adamjax.cli._flags import CommandError, Options

PROBLEMS = ("characters", "digits", "digits_convnet")

_HELP = f"{', '.join(PROBLEMS)} (default: digits), or MODULE:OBJECT: a problem, an objective or a factory of your own"
KINDS = (
    "An objective is a function objective(optimizer, trial) that trains with the optimizer and returns the validation "
    "loss, or a dict of metrics. A factory is a class or a function without required arguments (but batch_size) that "
    "makes a problem or an objective."
)
_EXPECTED = "a problem, an objective(optimizer, trial), or a factory, which has no required arguments but batch_size"

Subject = Any  # a problem or an objective


def add_argument(parser: argparse.ArgumentParser, *, old_flag: bool = False) -> None:
    """Add the argument that names the subject; `old_flag` for the spelling `--problem` that it once had."""
    group = parser.add_argument_group("the problem")
    names = group.add_mutually_exclusive_group()
    if old_flag:
        names.add_argument("--problem", dest="problem_flag", help=argparse.SUPPRESS)
    names.add_argument("problem", nargs="?", metavar="PROBLEM", default="digits", help=_HELP)
    _flags.add_flags(group, _flags.PROBLEM_OPTIONS)


def load(options: Options) -> Subject:
    """Return the problem or the objective that the options name, made by its factory if it has one."""
    name = options["problem"]
    named = _find(name)
    if not isinstance(named, type) and not callable(named) and not _is_problem(named):
        raise CommandError(f"problem {name} is {reprlib.repr(named)}, expected {_EXPECTED}")
    if isinstance(named, type) or not _is_problem(named):
        required = _required_arguments(named)
        if required <= _flags.PROBLEM_OPTIONS.keys():
            return _make(named, required, options)
        if isinstance(named, type) or not _binds_two(named):
            raise CommandError(f"problem {name} takes {', '.join(sorted(required))}, expected {_EXPECTED}")
    kind = "an objective" if is_objective(named) else "a problem already made"
    _flags.accepted(lambda: named, options, _flags.PROBLEM_OPTIONS, f"{name}, which is {kind}")
    return named


def is_objective(subject: Subject) -> bool:
    return callable(subject) and not _is_problem(subject)


def _is_problem(x: object) -> bool:
    """Whether `x` is meant to be a problem: the functions that take one say what a bad one lacks."""
    return not isinstance(x, type) and any(callable(getattr(x, name, None)) for name in ("init", "loss", "evaluate"))


def _find(name: str) -> Any:
    if name in PROBLEMS:
        return getattr(problems, name)
    module, _, attribute = name.partition(":")
    if not attribute:
        raise CommandError(f"problem {name} is neither one of {', '.join(PROBLEMS)} nor MODULE:OBJECT")
    # As with `python -m`, modules of the current folder can be named.
    sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ModuleNotFoundError, AttributeError) as error:
        raise CommandError(f"problem {name}: {error}") from error


def _make(factory: Any, required: set[str], options: Options) -> Subject:
    name = options["problem"]
    given = _flags.accepted(factory, options, _flags.PROBLEM_OPTIONS, name)
    if missing := required - given.keys():
        raise CommandError(f"problem {name} needs {', '.join(map(_flags.flag, sorted(missing)))}")
    made = factory(**given)
    if not _is_problem(made) and (isinstance(made, type) or not (callable(made) and _binds_two(made))):
        raise CommandError(
            f"problem {name} made {reprlib.repr(made)}, expected a problem or an objective(optimizer, trial)"
        )
    return made


def _required_arguments(x: Any) -> set[str]:
    try:
        parameters = inspect.signature(x).parameters.values()
    except ValueError:  # some of Python's own functions and classes have none
        return set()
    return {p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}


def _binds_two(x: Any) -> bool:
    try:
        inspect.signature(x).bind(None, None)
    except (TypeError, ValueError):
        return False
    return True
