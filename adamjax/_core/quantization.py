"""Block-quantised arrays: 8 or 4 bits per number, and a float32 scale per block.

A block is a run of numbers along the last axis. Its scale s is the largest magnitude in it. A magnitude |x| = y s is
stored as an integer next to L y**(1/p). With p = 2 or 4 the codes lie closer together near 0, where most numbers are.
Rounding picks one of the two neighbouring codes at random, so that |x| is the expected decoded value.
"""

import json
import math
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, NoReturn

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from adamjax._core import low_precision
from adamjax._core.low_precision import Dither


class Code(NamedTuple):
    """The integer codes q of one format, from 0 to `levels`."""

    levels: int
    power: int
    least: int = 0  # the smallest code of a number above 0
    zero: int = 0  # the code of 0
    offset: int = 0  # added to q before storing

    @property
    def units(self) -> float:
        """The magnitude of the largest q, in units. The unit of a block is its scale divided by this."""
        return float(self.levels**self.power)

    def magnitude(self, q: Array) -> Array:
        """Return the magnitude that q encodes, in units: q ** power."""
        return q * q if self.power == 2 else (q * q) * (q * q)

    def width(self, q: Array) -> Array:
        """Return the distance between the magnitudes of q and q + 1, in units."""
        return 2 * q + 1 if self.power == 2 else ((4 * q + 6) * q + 4) * q + 1

    def below(self, y: Array) -> Array:
        """Return the largest q of magnitude `y` or less. It may be off by one next to the magnitude of a q."""
        return jnp.floor(jnp.sqrt(y) if self.power == 2 else jnp.sqrt(jnp.sqrt(y)))

    def value(self, q: Array, unit: Array) -> Array:
        """Return the number that q encodes, with its sign."""
        return (q * jnp.abs(q) if self.power == 2 else self.magnitude(q)) * unit

    def scale(self, largest: Array, *, grows: bool) -> Array:
        """Return the scale of a block from its largest magnitude; a power of two for arrays that only grow."""
        # A unit below the smallest normal number would be flushed to 0.
        least = np.float32(jnp.finfo(jnp.float32).tiny * self.units)
        s = jnp.where(largest > 0, jnp.maximum(largest, least), largest)
        return jnp.where(jnp.isfinite(s), _power_of_two_above(s), s) if grows else s

    def per_number(self, s: Array) -> Array:
        """Return the factor from numbers to units, given the scale s; 0 if s is 0, as are all numbers of the block."""
        return jnp.where(s == 0, 0.0, self.units / jnp.where(s == 0, 1.0, s))

    def rounded(self, x: Array, per_number: Array, threshold: Array | float) -> Array:
        """Return the signed q of `x`. Round up if `x` lies beyond the fraction `threshold` of the way to the next q."""
        y = jnp.abs(x) * per_number
        q = self.below(y)
        up = y - self.magnitude(q) > self.width(q) * threshold
        q = jnp.clip(q + up.astype(jnp.float32), float(self.least), float(self.levels))
        if self.zero != self.least:
            q = jnp.where(x == 0, float(self.zero), q)
        return jnp.where(x < 0, -q, q) if self.power == 2 else q


# A first moment that decodes to 0 gives a step of 0, but a second moment that does gives a division by 0.
# The sixteen codes of a 4-bit second moment have none to spare for 0: it becomes s / 65536.
_CODES = {
    (8, True): Code(127, 2),
    (8, False): Code(255, 4, least=1),
    (4, True): Code(7, 2, offset=8),
    (4, False): Code(16, 4, least=1, zero=1, offset=-1),
}


