"""What the members of a chain do to a leaf, one after the other, as one compiled function of it.

A tree of a thousand leaves is then traced once per distinct leaf, and what is handed over to the
compiler is one call a leaf.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from adamjax._core import trees
from adamjax._core.trees import PyTree

T = TypeVar("T")


class Doing(NamedTuple):
    """What is done to one leaf.

    Fields:
      function: Called as `function(u, p, kept, numbers)` with the update, the parameter and what is kept of the
        leaf: the new update, and what is kept from now on. Hashable.
      numbers: Arrays that it needs besides.
      dtype: Of the new update.
    """

    function: Callable[[Any, Any, Any, Any], tuple[Any, Any]]
    numbers: Any
    dtype: np.dtype


class Plan(NamedTuple):
    """What one member does at a step.

    Fields:
      at: From the number of a leaf, the dtype of its update, its parameter and what is kept of it: what is done to
        it, or None.
      state: The new state, called with the new trees of `kept`.
      kept: Trees that have something for each leaf.
    """

    at: Callable[[int, np.dtype, Any, tuple[Any, ...]], Doing | None]
    state: Callable[..., PyTree]
    kept: tuple[PyTree, ...] = ()


def carry_out(
    plans: Sequence[Plan], updates: PyTree, params: PyTree | None, *, where_none: PyTree = None
) -> tuple[PyTree, list[PyTree]]:
    """The new updates, with what stands in `where_none` in place of None, and the new states."""
    if not plans:
        return updates, []
    ends = np.cumsum([len(plan.kept) for plan in plans]).tolist()
    spans = [slice(end - len(plan.kept), end) for plan, end in zip(plans, ends, strict=True)]
    structure, rows = trees.flatten(updates, params, where_none, *(tree for plan in plans for tree in plan.kept))
    new: list[tuple[Any, ...]] = []
    for i, (u, p, otherwise, *kept) in enumerate(rows):
        if u is None:
            new.append((otherwise, *kept))
            continue
        functions, given, numbers, changed = [], [], [], []
        dtype = trees.dtype_of(u)
        for plan, span in zip(plans, spans, strict=True):
            doing = plan.at(i, dtype, p, tuple(kept[span]))
            if doing is not None:
                dtype = doing.dtype
                functions.append(doing.function)
                given.append(tuple(kept[span]))
                numbers.append(doing.numbers)
                changed.append(span)
        if functions:
            u, results = _one_leaf(u, p, given, numbers, functions=tuple(functions))
            for span, result in zip(changed, results, strict=True):
                kept[span] = result
        new.append((u, *kept))
    updates, *columns = trees.unflatten(structure, new, 1 + ends[-1])
    return updates, [plan.state(*columns[span]) for plan, span in zip(plans, spans, strict=True)]


@jax.tree_util.register_static
class _Fixed:
    """One of NumPy's numbers, as part of a compiled function instead of an argument."""

    def __init__(self, x: Any) -> None:
        self.x = x
        self.key = x.dtype, x.tobytes()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Fixed) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


def fixed(numbers: T, like: PyTree) -> T:
    """`numbers`, where `like` is part of a program that is being traced with those of NumPy fixed in its functions.

    They are constants of that program anyway. As arguments, a thousand leaves would be a long time over them.
    """
    if not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(like)):
        return numbers
    return jax.tree.map(lambda x: _Fixed(x) if isinstance(x, np.ndarray | np.generic) else x, numbers)


def _loose(numbers: PyTree) -> PyTree:
    return jax.tree.map(lambda x: x.x if _is_fixed(x) else x, numbers, is_leaf=_is_fixed)


def _is_fixed(x: Any) -> bool:
    return isinstance(x, _Fixed)


@partial(jax.jit, static_argnames="functions")
def _one_leaf(
    u: Any, p: Any, kept: list[Any], numbers: list[Any], *, functions: tuple[Callable[..., Any], ...]
) -> tuple[Any, list[Any]]:
    results = []
    for function, part, of_function in zip(functions, kept, _loose(numbers), strict=True):
        u, result = function(u, p, part, of_function)
        results.append(result)
    return u, results
