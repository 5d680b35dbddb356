"""Checks of arguments and trees, and what they say: what was found, where, and what to do."""

import math
import numbers
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adamjax import _trees
from adamjax._trees import PyTree

# torch.optim's wording, so that whoever comes from there recognises the message.
_WORDING = {
    "learning_rate": "Invalid learning rate",
    "b1": "Invalid beta parameter at index 0",
    "b2": "Invalid beta parameter at index 1",
    "eps": "Invalid epsilon value",
}


def number(name: str, x: Any, *, low: float = 0.0, below: float = math.inf) -> Any:
    """Check a hyperparameter: a number in [low, below), or an array whose dtype could hold one.

    Python and NumPy numbers come back as Python floats: an int and a float of the same value are
    then equal leaves of the same type, and compile once. Arrays and tracers come back as they are;
    their values are not looked at (that would wait for the device, or is impossible).
    """
    if isinstance(x, (np.ndarray, np.generic)) and x.ndim == 0:
        x = x.item()
    invalid = f"{_WORDING.get(name, f'Invalid {name} value')}: {x!r}"
    if isinstance(x, numbers.Real) and not isinstance(x, bool):
        if not (low <= float(x) < below and math.isfinite(x)):
            raise ValueError(f"{invalid}; {name} must be {_interval(low, below)}")
        return float(x)
    dtype = getattr(x, "dtype", None)
    if dtype is None or not (jnp.issubdtype(dtype, np.floating) or jnp.issubdtype(dtype, np.integer)):
        raise TypeError(f"{invalid}; {name} must be a real number, or an array or tracer that holds one")
    if isinstance(x, np.ndarray) and not np.all((low <= x) & (x < below) & np.isfinite(x)):
        raise ValueError(f"{invalid}; every {name} must be {_interval(low, below)}")
    return x


def choice(name: str, x: Any, allowed: tuple[Any, ...]) -> Any:
    """Check that `x` is one of `allowed` (1 is not True here)."""
    if not any(x is a or (isinstance(x, str) and x == a) for a in allowed):
        raise ValueError(f"Invalid {name} value: {x!r}; {name} must be one of {', '.join(map(repr, allowed))}")
    return x


def scalar(name: str, x: Any, dtype: np.dtype) -> Any:
    """The hyperparameter `x`, a number or a 0-d array, as a 0-d array of `dtype`."""
    if isinstance(x, (float, int)):
        return np.asarray(x, dtype)
    if jnp.shape(x) != ():
        raise ValueError(
            f"{name} has shape {jnp.shape(x)}, a step takes one number. An optimizer whose hyperparameters "
            "are stacked is a population: step it under jax.vmap"
        )
    return jnp.asarray(x).astype(dtype)


def parameters(params: PyTree) -> None:
    """Check that every leaf of `params` is a floating point or complex array."""
    if not all(map(_is_inexact, jax.tree.leaves(params))):
        for path, leaf in jax.tree.leaves_with_path(params):
            if not _is_inexact(leaf):
                raise TypeError(_leaf_message(_at("params", path), leaf))


def updates(grads: PyTree, like: PyTree, name: str = "params") -> None:
    """Check that `grads` has the structure, shapes and kinds of dtype of the tree `like`.

    A None in `grads` may stand for anything. `like` is None where nothing is known but `grads`.
    """
    try:
        _, rows = _trees.flatten(grads, like)
    except ValueError:
        raise ValueError(_structure_message(grads, like, name)) from None
    if like is None:
        ok = all(g is None or _is_inexact(g) for g, _ in rows)
    else:
        ok = all(g is None or _fits(g, p) for g, p in rows)
    if not ok:
        _raise_first_misfit(grads, like, name)


def mask(tree: PyTree) -> None:
    """Check that every leaf of a mask is True or False."""
    for path, leaf in jax.tree.leaves_with_path(tree):
        if not isinstance(leaf, (bool, np.bool_)):
            hint = "; give the mask as one function of params, or as one tree" if callable(leaf) else ""
            raise TypeError(f"{_at('mask', path)} is {_describe(leaf)}, a mask holds True and False only{hint}")


def prefix(tree: PyTree, params: PyTree) -> None:
    """Check that the mask `tree` has the structure of `params`, or is a prefix of it."""
    structure: Any = jax.tree.structure(tree)
    try:
        structure.flatten_up_to(params)
    except ValueError:
        raise ValueError(_structure_message(tree, params, "params", who="the mask")) from None


def state(found: Any, expected: type, who: str) -> None:
    """Check that `found` is the state of the transformation `who`."""
    if not isinstance(found, expected):
        raise TypeError(
            f"{who} was given {_describe(found)} for its state, expected {expected.__name__}: "
            "the order is update(grads, state, params), and state comes from init(params)"
        )


def given(params: PyTree, grads: PyTree, who: str) -> None:
    """Check that parameters were passed to a transformation that reads them, if there are any."""
    if params is None and jax.tree.leaves(grads):
        raise ValueError(f"{who} needs the parameters: call update(grads, state, params)")


