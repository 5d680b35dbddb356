"""The end of a step: the last operation of a leaf program delivers its result."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from adamjax._core import checks, trees
from adamjax._core.trees import Leaves
from adamjax._core.typing import PyTree
from adamjax._transforms.leafwise import LeafOp, LeafTransform, run_leafwise


class Delivery(LeafTransform):
    """Base of the deliveries: the last transform of a leaf program."""

    def unchanged(self, index: int, p: Any) -> Any:
        """The result that leaves parameter `index` as it is; None for an update of -0."""
        return None


class AsUpdate(Delivery):
    """Deliver an update, rounded to the dtype of its parameter, or of its gradient where that is all there is."""

    def __init__(self, targets: Sequence[Any]) -> None:
        self.targets = targets

    def ops_for(self, index: int, dtype: np.dtype, p: Any) -> Sequence[LeafOp]:
        target = update_dtype(dtype, trees.dtype_of(self.targets[index]))
        return () if target == dtype else (LeafOp(RoundTo(target), None, target),)


class AddToParam(Delivery):
    """Deliver the new parameter: the update, rounded to its dtype, and added in float32 or wider."""

    def ops_for(self, index: int, dtype: np.dtype, p: Any) -> Sequence[LeafOp]:
        return (LeafOp(add_to_param, None, trees.dtype_of(p)),)

    def unchanged(self, index: int, p: Any) -> Any:
        return p


@dataclass(frozen=True)
class RoundTo:
    """A `LeafFunction`: round the update to a dtype."""

    dtype: np.dtype

    def __call__(self, u: Array, p: Any, state: Any, operands: None) -> tuple[Array, Any]:
        return u.astype(self.dtype), state


def add_to_param(u: Array, p: Array, state: Any, operands: None) -> tuple[Array, Any]:
    """A `LeafFunction`: the parameter plus its update, which is rounded to the parameter's dtype first."""
    return _add(p, u.astype(update_dtype(u.dtype, p.dtype))), state


def deliver(updates: Leaves, params: Leaves | None, delivery: Delivery | None) -> tuple[Leaves, list[Any]]:
    """Deliver finished updates; return what is delivered, and the new leaf states of the delivery."""
    if delivery is None:
        return updates, []
    new, (states,) = run_leafwise([delivery], updates, params)
    return new, states


def apply_updates(params: PyTree, updates: PyTree) -> PyTree:
    """Add updates to parameters: `params + updates`, rounded once to the parameters' dtype.

    Args:
      params: The parameters.
      updates: The updates that `update` returned: the structure and shapes of `params`. The sum is taken in
        float32 or wider. A None leaves the parameter at its place as it is.

    Returns:
      The new parameters, with the structure, shapes and dtypes of `params`.

    Raises:
      TypeError, ValueError: The trees do not fit each other; the message names the path.

    >>> import adamjax, jax.numpy as jnp
    >>> adamjax.apply_updates({"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([0.5, -0.5])})
    {'w': Array([1.5, 1.5], dtype=float32)}
    """
    checks.params_given(params, updates, "apply_updates", "apply_updates(params, updates)")
    given, own = checks.updates(updates, params, integers=True)
    pairs = zip(given.leaves, (own or given).leaves, strict=True)
    return given.like([_add(p, u) if _changes(u) else p for u, p in pairs]).tree


def _changes(u: Any) -> bool:
    """Return whether adding `u` may change a parameter; zeros for what has no gradient would make it an array."""
    return checks.is_param(u) and not (isinstance(u, float | complex) and u == 0)


@partial(jax.jit, inline=True)
def _add(p: Array, u: Array) -> Array:
    dtype = trees.compute_dtype(p.dtype, u.dtype)
    return (p.astype(dtype) + u.astype(dtype)).astype(p.dtype)


def update_dtype(update: np.dtype, target: np.dtype) -> np.dtype:
    """The dtype of an update for a parameter of dtype `target`: a complex parameter may have a real gradient, but no
    real update.
    """
    is_complex = jnp.issubdtype(update, jnp.complexfloating)
    return trees.compute_dtype(target, jnp.dtype(jnp.complex64)) if is_complex else target
