"""Block-quantised arrays: 8 or 4 bits per number, and a scale of 16 bits per block.

Second moments are floats of 8 or 4 bits that share the origin of their exponents: the codes of a block count the
numbers of a float format from the smallest one in the block, in steps that are as fine as its largest one allows.
Their grid does not move with the block, so a number that is stored again stays what it is.

First moments are stored as their ratio to the root of the second, as Adam uses them. It has the same size for
parameters with large and with small gradients, and no rounding of it makes a step larger than the largest of a block.
"""

import json
import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, NoReturn

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from adamjax._core import low_precision
from adamjax._core.low_precision import Dither
from adamjax._core.numerics import sqrt_with_zero_slope

OF_ITSELF = -1.0  # the power of a first moment that is stored as it is, and not as a ratio

_CONVERT = "begin with init(params), or decode the moments with that version and go on from float32"
_SHIFT = 10  # the least of `FloatCode`
_TINY, _LARGEST, _INFINITY, _NANS = 0x00800000, 0x7F7FFFFF, 0x7F800000, 0x7FFFFFFF  # bits of float32 numbers


class Rounding(NamedTuple):
    """The random numbers with which an array is rounded; without them, to nearest."""

    random: Array  # uint32, its upper 23 bits are random
    # By this times its code, the dither of a ratio is narrower than from one code to the next; see `RatioCode`.
    narrowing: Any = 0.0


class RatioCode(NamedTuple):
    """The codes of ratios: integers q from -levels to levels.

    With t = q / levels, a ratio is scale * t (2 + |t|) / 3: close to evenly spaced, twice as fine at 0 as at the scale.

    Rounding picks one of the neighbouring codes at random. A dither of full width makes the expected decoded value the
    encoded one; one of half the width makes two thirds of its noise, but would freeze a decay by less than a quarter of
    a spacing a step. So it is as wide as the decay of a moment without gradients needs, and full where the largest
    number of a block lies: always in the upper part of its cell, which would be rounded up too often.
    """

    levels: int
    offset: int  # added to q before storing

    def maxima(self, x: Array) -> tuple[Array, ...]:
        """Return integers of each number; their maxima over a block make its scale."""
        return (_bits(jnp.abs(x)),)

    def scale(self, top: Array) -> Array:
        """Return the scale of a block, from the maxima: the upper 16 bits of a float32, rounded up.

        Numbers that are not finite have the largest bits. They make the scale NaN, and so the block.
        """
        return jnp.where(top < _INFINITY, jnp.minimum(top + 0xFFFF, _LARGEST) >> 16, 0x7FC0)

    def encode(self, x: Array, scale: Array, rounding: Rounding) -> Array:
        """Return the codes of numbers, as they are stored, given the scale of each."""
        s = _number(scale << 16)
        y = jnp.abs(x) * jnp.where(s == 0, 0.0, self._units / jnp.where(s == 0, 1.0, s))
        q = self.floor(jnp.sqrt(y + self.levels**2) - self.levels)
        width = jnp.maximum(jnp.where(q < self.levels - 1, 0.5, 1.0), 1 - q * rounding.narrowing)
        threshold = 0.5 + width * (low_precision.fraction(rounding.random) - 0.5)
        up = y - self._magnitude(q) > (2 * q + (1 + 2 * self.levels)) * threshold
        q = jnp.minimum(q + up.astype(jnp.float32), float(self.levels))
        return jnp.where(x < 0, -q, q) + self.offset

    def decode(self, stored: Array, scale: Array) -> Array:
        """Return the numbers of codes."""
        q = stored.astype(jnp.float32) - self.offset
        return q * (jnp.abs(q) + 2 * self.levels) * (_number(scale << 16) * np.float32(1 / self._units))

    def spacing(self, stored: Array, scale: Array) -> Array:
        """Return the distance between the numbers around a code: the mean of both sides."""
        q = jnp.abs(stored.astype(jnp.float32) - self.offset)
        return 2 * (q + self.levels) * (_number(scale << 16) * np.float32(1 / self._units))

    def floor(self, x: Array) -> Array:
        """Return the largest integer not above x. It may be off by one next to an integer."""
        return jnp.floor(x)

    @property
    def _units(self) -> float:
        return float(3 * self.levels**2)

    def _magnitude(self, q: Array) -> Array:
        """Return the ratio of code q in units: a third of the scale over levels squared."""
        return q * (q + 2 * self.levels)


