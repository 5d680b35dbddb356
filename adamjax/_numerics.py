"""Arithmetic with care where the obvious form loses digits, or is infinite."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from adamjax import _checks


def mix(x: Array, y: Array, b: Array, a: Array) -> Array:
    """b * x + a * y for b + a = 1, where the float32 nearest to b and to a do not sum to 1.

    By the smaller weight alone: a mean of equals stays what it is, and the larger of x and y, where
    it weighs little, does not cost the other its digits.
    """
    return jnp.where(a < 0.5, x + a * (y - x), y + b * (x - y))


def abs2(g: Array) -> Array:
    return g.real * g.real + g.imag * g.imag if jnp.iscomplexobj(g) else g * g


def divide(x: Array, d: Array) -> Array:
    """Divide by a real d, with 0 / 0 = 0: what eps = 0 makes of a parameter without gradients."""
    d = jnp.where(d == 0, 1.0, d)
    return jax.lax.complex(x.real / d, x.imag / d) if jnp.iscomplexobj(x) else x / d


@jax.custom_jvp
def sqrt(x: Array) -> Array:
    """The square root, with slope 0 at 0 instead of infinity: a gradient through it stays finite."""
    return jnp.sqrt(x)


@sqrt.defjvp
def _sqrt_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    root = sqrt(primals[0])
    at_zero = root == 0
    return root, jnp.where(at_zero, 0.0, 0.5 / jnp.where(at_zero, 1.0, root)) * tangents[0]


def log(b: float) -> float:
    return math.log(b) if b > 0 else -math.inf


def decay_rate(name: str, b: Any, dtype: np.dtype) -> tuple[Any, Any, Any]:
    """b, 1 - b and log(b).

    Of a number, in double: the float32 next to 0.999 is off by 1.3e-5 of its distance to 1.
    """
    if isinstance(b, float):
        return np.asarray(b, dtype), np.asarray(1 - b, dtype), np.asarray(log(b), dtype)
    b = _checks.scalar(name, b, dtype)
    return b, 1 - b, jnp.log1p(-(1 - b))


def correction(t: Array, log_b: Any) -> Array:
    """1 - b**t; formed as written, it would cancel: for b = 0.999 that costs three digits."""
    return -jnp.expm1(t * log_b)