@cache
def _is_inexact_dtype(dtype: Any) -> bool:
    return bool(jnp.issubdtype(dtype, np.inexact))


def _is_inexact(x: Any) -> bool:
    return isinstance(x, (float, complex)) or (
        hasattr(x, "dtype") and hasattr(x, "shape") and _is_inexact_dtype(x.dtype)
    )


@cache
def _is_complex_dtype(dtype: Any) -> bool:
    return bool(jnp.issubdtype(dtype, np.complexfloating))


def _fits(g: Any, p: Any) -> bool:
    return (
        _is_inexact(g)
        and _is_inexact(p)
        and jnp.shape(g) == jnp.shape(p)
        # A real gradient of a complex parameter loses nothing; the reverse would.
        and (not _is_complex_dtype(_trees.dtype_of(g)) or _is_complex_dtype(_trees.dtype_of(p)))
    )


def _raise_first_misfit(grads: PyTree, like: PyTree, name: str) -> None:
    _, rows = _trees.flatten(grads, like)
    paths = [path for path, _ in jax.tree.leaves_with_path(grads, is_leaf=_trees.is_none)]
    for path, (g, p) in zip(paths, rows, strict=True):
        where = _at(name, path)
        if g is None or (_is_inexact(g) if like is None else _fits(g, p)):
            continue
        if not _is_inexact(g):
            raise TypeError(_leaf_message(f"the gradient for {where}", g))
        if p is None:
            raise ValueError(f"{where} is None, but its gradient is {_describe(g)}: make both None, or neither")
        if not _is_inexact(p):
            if isinstance(p, (dict, list, tuple)):
                raise ValueError(_structure_message(grads, like, name))
            raise TypeError(_leaf_message(where, p))
        if jnp.shape(g) != jnp.shape(p):
            raise ValueError(
                f"the gradient for {where} has shape {jnp.shape(g)}, expected {jnp.shape(p)}: "
                f"it is not broadcast; {_remedy(name)}"
            )
        raise TypeError(
            f"the gradient for {where} is complex ({_trees.dtype_of(g)}), expected a real one "
            f"({_trees.dtype_of(p)}): take .real first, or make the parameter complex"
        )


def _structure_message(tree: PyTree, like: PyTree, name: str, who: str = "the gradients") -> str:
    """Name the first place at which two trees part."""
    found = dict(jax.tree.leaves_with_path(tree, is_leaf=_trees.is_none))
    expected = dict(jax.tree.leaves_with_path(like, is_leaf=_trees.is_none))
    prefixes = {path[:n] for path in found for n in range(len(path) + 1)}
    for path in expected:
        # A leaf of `tree` may stand above: then it is a prefix, and the trees part elsewhere.
        if not any(path[:n] in found for n in range(len(path) + 1)) and path not in prefixes:
            return f"{who} lack {_at(name, path)} ({_describe(expected[path])}); {_remedy(name)}"
    for path in found:
        if path not in expected and not any(path == p[: len(path)] for p in expected):
            return f"{who} have {_at('', path) or 'a leaf'} ({_describe(found[path])}), {name} has not; {_remedy(name)}"
    return (
        f"{who} and {name} differ in structure: {jax.tree.structure(tree)} "
        f"against {jax.tree.structure(like)}; {_remedy(name)}"
    )


def _remedy(name: str) -> str:
    if name == "params":
        return "gradients and parameters must be trees of the same structure and shapes"
    return "this state belongs to other parameters: call init(params) for these"


def _at(name: str, path: tuple[Any, ...]) -> str:
    return name + jax.tree_util.keystr(path)


def _leaf_message(where: str, leaf: Any) -> str:
    expected = "expected a floating point or complex array"
    if callable(leaf) and not hasattr(leaf, "dtype"):
        return (
            f"{where} is {_describe(leaf)}, {expected}: pass arrays only, for instance "
            "equinox.filter(model, equinox.is_inexact_array) or the parameters that flax's init returned"
        )
    if hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return f"{where} is a PRNG key, {expected}: keep keys outside the parameters"
    return (
        f"{where} is {_describe(leaf)}, {expected}: keep it outside the parameters, "
        "or put None at its place in parameters and gradients"
    )


def _describe(x: Any) -> str:
    if isinstance(x, Callable) and not hasattr(x, "dtype"):  # type: ignore[arg-type]
        return f"a function ({getattr(x, '__name__', type(x).__name__)})"
    if hasattr(x, "dtype") and hasattr(x, "shape"):
        return f"{x.dtype}[{','.join(map(str, x.shape))}]"
    if isinstance(x, (dict, list, tuple)):
        return f"a {type(x).__name__}"
    return f"{x!r} ({type(x).__name__})"


def _interval(low: float, below: float) -> str:
    least = "" if low == -math.inf else f"at least {low:g} and "
    return least + ("finite" if below == math.inf else f"below {below:g}")
