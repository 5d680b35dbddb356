"""Flags of the optimizer, its schedule and the problem, and errors for users: what the commands share."""

import argparse
import errno
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import adamjax
from adamjax import schedules, storage
from adamjax._core import checks, signals
from adamjax._core.text import printable

OPTIMIZERS = (
    "adam", "adam_atan2", "adamax", "adamaxw", "adamw", "ademamix", "adopt", "amsgrad", "nadam", "nadamw", "radam",
    "schedule_free_adamw", "simplified_ademamix", "stable_adamw",
)  # fmt: skip
SCHEDULES = ("constant", "cosine", "inverse_sqrt", "linear", "one_cycle", "warmup_cosine", "warmup_stable_decay")

OPTIMIZER_HELP = "Its arguments; those that are not given are adamjax's defaults."

DTYPES = ("bfloat16", "float16", "float32")
FORMATS = (*DTYPES, "int8", "int4")
AMSGRAD = ("torch", "corrected", "paper")

STOPPED = "adamjax: stopped"  # what a command says that a signal stopped

Options = dict[str, Any]  # the values of the flags that were given, by name
Flags = dict[str, dict[str, Any]]  # keyword arguments of `add_argument`, by name of the flag
Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def boolean_or_name(text: str) -> bool | str:
    """Return the boolean that `text` spells, or `text` itself."""
    return {"false": False, "true": True}.get(text, text)


# Flags by the names of the optimizers' arguments.
HYPERPARAMETERS: Flags = {
    "b1": {
        "type": float,
        "help": "decay rate per update of the first moment, the mean of the gradients (default: 0.9; "
        "simplified_ademamix: 0.99)",
    },
    "b2": {
        "type": float,
        "help": "decay rate per update of the second moment, the mean of their squares (default: 0.999; adam_atan2 and "
        "stable_adamw: 0.99; adopt: 0.9999; simplified_ademamix: 0.95)",
    },
    "b3": {
        "type": float,
        "help": "ademamix: decay rate per update of the slow mean of the gradients (default: 0.9999)",
    },
    "alpha": {
        "type": float,
        "help": "ademamix: weight of the slow mean (default: 5); simplified_ademamix: of the gradient (default: 0)",
    },
    "eps": {
        "type": float,
        "help": "number added to the root of the second moment (default: 1e-8; adopt and stable_adamw: 1e-6)",
    },
    "eps_root": {"type": float, "help": "number added to the second moment under the root (default: 0)"},
    "a": {"type": float, "help": "adam_atan2: factor of the angle (default: 1.27)"},
    "b": {"type": float, "help": "adam_atan2: factor of the root (default: 1)"},
    "use_clipping": {
        "action": argparse.BooleanOptionalAction,
        "help": "adopt: limit each gradient over its root, by less and less (default: true)",
    },
    "threshold": {
        "type": float,
        "help": "radam: length of the moving average, in updates, from which on the second moment is used (default: 5)",
    },
    "weight_decay": {
        "type": float,
        "help": "weight decay: decoupled from the gradient for adamw, nadamw and adamaxw (default: 1e-4), stable_adamw "
        "(default: 1e-2), schedule_free_adamw, ademamix, simplified_ademamix, adopt and adam_atan2 (default: 0), added "
        "to it for others (default: 0)",
    },
    "weight_lr_power": {
        "type": float,
        "help": "schedule_free_adamw: power of the learning rate that weights its average (default: 2)",
    },
    "decay_schedule": {
        "choices": ("lr", "independent"),
        "help": "adamw: factor of the weight decay: lr, the learning rate; independent, its part of the peak "
        "(default: lr)",
    },
    "cautious": {
        "action": argparse.BooleanOptionalAction,
        "help": "leave numbers alone whose direction opposes their gradient (default: false)",
    },
    "cautious_decay": {
        "action": argparse.BooleanOptionalAction,
        "help": "let a number decay only where that does not oppose its update (default: false)",
    },
    "mu_dtype": {"choices": FORMATS, "help": "storage format of the first moment (default: float32, or wider)"},
    "mu_slow_dtype": {"choices": FORMATS, "help": "ademamix: storage format of the slow mean (default: float32)"},
    "nu_dtype": {"choices": FORMATS, "help": "storage format of the second moment (default: float32, or wider)"},
    "nesterov": {
        "action": argparse.BooleanOptionalAction,
        "help": "look ahead by one step, as Nesterov's momentum (default: false)",
    },
    "amsgrad": {
        "type": boolean_or_name,
        "choices": (False, True, *AMSGRAD),
        "metavar": f"{{{','.join(AMSGRAD)}}}",
        "help": "divide by the largest second moment so far, as torch, as the paper, or with the bias corrected "
        "(default: false)",
    },
    "variant": {"choices": AMSGRAD, "help": "amsgrad: form of the maximum, as above (default: torch)"},
    "maximize": {"action": argparse.BooleanOptionalAction, "help": "ascend instead of descend (default: false)"},
    "fused": {
        "action": argparse.BooleanOptionalAction,
        "help": "step in one pass over memory, by a compiled kernel (default: false)",
    },
}

