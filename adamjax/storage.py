"""How a moment is kept between steps: in which dtype, and how it is rounded to it.

The arithmetic of a step is in float32 or wider whatever the storage. A moment narrower than that
is rounded once, after the step has used it. The first moment is rounded to nearest. The second must
not be: with b2 = 0.999 one step changes it by a thousandth, less than half the spacing of bfloat16,
and a nearest rounding would hold it where it is for ever. It is rounded stochastically, so that
it is right on average.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from adamjax import _trees

_FLOATS = ("bfloat16", "float16", "float32", "float64")
_COMPLEX = ("complex64", "complex128")


def moment_dtype(name: str, dtype: Any, *, signed: bool) -> np.dtype | None:
    """Check the argument `mu_dtype` (`signed`: may be complex) or `nu_dtype`; None is kept."""
    if dtype is None:
        return None
    allowed = _FLOATS + _COMPLEX if signed else _FLOATS
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        raise TypeError(f"Invalid {name} value: {dtype!r}; {name} must be one of {', '.join(allowed)}") from None
    if found.name not in allowed:
        raise ValueError(f"Invalid {name} value: {found.name}; {name} must be one of {', '.join(allowed)}")
    return found


def empty(p: Any, name: str, dtype: np.dtype | None, *, signed: bool) -> Any:
    """The moment of parameter `p` before the first step: zeros of its shape and sharding.

    Without a `dtype` it is the parameter's own, but at least float32; real unless `signed`.
    """
    if dtype is None:
        dtype = _trees.compute_dtype(_trees.dtype_of(p))
        dtype = dtype if signed else _trees.real_dtype(dtype)
    elif jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(f"{name}={dtype.name} needs 64-bit JAX: set jax_enable_x64, or choose {name}=float32")
    return _trees.zeros_like(p, dtype)


def is_narrow(dtype: np.dtype) -> bool:
    """Whether storing a moment in `dtype` rounds it."""
    return jnp.finfo(dtype).bits < 32


def store_signed(x: jax.Array, dtype: np.dtype) -> jax.Array:
    """Round a first moment to nearest."""
    return _saturate(x, dtype).astype(dtype)


def store_decaying(x: jax.Array, dtype: np.dtype, seed: jax.Array | None) -> jax.Array:
    """Round a second moment stochastically.

    The random bits depend on `seed` (a uint32 scalar, needed where `dtype` is narrow) and on the
    position in the array alone, not on how the array is sharded.
    """
    if not is_narrow(dtype):
        return x.astype(dtype)
    return _keep_positive(x, _round_stochastically(_saturate(x, dtype), seed, dtype))


def store_growing(x: jax.Array, dtype: np.dtype) -> jax.Array:
    """Round a running maximum to nearest: it has no decay that this could freeze."""
    rounded = _saturate(x, dtype).astype(dtype)
    return _keep_positive(x, rounded) if is_narrow(dtype) else rounded


def seed(count: jax.Array, leaf: int) -> jax.Array:
    """The seed of one leaf (by its position in the tree) at one step: a uint32 scalar."""
    return _hash(_hash(count.astype(jnp.uint32)) ^ np.uint32(leaf))


def _saturate(x: jax.Array, dtype: np.dtype) -> jax.Array:
    """Stay finite where float16 would overflow: its infinity would never leave the moment."""
    if dtype != jnp.float16:
        return x
    largest = float(jnp.finfo(dtype).max)
    return jnp.where(jnp.isfinite(x), jnp.clip(x, -largest, largest), x)


def _keep_positive(x: jax.Array, rounded: jax.Array) -> jax.Array:
    """The smallest number instead of 0 where `x` is not 0: its root is a divisor."""
    smallest = jnp.asarray(_spacing_at_zero(rounded.dtype), rounded.dtype)
    return jnp.where((x > 0) & (rounded < smallest), smallest, rounded)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _round_stochastically(x: jax.Array, seed: jax.Array, dtype: np.dtype) -> jax.Array:
    """Round `x >= 0` up with a probability that makes its expectation `x`.

    By the spacing of the narrow numbers around `x` and not by way of a conversion to them: XLA
    takes a conversion to bfloat16 and back for nothing, and leaves it out.
    """
    x = x.astype(jnp.float32)
    info = jnp.finfo(dtype)
    exponent = jnp.maximum(lax.bitcast_convert_type(x, jnp.uint32) >> 23, np.uint32(_lowest_exponent(dtype)))
    spacing = lax.bitcast_convert_type((exponent - np.uint32(info.nmant)) << 23, jnp.float32)
    units = x / spacing
    whole = jnp.floor(units)
    up = _uniform(x, seed) < units - whole
    return ((whole + up.astype(jnp.float32)) * spacing).astype(dtype)


@_round_stochastically.defjvp
def _straight_through(dtype: np.dtype, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    return _round_stochastically(*primals, dtype), tangents[0].astype(dtype)


def _lowest_exponent(dtype: np.dtype) -> int:
    """The biased float32 exponent below which the spacing of `dtype` no longer shrinks.

    Where bfloat16 has subnormals, float32 has too, and processors flush those to 0: stay above.
    """
    info = jnp.finfo(dtype)
    return max(info.minexp + 127, info.nmant + 1)


def _spacing_at_zero(dtype: np.dtype) -> float:
    return 2.0 ** (_lowest_exponent(dtype) - jnp.finfo(dtype).nmant - 127)


def _uniform(like: jax.Array, seed: jax.Array) -> jax.Array:
    """Random float32 in [0, 1), a function of `seed` and the global index alone."""
    # Starting from zeros_like, the index takes the sharding of `like`.
    index = jnp.zeros_like(like, dtype=jnp.uint32)
    for axis, size in enumerate(like.shape):
        index = index * np.uint32(size) + lax.broadcasted_iota(jnp.uint32, like.shape, axis)
    bits = _hash(index * np.uint32(0x9E3779B9) + seed)
    return (bits >> 8).astype(jnp.float32) * np.float32(2**-24)


def _hash(x: jax.Array) -> jax.Array:
    """Mix the bits of uint32 integers (C. Wellons, "lowbias32"); far cheaper than `jax.random`."""
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)
