"""Sums and maxima over mapped axes, and the axes that values vary over, inside `jax.shard_map` and `jax.pmap`."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from adamjax._core import trees
from adamjax._core.numerics import abs_sq, largest_square_root
from adamjax._core.typing import AxisName


def check_axis_name(axis_name: object) -> None:
    """Check the argument `axis_name`: the name of a mapped axis, a tuple of them, or None."""
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    if axis_name is not None and not all(isinstance(name, str) for name in names):
        raise TypeError(f"Invalid axis_name value: {axis_name!r}; axis_name must be a string or a tuple of them")


@partial(jax.jit, inline=True)
def sum_of_squares(x: Array) -> Array:
    """Return the sum of squares of the elements of an array, in float32 or wider."""
    return jnp.sum(abs_sq(x.astype(trees.compute_dtype(x.dtype))))


def limit_of_squares(dtype: np.dtype, size: int, axis_name: AxisName) -> float:
    """Return the largest number of which `size`, on each device, have a finite sum of squares in `dtype`."""
    devices = 1 if axis_name is None else 2**16  # at most
    return largest_square_root(dtype) / (devices * max(size, 1)) ** 0.5


def psum_of_scalars(parts: Sequence[Array], axis_name: AxisName, dtype: np.dtype) -> Array:
    """Sum scalars in `dtype`, each over those of the axes that it varies over."""
    if axis_name is None:
        return sum((x.astype(dtype) for x in parts), start=jnp.zeros((), dtype))
    sums: dict[tuple[str, ...], Array] = {}
    for x in parts:
        axes = axes_varying(x, axis_name)
        sums[axes] = sums.get(axes, jnp.zeros((), dtype)) + x.astype(dtype)
    return sum((jax.lax.psum(x, axes) if axes else x for axes, x in sums.items()), start=jnp.zeros((), dtype))


def pmax(x: Array, axis_name: AxisName) -> Array:
    """Return the elementwise maximum over the axes."""
    axes = axes_varying(x, axis_name)
    return jax.lax.pmax(x, axes) if axes else x


def axes_varying(x: Array, axis_name: AxisName) -> tuple[str, ...]:
    """Return those of the axes that `x` may vary over; all of them if JAX does not track that."""
    if axis_name is None:
        return ()
    axes = {axis_name} if isinstance(axis_name, str) else set(axis_name)
    # The axis index varies over its axis, if shard_map tracks that. Otherwise nothing is marked as varying.
    tracked = any(varying_over(jax.lax.axis_index(axis)) for axis in axes)
    return tuple(sorted(axes & varying_over(x) if tracked else axes))


def bound_axes(axis_name: AxisName) -> tuple[str, ...]:
    """Return those of the axes that are mapped here: none of them outside of `jax.shard_map` and `jax.pmap`."""
    names = () if axis_name is None else (axis_name,) if isinstance(axis_name, str) else axis_name
    return tuple(filter(_is_bound, names))


def _is_bound(name: str) -> bool:
    try:
        jax.lax.axis_size(name)
    except NameError:
        return False
    return True


def pcast_like(x: Array, like: jax.ShapeDtypeStruct) -> Array:
    """Mark `x` as varying over the axes that `like` varies over."""
    found = like.manual_axis_type
    return x if found is None else _vary(x, found.varying)


def pcast_all(*arrays: Array) -> list[Array]:
    """Mark each array as varying over all axes that any of them varies over."""
    axes: frozenset[str] = frozenset().union(*map(varying_over, arrays))
    return [_vary(x, axes) for x in arrays] if axes else list(arrays)


def _vary(x: Array, axes: frozenset[str]) -> Array:
    new = tuple(sorted(axes - varying_over(x)))
    return jax.lax.pcast(x, new, to="varying") if new else x


def varying_over(x: Array) -> frozenset[str]:
    """Return the mapped axes that `x` varies over, as far as JAX tracks that."""
    return jax.typeof(x).manual_axis_type.varying
