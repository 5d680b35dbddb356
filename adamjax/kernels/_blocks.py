"""The step of blocks of a quantised moment that a Pallas kernel has loaded, by operations that Mosaic has."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from adamjax._core import low_precision, trees
from adamjax._core.low_precision import Dither
from adamjax._core.numerics import Decay, clip_finite
from adamjax._core.quantization import QuantizedArray, Rounding
from adamjax._transforms import moment_storage
from adamjax._transforms.adam import AdamRule, AdamScalars
from adamjax._transforms.delivery import add_to_param
from adamjax._transforms.param_rounding import RoundParam
from adamjax._transforms.weight_decay import agreeing
from adamjax.kernels._backend import OFFSETS, LeafArrays, StepScalars, StepVariant


def is_faster(leaf: LeafArrays) -> bool:
    """Return whether a kernel steps a parameter faster than XLA."""
    return any(isinstance(x, QuantizedArray) for x in leaf)


def common_reason(leaf: LeafArrays, g: Array) -> str | None:
    """Return the reason why no kernel can step a parameter whose moments are quantised, or None."""
    p, *moments, _ = leaf
    for name, array in (("parameter", p), ("gradient", g)):
        if (dtype := trees.dtype_of(array).name) not in ("float32", "bfloat16"):
            return f"its {name} is {dtype}, and the kernel steps float32, bfloat16"
    for x in moments:
        if x is not None and x.dtype != jnp.float32:
            return f"one of its moments is quantised and the other {x.dtype}, and the kernel steps float32 beside codes"
    if p.size >= 2**31:
        return f"it has {p.size} elements, and the kernel counts to 2**31"
    # If shard_map tracks what varies over devices, it marks Pallas's references as varying, which Pallas rejects.
    if any(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves((leaf, g))):
        return "its parts vary inside of jax.shard_map, and the kernel needs check_vma=False there"
    return None


def scalars_of(variant: StepVariant, scalars: StepScalars) -> Sequence[Any]:
    """Return the float32 scalars that the kernels take, in their order."""
    # A number that this variant does without (a correction of the next step, say) keeps its place.
    used = scalars.adam[:-1], *scalars[1:]  # a kernel steps by the rule of Adam itself, without `extra`
    return [jnp.float32(0) if x is None else x for x in jax.tree.leaves(used, is_leaf=trees.is_none)]


def step_scalars(row: Sequence[Any]) -> StepScalars:
    """Put the scalars of a step together again."""
    decays = [Decay(*row[i : i + 5]) for i in (0, 5)]
    return StepScalars(AdamScalars(*decays, *row[10:15]), *row[15:])


def places_of(shape: tuple[int, ...], places: Array) -> Array:
    """Return seed and phase of both dithers, and the global index of the first element, for each parameter."""
    strides = [np.uint32(math.prod(shape[axis + 1 :]) % 2**32) for axis in range(len(shape))]
    first = reduce(jnp.add, [places[:, OFFSETS + axis] * stride for axis, stride in enumerate(strides)])
    return jnp.concatenate([places[:, :OFFSETS], first[:, None]], axis=-1)


def axes_of(part: Sequence[int], whole: Sequence[int], size: int) -> list[tuple[int, int]]:
    """Return the rows of `size` along each axis of a shard, and their distance in the global array, innermost first."""
    axes: list[tuple[int, int]] = [(part[-1] // size, size)]
    stride = 1
    for i in reversed(range(len(part) - 1)):
        stride *= whole[i + 1]
        count, apart = axes[-1]
        if count * apart == stride:  # merge adjacent axes without a gap between them
            axes[-1] = (count * part[i], apart)
        else:
            axes.append((part[i], stride))
    return [(count, apart % 2**32) for count, apart in axes]


def index_of(shape: tuple[int, ...], axes: list[tuple[int, int]], start: Any) -> Array:
    """Return the global index of each element in rows of blocks. The first row is row `start`."""
    row = start.astype(jnp.uint32) + lax.broadcasted_iota(jnp.uint32, shape, 0)
    index = jnp.zeros(shape, jnp.uint32)
    for count, apart in axes[:-1]:
        index = index + lax.rem(row, jnp.full(shape, np.uint32(count))) * np.uint32(apart)
        row = lax.div(row, jnp.full(shape, np.uint32(count)))
    index = index + row * np.uint32(axes[-1][1])
    for axis in range(1, len(shape)):
        size = math.prod(shape[axis + 1 :])
        index = index + lax.broadcasted_iota(jnp.uint32, shape, axis) * np.uint32(size)
    return index


def scales_of_blocks(code: Any, x: Array, like: QuantizedArray) -> Array:
    """Return the scales of blocks that fill the last axes of an array."""
    maxima = code.maxima(x)
    for _ in range(x.ndim - like.scales.ndim):
        maxima = tuple([jnp.max(y, axis=-1) for y in maxima])
    return code.scale(*maxima)


def step_blocks(
    variant: StepVariant,
    row: list[Any],
    places: Any,
    offsets: Array,
    g: Array,
    leaf: LeafArrays,
    scales_of: Callable[[Any, Array, QuantizedArray], Array] = scales_of_blocks,
) -> LeafArrays:
    """Step a part of one parameter, given the index of each element after the first.

    The shapes of codes and scales are those of the first axes of the gradient. Codes of 4 bits with all its axes are
    not packed.
    """
    scalars = step_scalars(row)
    index = places[OFFSETS] + offsets
    dither, dither_p = Dither(places[0], places[1]), Dither(places[2], places[3], positions=index)
    p, *old, residual = leaf
    g = g.astype(jnp.float32)
    wide = p.astype(jnp.float32) if variant.rounding is None else variant.rounding.to_float32(p, residual)
    g = scalars.sign * (clip_finite(g, scalars.limit) if variant.clips else g)
    if variant.coupled:
        g = g + scalars.coupled * wide
    rule, adam = AdamRule(variant.nesterov, variant.amsgrad), scalars.adam
    g = rule.limited(g)
    v, v_max = [_load(x, g.shape) for x in old[1:]]
    m = _load(old[0], g.shape, v)
    # Neither codes nor float32 are rounded before the step goes on with them.
    m, v = rule.accumulate(g, m, v, adam)
    v_max = v_max if v_max is None else rule.third(g, v, v_max, adam)
    update = scalars.rate * rule.direction(g, m, v, v_max, adam)
    if variant.decays:
        decay = scalars.decay * wide
        update = update + (agreeing(decay, update) if variant.cautious else decay)
    random = low_precision.random(index, dither), low_precision.random(index, dither.second_array())
    v_stored = _store(v, old[1], Rounding(random[1]), scales_of)
    rounding = Rounding(random[0], adam.decay1.one_minus_b)
    m_stored = _store_first(m, _storable(v, v_stored), old[0], rounding, scales_of)
    stored = m_stored, v_stored, _store(v_max, old[2], None, scales_of)
    new, residual = _deliver(variant, p, update, residual, dither_p)
    return new, *stored, residual


def _deliver(variant: StepVariant, p: Array, update: Array, residual: Any, dither: Dither) -> tuple[Array, Any]:
    if variant.rounding is not None:
        deliver = RoundParam(variant.rounding, as_update=variant.update is not None)
        new, (_, residual) = deliver(update, None, (p, residual), dither)
        return new, residual
    if variant.update is not None:
        return update.astype(variant.update), None
    return add_to_param(update, p, None, None)


def _load(stored: Any, shape: tuple[int, ...], v: Array | None = None) -> Any:
    """Decode the numbers of a moment; of a first one, given the second."""
    if not isinstance(stored, QuantizedArray):
        return stored
    q = stored.codes.astype(jnp.int32)
    if _is_packed(stored, shape):
        q = (_spread(q, shape) >> _shift(shape, q.dtype)) & 15
    x = stored.code.decode(q, _spread(stored.scales.astype(jnp.int32), shape))
    return x if v is None else x * stored.unit(v)


def _is_packed(stored: QuantizedArray, shape: tuple[int, ...]) -> bool:
    return stored.bits == 4 and stored.codes.ndim < len(shape)


def _storable(v: Array, stored: Any) -> Array:
    if not isinstance(stored, QuantizedArray):
        return v
    scales = stored.scales.astype(jnp.int32)
    return jnp.maximum(v, _spread(stored.code.decode(jnp.ones_like(scales), scales), v.shape))


def _store_first(m: Array, v: Array, like: Any, rounding: Rounding, scales_of: Callable[..., Array]) -> Any:
    if not isinstance(like, QuantizedArray):
        return m
    ratio, narrowing = moment_storage.ratio_of(m, v, like, rounding.narrowing)
    return _store(ratio, like, rounding._replace(narrowing=narrowing), scales_of)


def _store(x: Any, like: Any, rounding: Rounding | None, scales_of: Callable[..., Array]) -> Any:
    if not isinstance(like, QuantizedArray):
        return x
    scales = scales_of(like.code, x, like)
    q = like.code.encode(x, _spread(scales, x.shape), rounding)
    q = lax.bitcast_convert_type(q + WHOLE if like.signed else q, jnp.uint32)
    if _is_packed(like, x.shape):
        q = jnp.sum((q & np.uint32(15)) << _shift(x.shape, q.dtype), axis=-1, dtype=jnp.uint32)
    return replace(like, codes=q.astype(like.codes.dtype), scales=scales.astype(like.scales.dtype))


# float32 numbers around this one have a spacing of 1, and its low bits are 0. Adding it rounds to an integer, which
# is then in the low bits, in two's complement.
WHOLE = np.float32(3 * 2**22)


def _spread(x: Array, shape: tuple[int, ...]) -> Array:
    return lax.broadcast_in_dim(x, shape, tuple(range(x.ndim)))


def _shift(shape: tuple[int, ...], dtype: Any) -> Array:
    return lax.broadcasted_iota(dtype, shape, len(shape) - 1) * np.asarray(4, dtype)
