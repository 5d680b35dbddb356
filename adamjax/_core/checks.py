"""Checks of arguments and trees. Each message says where the fault is, what was found, and the remedy."""

import math
import numbers
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from itertools import accumulate
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

# The scalar fields of the states, and the dtypes that integers are kept in.
_SCALARS: dict[str, Any] = dict.fromkeys(
    ("count", "plateau", "cooldown", "skipped", "consecutive", "good"), np.dtype(np.int32)
)
_SCALARS |= {"seed": np.dtype(np.uint32)} | dict.fromkeys(("scale", "best", "mean", "deviation", "mu_product"))
_SCALARS |= dict.fromkeys(("b1", "weight_sum", "max_lr"))

_ON_HOST = (np.ndarray, np.generic, bool, float, complex)

# The length at which a part of a message is cut: a path, or an argument that is quoted.
_LONGEST = 160


def number(name: str, x: object, *, low: float = 0.0, below: float = math.inf) -> Any:
    """Check a hyperparameter: a number in [low, below), or an array whose dtype could hold one.

    Return Python and NumPy numbers, and a tensor of torch that holds one, as Python floats, so that an int and a
    float of the same value are equal leaves of one type and compile once. Return arrays and tracers unchanged, and
    do not read the values of JAX arrays: that would wait for the device, or is impossible.
    """
    if isinstance(x, (np.ndarray, np.generic)) and x.ndim == 0:
        x = x.item()
    elif _is_torch_tensor(x):
        x = _number_of_tensor(name, x)
    invalid = f"{_WORDING.get(name, f'Invalid {name} value')}: {shown(x)}"
    if isinstance(x, numbers.Real) and not isinstance(x, bool):
        if not (low <= float(x) < below and math.isfinite(x)):
            raise ValueError(f"{invalid}; {name} must be {_interval(low, below)}")
        return float(x)
    if not _is_real(x):
        raise TypeError(f"{invalid}; {name} must be a real number, or an array or tracer that holds one")
    if isinstance(x, np.ndarray) and not np.all((low <= x) & (x < below) & np.isfinite(x)):
        raise ValueError(f"{invalid}; every {name} must be {_interval(low, below)}")
    return x


def count(name: str, x: object, least: int = 1, below: int | None = None) -> int:
    if isinstance(x, bool) or not isinstance(x, (int, np.integer)):
        raise TypeError(f"Invalid {name} value: {shown(x)}; {name} must be an int")
    if x < least:
        raise ValueError(f"Invalid {name} value: {shown(x)}; {name} must be at least {least}")
    if below is not None and x >= below:
        raise ValueError(f"Invalid {name} value: {shown(x)}; {name} must be below {below}")
    return int(x)


def integer(name: str, x: object) -> Any:
    """Check an int that fits into 64 bits, or an array or tracer of ints."""
    whole = isinstance(x, int) or jnp.issubdtype(getattr(x, "dtype", np.void), np.integer)
    if isinstance(x, bool) or not whole:
        raise TypeError(f"Invalid {name} value: {shown(x)}; {name} must be an int, or an array of them")
    if isinstance(x, int) and not -(2**63) <= x < 2**63:
        raise ValueError(f"Invalid {name} value: {shown(x)}; {name} must fit into 64 bits")
    return x


def function(name: str, x: Any) -> Any:
    if not callable(x):
        raise TypeError(f"Invalid {name} value: {shown(x)}; {name} must be a function")
    return x


def choice(name: str, x: Any, allowed: tuple[object, ...]) -> Any:
    """Check that `x` is one of `allowed` (1 is not True here)."""
    if not any(x is a or (isinstance(x, str) and x == a) for a in allowed):
        raise ValueError(f"Invalid {name} value: {shown(x)}; {name} must be one of {', '.join(map(repr, allowed))}")
    return x


def dtype(name: str, x: Any, allowed: tuple[str, ...], expected: str) -> np.dtype:
    """Check an argument that is a dtype with one of these names; the message of an error ends with `expected`."""
    try:
        found = jnp.dtype("None" if x is None else x)  # None would be float64 to NumPy
    except TypeError:
        raise TypeError(f"Invalid {name} value: {shown(x)}; {expected}") from None
    if found.name not in allowed:
        raise ValueError(f"Invalid {name} value: {found.name}; {expected}")
    return found


def steps(x: Any) -> Any:
    """Check the argument of a schedule, a step count: a real number, or an array of them."""
    if not (isinstance(x, (int, float)) or _is_real(x)):
        raise TypeError(f"the count is {describe(x)}: a schedule is called with an int, or an integer array")
    return x


