"""The ranges of an optimizer's arguments that are searched where none are given."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from adamjax.interop._muon import muon
from adamjax.optimizers import ademamix, simplified_ademamix
from adamjax.tuning._courses import Scheduled
from adamjax.tuning._space import Choice, Linear, Log, OneMinus, OptimizerFactory, Range, Setting
from adamjax.tuning._strategy import RANGES

# Arguments beside Adam's, and arguments on another scale than Adam's. Published runs of AdEMAMix are far longer than
# those of a search: b3 from 0.999 to 0.9999 and alpha from 2 to 10 (Pagliardini et al., 2024). Those of the simplified
# one have b1 from 0.99 to 0.9999 and alpha from 0 to 200 (Morwani et al., 2025).
_OWN: tuple[tuple[OptimizerFactory, Mapping[str, Range]], ...] = (
    (ademamix, {"b3": OneMinus(Log(1e-4, 0.1)), "alpha": Linear(0.0, 10.0)}),
    (
        simplified_ademamix,
        {"learning_rate": Log(1e-6, 1.0), "b1": OneMinus(Log(1e-3, 0.6)), "alpha": Log(0.1, 200.0)},
    ),
    (muon, {"beta": OneMinus(Log(0.02, 0.6))}),
)
# Choices that are only searched if a stage names them: each option is a program to compile.
WHEN_ASKED: Mapping[str, Range] = {"cautious": Choice(False, True), "cautious_decay": Choice(False, True)}


def default_ranges(optimizer: OptimizerFactory) -> dict[str, Range]:
    """Return the ranges of the arguments that an optimizer takes and that `functools.partial` does not fix."""
    takes, fixed, function = inspect.signature(optimizer).parameters, _fixed_arguments(optimizer), _function(optimizer)
    any_name = any(p.kind is p.VAR_KEYWORD for p in takes.values())
    own = next((ranges for f, ranges in _OWN if f is function), {})
    ranges = {name: own.get(name, r) for name, r in RANGES.items() if any_name or name in takes}
    ranges |= {name: r for name, r in {**own, **WHEN_ASKED}.items() if name in takes and name not in ranges}
    return {name: r for name, r in ranges.items() if name not in fixed}


def from_adam(optimizer: OptimizerFactory) -> Callable[[Setting], Setting]:
    """Return the function that makes of a setting for Adam one with which `optimizer` steps about as far."""
    if _function(optimizer) is not simplified_ademamix:
        return dict
    defaults = {p.name: p.default for p in inspect.signature(optimizer).parameters.values()}

    def scaled(setting: Setting) -> Setting:
        b1, alpha = (setting.get(name, defaults[name]) for name in ("b1", "alpha"))
        if callable(alpha) or "learning_rate" not in setting:
            return setting
        # The momentum is a sum of gradients, not their mean, and alpha gradients are added to it.
        return setting | {"learning_rate": setting["learning_rate"] / (1 / (1 - b1) + alpha)}

    return scaled


def _function(optimizer: OptimizerFactory) -> OptimizerFactory:
    """Return the function that makes the optimizer, inside of its schedule and of `functools.partial`."""
    while (inner := _wrapped(optimizer)) is not None:
        optimizer = inner
    return optimizer


def _wrapped(optimizer: Any) -> Any:
    if isinstance(optimizer, Scheduled):
        return optimizer.make
    return optimizer.func if isinstance(optimizer, partial) else getattr(optimizer, "__wrapped__", None)


def _fixed_arguments(optimizer: OptimizerFactory) -> set[str]:
    optimizer = optimizer.make if isinstance(optimizer, Scheduled) else optimizer
    return optimizer.keywords.keys() | _fixed_arguments(optimizer.func) if isinstance(optimizer, partial) else set()
