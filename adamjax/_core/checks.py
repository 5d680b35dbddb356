"""Checks of arguments and trees. Each message says where the fault is, what was found, and the remedy."""

import math
import numbers
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adamjax._core import trees
from adamjax._core.trees import Leaves
from adamjax._core.typing import Path, PyTree

# torch.optim's wording, which users of torch will recognise.
_WORDING = {
    "learning_rate": "Invalid learning rate",
    "b1": "Invalid beta parameter at index 0",
    "b2": "Invalid beta parameter at index 1",
    "eps": "Invalid epsilon value",
}

# The scalar fields of the states, and their kinds of dtype.
_SCALARS: dict[str, type] = dict.fromkeys(
    ("count", "seed", "plateau", "cooldown", "skipped", "consecutive", "good"), np.integer
)
_SCALARS |= dict.fromkeys(("scale", "best", "mean", "mu_product"), np.floating)


def number(name: str, x: object, *, low: float = 0.0, below: float = math.inf) -> Any:
    """Check a hyperparameter: a number in [low, below), or an array whose dtype could hold one.

    Return Python and NumPy numbers as Python floats, so that an int and a float of the same value are
    equal leaves of one type and compile once. Return arrays and tracers unchanged, and do not read the
    values of JAX arrays: that would wait for the device, or is impossible.
    """
    if isinstance(x, (np.ndarray, np.generic)) and x.ndim == 0:
        x = x.item()
    invalid = f"{_WORDING.get(name, f'Invalid {name} value')}: {x!r}"
    if isinstance(x, numbers.Real) and not isinstance(x, bool):
        if not (low <= float(x) < below and math.isfinite(x)):
            raise ValueError(f"{invalid}; {name} must be {_interval(low, below)}")
        return float(x)
    if not _is_real(x):
        raise TypeError(f"{invalid}; {name} must be a real number, or an array or tracer that holds one")
    if isinstance(x, np.ndarray) and not np.all((low <= x) & (x < below) & np.isfinite(x)):
        raise ValueError(f"{invalid}; every {name} must be {_interval(low, below)}")
    return x


def count(name: str, x: object, least: int = 1) -> int:
    if isinstance(x, bool) or not isinstance(x, (int, np.integer)):
        raise TypeError(f"Invalid {name} value: {x!r}; {name} must be an int")
    if x < least:
        raise ValueError(f"Invalid {name} value: {x!r}; {name} must be at least {least}")
    return int(x)


def integer(name: str, x: object) -> Any:
    """Check an int that fits into 64 bits, or an array or tracer of ints."""
    whole = isinstance(x, int) or jnp.issubdtype(getattr(x, "dtype", np.void), np.integer)
    if isinstance(x, bool) or not whole:
        raise TypeError(f"Invalid {name} value: {x!r}; {name} must be an int, or an array of them")
    if isinstance(x, int) and not -(2**63) <= x < 2**63:
        raise ValueError(f"Invalid {name} value: {x!r}; {name} must fit into 64 bits")
    return x


def function(name: str, x: Any) -> Any:
    if not callable(x):
        raise TypeError(f"Invalid {name} value: {x!r}; {name} must be a function")
    return x


def choice(name: str, x: Any, allowed: tuple[object, ...]) -> Any:
    """Check that `x` is one of `allowed` (1 is not True here)."""
    if not any(x is a or (isinstance(x, str) and x == a) for a in allowed):
        raise ValueError(f"Invalid {name} value: {x!r}; {name} must be one of {', '.join(map(repr, allowed))}")
    return x


def dtype(name: str, x: Any, allowed: tuple[str, ...], expected: str) -> np.dtype:
    """Check an argument that is a dtype with one of these names; the message of an error ends with `expected`."""
    try:
        found = jnp.dtype("None" if x is None else x)  # None would be float64 to NumPy
    except TypeError:
        raise TypeError(f"Invalid {name} value: {x!r}; {expected}") from None
    if found.name not in allowed:
        raise ValueError(f"Invalid {name} value: {found.name}; {expected}")
    return found


def steps(x: Any) -> Any:
    """Check the argument of a schedule, a step count: a real number, or an array of them."""
    if not (isinstance(x, (int, float)) or _is_real(x)):
        raise TypeError(f"the count is {_describe(x)}: a schedule is called with an int, or an integer array")
    return x


