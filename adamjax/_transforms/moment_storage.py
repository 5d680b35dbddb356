"""The storage of moments between steps, as a dtype or as codes, and the rounding to it.

`adamjax.storage` says what is rounded when, and why.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from adamjax._core import checks, low_precision, quantization, trees
from adamjax._core.low_precision import Dither
from adamjax._core.quantization import QuantizedArray
from adamjax._core.trees import Leaves
from adamjax._core.typing import DTypeLike, PyTree
from adamjax._core.value import Value, name_of, static_field, value

FLOATS = ("bfloat16", "float16", "float32", "float64")
_COMPLEX = ("complex64", "complex128")
_BLOCK_SIZES = {"int8": 128, "int4": 64}
_FLOAT32 = jnp.dtype(jnp.float32)


@value
class Quantized(Value):
    """A format for moments; see `adamjax.quantized`."""

    name: str = static_field()
    block_size: Any = static_field(default=None)
    min_size: int = static_field(default=4096)
    keep: Callable[[str], bool] | None = static_field(default=None)

    def __post_init__(self) -> None:
        checks.choice("format", self.name, tuple(_BLOCK_SIZES))
        block_size = _BLOCK_SIZES[self.name] if self.block_size is None else self.block_size
        self._replace_field("block_size", checks.count("block_size", block_size))
        self._replace_field("min_size", checks.count("min_size", self.min_size, least=0))
        if self.keep is not None and not callable(self.keep):
            raise TypeError(f"Invalid keep value: {self.keep!r}; keep must be a function of a path, or None")

    def __repr__(self) -> str:
        block_size = f", block_size={self.block_size}" if self.block_size != _BLOCK_SIZES[self.name] else ""
        min_size = f", min_size={self.min_size}" if self.min_size != 4096 else ""
        keep = f", keep={name_of(self.keep)}" if self.keep is not None else ""
        return f"adamjax.quantized({self.name!r}{block_size}{min_size}{keep})"

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return int(self.name.removeprefix("int"))

    def applies_to(self, p: Any, path: str, *, signed: bool) -> bool:
        """Return whether the moment of parameter `p` is quantised, and not kept in float32 or wider."""
        shape = np.shape(p)
        if not shape or math.prod(shape) < max(self.min_size, 1) or (self.keep is not None and self.keep(path)):
            return False
        if signed and jnp.iscomplexobj(p):
            return False
        n, scales = shape[-1], -(-shape[-1] // self.block_size)
        return -(-n * self.bits // 8) + 4 * scales <= 2 * n


MomentFormat = DTypeLike | Quantized | None  # the arguments mu_dtype and nu_dtype
Moment = Array | QuantizedArray


def moment_format(name: str, found: MomentFormat, *, signed: bool) -> np.dtype | Quantized | None:
    """Check the argument `mu_dtype` (`signed`: may be complex) or `nu_dtype`; None is kept."""
    if found is None or isinstance(found, Quantized):
        return found
    allowed = FLOATS + _COMPLEX if signed else FLOATS
    expected = f"{name} must be one of {', '.join(allowed)}, or adamjax.quantized('int8') or ('int4')"
    return checks.dtype(name, found, allowed, expected)


def init_moments(params: PyTree, name: str, format: np.dtype | Quantized | None, *, signed: bool) -> PyTree:
    """Make the moments of `params` before the first step: zeros of their shapes and shardings.

    Without a `format` they have the parameters' own dtypes, but at least float32; real unless `signed`.
    """

    def of_leaf(path: Any, p: Any) -> Any:
        if isinstance(format, Quantized):
            if format.applies_to(p, trees.path_of(path), signed=signed):
                return _init_codes(p, format, signed)
        elif format is not None:
            if jax.dtypes.canonicalize_dtype(format) != format:
                raise ValueError(f"{name}={format.name} needs 64-bit JAX: set jax_enable_x64, or choose {name}=float32")
            return trees.zeros_like(p, format)
        dtype = trees.compute_dtype(trees.dtype_of(p))
        return trees.zeros_like(p, dtype if signed else trees.real_dtype(dtype))

    return jax.tree.map_with_path(of_leaf, params)


def _init_codes(p: Any, format: Quantized, signed: bool) -> QuantizedArray:
    zeros = trees.zeros_like(p, _FLOAT32)
    if trees.is_abstract(p):
        return quantization.abstract(zeros, format.bits, signed, format.block_size)
    return _encode(zeros, format.bits, signed, format.block_size, None)


_encode = jax.jit(quantization.encode, static_argnums=(1, 2, 3))


def rebuild_quantized(moments: PyTree, updates: Leaves, format: Quantized, *, signed: bool) -> PyTree:
    """Put a `QuantizedArray` back where `moments` holds a mapping of its codes and scales.

    flax's nnx.Optimizer makes such mappings: it keeps the state of each parameter in a Variable, and takes
    apart what it finds there. The `format` and the shape of the gradient say the rest.
    """
    if moments is None:
        return moments
    try:
        column = updates.column(moments)
    except ValueError:  # the check of the trees says where they differ
        return moments
    rebuilt = [
        QuantizedArray(x["codes"], x["scales"], format.bits, signed, format.block_size, g.shape[-1])
        if isinstance(x, Mapping) and x.keys() == {"codes", "scales"} and g is not None
        else x
        for g, x in zip(updates.leaves, column, strict=True)
    ]
    return updates.like(rebuilt).tree


def needs_dither(stored: Moment) -> bool:
    """Return whether storing a moment as `stored` is rounds it."""
    return isinstance(stored, QuantizedArray) or low_precision.is_low_precision(stored.dtype)


def load(stored: Moment, dtype: np.dtype, like: Array) -> Array:
    """Load a stored moment for arithmetic in `dtype`, sharded as `like`."""
    if isinstance(stored, QuantizedArray):
        return quantization.sharded_like(stored.decode(), like).astype(dtype)
    return stored.astype(dtype)


def round_first_moment(x: Array, like: Moment, dither: Dither | None) -> Array:
    """Round a new first moment to its storage dtype (stochastically, if narrower than float32).

    The step goes on with the rounded moment: one that it needed both before and after rounding would be computed
    twice, from old ones that had to be copied. Codes are too coarse for that, so `store` rounds to them afterwards.
    The `dither` is needed where `needs_dither` says so. How the array is sharded does not matter.
    """
    return _as_stored(_rounded(x, like, dither), x, like)


def round_second_moment(x: Array, like: Moment, dither: Dither | None) -> Array:
    """Round a new second moment likewise; one above 0 stays above 0."""
    return _as_stored(_keep_positive(x, _rounded(x, like, dither), like), x, like)


def round_max(x: Array, like: Moment) -> Array:
    """Round a running maximum likewise, but to nearest; one above 0 stays above 0."""
    if _is_wide(like):
        return x
    nearest = low_precision.round_to_nearest(_saturate(x, like.dtype).astype(_FLOAT32), like.dtype)
    return _as_stored(_keep_positive(x, nearest, like), x, like)


def store(x: Array, like: Moment, dither: Dither | None) -> Moment:
    """Store a rounded moment as `like` is stored; codes are rounded by the `dither`, or to nearest without one."""
    if isinstance(like, QuantizedArray):
        made = quantization.encode(x.astype(_FLOAT32), like.bits, like.signed, like.block_size, dither)
        return dataclasses.replace(made, size=like.size)
    return x.astype(like.dtype)


def ulp(stored: Moment) -> Array | None:
    """Return the distance, in float32, of the numbers around a stored moment; None if float32 holds all of them."""
    if isinstance(stored, QuantizedArray):
        return stored.spacing()
    return low_precision.ulp(stored.astype(_FLOAT32), stored.dtype) if needs_dither(stored) else None


def _is_wide(stored: Moment) -> bool:
    return isinstance(stored, QuantizedArray) or not low_precision.is_low_precision(stored.dtype)


def _rounded(x: Array, like: Moment, dither: Dither | None) -> Array:
    if _is_wide(like) or dither is None:
        return x
    return low_precision.stochastic_round(_saturate(x, like.dtype).astype(_FLOAT32), dither, like.dtype)


def _as_stored(rounded: Array, x: Array, like: Moment) -> Array:
    """Convert to the storage dtype and back, so that XLA sees that the step reads the numbers it has stored."""
    return x if _is_wide(like) else rounded.astype(like.dtype).astype(x.dtype)


def _saturate(x: Array, dtype: np.dtype) -> Array:
    """Stay finite where float16 would overflow: its infinity would never leave the moment."""
    if dtype != jnp.float16:
        return x
    largest = float(jnp.finfo(dtype).max)
    return jnp.where(jnp.isfinite(x), jnp.clip(x, -largest, largest), x)


def _keep_positive(x: Array, rounded: Array, like: Moment) -> Array:
    """Replace 0 by the smallest number where `x` is above 0: its root is a divisor."""
    if _is_wide(like):
        return rounded
    smallest = jnp.float32(low_precision.ulp_at_zero(like.dtype))
    return jnp.where((x > 0) & (rounded < smallest), smallest, rounded)
