"""The hyperparameters of an optimizer, wherever in it they are."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from adamjax._core import checks
from adamjax._core.value import replaced
from adamjax._transforms.base import Leafwise, Transformation, contains_foreign
from adamjax._transforms.chain import Chain
from adamjax._transforms.groups import scale
from adamjax._transforms.schedule import Scaled, Schedule
from adamjax._transforms.weight_decay import AddDecayedWeights, CoupledDecay
from adamjax.scaling import _batch

_LENGTHS = ("total_steps", "warmup_steps", "decay_steps")  # fields of schedules that are numbers of steps


def changed(opt: Any, change: Callable[[str, Any], Any]) -> Any:
    """Return `opt` with `change(name, x)` in place of each hyperparameter of it and of its members."""
    changes = {}
    for field in dataclasses.fields(opt):
        x = getattr(opt, field.name)
        if isinstance(x, Transformation):
            new = changed(x, change)
        elif isinstance(x, tuple) and x and all(isinstance(member, Transformation) for member in x):
            members = [changed(member, change) for member in x]
            new = x if all(a is b for a, b in zip(members, x, strict=True)) else tuple(members)
        else:
            new = x if field.metadata.get("static") else change(field.name, x)
        if new is not x:
            changes[field.name] = new
    return replaced(opt, changes) if changes else opt


def found_in(opt: Any) -> dict[str, Any]:
    """Return the hyperparameters of `opt` and its members; of those with one name, the first."""
    found: dict[str, Any] = {}

    def record(name: str, x: Any) -> Any:
        found.setdefault(name, x)
        return x

    changed(opt, record)
    return found


def check_transferable(opt: Transformation) -> None:
    """Raise if there are no rules for `opt`."""
    if contains_foreign(opt):
        raise TypeError(
            f"{checks.shown(opt)} has a transformation from elsewhere in it, whose hyperparameters are hidden: "
            "transfer an optimizer of adamjax, and put the other one around the result"
        )
    if "learning_rate" not in found_in(opt):
        raise ValueError(
            f"{checks.shown(opt)} has no learning_rate, and transfer scales it by group: give a whole optimizer"
        )
    for member in members_of(opt):
        if isinstance(member, CoupledDecay) and not is_zero(member.weight_decay):
            raise ValueError(
                f"weight_decay={member.weight_decay} of {checks.shown(opt)} is coupled to the gradient: there is no "
                "rule for that. Use adamw, or weight_decay=0"
            )


def members_of(opt: Any) -> list[Any]:
    """Return `opt` and all transformations in it."""
    inside: list[Any] = []
    for x in vars(opt).values():
        inside += [member for member in (x if isinstance(x, tuple) else (x,)) if isinstance(member, Transformation)]
    return [opt, *(found for member in inside for found in members_of(member))]


def is_zero(x: Any) -> bool:
    return isinstance(x, (int, float)) and x == 0


def decays_after_rate(opt: Any) -> bool:
    """Return whether the weight decay is not multiplied by the learning rate: decay_schedule="independent"."""
    return any(isinstance(member, AddDecayedWeights) and member.flip_sign for member in members_of(opt))


def is_leafwise(opt: Any) -> bool:
    """Return whether `opt` treats each parameter by itself, so that groups of them can have members of their own."""
    if isinstance(opt, Chain):
        return all(map(is_leafwise, opt.transforms))
    return isinstance(opt, Leafwise) and not opt.reads_updates


def for_run(opt: Any, batch: float, steps: float, rule: str) -> Any:
    """Return `opt` with its decay rates for another batch size, and with its schedules stretched to another length."""
    names = ("b2",) if rule == "beta2_half_life" else ("b1", "b2", "b3")
    decays = {name: x for name, x in found_in(opt).items() if name in names and batch != 1}
    for name, x in decays.items():
        if not isinstance(x, float):
            raise TypeError(f"{name} is {checks.shown(x)}, and only a number can be scaled to another batch size")

    def change(name: str, x: Any) -> Any:
        if name in decays:
            return _batch.scaled_decays({name: x}, batch, rule)[name]
        return stretched(x, steps) if steps != 1 and callable(x) else x

    return changed(opt, change)


def stretched(schedule: Any, steps: float) -> Any:
    """Return a schedule that takes `steps` times as many steps."""
    if type(schedule).__module__ not in (Scaled.__module__, "adamjax.schedules") or hasattr(schedule, "function"):
        raise TypeError(
            f"steps={steps:g} cannot stretch {checks.shown(schedule)}: use one of adamjax.schedules, not a function"
        )
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(schedule):
        x = getattr(schedule, field.name)
        if isinstance(x, Schedule):
            changes[field.name] = stretched(x, steps)
        elif field.name in _LENGTHS:
            changes[field.name] = _length(field.name, x, steps)
    return dataclasses.replace(schedule, **changes)


def _length(name: str, x: Any, steps: float) -> Any:
    """A number of steps, stretched. Phases are rounded down, so that they still fit into the total."""
    if not isinstance(x, float):
        return x * steps
    return max(float(round(x * steps) if name == "total_steps" else math.floor(x * steps)), min(x, 1.0))


def overrides(opt: Any, rate: float, decay: float, eps: float) -> Mapping[str, Any]:
    """Return the hyperparameters of `opt` that these factors change, as numbers and factors: see `groups`."""
    found = found_in(opt)
    changes: dict[str, Any] = {}
    if rate != 1 and "learning_rate" in found:
        changes["learning_rate"] = scale(rate)
    if decay != 1 and not is_zero(found.get("weight_decay", 0.0)):
        changes["weight_decay"] = scale(decay)
    for name, factor in (("eps", eps), ("eps_root", eps**2)):
        if factor != 1 and not is_zero(found.get(name, 0.0)):
            changes[name] = found[name] * factor
    return changes