class FloatCode(NamedTuple):
    """The codes of numbers that are not negative: 0 for 0, and `levels` for numbers above.

    The numbers above 0 are float32 without its last `shift` bits: from 13 bits of the mantissa down to powers of 16,
    as the range of a block needs. A scale has the upper bits of the first of them, and `shift`. A number above 0 stays
    so. Numbers that are too small for a block become its smallest.
    """

    levels: int

    def maxima(self, x: Array) -> tuple[Array, ...]:
        """Return integers of each number; their maxima over a block make its scale."""
        bits = _bits(jnp.abs(x))
        return bits, jnp.where(bits < _TINY, 0, _NANS - bits)

    def scale(self, top: Array, bottom: Array) -> Array:
        """Return the scale of a block, from the maxima; if a number is not finite, all above 0 will be NaN."""
        first = jnp.minimum(_NANS - bottom, top) & -(1 << 19)
        length = (_bits((top - first).astype(jnp.float32)) >> 23) - 126  # of the integer, in bits
        shift = jnp.clip(length - self.levels.bit_length(), _SHIFT, _SHIFT + 15)
        # Rounding may add one to the largest.
        fits = (top >> shift) - (first >> shift) <= self.levels - 2
        shift = jnp.minimum(jnp.where(fits, shift, shift + 1), _SHIFT + 15)
        first = jnp.maximum(first, jnp.maximum((top >> shift) - (self.levels - 2), 1) << shift)  # not 0
        return jnp.where(top < _INFINITY, (first >> 19) << 4 | (shift - _SHIFT), (_NANS >> 19) << 4)

    def encode(self, x: Array, scale: Array, rounding: Rounding | None) -> Array:
        """Return the codes of numbers, as they are stored, given the scale of each."""
        first, shift = self._first(scale)
        bits = _bits(jnp.abs(x))
        is_coarse = self.levels < 16
        if rounding is None:
            # A maximum keeps each rounding up for ever: to nearest, in coarse steps, it would be far too large.
            random = jnp.full_like(bits, 1 << (30 if is_coarse else 31), jnp.uint32)
        else:
            random = low_precision.scrambled(rounding.random) if is_coarse else rounding.random
        cut_off = (random >> (32 - shift).astype(jnp.uint32)).astype(jnp.int32)
        rounded = (bits + jnp.minimum(cut_off, _LARGEST - jnp.minimum(bits, _LARGEST))) >> shift
        return jnp.where(bits < _TINY, 0, jnp.clip(rounded - first + 1, 1, self.levels))

    def decode(self, stored: Array, scale: Array) -> Array:
        """Return the numbers of codes."""
        return self._number(stored.astype(jnp.int32), scale)

    def spacing(self, stored: Array, scale: Array) -> Array:
        """Return the distance between the numbers around a code."""
        q = stored.astype(jnp.int32)
        return self._number(q + 1, scale) - self._number(q, scale)

    def _number(self, q: Array, scale: Array) -> Array:
        first, shift = self._first(scale)
        return jnp.where(q == 0, 0.0, _number((first + q - 1) << shift))

    def _first(self, scale: Array) -> tuple[Array, Array]:
        """Return the first number of a block without its last bits, and their count."""
        shift = (scale & 15) + _SHIFT
        return ((scale >> 4) << 19) >> shift, shift


_CODES: dict[tuple[int, bool], RatioCode | FloatCode] = {
    (8, True): RatioCode(127, 0),
    (4, True): RatioCode(7, 8),
    (8, False): FloatCode(255),
    (4, False): FloatCode(15),
}


