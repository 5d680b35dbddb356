"""How a step is skipped as a whole, how it is counted, and which wrappers that do so fit into each other."""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from adamjax._core import checks, collectives, trees
from adamjax._core.trees import Leaves
from adamjax._core.typing import PyTree
from adamjax._transforms.base import Result, StepContext, Transformation, delivering, may_skip

# Skipped steps in a row that the scale of the loss cannot explain: after one fewer, it is 1 from wherever it began.
MAX_OF_SCALE = 25
COUNTED = 2**31  # steps that the int32 counts of a state can tell apart


def step_if(
    ok: Array, apply: Callable[[Leaves, PyTree], Result], grads: Leaves, inner: PyTree, context: StepContext
) -> Result:
    """Apply the gradients if `ok`; else deliver results that change nothing, and `inner`, the state, as it is."""

    def skip(grads: Leaves, inner: PyTree) -> Result:
        params, delivery = context.params, context.delivery
        made, delivered, after = jax.eval_shape(apply, grads, inner)
        found = trees.unflatten_by_path(inner, after)
        # If the paths differ, the leaves are still in the same order.
        structure: Any = jax.tree.structure(after)
        inner = jax.tree.unflatten(structure, jax.tree.leaves(inner)) if found is None else found
        ps = [None] * len(made.leaves) if params is None else params.leaves
        unchanged = [None if delivery is None else delivery.unchanged(i, p) for i, p in enumerate(ps)]
        same = made.map(lambda like, x: _minus_zeros(like) if x is None else x, unchanged)
        kept = delivered if delivery is None or delivery.leaf_states is None else list(delivery.leaf_states)
        return same, kept, inner

    if isinstance(ok, jax.core.Tracer):
        # A branch, and not a selection by element, which would need the old moments beside the new ones.
        result: Result = jax.lax.cond(ok, apply, skip, grads, inner)
        return result
    return (apply if ok else skip)(grads, inner)  # Eagerly, `cond` would compile its branches at each step.


def _minus_zeros(like: jax.ShapeDtypeStruct) -> Array:
    """Updates that change nothing. Adding 0 would turn a parameter that is -0 into 0; adding -0 does not."""
    return collectives.pcast_like(-jnp.zeros(like.shape, like.dtype, device=like.sharding), like)


def zero_counts(params: PyTree) -> tuple[Array, Array, Array]:
    """The counts of skipped steps before the first step: `skipped`, `consecutive` and `exceeded`."""
    exceeded = trees.make_on_mesh_of(lambda: jnp.zeros((), jnp.bool), params)
    return trees.zero_count(params), trees.zero_count(params), exceeded


def count_step(ok: Array, state: Any, limit: int | None) -> tuple[Array, Array, Array]:
    """The counts after a step; `exceeded` is True from `limit` skipped steps in a row on."""
    consecutive = jnp.where(ok, 0, trees.increment(state.consecutive))
    exceeded = state.exceeded if limit is None else state.exceeded | (consecutive >= limit)
    return jnp.where(ok, state.skipped, trees.increment(state.skipped)), consecutive, exceeded


def check_state(state: Any) -> None:
    """Check what `checks.state` does not: the flag and the arrays of the wrapped transformation."""
    checks.same_structure(state.exceeded, jax.ShapeDtypeStruct((), jnp.bool), "state.exceeded")
    checks.arrays(state.inner, "state.inner")


def checked_limit(max_consecutive: object) -> int | None:
    """Check the argument `max_consecutive`."""
    return None if max_consecutive is None else checks.count("max_consecutive", max_consecutive, below=COUNTED)


def warn_of_loss_scale(name: str, inner: Transformation, remedy: str) -> None:
    """Warn of a wrapper that keeps from `dynamic_loss_scale` the steps it halves the scale at."""
    if may_skip(inner) and any(t.unscales_gradients for t in delivering(inner)):
        warnings.warn(
            f"{name} around dynamic_loss_scale skips the steps at which the scale would be halved: it stays "
            f"too large: {remedy}",
            stacklevel=5,
        )
