"""Rounding to a narrow dtype, to nearest or stochastically, and the random numbers for it.

An element rounds up where its number u is below the fraction that it would be cut by. Its first u is a
hash of its position in the array and of a seed: the same however the array is sharded, and far
cheaper than those of `jax.random`. From step to step it moves on by a constant that is near no simple
fraction, modulo 1. Over any run of steps these numbers lie more evenly than independent ones (Weyl,
1916): an element that is cut by the same fraction each time rounds up as often as it should within
one time or two, where coin tosses would be off by the root of the number of steps.
"""

from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax


@cache
def is_low_precision(dtype: np.dtype) -> bool:
    """Return whether `dtype` holds fewer digits than float32."""
    return jnp.finfo(dtype).bits < 32


class Dither(NamedTuple):
    """Where the random numbers of one array at one step come from: uint32 scalars."""

    seed: Array
    phase: Array  # by how much they have moved on, in parts of 2**32
    shift: Any = np.uint32(0)  # upper bits that are left to another array

    def second_array(self) -> "Dither":
        """That of a second array in the same place, from the same hashes, which are what costs most."""
        return self._replace(shift=np.uint32(9))


# Of all constants tried, the one by which both arrays move most evenly: any run of up to 3000 steps is at most 6 %
# more uneven than by the golden ratio, for which this is least, and so lie the pairs of both.
_WEYL_STEP = np.uint32(0xB94A434B)


def dither(count: Array, number: int, seed: Any = 0) -> Dither:
    """That of the array with a `number` of its own, at step `count`."""
    return Dither(_hash(jnp.uint32(number) ^ jnp.uint32(seed)), count.astype(jnp.uint32) * _WEYL_STEP)


def uniform(index: Array, dither: Dither) -> Array:
    """Numbers in [0, 1), in float32, by the global index alone."""
    return _fraction(_random(index, dither))


def index_of(like: Array) -> Array:
    """The global index of each element of an array, row by row; modulo 2**32."""
    # Starting from zeros_like, the index takes the sharding of `like`.
    index = jnp.zeros_like(like, dtype=jnp.uint32)
    for axis, size in enumerate(like.shape):
        index = index * np.uint32(size) + lax.broadcasted_iota(jnp.uint32, like.shape, axis)
    return index


def _random(index: Array, dither: Dither) -> Array:
    """The same as uint32 integers, of which the upper 23 bits are random."""
    return (_hash(index ^ dither.seed) + dither.phase) << dither.shift


def _fraction(random: Array) -> Array:
    return (random >> 9).astype(jnp.float32) * np.float32(2**-23)


def round_to_nearest(x: Array, dtype: np.dtype) -> Array:
    """The float32 `x` rounded to what the narrow `dtype` can hold, as float32; ties to even.

    By the spacing of the narrow numbers around `x` and not by way of a conversion to them: XLA
    takes a conversion to bfloat16 and back for nothing, and leaves it out.
    """
    step = ulp(x, dtype)
    # By its inverse, which a power of two has: a division XLA would take for too dear to fuse, and keep in memory.
    inverse = lax.bitcast_convert_type(np.uint32(254 << 23) - lax.bitcast_convert_type(step, jnp.uint32), jnp.float32)
    return jnp.round(x * inverse) * step


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def stochastic_round(x: Array, dither: Dither, dtype: np.dtype) -> Array:
    """The float32 `x` as one of its two neighbours in the narrow `dtype`, as float32: on average `x`."""
    info, random = jnp.finfo(dtype), _random(index_of(x), dither)
    # A random number that is added to the bits which are to be cut carries rightly.
    cut = 23 - info.nmant
    bits = lax.bitcast_convert_type(x, jnp.uint32) + (random >> np.uint32(32 - cut))
    rounded = lax.bitcast_convert_type(bits & np.uint32(2**32 - 2**cut), jnp.float32)
    if info.tiny > jnp.finfo(jnp.float32).tiny:
        # Below the smallest normal number neighbours are no closer.
        smallest = ulp_at_zero(dtype)
        subnormal = jnp.floor(x * np.float32(1 / smallest) + _fraction(random)) * np.float32(smallest)
        rounded = jnp.where(jnp.abs(x) < np.float32(info.tiny), subnormal, rounded)
    return jnp.where(jnp.isnan(x), x, rounded)


@stochastic_round.defjvp
def _straight_through(dtype: np.dtype, primals: Any, tangents: Any) -> tuple[Array, Array]:
    return stochastic_round(*primals, dtype), tangents[0]


def ulp(x: Array, dtype: np.dtype) -> Array:
    """The distance between neighbours in the narrow `dtype` around the float32 `x`: a power of two."""
    info = jnp.finfo(dtype)
    exponent = (lax.bitcast_convert_type(x, jnp.uint32) >> 23) & np.uint32(0xFF)
    exponent = jnp.maximum(exponent, np.uint32(_lowest_exponent(dtype)))
    return lax.bitcast_convert_type((exponent - np.uint32(info.nmant)) << 23, jnp.float32)


def ulp_at_zero(dtype: np.dtype) -> float:
    """The smallest number that is rounded to, but for 0."""
    return 2.0 ** (_lowest_exponent(dtype) - jnp.finfo(dtype).nmant - 127)


def _lowest_exponent(dtype: np.dtype) -> int:
    """The biased float32 exponent below which the spacing of `dtype` no longer shrinks.

    Where bfloat16 has subnormals, float32 has too, and processors flush those to 0: stay above.
    """
    info = jnp.finfo(dtype)
    return max(info.minexp + 127, info.nmant + 1)


def _hash(x: Array) -> Array:
    """Mix the bits of uint32 integers: C. Wellons's "lowbias32" without its first and last shift."""
    x = x * np.uint32(0x7FEB352D)
    return (x ^ (x >> 15)) * np.uint32(0x846CA68B)