# Flags by the names of the schedules' arguments.
SCHEDULE_OPTIONS: Flags = {
    "warmup_steps": {"type": int, "help": "updates of warmup (default: a tenth of --steps)"},
    "decay_steps": {"type": int, "help": "warmup_stable_decay: updates of decay (default: a fifth of --steps)"},
    "end": {"type": float, "help": "learning rate at the end (default: 0)"},
}

# Flags by the arguments of functions that make a problem.
PROBLEM_OPTIONS: Flags = {"batch_size": {"type": int, "help": "examples per update (default: the problem's own)"}}


class CommandError(Exception):
    """A command cannot be carried out; the message says why, and what to do."""

    def show(self, *command: str) -> int:
        """Print the message with the name of the command, if that is known, and return the exit code."""
        if isinstance(self.__cause__, BrokenPipeError):  # of a reader that has read enough, as `head` does
            return signals.UNREAD
        print(printable(f"{' '.join(('adamjax', *command))}: error: {self}"), file=sys.stderr)
        is_full = isinstance(self.__cause__, OSError) and self.__cause__.errno in (errno.ENOSPC, errno.EDQUOT)
        return 1 if is_full else 2


def flag(name: str) -> str:
    """Return the name of a flag as it is written on the command line."""
    return "--" + name.replace("_", "-")


def subject(options: Options) -> str:
    """Return what a run is about, for headings."""
    return f"{options['problem']}, {options['optimizer']}"


def add_flags(group: argparse._ActionsContainer, flags: Flags) -> None:
    for name, keywords in flags.items():
        group.add_argument(flag(name), **keywords)


def add_optimizer(parser: argparse.ArgumentParser, description: str) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("the optimizer", description)
    group.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw", help="its name (default: adamw)")
    add_flags(group, HYPERPARAMETERS)
    return group


def has_own_warmup(options: Options) -> bool:
    """Return whether the chosen optimizer has a warmup of its own, and wants a constant rate after it."""
    return "warmup_steps" in inspect.signature(getattr(adamjax, options["optimizer"])).parameters


def own_warmup(options: Options) -> int:
    """Return the updates of the warmup of an optimizer that has one of its own; none beside another schedule."""
    if not has_own_warmup(options) or options.get("schedule", "constant") != "constant":
        return 0
    default = -(-(options.get("steps") or 0) // 10)
    return checks.count("warmup_steps", options.get("warmup_steps", default), least=0)


def schedule_options(options: Options) -> Options:
    """Return the arguments of the chosen schedule, without its peak."""
    name, steps = options["schedule"], options.get("steps")
    make = getattr(schedules, name)
    if name == "constant" and has_own_warmup(options):
        options = {option: x for option, x in options.items() if option != "warmup_steps"}
    given = accepted(make, options, SCHEDULE_OPTIONS, f"the schedule {name}")
    takes = inspect.signature(make).parameters
    defaults: Options = {"end": 0.0}
    if steps is not None:
        defaults |= {"total_steps": steps, "warmup_steps": -(-steps // 10), "decay_steps": steps // 5}
    elif "total_steps" in takes or "warmup_steps" in takes.keys() - given.keys():
        raise CommandError(f"--schedule {name} needs --steps, the number of updates that the objective does")
    return {k: x for k, x in defaults.items() if k in takes} | given


def hyperparameters(make: Callable[..., object], options: Options) -> Options:
    """Return the hyperparameters that were given, as arguments of the optimizer."""
    given = accepted(make, options, HYPERPARAMETERS, options["optimizer"])
    return {name: as_argument(name, x) for name, x in given.items()}


def as_argument(name: str, x: Any) -> Any:
    """Return the value of a hyperparameter's flag as the optimizer takes it."""
    return storage.quantized(x) if name in ("mu_dtype", "mu_slow_dtype", "nu_dtype") and x in ("int8", "int4") else x


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
    except BrokenPipeError:  # of what prints
        raise
    except (ImportError, OSError, TypeError, ValueError) as error:
        raise CommandError(f"{error}{_line_in_problem(error, problem)}") from error
    except MemoryError as error:
        raise CommandError(f"this machine's memory is too small. {error}".rstrip()) from error


@contextmanager
def without(what: str) -> Iterator[None]:
    """Say in one line that something cannot be written, as on a full disk, and go on: the run itself is kept."""
    try:
        yield
    except BrokenPipeError:  # of what prints
        raise
    except OSError as error:
        print(printable(f"adamjax: {what} was not written: {error}"), file=sys.stderr)


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