def as_scalar(name: str, x: Any, dtype: np.dtype) -> Any:
    """Return the hyperparameter `x`, a number or an array of one element, as a 0-d array of `dtype`."""
    if isinstance(x, (float, int)):
        return np.asarray(x, dtype)
    if not _is_real(x):
        raise TypeError(f"{name} is {_describe(x)}, a step takes one real number")
    if jnp.size(x) != 1:
        raise ValueError(
            f"{name} has shape {jnp.shape(x)}, a step takes one number. An optimizer whose hyperparameters "
            "are stacked is a population: step it under jax.vmap"
        )
    return jnp.asarray(x).reshape(()).astype(dtype)


def parameters(params: PyTree) -> None:
    """Check that every leaf of `params` is a floating point or complex array."""
    if not all(map(_is_inexact, jax.tree.leaves(params))):
        path, leaf = next(x for x in jax.tree.leaves_with_path(params) if not _is_inexact(x[1]))
        raise TypeError(_leaf_message(_at("params", path), leaf))


def updates(grads: PyTree, like: PyTree, name: str = "params") -> tuple[Leaves, Leaves | None]:
    """Check that `grads` has the structure, shapes and kinds of dtype of the tree `like`; return both, flattened.

    A None in `grads` may stand for any subtree. `like` is None if only `grads` is known.
    """
    found = Leaves.of(grads)
    if like is None:
        for g in found.leaves:
            if g is not None and not _is_inexact(g):
                _raise_first_misfit(found, None, name)
        return found, None
    return found, found.like(_fitting(found, like, name))


def moments(grads: Leaves, found: PyTree, name: str, *, real: bool = False) -> list[Any]:
    """Return the arrays of the tree `found` that fit the gradients; `real` ones may belong to complex gradients."""
    if found is None and any(g is not None for g in grads.leaves):
        raise ValueError(f"{name} is None, expected an array for each gradient; {_remedy(name)}")
    return _fitting(grads, found, name, real)


def nodes_at(grads: Leaves, tree: PyTree, name: str = "state") -> list[Any]:
    """Check that `tree` has a node for each gradient; return those in order."""
    try:
        return grads.column(tree)
    except ValueError:
        raise ValueError(f"the gradients {_difference(grads.tree, tree, name)}; {_remedy(name)}") from None


def _fitting(grads: Leaves, like: PyTree, name: str, real: bool = False) -> list[Any]:
    """Return the nodes of `like` at the places of the gradients, if they fit them."""
    try:
        column = grads.column(like)
    except ValueError:
        raise ValueError(f"the gradients {_difference(grads.tree, like, name)}; {_remedy(name)}") from None
    for g, x in zip(grads.leaves, column, strict=True):
        if g is not None and not _fits(g, x, real):
            _raise_first_misfit(grads, column, name, real)
    return column


def mask(tree: PyTree) -> None:
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
        remedy = "a mask has the structure of params, or of a prefix of it"
        raise ValueError(f"the flags of the mask {_difference(tree, params, 'params')}; {remedy}") from None


def state(found: object, expected: type, who: str) -> None:
    """Check that `found` is the state of the transformation `who`."""
    if not isinstance(found, expected):
        raise TypeError(
            f"{who} was given {_describe(found)} for its state, expected {expected.__name__}: "
            "the order is update(grads, state, params), and state comes from init(params)"
        )
    for name in getattr(found, "_fields", ()):
        x, kind = getattr(found, name), _SCALARS.get(name)
        if kind is not None and not (_shape(x) == () and jnp.issubdtype(getattr(x, "dtype", np.void), kind)):
            what = "an integer" if kind is np.integer else "a floating point"
            raise TypeError(
                f"state.{name} of {who} is {_describe(x)}, expected {what} array of shape (): "
                "the state comes from init(params) or update"
            )


def has_count(found: object, who: str) -> None:
    state(found, tuple, who)
    if "count" not in getattr(found, "_fields", ()):
        raise TypeError(f"{who} was given a state without a count: this state belongs to another optimizer")


def member_states(found: Any, count: int, who: str) -> None:
    """Check that `found` is the state of `who`, which has `count` members."""
    state(found, tuple, who)
    if len(found) != count:
        raise ValueError(
            f"{who} of {count} transformations was given {len(found)} states: "
            "this state belongs to another optimizer, call init(params)"
        )


