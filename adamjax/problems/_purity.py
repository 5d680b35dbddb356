"""Find functions that are not pure: JAX traces a function once, and would freeze what it draws or reads."""

import itertools
import pickle
import random
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.extend import core

from adamjax._core import trees
from adamjax._core.typing import PyTree

_HARMLESS_EFFECTS = ("Debug",)  # of jax.debug.print and the like


def traced(f: Callable[..., Any], *args: PyTree) -> tuple[core.ClosedJaxpr, PyTree]:
    """Return the program of `f` for abstract arguments, and the shapes of its results."""
    # A new function each time: JAX keeps the programs of functions that it knows.
    jaxpr, shapes = jax.make_jaxpr(lambda *args: f(*args), return_shape=True)(*args)
    return jaxpr, shapes


def impurity(f: Callable[..., Any], first: core.ClosedJaxpr, *args: PyTree, traces: int = 1) -> str:
    """Return how `f`, whose program is `first`, shows that it is not a pure function; empty if it does not.

    A function that draws from a generator or a loader, or reads a clock, gives another program when it is traced again.
    With more `traces`, it is found even if it draws from few numbers.
    """
    if effects := [str(effect) for effect in first.effects if not str(effect).startswith(_HARMLESS_EFFECTS)]:
        return f"has side effects ({', '.join(effects)})"
    before = _global_randomness()
    # Functions that were jitted before are traced again only in another context, such as that of a device named aloud.
    for i in range(traces):
        with jax.default_device(jax.local_devices()[i % jax.local_device_count()]):
            try:
                again, _ = traced(f, *args)
                pairs = itertools.zip_longest(_constants(first), _constants(again), fillvalue=_END)
                same = all(equal(x, y) for x, y in pairs)
            except Exception as error:  # of a loader that has ended, or of an array of the trace before
                return f"raises {type(error).__name__} when it is traced again"
        if not same:
            return "gives something else each time that it is traced"
    return "" if _global_randomness() == before else "draws from the global random numbers of NumPy or Python"


def _global_randomness() -> bytes:
    return pickle.dumps((np.random.get_state(), random.getstate()))  # noqa: NPY002 - to see that nobody uses it


def depends_on_arguments(jaxpr: core.ClosedJaxpr) -> bool:
    """Return whether any result can depend on any argument, or there is no result."""
    known = set(map(id, jaxpr.jaxpr.invars))
    for equation in jaxpr.jaxpr.eqns:
        if any(id(x) in known for x in equation.invars):
            known.update(map(id, equation.outvars))
    return not jaxpr.jaxpr.outvars or any(id(x) in known for x in jaxpr.jaxpr.outvars)


def calls_host(jaxpr: core.ClosedJaxpr) -> bool:
    """Return whether a program calls Python functions as it runs."""
    return any(isinstance(x, str) and x in ("pure_callback", "io_callback") for x in _constants(jaxpr))


_END = object()


def _constants(program: Any) -> Iterator[Any]:
    """All that a program was made of but the shapes: its operations, constants and parameters, those within as well."""
    if isinstance(program, core.ClosedJaxpr):
        yield from program.consts
        program = program.jaxpr
    for equation in program.eqns:
        yield equation.primitive.name
        yield from (x.val for x in equation.invars if isinstance(x, core.Literal))
        for x in jax.tree.leaves(equation.params, is_leaf=lambda x: isinstance(x, (core.ClosedJaxpr, core.Jaxpr))):
            if isinstance(x, (core.ClosedJaxpr, core.Jaxpr)):
                yield from _constants(x)
            elif isinstance(x, (bool, int, float, complex, str, np.ndarray)):
                yield x


def equal(x: Any, y: Any) -> bool:
    """Return whether two constants, arrays or keys have the same bits."""
    if x is y:
        return True
    if isinstance(x, str) or isinstance(y, str) or x is _END or y is _END:
        return bool(type(x) is type(y) and x == y)
    a, b = _bits(x), _bits(y)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def _bits(x: Any) -> np.ndarray:
    return np.asarray(jax.random.key_data(x) if trees.is_key(x) else x)
