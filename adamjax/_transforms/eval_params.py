"""The parameters to evaluate at, where these are not those that are trained."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from adamjax._core import checks, trees
from adamjax._core.quantization import sharded_like
from adamjax._core.typing import Path, PyTree
from adamjax._transforms.average_params import AverageState
from adamjax._transforms.param_rounding import RoundingState, exact_param

Found = tuple[Any, PyTree]  # a state that averages, and the residuals of its parameters, which a wrapper rounds


def is_schedule_free(x: object) -> bool:
    """Return whether a node of a state is that of a schedule-free optimizer, ours or optax's."""
    return {"b1", "z", "weight_sum"} <= set(getattr(x, "_fields", ()))


def is_averaging(x: object) -> bool:
    """Return whether a node of a state says what parameters to evaluate at."""
    return isinstance(x, AverageState) or is_schedule_free(x)


def averaging_arrays(state: PyTree) -> list[tuple[Path, PyTree]]:
    """Find the arrays of all such nodes, in dicts by field: each with the path of the node."""
    nodes = jax.tree.leaves_with_path(state, is_leaf=is_averaging)
    fields = ("average", "z", "nu")
    return [(path, {k: getattr(x, k) for k in fields if hasattr(x, k)}) for path, x in nodes if is_averaging(x)]


def find_averages(state: PyTree, residuals: PyTree = None) -> Iterator[Found]:
    """Yield all nodes of a state that say what parameters to evaluate at, each with the residuals of those."""
    if is_averaging(state):
        yield state, residuals
        return
    if isinstance(state, RoundingState):
        yield from find_averages(state.inner, state.kept)
        return
    for child in jax.tree.leaves(state, is_leaf=lambda x: x is not state):
        if child is not state:
            yield from find_averages(child, residuals)


def has_average(state: PyTree) -> bool:
    """Return whether a state says other parameters to evaluate at than those that are trained."""
    return next(find_averages(state), None) is not None


def evaluated_params(state: PyTree, params: PyTree) -> PyTree:
    """The parameters to evaluate at, whatever the optimizer: `eval_params`, or the parameters themselves."""
    return eval_params(state, params) if has_average(state) else params


def eval_params(state: PyTree, params: PyTree) -> PyTree:
    """The parameters to evaluate a model at: an average of those that are trained.

    Of `schedule_free_adamw` they are x = y + (1 - b1) / b1 (y - z), of `average_params` the average. Go on training
    with `params`, and save those, with the state. A state of `optax.contrib.schedule_free` will do, too.

    A model that keeps statistics, as batch normalisation does, has those of the trained parameters: before a last
    evaluation, compute them anew with these.

    Args:
      state: The state of an optimizer that has one of these two anywhere inside: in a chain, a group or a wrapper.
      params: The parameters that are trained, after the same step.

    Returns:
      The parameters in the structure, dtypes and shardings of `params`; computed in float32 or wider, with the digits
      of y that `master_weights` or `kahan` keeps. Those that no average is kept of are those of `params`.

    Raises:
      ValueError: Nothing in the state says such parameters; or it is that of other ones (the message has the path).

    >>> import adamjax, jax.numpy as jnp
    >>> opt = adamjax.schedule_free_adamw(0.5)
    >>> params = jnp.ones(2)
    >>> params, state = opt.step(jnp.ones(2), opt.init(params), params)
    >>> print(adamjax.eval_params(state, params).round(3))
    [0.5 0.5]
    """
    found = list(find_averages(state))
    if not found:
        raise ValueError(
            f"there are no parameters to evaluate at in the state, {checks.describe(state)}: it has neither a "
            "ScheduleFreeState of schedule_free_adamw nor an AverageState of average_params, as `opt.init` and "
            "`opt.step` return them. Evaluate another optimizer at `params`, and restore a saved state into that of "
            "`init` first"
        )
    by_path = dict(jax.tree.leaves_with_path(params))
    made: dict[Path, Any] = {}
    for node, residuals in found:
        rounded = {} if residuals is None else dict(jax.tree.leaves_with_path(residuals))
        average = isinstance(node, AverageState)
        for path, x in jax.tree.leaves_with_path(node.average if average else node.z):
            p = by_path.get(path)
            name = checks.at("params", path)
            if p is None or jnp.shape(p) != jnp.shape(x):
                raise ValueError(
                    f"the state averages {checks.describe(x)} at {name}, and there is {checks.describe(p)}: give "
                    "`eval_params` the parameters that this state belongs to"
                )
            if path in made:
                raise ValueError(f"the state has two averages of {name}: give `eval_params` that of one optimizer")
            x = _beside(x, p)
            made[path] = _cast(x, p) if average else _average_of(_exact(p, rounded.get(path)), x, node.b1, p)
    return jax.tree.map_with_path(lambda path, p: made.get(path, p), params)


def _exact(p: Any, residual: Any) -> Any:
    return exact_param(p, None if residual is None else _beside(residual, p))


def _average_of(y: Any, z: Array, b1: Array, like: Any) -> Array:
    if jnp.ndim(b1):
        raise ValueError(
            f"b1 in the state has shape {jnp.shape(b1)}: this is the state of a population, call `eval_params` under "
            "`jax.vmap`"
        )
    dtype = trees.compute_dtype(trees.dtype_of(y), z.dtype)
    y, z = jnp.asarray(y).astype(dtype), z.astype(dtype)
    b1 = jnp.asarray(b1).astype(trees.real_dtype(dtype))
    with jax.numpy_dtype_promotion("standard"):  # a real factor of complex parameters
        return _cast(y + (1 - b1) / b1 * (y - z), like)


def _cast(x: Array, p: Any) -> Array:
    return x.astype(trees.dtype_of(p))


def _is_on_host(x: Any) -> bool:
    return getattr(jax.typeof(x), "memory_space", None) == jax.memory.Space.Host


def _beside(x: Any, p: Any) -> Any:
    """The array of a state where its parameter is: `sharding.zero1` divides states, `offload` has them on the host."""
    if isinstance(x, jax.core.Tracer) or isinstance(p, jax.core.Tracer):
        return sharded_like(jax.device_put(x, jax.memory.Space.Device) if _is_on_host(x) else x, p)
    same = not isinstance(p, jax.Array) or getattr(x, "sharding", None) == p.sharding
    return jnp.asarray(x) if same else jax.device_put(x, p.sharding)
