"""Rounding to a low-precision dtype, to nearest or stochastically, and the random numbers for it.

An element rounds up if its random number u is below the fraction that would be cut off. The first u is
a hash of the element's position in the array and of a seed. It does not depend on the sharding and is far
cheaper than the numbers of `jax.random`. At each step u advances by a constant, modulo 1, that is close
to no simple fraction. Over any run of steps these numbers are spread more evenly than independent ones
(Weyl, 1916): if the same fraction is cut off at each step, the number of times an element rounds up is
off by one or two, where coin tosses would be off by the root of the number of steps.
"""

from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike


@cache
def is_low_precision(dtype: np.dtype) -> bool:
    """Return whether `dtype` is less precise than float32."""
    return jnp.finfo(dtype).bits < 32


class Dither(NamedTuple):
    """The source of the random numbers of one array at one step: uint32 scalars."""

    seed: Array
    phase: Array  # the advance of u up to this step, times 2**32
    shift: np.uint32 = np.uint32(0)  # upper bits left to another array
    positions: Array | None = None  # in a part of an array, the index of each element in the whole

    def second_array(self) -> "Dither":
        """Return the dither of a second array of the same leaf. It reuses the hashes, the expensive part."""
        return self._replace(shift=np.uint32(9))

    def third_array(self) -> "Dither":
        """Return the dither of a third array of the same leaf, with hashes of its own: the others use up all bits."""
        return self._replace(seed=_hash(self.seed + np.uint32(1)))


# The advance per step: of all constants tried, the one that is most even for both arrays and for their pairs. Over
# any run of up to 3000 steps it is at most 6 % less even than the golden ratio, the optimum for a single array.
_WEYL_STEP = np.uint32(0xB94A434B)


def dither(count: Array, number: int, seed: ArrayLike = 0) -> Dither:
    """Return the dither of an array at step `count`. Each array has a `number` of its own."""
    return Dither(_hash(jnp.uint32(number) ^ jnp.uint32(seed)), count.astype(jnp.uint32) * _WEYL_STEP)


def random(index: Array, dither: Dither) -> Array:
    """Return uint32 integers whose upper 23 bits are random. They depend on the global index only."""
    index = index if dither.positions is None else dither.positions
    return (_hash(index ^ dither.seed) + dither.phase) << dither.shift


def scrambled(random: Array) -> Array:
    """Return the numbers of `random` without their order in time.

    Where each rounding changes much of the fraction that the next one sees, evenly spread numbers would be biased.
    """
    return _hash(random)


def index_of(like: Array) -> Array:
    """Return the global index of each element of an array in row-major order, modulo 2**32."""
    # Starting from zeros_like, the index takes the sharding of `like`.
    index = jnp.zeros_like(like, dtype=jnp.uint32)
    for axis, size in enumerate(like.shape):
        index = index * np.uint32(size) + lax.broadcasted_iota(jnp.uint32, like.shape, axis)
    return index


def fraction(r: Array) -> Array:
    """Return float32 numbers in [0, 1) from `random` ones."""
    return (r >> 9).astype(jnp.float32) * np.float32(2**-23)


def round_to_nearest(x: Array, dtype: np.dtype) -> Array:
    """Round the float32 array `x` to the nearest value of a low-precision `dtype`, as float32; ties to even.

    Use the spacing of `dtype` around `x` instead of a conversion: XLA removes a conversion to bfloat16
    and back.
    """
    step = ulp(x, dtype)
    # Multiply by the inverse (exact for powers of two): XLA will not fuse a division here.
    inverse = lax.bitcast_convert_type(np.uint32(254 << 23) - lax.bitcast_convert_type(step, jnp.uint32), jnp.float32)
    return jnp.round(x * inverse) * step


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def stochastic_round(x: Array, dither: Dither, dtype: np.dtype) -> Array:
    """Round the float32 array `x` to one of its two neighbours in a low-precision `dtype`, as float32; unbiased."""
    info, r = jnp.finfo(dtype), random(index_of(x), dither)
    # Add a random number to the bits that will be cut off: it carries with the right probability.
    cut = 23 - info.nmant
    bits = lax.bitcast_convert_type(x, jnp.uint32) + (r >> np.uint32(32 - cut))
    rounded = lax.bitcast_convert_type(bits & np.uint32(2**32 - 2**cut), jnp.float32)
    if info.tiny > jnp.finfo(jnp.float32).tiny:
        # Below the smallest normal number the spacing no longer shrinks.
        smallest = ulp_at_zero(dtype)
        subnormal = jnp.floor(x * np.float32(1 / smallest) + fraction(r)) * np.float32(smallest)
        rounded = jnp.where(jnp.abs(x) < np.float32(info.tiny), subnormal, rounded)
    return jnp.where(jnp.isnan(x), x, rounded)


@stochastic_round.defjvp
def _straight_through(
    dtype: np.dtype, primals: tuple[Array, Dither], tangents: tuple[Array, Any]
) -> tuple[Array, Array]:
    return stochastic_round(*primals, dtype), tangents[0]


def ulp(x: Array, dtype: np.dtype) -> Array:
    """Return the spacing of a low-precision `dtype` around the float32 array `x`: a power of two."""
    info = jnp.finfo(dtype)
    exponent = (lax.bitcast_convert_type(x, jnp.int32) >> 23) & np.int32(0xFF)
    exponent = jnp.maximum(exponent, np.int32(_lowest_exponent(dtype)))
    return lax.bitcast_convert_type((exponent - np.int32(info.nmant)) << 23, jnp.float32)


def ulp_at_zero(dtype: np.dtype) -> float:
    """Return the smallest positive number that rounding gives."""
    return 2.0 ** (_lowest_exponent(dtype) - jnp.finfo(dtype).nmant - 127)


def _lowest_exponent(dtype: np.dtype) -> int:
    """Return the biased float32 exponent below which the spacing of `dtype` no longer shrinks.

    Stay above the subnormals of bfloat16: they are subnormal in float32 too, and processors flush them to 0.
    """
    info = jnp.finfo(dtype)
    return max(info.minexp + 127, info.nmant + 1)


def _hash(x: Array) -> Array:
    """Mix the bits of uint32 integers: C. Wellons's "lowbias32" without its first and last shift."""
    x = x * np.uint32(0x7FEB352D)
    return (x ^ (x >> 15)) * np.uint32(0x846CA68B)