def as_scalar(name: str, x: Any, dtype: np.dtype) -> Any:
    """Return the hyperparameter `x`, a number or an array of one element, as a 0-d array of `dtype`."""
    if isinstance(x, (float, int)):
        return np.asarray(x, dtype)
    if not _is_real(x):
        raise TypeError(f"{name} is {describe(x)}, a step takes one real number")
    if jnp.size(x) != 1:
        raise ValueError(
            f"{name} has shape {jnp.shape(x)}, a step takes one number. An optimizer whose hyperparameters "
            "are stacked is a population: step it under jax.vmap"
        )
    return jnp.asarray(x).reshape(()).astype(dtype)


def parameters(params: PyTree) -> None:
    """Check that every leaf of `params` is a floating point or complex array."""
    if not all(map(is_param, jax.tree.leaves(params))):
        path, leaf = next(x for x in jax.tree.leaves_with_path(params) if not is_param(x[1]))
        raise TypeError(_leaf_message(at("params", path), leaf))


def updates(
    grads: PyTree, like: PyTree, name: str = "params", *, integers: bool = False
) -> tuple[Leaves, Leaves | None]:
    """Check that `grads` has the structure, shapes and kinds of dtype of the tree `like`; return both, flattened.

    A None in `grads` may stand for any subtree. `like` is None if only `grads` is known. With `integers`, those may
    stand for each other, as in the updates of parameters that have no gradient.
    """
    found = Leaves.of(grads)
    if like is None:
        for g in found.leaves:
            if g is not None and not is_param(g):
                _raise_first_misfit(found, None, name)
        return found, None
    column = _fitting(found, like, name, integers=integers)
    if found.has_none and any(g is None and trees.is_node(p) for g, p in zip(found.leaves, column, strict=True)):
        # States number the leaves of all parameters.
        whole = Leaves.of(like)
        frozen = [[None] * len(Leaves.of(p).leaves) for p in column]
        grads = [rest if g is None else [g] for g, rest in zip(found.leaves, frozen, strict=True)]
        return whole.like([g for rest in grads for g in rest]), whole
    return found, found.like(column)


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
        raise ValueError(f"the gradients {difference(grads.tree, tree, name)}; {_remedy(name)}") from None


def _fitting(grads: Leaves, like: PyTree, name: str, real: bool = False, integers: bool = False) -> list[Any]:
    """Return the nodes of `like` at the places of the gradients, if they fit them."""
    try:
        column = grads.column(like)
    except ValueError:
        raise ValueError(f"the gradients {difference(grads.tree, like, name)}; {_remedy(name)}") from None
    for g, x in zip(grads.leaves, column, strict=True):
        if g is not None and not (_fits(g, x, real) or (integers and _are_integers(g, x))):
            _raise_first_misfit(grads, column, name, real)
    return column


def mask(tree: PyTree) -> None:
    for path, leaf in jax.tree.leaves_with_path(tree):
        if not isinstance(leaf, (bool, np.bool_)):
            hint = "; give the mask as one function of params, or as one tree" if callable(leaf) else ""
            raise TypeError(f"{at('mask', path)} is {describe(leaf)}, a mask holds True and False only{hint}")


def prefix(tree: PyTree, params: PyTree) -> None:
    """Check that the mask `tree` has the structure of `params`, or is a prefix of it."""
    structure: Any = jax.tree.structure(tree)
    try:
        structure.flatten_up_to(params)
    except ValueError:
        remedy = "a mask has the structure of params, or of a prefix of it"
        raise ValueError(f"the flags of the mask {difference(tree, params, 'params')}; {remedy}") from None


def state(found: Any, expected: type, who: str) -> Any:
    """Check that `found` is the state of the transformation `who`; return it with its scalars as arrays of JAX."""
    if not isinstance(found, expected):
        raise TypeError(
            f"{who} was given {describe(found)} for its state, expected {expected.__name__}: {_state_remedy(found)}"
        )
    fields = getattr(found, "_fields", ())
    # The numbers of a plateau and of an average by rates are as wide as schedules; others are float32 in x64 mode, too.
    real = jnp.result_type(float) if {"best", "max_lr"} & set(fields) else np.dtype(np.float32)
    changed = {}
    for name in fields:
        if name in _SCALARS:
            x = getattr(found, name)
            # NumPy's integers and Python's would overflow with a warning, or not at all.
            if (array := _state_scalar(name, x, who, _SCALARS[name] or real)) is not x:
                changed[name] = array
    replace: Any = getattr(found, "_replace", None)
    return replace(**changed) if changed else found


