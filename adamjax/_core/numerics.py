"""Arithmetic with care where the obvious form loses digits, or is infinite."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from adamjax._core import checks


class Decay(NamedTuple):
    """What a running mean that decays at rate b needs: 0-d arrays."""

    b: Any
    a: Any  # 1 - b
    log_b: Any
    keep: Any  # 1 where b is above a half, b else
    undo: Any  # 1 where b is above a half, 0 else


def decay(name: str, b: Any, dtype: np.dtype) -> Decay:
    """The rate `b`, a number or a 0-d array, for arithmetic in `dtype`.

    Of a number, 1 - b and log(b) are formed in double: the float32 next to 0.999 is off by 1.3e-5 of
    its distance to 1.
    """
    if isinstance(b, float):
        slow = b > 0.5
        numbers = (b, 1 - b, log(b), 1.0 if slow else b, 1.0 if slow else 0.0)
        return Decay(*(np.asarray(x, dtype) for x in numbers))
    b = checks.scalar(name, b, dtype)
    slow = b > 0.5
    return Decay(b, 1 - b, jnp.log1p(-(1 - b)), jnp.where(slow, 1, b), jnp.where(slow, 1, jnp.zeros_like(b)))


def mix(mean: Array, x: Array, d: Decay) -> Array:
    """The mean after one more x: b * mean + a * x.

    Where b is near 1, as mean + a * (x - mean): the float32 next to b and to a do not sum to 1, and a
    mean of equals would drift. Where b is small, as written: a large mean would cost x its digits.
    """
    return d.keep * mean + d.a * (x - d.undo * mean)


def correction(t: Array, d: Decay) -> Array:
    """1 - b**t; formed as written it would cancel, which for b = 0.999 costs three digits."""
    return -jnp.expm1(t * d.log_b)


def log(b: float) -> float:
    return math.log(b) if b > 0 else -math.inf


def abs2(g: Array) -> Array:
    return g.real * g.real + g.imag * g.imag if jnp.iscomplexobj(g) else g * g


@partial(jax.jit, inline=True)
def scale(u: Array, factor: Array) -> Array:
    return u.astype(factor.dtype) * factor


def divide(x: Array, d: Array) -> Array:
    """Divide by a real d; a complex division would square it."""
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