def same_structure(found: PyTree, expected: PyTree, name: str) -> None:
    """Check that the field `name` of a state has the structure, shapes and dtypes of `expected`."""
    rows = jax.tree.leaves_with_path(expected)
    if not rows and (found is None or expected is None):
        return
    structure: Any = jax.tree.structure(found)
    if structure != jax.tree.structure(expected):
        raise ValueError(f"{name} is {structure}, expected {jax.tree.structure(expected)}; {_remedy(name)}")
    for (path, like), x in zip(rows, jax.tree.leaves(found), strict=True):
        if (_shape(x), getattr(x, "dtype", None)) != (like.shape, like.dtype):
            raise ValueError(f"{_at(name, path)} is {_describe(x)}, expected {_describe(like)}; {_remedy(name)}")


def groups(found: object, sizes: list[int], name: str) -> None:
    """Check that the groups of the field `name` of a state are arrays of these sizes."""
    if not isinstance(found, tuple) or len(found) != len(sizes):
        raise TypeError(f"{name}.groups is {_describe(found)}, expected {len(sizes)} arrays; {_remedy(name)}")
    for k, (x, size) in enumerate(zip(found, sizes, strict=True)):
        if not (_is_inexact(x) and _shape(x) == (size,)):
            raise TypeError(
                f"{name}.groups[{k}] is {_describe(x)}, expected a float array of shape {(size,)}; {_remedy(name)}"
            )


def arrays(found: PyTree, name: str) -> None:
    """Check that the leaves of the field `name` of a state are arrays or numbers."""
    for path, x in jax.tree.leaves_with_path(found):
        if not (hasattr(x, "dtype") or isinstance(x, numbers.Number)):
            raise TypeError(f"{_at(name, path)} is {_describe(x)}, expected an array; {_remedy(name)}")


def params_given(params: PyTree, grads: PyTree, who: str, call: str = "update(grads, state, params)") -> None:
    """Check that `who`, which reads the parameters, was given them (an empty tree needs none)."""
    if params is None and jax.tree.leaves(grads):
        raise ValueError(f"{who} needs the parameters: call {call}")


def _is_real(x: Any) -> bool:
    dtype = getattr(x, "dtype", np.void)
    known = not _is_foreign_dtype(dtype)
    return known and bool(jnp.issubdtype(dtype, np.floating) or jnp.issubdtype(dtype, np.integer))


def _shape(x: Any) -> tuple[int, ...]:
    return getattr(x, "shape", ())


@cache
def _is_foreign_dtype(dtype: Any) -> bool:
    """Return whether JAX cannot interpret `dtype`, such as torch's."""
    try:
        jnp.issubdtype(dtype, np.inexact)
    except TypeError:
        return True
    return False


@cache
def _is_inexact_dtype(dtype: Any) -> bool:
    return not _is_foreign_dtype(dtype) and bool(jnp.issubdtype(dtype, np.inexact))


def _is_inexact(x: Any) -> bool:
    return isinstance(x, (float, complex)) or (
        hasattr(x, "dtype") and hasattr(x, "shape") and _is_inexact_dtype(x.dtype)
    )


@cache
def _dtype_fits(g: Any, p: Any, real: bool) -> bool:
    # A real gradient of a complex parameter loses nothing; the reverse would.
    known = _is_inexact_dtype(g) and _is_inexact_dtype(p)
    return known and bool(real or jnp.issubdtype(p, np.complexfloating) or not jnp.issubdtype(g, np.complexfloating))


def _fits(g: Any, p: Any, real: bool = False) -> bool:
    try:
        return g.shape == p.shape and _dtype_fits(g.dtype, p.dtype, real)
    except AttributeError:  # Python's numbers
        known = _is_inexact(g) and _is_inexact(p)
        return known and _shape(g) == _shape(p) and _dtype_fits(trees.dtype_of(g), trees.dtype_of(p), real)