def inner_state(found: Any, who: object) -> Any:
    """Check that `found` is the state of a transformation around another one; return the state of that."""
    if not hasattr(found, "inner"):
        raise TypeError(
            f"{type(who).__name__} was given {describe(found)} for its state, expected one that has the state of the "
            f"wrapped transformation in its field inner: {_state_remedy(found)}"
        )
    return found.inner


def _state_scalar(name: str, x: Any, who: str, dtype: np.dtype) -> Any:
    """Check the scalar field `name` of a state; return a number of Python's or NumPy's as an array of JAX."""
    kind: Any = np.integer if jnp.issubdtype(dtype, np.integer) else np.floating
    if isinstance(x, int | float) and not isinstance(x, bool):
        x = np.asarray(x, None if isinstance(x, int) and kind is np.integer else dtype)
    if getattr(x, "shape", ()) != () or not jnp.issubdtype(getattr(x, "dtype", np.void), kind):
        what = "an integer" if kind is np.integer else "a floating point"
        raise TypeError(
            f"state.{name} of {who} is {describe(x)}, expected {what} array of shape (): "
            "the state comes from init(params) or update"
        )
    if not isinstance(x, np.ndarray | np.generic):
        return x
    if kind is np.integer:
        limits = np.iinfo(dtype)
        x = np.asarray(min(max(int(x), limits.min), limits.max), dtype)
    return jnp.asarray(x)


def _is_foreign_state(x: object) -> bool:
    """Return whether `x` is a named tuple of another library."""
    return hasattr(x, "_fields") and not type(x).__module__.startswith("adamjax.")


def _state_remedy(found: Any) -> str:
    """The cure for a state that is not one of ours, as far as its type tells."""
    if _is_foreign_state(found):
        return "convert a state of optax by adamjax.interop.optax.import_state(opt, params, state)"
    if isinstance(found, Mapping) and {"state", "param_groups"} <= found.keys():
        return "convert a state of torch by adamjax.interop.torch.import_state(opt, params, state_dict)"
    return (
        "the order is update(grads, state, params), and state comes from init(params), which is also the target to "
        "restore a saved one into"
    )


def as_arrays(tree: PyTree) -> PyTree:
    """Return a state, or another tree, with arrays of JAX in place of NumPy's, and of Python's numbers but integers.

    The scalars of our states stay: `state` knows their dtypes, and what to do about overflow.
    """
    if not any(map(_is_on_host, set(map(type, jax.tree.leaves(tree))))):
        return tree

    def convert(path: Path, x: Any) -> Any:
        scalar = getattr(path[-1], "name", None) in _SCALARS if path else False
        if scalar or not isinstance(x, _ON_HOST):
            return x
        if np.result_type(x).kind not in ("biufcV" if np.ndim(x) else "bfcV"):  # V: the dtypes of ml_dtypes
            return x
        return jnp.asarray(x, trees.dtype_of(x) if isinstance(x, float | complex) else None)

    return jax.tree.map_with_path(convert, tree)


@cache
def _is_on_host(kind: type) -> bool:
    return issubclass(kind, _ON_HOST)


def has_count(found: Any, who: str) -> None:
    state(found, tuple, who)
    if "count" not in getattr(found, "_fields", ()):
        raise TypeError(f"{who} was given a state without a count: this state belongs to another optimizer")


def member_states(found: Any, count: int, who: str) -> None:
    """Check that `found` is the state of `who`, which has `count` members."""
    state(found, tuple, who)
    if len(found) != count:
        remedy = _state_remedy(found) if _is_foreign_state(found) else "call init(params)"
        raise ValueError(
            f"{who} of {count} transformations was given {len(found)} states: this state belongs to another "
            f"optimizer, {remedy}"
        )


def same_structure(found: PyTree, expected: PyTree, name: str) -> None:
    """Check that the field `name` of a state has the structure, shapes and dtypes of `expected`."""
    rows = jax.tree.leaves_with_path(expected)
    if not rows and (found is None or expected is None):
        return
    structure: Any = jax.tree.structure(found)
    if structure != jax.tree.structure(expected):
        raise ValueError(f"the arrays of the state {difference(found, expected, name)}; {_remedy(name)}")
    for (path, like), x in zip(rows, jax.tree.leaves(found), strict=True):
        if (_shape(x), getattr(x, "dtype", None)) != (like.shape, like.dtype):
            raise ValueError(f"{at(name, path)} is {describe(x)}, expected {describe(like)}; {_remedy(name)}")


