"""The formats in which bitsandbytes, torchao and FlashOptim store moments, reimplemented: in blocks, to nearest.

Sources: bitsandbytes 0.48, `functional.create_dynamic_map` and `optim.AdamW8bit` (blocks of 256); torchao 0.14,
`optim/subclass_8bit.py` (the same map), `subclass_4bit.py` (blocks of 128) and `subclass_fp8.py` (blocks of 256). Both
keep leaves of fewer than 4096 elements in float32. Checked by hand: torchao 0.18 stores and loads random numbers of
all magnitudes the same to 3e-7, and bitsandbytes 0.50 on a CPU stores all but 2 in 1000 first moments the same.

FlashOptim (arXiv 2602.23349) in blocks of 32 with float16 scales: from `quantization.py` of flashoptim-jax 0.1, whose
steps need a GPU. Checked by hand: its functions store and load random numbers the same. So does `FlashWeights` with its
`compression.py`, whose int8 numbers correct bfloat16 parameters.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adamjax._core import trees
from adamjax._core.value import value
from adamjax._transforms.base import Transformation
from adamjax._transforms.param_rounding import ParamRounding, Rounding


def dynamic_map(signed: bool, exponent_bits: int, bits: int) -> np.ndarray:
    """Return the map of Dettmers et al. (2016, 2022): each decade is divided linearly, smaller ones more coarsely."""
    numbers = [0.0, 1.0]
    for i in range(exponent_bits):
        items = 2 ** (i + bits - 1 - exponent_bits + (0 if signed else 1)) + 1
        edges = np.linspace(0.1, 1, int(items))
        means = 10.0 ** (i - exponent_bits + 1) * (edges[:-1] + edges[1:]) / 2
        numbers += [*means, *-means] if signed else [*means]
    assert len(numbers) == 2**bits
    return np.sort(np.array(numbers, np.float32))


class Reference(NamedTuple):
    """A storage format: its numbers between -1 and 1, and how many elements share a scale."""

    numbers: np.ndarray
    block_size: int

    @property
    def bytes(self) -> float:
        """Bytes per number, with the share of a float32 scale."""
        return (0.5 if len(self.numbers) <= 16 else 1.0) + 4 / self.block_size

    def round_trip(self, x: jax.Array) -> jax.Array:
        """Return `x` as stored and loaded: in blocks of the flat array, each number rounded to the nearest."""
        if x.size < 4096:
            return x
        flat = jnp.pad(x.reshape(-1), (0, -x.size % self.block_size)).reshape(-1, self.block_size)
        scale = jnp.maximum(jnp.max(jnp.abs(flat), axis=1, keepdims=True), 1e-12)
        middles = (self.numbers[1:] + self.numbers[:-1]) / 2
        found = jnp.asarray(self.numbers)[jnp.searchsorted(jnp.asarray(middles), flat / scale)] * scale
        return found.reshape(-1)[: x.size].reshape(x.shape)


class Flash(NamedTuple):
    """FlashOptim's codes: softsign of a first moment, the root of a second one."""

    signed: bool
    block_size: int = 32

    @property
    def bytes(self) -> float:
        """Bytes per number, with the share of a float16 scale."""
        return 1 + 2 / self.block_size

    def round_trip(self, x: jax.Array) -> jax.Array:
        """Return `x` as stored and loaded, in blocks of the flat array."""
        flat = jnp.pad(x.reshape(-1), (0, -x.size % self.block_size)).reshape(-1, self.block_size)
        flat = flat if self.signed else jnp.sqrt(flat)
        scale = jnp.max(jnp.abs(flat), axis=1, keepdims=True)
        y, levels = flat / jnp.where(scale > 0, scale, 1.0), 127 if self.signed else 255
        q = jnp.floor((2 * y / (1 + jnp.abs(y)) if self.signed else y) * levels + 0.5)
        y = jnp.clip(q, -levels, levels) / levels
        found = (y / (2 - jnp.abs(y)) if self.signed else y) * scale.astype(jnp.float16).astype(jnp.float32)
        found = found if self.signed else found**2
        return found.reshape(-1)[: x.size].reshape(x.shape)


class Nearest(NamedTuple):
    """bfloat16, rounded to nearest."""

    bytes: float = 2

    def round_trip(self, x: jax.Array) -> jax.Array:
        """Return `x` as stored and loaded."""
        return jax.lax.reduce_precision(x, 8, 7)


def _float8() -> np.ndarray:
    numbers = np.arange(256, dtype=np.uint8).view(jnp.float8_e4m3fn).astype(np.float32) / 448
    return np.unique(numbers[np.isfinite(numbers)])


REFERENCES: dict[str, tuple[Any, Any]] = {
    "FlashOptim's 8 bits": (Flash(True), Flash(False)),
    "bitsandbytes' and torchao's 8 bits": (
        Reference(dynamic_map(True, 7, 8), 256),
        Reference(dynamic_map(False, 7, 8), 256),
    ),
    "torchao's float8": (Reference(_float8(), 256), Reference(_float8(), 256)),
    "torchao's 4 bits": (
        Reference(dynamic_map(True, 3, 4), 128),
        Reference(np.linspace(0, 1, 17, dtype=np.float32)[1:], 128),
    ),
}


@value
class Stored(Transformation):
    """An optimizer whose moments are stored and loaded after each step (the state itself stays float32)."""

    inner: Any
    codes: Any

    def _init(self, params: Any) -> Any:
        return self.inner._init(params)

    def _update(self, updates: Any, state: Any, params: Any, extra: Any) -> tuple[Any, Any]:
        updates, (adam, *rest) = self.inner.update(updates, state, params, **extra)
        mu = jax.tree.map(self.codes[0].round_trip, adam.mu)
        nu = jax.tree.map(self.codes[1].round_trip, adam.nu)
        return updates, (adam._replace(mu=mu, nu=nu), *rest)


def _half_spacing(p: jax.Array) -> jax.Array:
    """Half of the spacing of bfloat16 at its float32 numbers."""
    exponent = jax.lax.bitcast_convert_type(p, jnp.uint32) >> 23 & np.uint32(0xFF)
    return jax.lax.bitcast_convert_type(jnp.maximum(exponent, np.uint32(9)) - np.uint32(8) << 23, jnp.float32)


def _corrected(p: jax.Array, correction: jax.Array) -> jax.Array:
    wide = p.astype(jnp.float32)
    return wide + correction.astype(jnp.float32) / 127 * _half_spacing(wide)


def _correct(start: jax.Array, u: jax.Array, correction: jax.Array, dither: Any, dtype: Any) -> tuple[jax.Array, Any]:
    wanted = _corrected(start, correction) + u
    p = jax.lax.reduce_precision(wanted, 8, 7)
    part = jnp.clip((wanted - p) / _half_spacing(p), -1, 1) * 127
    return p - start, (jnp.sign(part) * jnp.floor(jnp.abs(part) + 0.5)).astype(jnp.int8)


@value
class FlashWeights(Rounding):
    """FlashOptim's bfloat16 parameters: an int8 correction of each, in units of its spacing, to nearest."""

    inner: Any

    def __post_init__(self) -> None:
        self._wrap("FlashWeights")

    def _init_residual(self, path: str, p: Any) -> Any:
        return trees.zeros_like(p, jnp.dtype(jnp.int8))

    @property
    def _rounding(self) -> ParamRounding:
        return ParamRounding("flash", _corrected, _correct)

    def weights(self, params: Any, state: Any) -> Any:
        """The corrected parameters, in float32."""
        return jax.tree.map(_corrected, params, state.kept)
