"""The interface of models, and what several of their kinds need."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import jax

from adamjax._core.typing import PyTree

# Arguments that tell a model whether it trains, and their values while it does.
_MODES = {
    "train": True,
    "training": True,
    "is_training": True,
    "deterministic": False,
    "use_running_average": False,
    "inference": False,
}


class Network(Protocol):
    """A model of any framework, as pure functions."""

    def init(self, key: jax.Array) -> tuple[PyTree, PyTree]:
        """Return the parameters, and all other arrays of the model."""

    def train(self, params: PyTree, state: PyTree, inputs: PyTree, key: jax.Array) -> tuple[PyTree, PyTree]:
        """Return the outputs for a batch in training mode, and the state after it."""

    def predict(self, params: PyTree, state: PyTree, inputs: PyTree) -> PyTree:
        """Return the outputs for a batch in evaluation mode."""


class Named:
    """The arrays of a tree, to and from nested dicts with the names on the path to each.

    A dict has no functions and no metadata in its structure, which might differ from one call of a factory to the next.
    """

    def __init__(self, tree: PyTree, without: tuple[Any, ...] = ()) -> None:
        """Take the names from `tree`, but not those of the keys `without`."""
        rows, self._structure = jax.tree.flatten_with_path(tree)
        self._names = [[_name(k) for k in path if k not in without] for path, _ in rows]

    def to_dict(self, tree: PyTree) -> dict[str, Any]:
        named: dict[str, Any] = {}
        for (*above, last), x in zip(self._names, jax.tree.leaves(tree), strict=True):
            node = named
            for name in above:
                node = node.setdefault(name, {})
            node[last] = x
        return named

    def to_tree(self, named: dict[str, Any]) -> PyTree:
        leaves = []
        for names in self._names:
            node: Any = named
            for name in names:
                node = node[name]
            leaves.append(node)
        return jax.tree.unflatten(self._structure, leaves)


def _name(key: Any) -> str:
    return jax.tree_util.keystr((key,), simple=True)


def arguments(f: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return the parameters of `f` by name; none if it does not tell."""
    known = f if isinstance(f, partial) else partial(f)
    if isinstance(known.func, type):  # the metaclasses of modules take (*args, **kwargs)
        f = partial(getattr(known.func, "__init__"), None, *known.args, **known.keywords)  # noqa: B009
    try:
        return dict(inspect.signature(f).parameters)
    except (TypeError, ValueError):
        return {}


def mode(f: Callable[..., Any], train: bool) -> dict[str, bool]:
    """Return the keyword arguments by which `f` is told whether it trains."""
    return {name: value is train for name, value in _MODES.items() if name in arguments(f)}


def randomness(f: Callable[..., Any], name: str, value: Any, *, optional: bool) -> dict[str, Any]:
    """Return `value` as the keyword argument `name` of `f`, if it requires one, or, if `optional`, takes one."""
    found = arguments(f).get(name)
    return {name: value} if found is not None and (optional or found.default is found.empty) else {}


def required(f: Callable[..., Any]) -> list[inspect.Parameter]:
    """Return the parameters that a call of `f` must give."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p for p in arguments(f).values() if p.default is p.empty and p.kind not in kinds]


def zeros(shapes: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jax.numpy.zeros(x.shape, x.dtype), shapes)