def groups(found: object, sizes: list[int], name: str) -> None:
    """Check that the groups of the field `name` of a state are arrays of these sizes."""
    if not isinstance(found, tuple) or len(found) != len(sizes):
        raise TypeError(f"{name}.groups is {describe(found)}, expected {len(sizes)} arrays; {_remedy(name)}")
    for k, (x, size) in enumerate(zip(found, sizes, strict=True)):
        if not (is_param(x) and _shape(x) == (size,)):
            raise TypeError(
                f"{name}.groups[{k}] is {describe(x)}, expected a float array of shape {(size,)}; {_remedy(name)}"
            )


def arrays(found: PyTree, name: str) -> None:
    """Check that the leaves of the field `name` of a state are arrays or numbers."""
    for path, x in jax.tree.leaves_with_path(found):
        if not (hasattr(x, "dtype") or isinstance(x, numbers.Number)):
            raise TypeError(f"{at(name, path)} is {describe(x)}, expected an array; {_remedy(name)}")


def params_given(params: PyTree, grads: PyTree, who: str, call: str = "update(grads, state, params)") -> None:
    """Check that `who`, which reads the parameters, was given them (an empty tree needs none)."""
    if params is None and jax.tree.leaves(grads):
        raise ValueError(f"{who} needs the parameters: call {call}")


def _is_real(x: Any) -> bool:
    dtype = getattr(x, "dtype", np.void)
    known = not _is_foreign_dtype(dtype)
    return known and bool(jnp.issubdtype(dtype, np.floating) or jnp.issubdtype(dtype, np.integer))


def _is_torch_tensor(x: object) -> bool:
    """Return whether `x` is a tensor of torch; without importing torch, which made it if it is one."""
    return isinstance(x, getattr(sys.modules.get("torch"), "Tensor", ()))


def _number_of_tensor(name: str, x: Any) -> Any:
    if x.numel() != 1:
        raise ValueError(
            f"{_WORDING.get(name, f'Invalid {name} value')}: a torch.Tensor of shape {tuple(x.shape)}; {name} must be "
            "one number. The hyperparameters of a population are arrays of JAX: jnp.asarray(tensor.detach().numpy())"
        )
    return x.item()


def _shape(x: Any) -> tuple[int, ...]:
    return getattr(x, "shape", ())


@cache
def _is_foreign_dtype(dtype: Any) -> bool:
    """Return whether JAX cannot interpret `dtype`, such as torch's."""
    if dtype is None:  # float64 to NumPy
        return True
    try:
        jnp.issubdtype(dtype, np.inexact)
    except TypeError:
        return True
    return False


@cache
def _is_inexact_dtype(dtype: Any) -> bool:
    return not _is_foreign_dtype(dtype) and bool(jnp.issubdtype(dtype, np.inexact))


@cache
def is_number_dtype(dtype: Any) -> bool:
    """Return whether `dtype` is one of numbers, and not of bools, keys or another library."""
    return not _is_foreign_dtype(dtype) and bool(jnp.issubdtype(dtype, np.number))


def is_param(x: Any) -> bool:
    """Return whether `x` may be a parameter: a floating point or complex array, or such a number of Python's."""
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
        known = is_param(g) and is_param(p)
        return known and _shape(g) == _shape(p) and _dtype_fits(trees.dtype_of(g), trees.dtype_of(p), real)


def _are_integers(g: Any, p: Any) -> bool:
    return _shape(g) == _shape(p) and all(jnp.issubdtype(getattr(x, "dtype", np.void), np.integer) for x in (g, p))


def _raise_first_misfit(grads: Leaves, like: list[Any] | None, name: str, real: bool = False) -> None:
    for path, g, p in zip(grads.paths(), grads.leaves, like or grads.leaves, strict=True):
        where = at(name, path)
        if g is None or (is_param(g) if like is None else _fits(g, p, real)):
            continue
        if not is_param(g):
            raise TypeError(_leaf_message(f"the gradient for {where}", g))
        if p is None:
            raise ValueError(f"{where} is None, but its gradient is {describe(g)}: make both None, or neither")
        if _is_node(p):
            whole = grads.like(like or []).tree
            raise ValueError(f"the gradients {difference(grads.tree, whole, name)}; {_remedy(name)}")
        if not is_param(p):
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


def difference(tree: PyTree, like: PyTree, name: str) -> str:
    """Return the first difference between `tree` and `like`, in words: "have a dict at params, expected a list".

    A None in `tree` is one only if there is no other.
    """
    for none_fits in (True, False):
        if (found := _first_difference(tree, like, name, none_fits)) is not None:
            return found
    return f"have another structure than {name}"