def _raise_first_misfit(grads: Leaves, like: list[Any] | None, name: str, real: bool = False) -> None:
    for path, g, p in zip(grads.paths(), grads.leaves, like or grads.leaves, strict=True):
        where = _at(name, path)
        if g is None or (_is_inexact(g) if like is None else _fits(g, p, real)):
            continue
        if not _is_inexact(g):
            raise TypeError(_leaf_message(f"the gradient for {where}", g))
        if p is None:
            raise ValueError(f"{where} is None, but its gradient is {_describe(g)}: make both None, or neither")
        if _is_node(p):
            whole = grads.like(like or []).tree
            raise ValueError(f"the gradients {_difference(grads.tree, whole, name)}; {_remedy(name)}")
        if not _is_inexact(p):
            raise TypeError(_leaf_message(where, p))
        if _shape(g) != _shape(p):
            raise ValueError(
                f"the gradient for {where} has shape {_shape(g)}, expected {_shape(p)}: "
                f"it is not broadcast; {_remedy(name)}"
            )
        remedy = (
            "take .real of the gradient, or make the parameter complex"
            if name == "params"
            else "the moment of a complex parameter needs mu_dtype=None or a complex one"
        )
        raise TypeError(
            f"the gradient for {where} is complex ({trees.dtype_of(g)}), expected a real one "
            f"({trees.dtype_of(p)}): {remedy}"
        )


def _difference(tree: PyTree, like: PyTree, name: str) -> str:
    """The first difference between `tree` and `like`, in words."""
    found = _first_difference(tree, like, name)
    return found or f"are {jax.tree.structure(tree)}, expected {jax.tree.structure(like)}"


def _first_difference(tree: PyTree, like: PyTree, where: str) -> str | None:
    if tree is None or not (_is_node(tree) or _is_node(like)):
        return None
    if type(tree) is not type(like):
        return f"have {_describe(tree)} at {where}, expected {_describe(like)}"
    children, expected = _children(tree), _children(like)
    for key, child in expected.items():
        if key not in children:
            return f"lack {where}{key} ({_describe(child)})"
    for key, child in children.items():
        if key not in expected:
            return f"have {_describe(child)} at {where}{key}, where nothing is expected"
        if (difference := _first_difference(child, expected[key], where + key)) is not None:
            return difference
    return None


def _is_node(x: Any) -> bool:
    """Return whether `x` has leaves below it. A moment made of several arrays counts as one leaf."""
    return jax.tree_util.is_tree_node(type(x)) and not hasattr(x, "dtype")


def _children(node: PyTree) -> dict[str, PyTree]:
    below = jax.tree.leaves_with_path(node, is_leaf=lambda x: x is not node)
    return {jax.tree_util.keystr(path): child for path, child in below}


def _remedy(name: str) -> str:
    if name == "params":
        return "gradients and parameters must be trees of the same structure and shapes"
    return "this state belongs to other parameters: call init(params) for these"


def _at(name: str, path: Path) -> str:
    return name + jax.tree_util.keystr(path)


def _leaf_message(where: str, leaf: object) -> str:
    expected = "expected a floating point or complex array"
    remedy = "keep it outside the parameters, or put None at its place in parameters and gradients"
    found = _describe(leaf)
    if hasattr(leaf, "dtype"):
        if _is_foreign_dtype(leaf.dtype):
            found, expected = f"{found} of type {type(leaf).__name__}", f"{expected} of JAX or NumPy"
            remedy = "convert it, as in jnp.asarray(tensor.detach().numpy())"
        elif trees.is_key(leaf):
            found, remedy = "a PRNG key", "keep keys outside the parameters"
    elif callable(leaf):
        remedy = (
            "pass arrays only, for instance equinox.filter(model, equinox.is_inexact_array) "
            "or the parameters that flax's init returned"
        )
    return f"{where} is {found}, {expected}: {remedy}"


def _describe(x: object) -> str:
    if isinstance(x, Callable) and not hasattr(x, "dtype"):  # type: ignore[arg-type]
        return f"a function ({getattr(x, '__name__', type(x).__name__)})"
    if hasattr(x, "dtype") and hasattr(x, "shape"):
        return f"{x.dtype}[{','.join(map(str, x.shape))}]"
    if isinstance(x, (dict, list, tuple)):
        return f"a {type(x).__name__}"
    if x is None:
        return "None"
    return f"{x!r} ({type(x).__name__})"


def _interval(low: float, below: float) -> str:
    least = "" if low == -math.inf else f"at least {low:g} and "
    return least + ("finite" if below == math.inf else f"below {below:g}")
