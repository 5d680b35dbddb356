"""The content of a tuning's files: what each field may be, and digests that tell damage."""

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from adamjax._core import checks
from adamjax.tuning._courses import COURSES

DIGEST = "digest"  # the name of the field that has it
_LARGEST = 2**63 - 1
_DIGITS = 16


class Kind(NamedTuple):
    """The values that a field may have."""

    expected: str  # in words
    fits: Callable[[Any], bool]
    optional: bool = False  # earlier versions did not write the field


def optional(kind: Kind) -> Kind:
    return kind._replace(optional=True)


def integer(least: int, most: int = _LARGEST) -> Kind:
    return Kind(f"an int from {least} to {most}", lambda x: _is_integer(x, least, most))


def one_of(*options: object) -> Kind:
    return Kind(
        f"one of {', '.join(map(repr, options))}", lambda x: any(x is o or (_is_text(x) and x == o) for o in options)
    )


def _is_integer(x: Any, least: int = 0, most: int = _LARGEST) -> bool:
    return type(x) is int and least <= x <= most


def _is_number(x: Any) -> bool:
    return (type(x) is float and math.isfinite(x)) or _is_integer(x, -_LARGEST)


def _is_text(x: Any) -> bool:
    return isinstance(x, str)


def _is_scalar(x: Any) -> bool:
    return x is None or isinstance(x, (bool, str)) or _is_number(x)