def _first_difference(tree: PyTree, like: PyTree, where: str, none_fits: bool) -> str | None:
    if (tree is None and none_fits) or not (_is_node(tree) or _is_node(like)):
        return None
    if type(tree) is not type(like):
        names = describe(tree), describe(like)
        if names[0] == names[1]:
            names = _full_name(tree), _full_name(like)
        return f"have {names[0]} at {shortened(where)}, expected {names[1]}"
    children, expected = _children(tree), _children(like)
    for key, child in expected.items():
        if key not in children:
            return f"lack {shortened(where + key)} ({describe(child)})"
    for key, child in children.items():
        if key not in expected:
            return f"have {describe(child)} at {shortened(where + key)}, where nothing is expected"
        if (found := _first_difference(child, expected[key], where + key, none_fits)) is not None:
            return found
    if not none_fits and not _same_node(tree, like):
        what = "keys in another order" if isinstance(tree, Mapping) else "static fields other than expected"
        return f"have {describe(tree)} at {shortened(where)} with {what}"
    return None


def _full_name(node: PyTree) -> str:
    return _article(f"{type(node).__module__}.{type(node).__qualname__}")


def _same_node(tree: PyTree, like: PyTree) -> bool:
    """Return whether two nodes with the same children are the same otherwise; their static fields may be anything."""
    a: Any = jax.tree.structure(tree, is_leaf=lambda x: x is not tree)
    b: Any = jax.tree.structure(like, is_leaf=lambda x: x is not like)
    try:
        return bool(a == b)
    except ValueError:  # arrays
        return False


def _is_node(x: Any) -> bool:
    """Return whether `x` has leaves below it. A moment made of several arrays counts as one leaf."""
    return trees.is_node(x) and not hasattr(x, "dtype")


def _children(node: PyTree) -> dict[str, PyTree]:
    below = jax.tree.leaves_with_path(node, is_leaf=lambda x: x is not node)
    return {jax.tree_util.keystr(path): child for path, child in below}


def _remedy(name: str) -> str:
    if name == "params":
        return "gradients and parameters must be trees of the same structure and shapes"
    return "this state belongs to other parameters: call init(params) for these"


def at(name: str, path: Path) -> str:
    """Return the place of a leaf of the tree `name`, as users write it; the middle of a long path is left out."""
    return name + shortened(jax.tree_util.keystr(path))


def _leaf_message(where: str, leaf: object) -> str:
    expected = "expected a floating point or complex array"
    remedy = "keep it outside the parameters, or put None at its place in parameters and gradients"
    found = describe(leaf)
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


def describe(x: object) -> str:
    """Return a short name of anything that a tree may hold, without its contents: "float32[3]", "a dict"."""
    if isinstance(x, Callable) and not (hasattr(x, "dtype") or _is_node(x)):  # type: ignore[arg-type]
        return f"a function ({shortened(str(getattr(x, '__name__', type(x).__name__)))})"
    if hasattr(x, "dtype") and hasattr(x, "shape"):
        try:
            return f"{x.dtype}[{','.join(map(str, x.shape))}]"
        except TypeError:  # `x` is a type, or pretends to be an array
            return f"{_article(type(x).__name__)}"
    if x is None:
        return "None"
    if isinstance(x, bool | int | float | complex | str | bytes | np.dtype | type):
        return f"{shortened(repr(x))} ({type(x).__name__})"
    return _article(type(x).__name__)


def shown(x: object) -> str:
    """Return the repr of an argument, for a message: cut where it is long, and without the contents of arrays."""
    text = repr(x)
    return describe(x) if re.search(r"(rray|ensor)\(\[", text) else shortened(text)


def listed(names: Iterable[str]) -> str:
    """Return names in a row, for a message; of many, the first ones."""
    found = list(map(shortened, names))
    length = list(accumulate(len(name) + 2 for name in found))
    count = max(sum(end <= _LONGEST for end in length), 1)
    return ", ".join(found[:count]) + (f" and {len(found) - count} more" if len(found) > count else "")


def _article(name: str) -> str:
    return f"{'an' if name[:1].lower() in 'aeio' else 'a'} {name}"


def shortened(text: str) -> str:
    """Return `text`, or its beginning and its end where it is long."""
    half = _LONGEST // 2 - 2
    return text if len(text) <= _LONGEST else f"{text[:half]}...{text[-half:]}"


def _interval(low: float, below: float) -> str:
    least = "" if low == -math.inf else f"at least {low:g} and "
    return least + ("finite" if below == math.inf else f"below {below:g}")
