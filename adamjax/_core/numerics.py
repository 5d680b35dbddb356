"""Arithmetic with care where the obvious form loses digits, or is infinite."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from adamjax._core import checks
from adamjax._core.value import low_part


class Decay(NamedTuple):
    """The numbers that an exponential moving average with decay rate b needs: 0-d arrays."""

    b: Any
    one_minus_b: Any
    log_b: Any
    old_weight: Any  # 1 where b is above a half, b else
    undo: Any  # 1 where b is above a half, 0 else


def decay(opt: Any, name: str, dtype: np.dtype) -> Decay:
    """Prepare the decay rate in a `precise_field` of `opt`, a number or a 0-d array, for arithmetic in `dtype`.

    For a Python number, 1 - b and log(b) are formed in double precision: the float32 next to 0.999 is off by
    1.3e-5 of its distance to 1. For a leaf that was one, its low part makes up for that. An array that is 1, as 0.999
    is in bfloat16, counts as the number of its dtype below 1: an average with rate 1 would never begin.
    """
    b: Any = getattr(opt, name)
    if isinstance(b, float):
        near_one = (1.0, 1.0) if b > 0.5 else (b, 0.0)
        numbers = (b, 1 - b, log(b), *near_one)
        return Decay(*[np.asarray(x, dtype) for x in numbers])
    own = jnp.result_type(b)
    below_one = float(jnp.finfo(own).epsneg) if jnp.issubdtype(own, jnp.floating) else float(jnp.finfo(dtype).epsneg)
    b = checks.as_scalar(name, b, dtype)
    one_minus_b = 1 - b
    if own != jnp.float64:  # float64 leaves nothing out
        # The derivative by the rate is that by its first leaf alone.
        one_minus_b = one_minus_b - jax.lax.stop_gradient(checks.as_scalar(name, low_part(opt, name), dtype))
    is_one = one_minus_b <= 0
    return decay_by(jnp.where(is_one, 1 - below_one, b), jnp.where(is_one, below_one, one_minus_b))


def decay_by(b: Array, one_minus_b: Array) -> Decay:
    """Prepare a decay rate that is traced, given its distance to 1."""
    slow, log_b = b > 0.5, jnp.log1p(-one_minus_b)
    return Decay(b, one_minus_b, log_b, jnp.where(slow, 1, b), jnp.where(slow, 1, jnp.zeros_like(b)))


def ema(mean: Array, x: Array, d: Decay) -> Array:
    """The exponential moving average after one more x: b * mean + (1 - b) * x.

    Where b is near 1, it is computed as mean + (1 - b) * (x - mean): the float32 numbers next to b and to 1 - b do
    not sum to 1, and a mean of equal numbers would drift. Where b is small, it is computed as written: a large mean
    would cost x its digits.
    """
    return d.old_weight * mean + d.one_minus_b * (x - d.undo * mean)


def bias_correction(t: Array, d: Decay) -> Array:
    """1 - b**t; formed as written it would cancel, which for b = 0.999 costs three digits."""
    return -jnp.expm1(t * d.log_b)


def log(b: float) -> float:
    """The natural logarithm; minus infinity at 0."""
    return math.log(b) if b > 0 else -math.inf


def is_zero(x: object) -> bool:
    """Whether a hyperparameter is the number 0, and not an array or a schedule, so that its term can be left out."""
    return isinstance(x, float) and x == 0


def largest_square_root(dtype: np.dtype) -> float:
    """The largest part of a number whose squared magnitude is finite, with room for rounding."""
    return 0.69 * float(jnp.finfo(dtype).max) ** 0.5


def clip_finite(x: Array, largest: float) -> Array:
    """Limit the parts of finite numbers to [-largest, largest]; infinity and NaN stay, so that they show."""
    if jnp.iscomplexobj(x):
        size = jnp.maximum(jnp.abs(x.real), jnp.abs(x.imag))
        factor = jnp.where((size > largest) & (size < np.inf), largest / size, 1.0)
        return jax.lax.complex(x.real * factor, x.imag * factor)
    return jnp.where(jnp.abs(x) < np.inf, jnp.clip(x, -largest, largest), x)


def abs_sq(g: Array) -> Array:
    """The squared magnitude, which is real."""
    return g.real * g.real + g.imag * g.imag if jnp.iscomplexobj(g) else g * g


@partial(jax.jit, inline=True)
def scale(u: Array, factor: Array) -> Array:
    """The product, in the dtype of `factor` or wider."""
    return u.astype(factor.dtype) * factor


def divide_by_real(x: Array, d: Array) -> Array:
    """Divide by a real d; a complex division would square it."""
    return jax.lax.complex(x.real / d, x.imag / d) if jnp.iscomplexobj(x) else x / d


@jax.custom_jvp
def sqrt_with_zero_slope(x: Array) -> Array:
    """The square root, with slope 0 at 0 instead of infinity: a gradient through it stays finite."""
    return jnp.sqrt(x)


@sqrt_with_zero_slope.defjvp
def _sqrt_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    root = sqrt_with_zero_slope(primals[0])
    at_zero = root == 0
    return root, jnp.where(at_zero, 0.0, 0.5 / jnp.where(at_zero, 1.0, root)) * tangents[0]