def _is_list(x: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(x, list) and all(map(fits, x))


def _is_mapping(x: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(x, dict) and all(map(fits, x.values()))


def _is_curve(x: Any) -> bool:
    return _is_list(x, lambda y: y is None or _is_number(y))


def _is_confirm(x: Any) -> bool:
    def is_pair(pair: Any) -> bool:
        return _is_list(pair, lambda n: _is_integer(n, 1)) and len(pair) == 2

    return x is None or is_pair(x) or (_is_list(x, is_pair) and bool(x))


def _is_rising(x: Any, fits: Callable[[Any], bool]) -> bool:
    return _is_list(x, fits) and all(a < b for a, b in itertools.pairwise(x))


def is_range_test(x: Any) -> bool:
    """Return whether `x` is what `LrRange.to_json` returns."""
    if not isinstance(x, dict) or x.keys() != {"learning_rates", "losses", "mode"}:
        return False
    rates, losses = x["learning_rates"], x["losses"]
    fits = _is_rising(rates, lambda rate: _is_number(rate) and rate > 0) and _is_curve(losses)
    return fits and len(rates) == len(losses) > 0 and x["mode"] in ("ramp", "constant")


TEXT = Kind("a text", _is_text)
SETTING = Kind("arguments by name", lambda x: _is_mapping(x, _is_scalar))
FLAG = one_of(True, False)

TRIAL: Mapping[str, Kind] = {
    "number": integer(0),
    "stage": TEXT,
    "setting": SETTING,
    "seed": integer(0, 2**31 - 1),
    "status": one_of("complete", "pruned", "infeasible", "failed"),
    "steps": Kind("rising ints", lambda x: _is_rising(x, _is_integer)),
    "losses": Kind("numbers or null", _is_curve),
    "metrics": Kind("numbers or null, by the name of the metric", lambda x: _is_mapping(x, _is_curve)),
    "diverged_at": integer(0),
    "error": optional(TEXT),
}

QUESTION: Mapping[str, Kind] = {
    "problem": TEXT,
    "parameters": optional(TEXT),
    "optimizer": TEXT,
    "schedule": optional(one_of("constant", *COURSES)),
    "space": optional(TEXT),
    "stages": optional(Kind("a text, or lists of them", lambda x: _is_text(x) or _is_list(x, _is_stage))),
    "sampler": optional(TEXT),
    "trials": integer(1),
    "steps": optional(Kind("an int from 1, or null", lambda x: x is None or _is_integer(x, 1))),
    "confirm": optional(Kind("two ints, or pairs of them, or null", _is_confirm)),
    "metric": TEXT,
    "mode": one_of("min", "max"),
    "seed": optional(integer(0, 2**31 - 1)),
}

DECISIONS: Mapping[str, Kind] = {
    "question": Kind("an object", lambda x: isinstance(x, dict)),
    "notes": Kind("a list of texts", lambda x: _is_list(x, _is_text)),
    "defaults": optional(SETTING),
    "range_test": optional(Kind("the curve of a range test, or null", lambda x: x is None or is_range_test(x))),
    "explored": optional(Kind("two numbers for each argument", lambda x: _is_mapping(x, _is_pair))),
    "execution": optional(TEXT),
    "order": optional(one_of("map", "vmap", "mesh")),
    "halving": optional(FLAG),
    "unknown": optional(Kind("lists of ints", lambda x: _is_mapping(x, lambda y: _is_list(y, _is_integer)))),
    "facts": optional(Kind("texts by name", lambda x: _is_mapping(x, _is_text))),
    DIGEST: optional(TEXT),
}


def _is_stage(x: Any) -> bool:
    return _is_list(x, _is_text)


def _is_pair(x: Any) -> bool:
    return _is_list(x, _is_number) and len(x) == 2 and x[0] <= x[1]


def check_fields(content: Mapping[str, Any], kinds: Mapping[str, Kind], where: str = "") -> None:
    """Check the types of the fields.

    Raises:
      ValueError: A field is missing, or is not of its kind.
    """
    for name, kind in kinds.items():
        if name not in content:
            if not kind.optional:
                raise ValueError(f"{where}{name} is missing")
        elif not kind.fits(content[name]):
            raise ValueError(f"{where}{name} is {checks.shown(content[name])}, expected {kind.expected}")


def check_decisions(decisions: Mapping[str, Any]) -> None:
    """Check all that `tune.json` holds.

    Raises:
      ValueError: A field is missing or not of its kind, or the digest is another.
    """
    check_fields(decisions, DECISIONS)
    question = decisions["question"]
    check_fields(question, QUESTION, "question: ")
    for name in question.keys() - QUESTION.keys():
        if not _is_scalar(question[name]):
            raise ValueError(f"question: {checks.shown(name)} is unknown")
    if question.get("schedule", "constant") != "constant" and question.get("steps") is None:
        raise ValueError("question: schedule needs steps")
    if ("order" in decisions) != ("halving" in decisions):
        raise ValueError("order and halving are not both there")
    check_digest(decisions)


def check_trial(fields: Mapping[str, Any], question: Mapping[str, Any]) -> None:
    """Check the fields of a line of `trials.jsonl`, of a tuning with this question.

    Raises:
      ValueError: A field is missing, unknown or not of its kind, or the digest is another.
    """
    check_fields(fields, TRIAL)
    for name in fields.keys() - TRIAL.keys() - {DIGEST}:
        raise ValueError(f"{checks.shown(name)} is unknown")
    steps = len(fields["steps"])
    if len(fields["losses"]) not in (0, steps):
        raise ValueError(f"losses has {len(fields['losses'])} numbers, expected one for each of {steps} steps")
    for name, curve in fields["metrics"].items():
        if not steps <= len(curve) <= steps + 1:
            raise ValueError(f"metrics: {checks.shown(name)} has {len(curve)} numbers, expected {steps} or {steps + 1}")
    check_digest({"error": "", **fields}, question)  # which journals did not always have


def with_digest(content: Mapping[str, Any], key: object = None) -> dict[str, Any]:
    return {**content, DIGEST: _digest(content, key)}


def check_digest(content: Mapping[str, Any], key: object = None) -> None:
    """Check the digest, if the content has one: earlier versions wrote none."""
    if content.get(DIGEST, digest := _digest(content, key)) != digest:
        raise ValueError("its digest does not fit: it was changed, or copied from another tuning")


def _digest(content: Mapping[str, Any], key: object) -> str:
    """Return a digest of JSON that does not depend on how it is written, and of a key."""
    fields = {name: x for name, x in content.items() if name != DIGEST}
    return hashlib.sha256(json.dumps([key, fields], sort_keys=True).encode()).hexdigest()[:_DIGITS]
