"""Values and ranges of the optimizer's arguments, as `--fix` and `--range` take them."""

import argparse
from typing import Any

from adamjax.cli import _flags
from adamjax.cli._flags import CommandError, Flags
from adamjax.tuning import Choice, Linear, Log
from adamjax.tuning._space import OneMinus, Range

_ARGUMENTS: Flags = {"learning_rate": {"type": float}} | _flags.HYPERPARAMETERS
_LOG_RATIO = 10  # from which on a range of positive numbers is logarithmic
_FORMS = (
    "expected NAME=LOW..HIGH, as in learning_rate=1e-4..1e-1, with log: or lin: before LOW to choose the scale; or "
    "NAME=A,B, as in amsgrad=false,true"
)


def add_fix(group: argparse._ActionsContainer) -> None:
    keep = "keep an argument of the optimizer at a value, as in b1=0.9; can be repeated"
    group.add_argument("--fix", action="append", type=_fixed, metavar="NAME=VALUE", help=keep)


def add_range(group: argparse._ActionsContainer) -> None:
    search = (
        "search an argument of the optimizer in this range, as in learning_rate=1e-4..1e-1; can be repeated. The scale "
        f"is logarithmic if LOW is above 0 and HIGH at least {_LOG_RATIO} times LOW, otherwise linear; log: or lin: "
        "before LOW chooses it. one_minus_b1=0.01..0.3 is a range of 1 - b1, and amsgrad=false,true a choice. All "
        "other arguments keep their default ranges, and no range test places the learning rate"
    )
    group.add_argument("--range", action="append", type=_range, metavar="NAME=RANGE", help=search)


def _fixed(text: str) -> tuple[str, Any]:
    """Return the name and the value in `NAME=VALUE`; the value is that of the flag of this name."""
    name, equals, value = text.partition("=")
    if not equals:
        raise CommandError(f"--fix {text}: expected NAME=VALUE, as in b1=0.9")
    return name, _value(f"--fix {text}", name, value)


def _range(text: str) -> tuple[str, Range]:
    """Return the name and the range in `NAME=RANGE`."""
    given, _, written = text.partition("=")
    where, name = f"--range {text}", given.removeprefix("one_minus_")
    keywords = _keywords(where, name)
    low, dots, high = written.partition("..")
    if not dots:
        if given != name or "," not in written:
            raise CommandError(f"{where}: {_FORMS}")
        return name, Choice(*(_flags.as_argument(name, _value(where, name, x)) for x in written.split(",")))
    if keywords.get("type") is not float:
        raise CommandError(f"{where}: {name} is not a number; list its values, as in amsgrad=false,true")
    interval = _interval(where, low, high)
    return name, interval if given == name else OneMinus(interval)


def _interval(where: str, low: str, high: str) -> Log | Linear:
    scale, colon, start = low.rpartition(":")
    try:
        a, b = float(start), float(high)
        if colon and scale not in ("log", "lin"):
            raise ValueError(scale)
    except ValueError as error:
        raise CommandError(f"{where}: {_FORMS}") from error
    make = {"log": Log, "lin": Linear, "": Log if 0 < _LOG_RATIO * a <= b else Linear}[scale]
    try:
        return make(a, b)
    except ValueError as error:
        raise CommandError(f"{where}: {error}") from error


def _keywords(where: str, name: str) -> dict[str, Any]:
    if name not in _ARGUMENTS:
        raise CommandError(
            f"{where}: {name or 'nothing'} is not an argument of an optimizer, expected one of {', '.join(_ARGUMENTS)}"
        )
    return _ARGUMENTS[name]


def _value(where: str, name: str, text: str) -> Any:
    keywords = _keywords(where, name)
    choices = keywords.get("choices") or ((False, True) if "action" in keywords else ())
    try:
        x = keywords.get("type", _flags.boolean_or_name)(text)
    except ValueError as error:
        raise CommandError(f"{where}: {text or 'nothing'} is not a number, as {name} must be") from error
    if choices and x not in choices:
        listed = ", ".join(str(c).lower() if isinstance(c, bool) else c for c in choices)
        raise CommandError(f"{where}: {text or 'nothing'} is not a value of {name}, expected one of {listed}")
    return x
