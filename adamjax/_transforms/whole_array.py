"""Factors of a step that depend on a whole parameter: how much of it agrees with the gradient, and how far it goes."""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from adamjax._core import collectives
from adamjax._core.numerics import abs_sq, sqrt_with_zero_slope
from adamjax._core.typing import AxisName


def agrees(u: Array, g: Array) -> Array:
    """Return where a direction has the sign of the gradient; of complex numbers, where it is within a right angle."""
    if jnp.iscomplexobj(u) or jnp.iscomplexobj(g):
        return u.real * g.real + u.imag * g.imag > 0
    # No product, which could underflow.
    return ((u > 0) & (g > 0)) | ((u < 0) & (g < 0))


def agreeing_part(u: Array, g: Array) -> Array:
    """Return the direction where it has the sign of the gradient, and 0 elsewhere."""
    return jnp.where(agrees(u, g), u, jnp.zeros_like(u))


def agreement(count: Array, size: int, axis_name: AxisName) -> Array:
    """Return the factor that makes up for what `agreeing_part` leaves out (Liang et al., 2024, Algorithm 1).

    `count` is how many numbers agree, of the `size` that this device has of a parameter.
    """
    count, whole = _of_whole(count, size, axis_name)
    return whole / (count + 1)


def update_clipping(squares: Array, size: int, axis_name: AxisName) -> Array:
    """Return 1 over the root mean square of what an Adam without memory would do, if that is above 1.

    Wortsman et al., 2023, Algorithm 2. `squares` is the sum of the squares of the `size` numbers that this device has
    of it.
    """
    squares, whole = _of_whole(squares, size, axis_name)
    return 1 / jnp.maximum(1, sqrt_with_zero_slope(squares / whole))


def norm(x: Array, axis_name: AxisName) -> Array:
    """Return the Frobenius norm of a whole parameter."""
    return sqrt_with_zero_slope(_of_whole(jnp.sum(abs_sq(x)), x.size, axis_name)[0])


def _of_whole(total: Array, size: int, axis_name: AxisName) -> tuple[Array, Any]:
    """The sum over a whole parameter, and its elements, from those of the part that a device may have."""
    axes = _axes_of_parts(total, axis_name)
    return (lax.psum(total, axes), size * lax.axis_size(axes)) if axes else (total, size)


def _axes_of_parts(x: Array, axis_name: AxisName) -> tuple[str, ...]:
    """The mapped axes over which a parameter is spread."""
    if axis_name is None and (axes := collectives.varying_over(x)):
        raise ValueError(
            f"an array differs over the mapped axes {', '.join(map(repr, sorted(axes)))}, and its step depends on "
            "the whole parameter: give axis_name=, the axes that parameters are spread over, or () if none"
        )
    return collectives.axes_varying(x, axis_name) if axis_name else ()