@dataclass(frozen=True, eq=False)
class QuantizedArray:
    """A moment stored in 8 or 4 bits per number: a pytree of its codes and scales.

    Fields:
      codes: In 8 bits: int8 if signed, else uint8, in the shape of the array. In 4 bits: uint8, two
        numbers per byte along the last axis, the first in the low half, its length rounded up.
      scales: uint16. The last axis is that of the array divided by `block_size`, rounded up.
      bits: 8 or 4.
      power: 0 for a second moment. A first moment is stored as its ratio to this power of the second one, or as it
        is if that is -1.
      block_size: Numbers per scale along the last axis. The last block may be shorter.
      size: The length of the last axis; inside `jax.shard_map`, that of the global array.
    """

    codes: Array
    scales: Array
    bits: int
    power: float
    block_size: int
    size: int

    @property
    def signed(self) -> bool:
        """True for a first moment, which may be below 0."""
        return self.power != 0

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the decoded array; inside `jax.shard_map`, of the local shard."""
        *leading, length = self.codes.shape
        return (*leading, min(self.size, length * (8 // self.bits)))

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the decoded array: float32."""
        return jnp.dtype(jnp.float32)

    @property
    def nbytes(self) -> int:
        """The bytes of codes and scales."""
        return sum(x.size * x.dtype.itemsize for x in (self.codes, self.scales))

    def __repr__(self) -> str:
        if not hasattr(self.codes, "shape"):  # a tree may hold anything
            return f"QuantizedArray({self.codes!r}, {self.scales!r})"
        shape = ",".join(map(str, self.shape))
        kind = f"{'' if self.signed else 'u'}int{self.bits}"
        return f"QuantizedArray({kind}[{shape}] in blocks of {self.block_size}, {self.nbytes} bytes)"

    def check(self) -> None:
        """Check that the shapes and dtypes of codes and scales fit together.

        Raises:
          ValueError: They do not.
        """
        kind = "int8" if self.bits == 8 and self.signed else "uint8"
        *leading, size = self.shape
        for name, x, length, dtype in (
            ("codes", self.codes, -(-size * self.bits // 8), kind),
            ("scales", self.scales, -(-size // self.block_size), "uint16"),
        ):
            shape = (*leading, length)
            if getattr(x, "shape", None) != shape or x.dtype != dtype:
                found = f"{x.dtype}{list(x.shape)}" if hasattr(x, "shape") else repr(x)
                cure = "the state comes from init(params) or update"
                if name == "scales" and getattr(x, "dtype", None) == jnp.float32:
                    cure = "an earlier version of adamjax wrote them, in a format that is no longer read: " + _CONVERT
                raise ValueError(
                    f"the {name} of a quantised moment in the state are {found}, expected {dtype}{list(shape)}: {cure}"
                )

    def decode(self, second: Array | None = None) -> Array:
        """Return the array in float32: of a first moment, given the second one.

        Raises:
          ValueError: `second` is needed and missing.
        """
        if not self.signed:
            return self.code.decode(*self._stored())
        if second is None:
            raise ValueError(
                "a first moment is stored as its ratio to the root of the second one: decode(nu) takes that, in "
                "float32; adamjax.storage.decode(state) decodes all moments of a state"
            )
        return self.code.decode(*self._stored()) * self.unit(second)

    def spacing(self, second: Array | None = None) -> Array:
        """Return the spacing of the format around each number, in float32: the mean of both sides."""
        found = self.code.spacing(*self._stored())
        return found if second is None else found * self.unit(second)

    def lowest(self) -> Array:
        """Return the smallest number above 0 that the block of each number of a second moment holds."""
        _, scales = self._stored()
        return self.code.decode(jnp.ones_like(scales), scales)

    def unit(self, second: Array) -> Array:
        """Return the size of a first moment whose ratio is 1, given the second moment."""
        if self.power == OF_ITSELF:
            return jnp.ones_like(second)
        return sqrt_with_zero_slope(second) if self.power == 0.5 else second

    @property
    def code(self) -> Any:
        """The format of its codes."""
        return _CODES[self.bits, self.signed]

    def _stored(self) -> tuple[Array, Array]:
        """The code and the scale of each number."""
        codes = _unpack(self.codes, self.shape[-1]) if self.bits == 4 else self.codes
        return codes, _spread(self.scales.astype(jnp.int32), self.block_size, codes)


def is_quantized(x: object) -> bool:
    """Return whether `x` is a `QuantizedArray`. As `is_leaf`, it makes codes and scales one leaf."""
    return isinstance(x, QuantizedArray)


def is_moment(x: object) -> bool:
    """Return whether `x` is the moment of one parameter, even if it is None or several arrays. For `is_leaf`."""
    return x is None or is_quantized(x)


jax.tree_util.register_dataclass(
    QuantizedArray, data_fields=["codes", "scales"], meta_fields=["bits", "power", "block_size", "size"]
)
jax.export.register_pytree_node_serialization(
    QuantizedArray,
    serialized_name="adamjax.QuantizedArray",
    serialize_auxdata=lambda static: json.dumps(static).encode(),
    deserialize_auxdata=lambda found: tuple(json.loads(bytes(found))),
)


@partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def encode(
    x: Array, bits: int, power: float, block_size: int, dither: Dither | None, narrowing: ArrayLike = 0.0
) -> QuantizedArray:
    """Quantise the float32 array `x`: a second moment, or the ratios of a first one to the `power` of it.

    Rounded stochastically; without a `dither`, to nearest, for second moments that only grow.
    """
    code: Any = _CODES[bits, power != 0]
    # Reduce in rows of SIMD width: XLA on CPU is ten times slower over a whole block.
    rows = math.gcd(block_size, 32)

    def maximum(x: Array) -> Array:
        runs = _runs(x, block_size)
        return jnp.max(jnp.max(runs.reshape(*runs.shape[:-1], -1, rows), -2), -1)

    scales = code.scale(*map(maximum, code.maxima(x)))
    rounding = None if dither is None else Rounding(low_precision.random(low_precision.index_of(x), dither), narrowing)
    stored = code.encode(x, _spread(scales, block_size, x), rounding)
    codes = _pack(stored.astype(jnp.uint8)) if bits == 4 else stored.astype(jnp.int8 if power != 0 else jnp.uint8)
    return QuantizedArray(codes, scales.astype(jnp.uint16), bits, power, block_size, x.shape[-1])


@encode.defjvp
def _refuse(*_: object) -> NoReturn:
    raise TypeError(
        "a derivative would have to pass through moments that are stored as integers, and cannot: "
        "differentiate with moments in float32 (mu_dtype=None, nu_dtype=None)"
    )


def abstract(x: jax.ShapeDtypeStruct, bits: int, power: float, block_size: int) -> QuantizedArray:
    """Return the types and shardings of the result of `encode` for an array like `x`."""
    dither = Dither(np.uint32(0), np.uint32(0))  # type: ignore[arg-type]
    made = jax.eval_shape(lambda: encode(jnp.zeros(x.shape, x.dtype), bits, power, block_size, dither))

    def placed(part: jax.ShapeDtypeStruct, unit: int) -> jax.ShapeDtypeStruct:
        sharding = x.sharding
        if isinstance(sharding, NamedSharding) and not is_divisible(x.shape, sharding, unit):
            sharding = whole(sharding)
        return jax.ShapeDtypeStruct(part.shape, part.dtype, sharding=sharding)

    return replace(made, codes=placed(made.codes, 8 // bits), scales=placed(made.scales, block_size))


def is_divisible(shape: tuple[int, ...], sharding: NamedSharding, unit: int) -> bool:
    """Return whether each device holds whole blocks of `unit` elements along the last axis."""
    spec = sharding.spec
    if len(spec) < len(shape) or spec[-1] is None:
        return True
    names = spec[-1] if isinstance(spec[-1], tuple) else (spec[-1],)
    return shape[-1] % (unit * math.prod(sharding.mesh.shape[name] for name in names)) == 0


def whole(sharding: NamedSharding) -> NamedSharding:
    """Return `sharding` with the last axis not sharded."""
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:-1], None))


def _runs(x: Array, length: int) -> Array:
    """Split the last axis into blocks of `length`, padded with zeros at the end."""
    # In Explicit mode (only there) the compiler does not gather the axis by itself.
    if not is_divisible(x.shape, jax.typeof(x).sharding, length):
        x = jax.sharding.reshard(x, whole(jax.typeof(x).sharding))
    count = -(-x.shape[-1] // length)
    if missing := count * length - x.shape[-1]:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])
    return x.reshape(*x.shape[:-1], count, length)


def sharded_like(x: Array, like: Array) -> Array:
    """Give `x` the sharding in the type of `like`, if there is one."""
    wanted = jax.typeof(like).sharding
    return x if wanted.mesh.empty or jax.typeof(x).sharding == wanted else jax.sharding.reshard(x, wanted)


def _spread(scales: Array, block_size: int, like: Array) -> Array:
    """Broadcast the scales to the numbers of an array with the shape and sharding of `like`."""
    x = jnp.broadcast_to(scales[..., None], (*scales.shape, block_size))
    x = x.reshape(*scales.shape[:-1], scales.shape[-1] * block_size)
    return sharded_like(x[..., : like.shape[-1]] if x.shape[-1] != like.shape[-1] else x, like)


def _pack(nibbles: Array) -> Array:
    # Pair the nibbles as uint16, the first in the low byte: slices of the pairs would run element by element in XLA.
    pairs = jax.lax.bitcast_convert_type(_runs(nibbles, 2), jnp.uint16)
    return (pairs | (pairs >> 4)).astype(jnp.uint8)


def _unpack(codes: Array, size: int) -> Array:
    pairs = jnp.stack([codes & np.uint8(15), codes >> 4], axis=-1)
    return pairs.reshape(*codes.shape[:-1], 2 * codes.shape[-1])[..., :size]


def _bits(x: Array) -> Array:
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def _number(bits: Array) -> Array:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
