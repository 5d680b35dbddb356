"""The storage of moments between steps, as a dtype or as codes, and the rounding to it.

`adamjax.storage` says what is rounded when, and why.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
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
_BITS = {"int8": 8, "int4": 4}
# Numbers per scale. The noise of a first moment grows with the size of a block, which 8 bits show.
_BLOCK_SIZE, _BLOCK_SIZE_OF_RATIOS = 64, 32
_MIN_LENGTH = 4  # of the last axis: fewer numbers do not pay for a scale
_FLOAT32 = jnp.dtype(jnp.float32)


@value
class Quantized(Value):
    """A format for moments; see `adamjax.quantized`."""

    name: str = static_field()
    block_size: Any = static_field(default=None)
    min_size: int = static_field(default=4096)
    keep: Callable[[str], bool] | None = static_field(default=None)

    def __post_init__(self) -> None:
        checks.choice("format", self.name, tuple(_BITS))
        if self.block_size is not None:
            self._replace_field("block_size", checks.count("block_size", self.block_size))
        self._replace_field("min_size", checks.count("min_size", self.min_size, least=0))
        if self.keep is not None and not callable(self.keep):
            raise TypeError(f"Invalid keep value: {self.keep!r}; keep must be a function of a path, or None")

    def __repr__(self) -> str:
        block_size = f", block_size={self.block_size}" if self.block_size is not None else ""
        min_size = f", min_size={self.min_size}" if self.min_size != 4096 else ""
        keep = f", keep={name_of(self.keep)}" if self.keep is not None else ""
        return f"adamjax.quantized({self.name!r}{block_size}{min_size}{keep})"

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return _BITS[self.name]

    def block(self, *, signed: bool) -> int:
        """Numbers per scale, of first moments (`signed`) or second."""
        default = _BLOCK_SIZE_OF_RATIOS if signed and self.bits == 8 else _BLOCK_SIZE
        return default if self.block_size is None else self.block_size

    def applies_to(self, p: Any, path: str, *, signed: bool) -> bool:
        """Return whether the moment of parameter `p` is quantised, and not kept in float32 or wider."""
        shape = np.shape(p)
        if not shape or math.prod(shape) < max(self.min_size, 1) or (self.keep is not None and self.keep(path)):
            return False
        if signed and jnp.iscomplexobj(p):
            return False
        n, scales = shape[-1], -(-shape[-1] // self.block(signed=signed))
        return n >= _MIN_LENGTH and -(-n * self.bits // 8) + 2 * scales <= 2 * n


MomentFormat = DTypeLike | Quantized | None  # the arguments mu_dtype and nu_dtype
Moment = Array | QuantizedArray


def moment_format(name: str, found: MomentFormat, *, signed: bool) -> np.dtype | Quantized | None:
    """Check the argument `mu_dtype` (`signed`: may be complex) or `nu_dtype`; None is kept."""
    if found is None or isinstance(found, Quantized):
        return found
    allowed = FLOATS + _COMPLEX if signed else tuple(x for x in FLOATS if x != "float16")
    expected = f"{name} must be one of {', '.join(allowed)}, or adamjax.quantized('int8') or ('int4')"
    if not signed and checks.dtype(name, found, (*allowed, "float16"), expected) == jnp.float16:
        # A constant gradient of 1e-4 would give a twelfth of its step, and one of 1e4 eight times as much.
        raise ValueError(
            f"Invalid {name} value: float16, whose range holds squares of gradients from 2.5e-3 to 256 only; take "
            "bfloat16, of the same size and with the range of float32, or adamjax.quantized('int8')"
        )
    return checks.dtype(name, found, allowed, expected)


def init_moments(params: PyTree, name: str, format: np.dtype | Quantized | None, power: float) -> PyTree:
    """Make the moments of `params` before the first step: zeros of their shapes and shardings.

    Without a `format` they have the parameters' own dtypes, but at least float32. Second moments, whose `power` is 0,
    are real. Codes of first ones are of their ratio to this power of the second.
    """
    signed = power != 0

    def of_leaf(path: Any, p: Any) -> Any:
        if isinstance(format, Quantized):
            if format.applies_to(p, trees.path_of(path), signed=signed):
                return _init_codes(p, format, power)
        elif format is not None:
            if jax.dtypes.canonicalize_dtype(format) != format:
                raise ValueError(f"{name}={format.name} needs 64-bit JAX: set jax_enable_x64, or choose {name}=float32")
            return trees.zeros_like(p, format)
        dtype = trees.compute_dtype(trees.dtype_of(p))
        return trees.zeros_like(p, dtype if signed else trees.real_dtype(dtype))

    return jax.tree.map_with_path(of_leaf, params)


def _init_codes(p: Any, format: Quantized, power: float) -> QuantizedArray:
    zeros, kind = trees.zeros_like(p, _FLOAT32), (format.bits, power, format.block(signed=power != 0))
    return quantization.abstract(zeros, *kind) if trees.is_abstract(p) else _encode_zeros(zeros, *kind)


@partial(jax.jit, static_argnums=(1, 2, 3))
def _encode_zeros(zeros: Array, bits: int, power: float, block_size: int) -> QuantizedArray:
    return quantization.encode(zeros, bits, power, block_size, low_precision.dither(jnp.int32(0), 0))


def rebuild_quantized(moments: PyTree, updates: Leaves, format: Quantized, *, power: float) -> PyTree:
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
        QuantizedArray(x["codes"], x["scales"], format.bits, power, format.block(signed=power != 0), g.shape[-1])
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


def load_first(stored: Moment, v: Array, dtype: np.dtype, like: Array) -> Array:
    """Load a stored first moment likewise, given the loaded second one."""
    if isinstance(stored, QuantizedArray):
        return quantization.sharded_like(stored.decode(v.astype(_FLOAT32)), like).astype(dtype)
    return stored.astype(dtype)


def round_first_moment(x: Array, like: Moment, dither: Dither | None) -> Array:
    """Round a new first moment to its storage dtype (stochastically, if narrower than float32).

    The step goes on with the rounded moment: one that it needed both before and after rounding would be computed
    twice, from old ones that had to be copied. Codes are too coarse for that, so `store` rounds to them afterwards.
    The `dither` is needed where `needs_dither` says so. How the array is sharded does not matter.
    """
    if _is_wide(like):
        return x
    rounded = _rounded(x, like, dither)
    if like.dtype == jnp.float16:
        # Its smallest number is no small one: rounded up to it, a moment would make a step of many learning rates.
        smallest = low_precision.ulp_at_zero(like.dtype)
        rounded = jnp.where(jnp.abs(x) < smallest / 2, jnp.zeros_like(rounded), rounded)
    return _as_stored(rounded, x, like)


def round_second_moment(x: Array, like: Moment, dither: Dither | None) -> Array:
    """Round a new second moment likewise; one above 0 stays above 0."""
    return x if _is_wide(like) else _as_stored(_keep_positive(x, _rounded(x, like, dither), like), x, like)


def round_max(x: Array, like: Moment) -> Array:
    """Round a running maximum likewise, but to nearest; one above 0 stays above 0."""
    if _is_wide(like):
        return x
    nearest = low_precision.round_to_nearest(_saturate(x, like.dtype).astype(_FLOAT32), like.dtype)
    return _as_stored(_keep_positive(x, nearest, like), x, like)


def store(x: Array, like: Moment, dither: Dither | None) -> Moment:
    """Store a rounded moment as `like` is stored; codes are rounded by the `dither`, or to nearest without one."""
    if isinstance(like, QuantizedArray):
        made = quantization.encode(x.astype(_FLOAT32), like.bits, like.power, like.block_size, dither)
        return dataclasses.replace(made, size=like.size)
    return x.astype(like.dtype)


def storable(v: Array, stored: Moment) -> Array:
    """Return a second moment, but at least the smallest number that its block can store."""
    return jnp.maximum(v, stored.lowest().astype(v.dtype)) if isinstance(stored, QuantizedArray) else v


def store_first(m: Array, v: Array, like: Moment, dither: Dither | None, one_minus_b: Array) -> Moment:
    """Store a rounded first moment likewise, given the `storable` second one and 1 minus its own decay rate."""
    if not isinstance(like, QuantizedArray):
        return m.astype(like.dtype)
    ratio, narrowing = ratio_of(m, v, like, one_minus_b)
    made = quantization.encode(ratio.astype(_FLOAT32), like.bits, like.power, like.block_size, dither, narrowing)
    return dataclasses.replace(made, size=like.size)


def ratio_of(m: Array, v: Array, like: QuantizedArray, one_minus_b: Array) -> tuple[Array, Array]:
    """Return the ratio of a first moment to the root of the second, and the narrowing of its dither."""
    unit = like.unit(v)
    # Without a second moment there is no first one either, but for gradients whose squares underflow.
    ratio = m / jnp.where(unit == 0, np.inf, unit)
    # Without gradients, a code falls by about `one_minus_b` of itself a step: a quarter of that may be lost to nearest.
    return ratio, 0.25 * one_minus_b


def decoded(v: Moment) -> Array:
    """Return a second moment as an array: a quantised one in float32, another as it is."""
    return v.decode() if isinstance(v, QuantizedArray) else v


def decoded_first(m: Moment, v: Moment) -> Array:
    """Return the first moment of a parameter likewise, given the second."""
    return m.decode(jnp.asarray(decoded(v), _FLOAT32)) if isinstance(m, QuantizedArray) else m


def storage_noise(m: Moment, v: Moment, v_loaded: Array) -> tuple[Array | None, Array | None]:
    """Return the root mean square error, in float32, of storing each moment; None if float32 holds it.

    A ratio keeps the direction that a rounded second moment would change, so that one has none beside it.
    """
    if isinstance(m, QuantizedArray):
        # The dither has half the width of the spacing.
        return m.spacing(v_loaded.astype(_FLOAT32)) * math.sqrt((1 + 0.25) / 12), None
    return _noise(m), _noise(v)


def _noise(stored: Moment) -> Array | None:
    if isinstance(stored, QuantizedArray):
        return stored.spacing() * math.sqrt(1 / 6)
    if not needs_dither(stored):
        return None
    return low_precision.ulp(stored.astype(_FLOAT32), stored.dtype) * math.sqrt(1 / 6)


def _is_wide(stored: Moment) -> bool:
    return isinstance(stored, QuantizedArray) or not low_precision.is_low_precision(stored.dtype)


def _rounded(x: Array, like: Moment, dither: Dither | None) -> Array:
    if dither is None:
        return x
    return low_precision.stochastic_round(_saturate(x, like.dtype).astype(_FLOAT32), dither, like.dtype)


def _as_stored(rounded: Array, x: Array, like: Moment) -> Array:
    """Convert to the storage dtype and back, so that XLA sees that the step reads the numbers it has stored."""
    return rounded.astype(like.dtype).astype(x.dtype)


def _saturate(x: Array, dtype: np.dtype) -> Array:
    """Stay finite where float16 would overflow: its infinity would never leave the moment."""
    if dtype != jnp.float16:
        return x
    largest = float(jnp.finfo(dtype).max)
    return jnp.where(jnp.isfinite(x), jnp.clip(x, -largest, largest), x)


def _keep_positive(x: Array, rounded: Array, like: Moment) -> Array:
    """Replace 0 by the smallest number where `x` is above 0: its root is a divisor."""
    smallest = jnp.float32(low_precision.ulp_at_zero(like.dtype))
    return jnp.where((x > 0) & (rounded < smallest), smallest, rounded)