@dataclass(frozen=True, eq=False)
class QuantizedArray:
    """A float32 array stored in 8 or 4 bits per number: a pytree of its codes and scales.

    Fields:
      codes: In 8 bits: int8 if signed, else uint8, in the shape of the array. In 4 bits: uint8, two
        numbers per byte along the last axis, the first in the low half, its length rounded up.
      scales: float32. The last axis is that of the array divided by `block_size`, rounded up.
      bits: 8 or 4.
      signed: True if the array may hold numbers below 0.
      block_size: Numbers per scale along the last axis. The last block may be shorter.
      size: The length of the last axis; inside `jax.shard_map`, that of the global array.
    """

    codes: Array
    scales: Array
    bits: int
    signed: bool
    block_size: int
    size: int

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
            ("scales", self.scales, -(-size // self.block_size), "float32"),
        ):
            shape = (*leading, length)
            if getattr(x, "shape", None) != shape or x.dtype != dtype:
                found = f"{x.dtype}{list(x.shape)}" if hasattr(x, "shape") else repr(x)
                raise ValueError(
                    f"the {name} of a quantised moment in the state are {found}, expected {dtype}{list(shape)}: "
                    "the state comes from init(params) or update"
                )

    def decode(self) -> Array:
        """Return the array in float32."""
        q = self._integers()
        return self.code.value(q, self._units_like(q))

    def spacing(self) -> Array:
        """Return the spacing of the format around each number, in float32: the mean of both sides."""
        q = jnp.abs(self._integers())
        below = jnp.maximum(q - 1, 0.0)
        y = (self.code.magnitude(q + 1) - self.code.magnitude(below)) / (q + 1 - below)
        return y * self._units_like(y)

    @property
    def code(self) -> Code:
        """The format of its codes."""
        return _CODES[self.bits, self.signed]

    def _units_like(self, y: Array) -> Array:
        return _spread(self.scales / self.code.units, self.block_size, y)

    def _integers(self) -> Array:
        stored = _unpack(self.codes, self.shape[-1]) if self.bits == 4 else self.codes
        return stored.astype(jnp.float32) - self.code.offset


def is_quantized(x: object) -> bool:
    """Return whether `x` is a `QuantizedArray`. As `is_leaf`, it makes codes and scales one leaf."""
    return isinstance(x, QuantizedArray)


def is_moment(x: object) -> bool:
    """Return whether `x` is the moment of one parameter, even if it is None or several arrays. For `is_leaf`."""
    return x is None or is_quantized(x)


jax.tree_util.register_dataclass(
    QuantizedArray, data_fields=["codes", "scales"], meta_fields=["bits", "signed", "block_size", "size"]
)
jax.export.register_pytree_node_serialization(
    QuantizedArray,
    serialized_name="adamjax.QuantizedArray",
    serialize_auxdata=lambda static: json.dumps(static).encode(),
    deserialize_auxdata=lambda found: tuple(json.loads(bytes(found))),
)


@partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def encode(x: Array, bits: int, signed: bool, block_size: int, dither: Dither | None) -> QuantizedArray:
    """Quantise the float32 array `x`, rounded stochastically.

    Without a `dither`, round to nearest: for arrays that only grow. Their scales are powers of two, so a
    decoded number is encoded as itself as long as its scale stays the same. If the scale moved at each
    step, it would move all numbers of its block, and rounding to nearest would not move them back.
    """
    code, size = _CODES[bits, signed], x.shape[-1]
    # Reduce in rows of SIMD width: XLA on CPU is ten times slower over a whole block.
    rows = math.gcd(block_size, 32)
    runs = _runs(x, block_size)
    tops = largest(largest(runs.reshape(*runs.shape[:-1], -1, rows), -2))
    scales = code.scale(tops, grows=dither is None)
    threshold = 0.5 if dither is None else low_precision.uniform(low_precision.index_of(x), dither)
    per_number = _spread(code.per_number(scales), block_size, x)
    stored = code.rounded(x, per_number, threshold) + code.offset
    codes = _pack(stored.astype(jnp.uint8)) if bits == 4 else stored.astype(jnp.int8 if signed else jnp.uint8)
    return QuantizedArray(codes, scales, bits, signed, block_size, size)


@encode.defjvp
def _refuse(*_: object) -> NoReturn:
    raise TypeError(
        "a derivative would have to pass through moments that are stored as integers, and cannot: "
        "differentiate with moments in float32 (mu_dtype=None, nu_dtype=None)"
    )


def largest(x: Array, axis: int = -1) -> Array:
    """Return the largest magnitude along an axis, or NaN if there is one.

    Compare the bits as integers, of which those of NaN are the largest. A maximum of floats may ignore NaN:
    it would then be stored as a code, and be 0 from the next step on.
    """
    bits = jax.lax.bitcast_convert_type(jnp.abs(x), jnp.int32)
    return jax.lax.bitcast_convert_type(jnp.max(bits, axis=axis), jnp.float32)


def abstract(x: jax.ShapeDtypeStruct, bits: int, signed: bool, block_size: int) -> QuantizedArray:
    """Return the types and shardings of the result of `encode` for an array like `x`."""
    made = jax.eval_shape(lambda: encode(jnp.zeros(x.shape, x.dtype), bits, signed, block_size, None))

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
    return x if jax.typeof(x).sharding == wanted else jax.sharding.reshard(x, wanted)


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


def _power_of_two_above(x: Array) -> Array:
    """Return the smallest power of two not below `x`, or the largest there is. `x` is at least 0; 0 gives 0."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    up = jnp.minimum((bits + np.uint32(0x7FFFFF)) >> 23, np.uint32(254))
    return jax.lax.bitcast_convert_type(up << 23, jnp.float32)
