"""What a tuning is about: the space and the defaults of an optimizer, and how to name it all."""

import hashlib
import importlib
import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from adamjax._core.low_precision import is_low_precision
from adamjax.optimizers import adamw
from adamjax.problems import Problem
from adamjax.tuning._space import Setting, Space, printed
from adamjax.tuning._strategy import RANGES

Stages = str | Sequence[str | Sequence[str]]


def space_of(optimizer: Callable[..., Any], space: Space | None, stages: Stages, *, half: bool) -> Space:
    """The space to search, within the stages: `space`, or Adam's ranges of the arguments of `optimizer`.

    Those that it has by `functools.partial` are not searched.

    Raises:
      ValueError: A stage names what is in neither, or there are no stages.
    """
    if not isinstance(stages, Sequence):
        raise TypeError(f'Invalid stages value: {stages!r}; stages must be "adam", or the arguments of each stage')
    asked = None if isinstance(stages, str) else [n for s in stages for n in ((s,) if isinstance(s, str) else s)]
    if isinstance(stages, str) and stages != "adam":
        raise ValueError(f'Invalid stages value: {stages!r}; stages must be "adam", or the arguments of each stage')
    if asked is not None and not (asked and all(s for s in stages)):
        raise ValueError(f"Invalid stages value: {stages!r}; every stage needs at least one argument")
    if not isinstance(space, Space | None):
        raise TypeError(f"Invalid space value: {space!r}; space must be a Space, or None")
    if space is not None:
        known, ranges = space.free, space.ranges
    else:
        takes = inspect.signature(optimizer).parameters
        any_name = any(p.kind is p.VAR_KEYWORD for p in takes.values())
        known = [name for name in RANGES if (any_name or name in takes) and name not in _given(optimizer)]
        ranges = {name: RANGES[name] for name in known if half or name != "eps" or asked}
    for name in asked or ():
        if name not in known:
            raise ValueError(f"Invalid stages value: {name!r} has no range, only {', '.join(known)}; add one to space")
    if asked is not None:
        ranges = {n: r for n, r in ranges.items() if n in asked or n not in known}
    if not ranges:
        raise ValueError(f"{name_of(optimizer)} has none of the arguments {', '.join(RANGES)}: give a space")
    return Space.of(ranges)


def defaults_of(optimizer: Callable[..., Any], space: Space) -> Setting:
    """The setting of the defaults: the optimizer's own; where it has none, adamw's; else the middle of the range."""
    own, usual = (inspect.signature(f).parameters for f in (optimizer, adamw))
    setting = space.at(dict.fromkeys(space.free, 0.5))
    for name in space.free:
        given = [p[name].default for p in (own, usual) if name in p and p[name].default is not inspect.Parameter.empty]
        if given:
            setting[name] = given[0]
    return setting


def _given(optimizer: Callable[..., Any]) -> dict[str, Any]:
    """The arguments that `functools.partial` gives it."""
    return optimizer.keywords | _given(optimizer.func) if isinstance(optimizer, partial) else {}


def name_of(optimizer: Callable[..., Any]) -> str:
    """An expression for it, as far as there is one: adamjax.adamw."""
    if isinstance(optimizer, partial):
        given = [*map(printed, optimizer.args), *(f"{k}={printed(x)}" for k, x in optimizer.keywords.items())]
        return f"functools.partial({', '.join([name_of(optimizer.func), *given])})"
    if not hasattr(optimizer, "__qualname__"):
        return printed(optimizer)
    package, name = optimizer.__module__.split(".")[0], optimizer.__qualname__
    public = getattr(importlib.import_module(package), name, None) is optimizer
    return f"{package if public else optimizer.__module__}.{name}"


def name_of_problem(problem: Problem) -> str:
    """How it prints; its class where that would be an address."""
    return type(problem).__qualname__ if type(problem).__repr__ is object.__repr__ else printed(problem)


def parameters_of(problem: Problem) -> str:
    """A short description of the parameters, different for different trees."""
    tree = shapes_of(problem)
    leaves = jax.tree.leaves(tree)
    digest = hashlib.sha256(
        str([(path, x.shape, str(x.dtype)) for path, x in jax.tree.leaves_with_path(tree)]).encode()
    )
    return f"{sum(x.size for x in leaves)} in {len(leaves)} arrays ({digest.hexdigest()[:8]})"


def is_half(problem: Problem) -> bool:
    """Whether some parameters are of half precision."""
    dtypes = {x.dtype for x in jax.tree.leaves(shapes_of(problem))}
    return any(jnp.issubdtype(d, jnp.floating) and is_low_precision(d) for d in dtypes)


def shapes_of(problem: Problem) -> Any:
    return jax.eval_shape(problem.init, jax.eval_shape(jax.random.key, 0))
