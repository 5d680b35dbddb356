"""Rounding to a narrow dtype, to nearest or stochastically, and the random numbers for it.

An element rounds up where its number u is below the fraction that it would be cut by. Its first u is a
hash of its position in the array and of a seed: the same however the array is sharded, and far
cheaper than those of `jax.random`. From step to step it moves on by the golden ratio, modulo 1. Over
any run of steps these numbers lie more evenly than independent ones (Weyl, 1916): an element that is
cut by the same fraction each time rounds up as often as it should within one time or two, where
coin tosses would be off by the root of the number of steps.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax


def is_narrow(dtype: np.dtype) -> bool:
    """Whether `dtype` holds fewer digits than float32."""
    return jnp.finfo(dtype).bits < 32


class Dither(NamedTuple):
    """Where the random numbers of one array at one step come from: uint32 scalars."""

    seed: Array
    turn: Array  # by how much they have moved on, in parts of 2**32


def dither(count: Array, number: int, seed: Any = 0) -> Dither:
    """That of the array with a `number` of its own, at step `count`."""
    golden_ratio = np.uint32(0x9E3779B9)
    return Dither(_hash(jnp.uint32(number) ^ jnp.uint32(seed)), count.astype(jnp.uint32) * golden_ratio)


def uniform(like: Array, dither: Dither) -> Array:
    """Numbers in [0, 1), in float32, by the global index alone."""
    # Starting from zeros_like, the index takes the sharding of `like`.
    index = jnp.zeros_like(like, dtype=jnp.uint32)
    for axis, size in enumerate(like.shape):
        index = index * np.uint32(size) + lax.broadcasted_iota(jnp.uint32, like.shape, axis)
    bits = _hash(index ^ dither.seed) + dither.turn
    return (bits >> 8).astype(jnp.float32) * np.float32(2**-24)


def to_nearest(x: Array, dtype: np.dtype) -> Array:
    """The float32 `x` rounded to what the narrow `dtype` can hold, as float32; ties to even.

    By the spacing of the narrow numbers around `x` and not by way of a conversion to them: XLA
    takes a conversion to bfloat16 and back for nothing, and leaves it out.
    """
    step = spacing(x, dtype)
    return jnp.round(x / step) * step


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def stochastically(x: Array, dither: Dither, dtype: np.dtype) -> Array:
    """The float32 `x` as one of its two neighbours in the narrow `dtype`, as float32: on average `x`."""
    step = spacing(x, dtype)
    units = x / step
    whole = jnp.floor(units)
    up = uniform(x, dither) < units - whole
    return (whole + up.astype(jnp.float32)) * step


@stochastically.defjvp
def _straight_through(dtype: np.dtype, primals: Any, tangents: Any) -> tuple[Array, Array]:
    return stochastically(*primals, dtype), tangents[0]


def spacing(x: Array, dtype: np.dtype) -> Array:
    """The distance between neighbours in the narrow `dtype` around the float32 `x`: a power of two."""
    info = jnp.finfo(dtype)
    exponent = (lax.bitcast_convert_type(x, jnp.uint32) >> 23) & np.uint32(0xFF)
    exponent = jnp.maximum(exponent, np.uint32(_lowest_exponent(dtype)))
    return lax.bitcast_convert_type((exponent - np.uint32(info.nmant)) << 23, jnp.float32)


def spacing_at_zero(dtype: np.dtype) -> float:
    """The smallest number that is rounded to, but for 0."""
    return 2.0 ** (_lowest_exponent(dtype) - jnp.finfo(dtype).nmant - 127)


def _lowest_exponent(dtype: np.dtype) -> int:
    """The biased float32 exponent below which the spacing of `dtype` no longer shrinks.

    Where bfloat16 has subnormals, float32 has too, and processors flush those to 0: stay above.
    """
    info = jnp.finfo(dtype)
    return max(info.minexp + 127, info.nmant + 1)


def _hash(x: Array) -> Array:
    """Mix the bits of uint32 integers (C. Wellons, "lowbias32")."""
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)
