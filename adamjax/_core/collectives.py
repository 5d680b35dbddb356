"""Sums of squares, and agreement, over mapped axes: inside `jax.shard_map` and `jax.pmap`."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from adamjax._core import trees
from adamjax._core.numerics import abs_sq

AxisName = str | tuple[str, ...] | None


def check_axis_name(axis_name: Any) -> None:
    """Check the argument `axis_name`: the name of a mapped axis, a tuple of them, or None."""
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    if axis_name is not None and not all(isinstance(name, str) for name in names):
        raise TypeError(f"Invalid axis_name value: {axis_name!r}; axis_name must be a string or a tuple of them")


@partial(jax.jit, inline=True)
def sum_of_squares(x: Array) -> Array:
    """Of the elements of one array, in float32 or wider."""
    return jnp.sum(abs_sq(x.astype(trees.compute_dtype(x.dtype))))


def psum_of_scalars(parts: Sequence[Array], axis_name: AxisName, dtype: Any) -> Array:
    """The sum of scalars in `dtype`, each over those of the axes that it is a shard's over."""
    if axis_name is None:
        return sum((x.astype(dtype) for x in parts), start=jnp.zeros((), dtype))
    sums: dict[tuple[str, ...], Array] = {}
    for x in parts:
        axes = axes_varying(x, axis_name)
        sums[axes] = sums.get(axes, jnp.zeros((), dtype)) + x.astype(dtype)
    return sum((jax.lax.psum(x, axes) if axes else x for axes, x in sums.items()), start=jnp.zeros((), dtype))


def pmax(x: Array, axis_name: AxisName) -> Array:
    """The largest over the axes, element by element."""
    axes = axes_varying(x, axis_name)
    return jax.lax.pmax(x, axes) if axes else x


def axes_varying(x: Array, axis_name: AxisName) -> tuple[str, ...]:
    """Those of the axes over which `x` may differ: where JAX does not track that, all of them."""
    if axis_name is None:
        return ()
    axes = {axis_name} if isinstance(axis_name, str) else set(axis_name)
    # Where shard_map tracks what varies over an axis, the axis index does; elsewhere nothing does.
    tracked = any(varying_over(jax.lax.axis_index(axis)) for axis in axes)
    return tuple(sorted(axes & varying_over(x) if tracked else axes))


def pcast_like(x: Array, like: Any) -> Array:
    """`x`, marked as what may differ over the axes that `like` (a `jax.ShapeDtypeStruct`) may differ over."""
    found = like.manual_axis_type
    return x if found is None else _vary(x, found.varying)


def pcast_all(*arrays: Array) -> list[Array]:
    """`arrays`, each marked as what may differ over the axes that any of them may differ over."""
    axes: frozenset[str] = frozenset().union(*map(varying_over, arrays))
    return [_vary(x, axes) for x in arrays] if axes else list(arrays)


def _vary(x: Array, axes: frozenset[str]) -> Array:
    new = tuple(sorted(axes - varying_over(x)))
    return jax.lax.pcast(x, new, to="varying") if new else x


def varying_over(x: Any) -> frozenset[str]:
    """The mapped axes over which `x` may differ, where JAX tracks that."""
    return jax.typeof(x).manual_axis_type.varying
