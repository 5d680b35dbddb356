"""The Pallas kernel for TPUs: steps with quantised moments in one pass over memory.

A TPU computes on tiles of 128 lanes. The kernel goes through rows in chunks of 256 numbers, so that packed codes of 4
bits fill a tile too. It takes the maxima of blocks by rolling lanes. Codes and scales change lanes by products with a
matrix of ones and zeros, which are exact.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType

from adamjax._core.quantization import QuantizedArray, is_divisible
from adamjax.kernels._backend import Backend, LeafArrays, LeafSpec, StepVariant, is_on_one_device, results
from adamjax.kernels._blocks import axes_of, common_reason, index_of, places_of, scalars_of, step_blocks
from adamjax.kernels._blocks import is_faster as is_faster

_CHUNK = 256  # numbers that are stepped at once, in each row
_LANES = 128
_ROWS = 32  # of a tile of 8-bit integers
_NUMBERS = 2**18  # of a program: twice 24 bytes of each fit into the 16 MiB that a program may have


def unsupported_reason(variant: StepVariant, leaf: LeafArrays, g: Array) -> str | None:
    """Return the reason why the kernel cannot step a parameter whose moments are quantised, or None."""
    for x in leaf[1:4]:
        if isinstance(x, QuantizedArray) and _CHUNK % x.block_size:
            size = f"blocks of {x.block_size}"
            return f"its moments are quantised in {size}, and the kernel steps {_CHUNK} numbers at a time"
    sharding = jax.typeof(leaf[0]).sharding
    if g.shape[-1] % _CHUNK or not is_divisible(g.shape, sharding, _CHUNK):
        return f"its last axis, {g.shape[-1]}, is no multiple of {_CHUNK} on each device"
    # libtpu does not call `custom_partitioning`.
    if AxisType.Explicit not in sharding.mesh.axis_types and not is_on_one_device([g]):
        return (
            "on TPUs, XLA cannot spread a kernel over devices: step inside of jax.shard_map, or on a mesh whose axes "
            "are in Explicit mode"
        )
    return common_reason(variant, leaf, g)


def _run(spec: LeafSpec, scalars: Array, places: Array, *arrays: Array, interpret: bool = False) -> list[Array]:
    """Step a batch of parameters. Its axes are the leading axes of the scalars."""
    batch, variant = scalars.ndim - 1, spec.variant
    many, part = math.prod(scalars.shape[:batch]), arrays[0].shape[batch:]
    axes, length, count = axes_of(part, spec.shape, part[-1]), part[-1], math.prod(part[:-1])
    # A part of the scales has whole tiles, or all that a row has.
    width = min(length, _LANES * max(block for _, block in spec.formats))
    rows = min(count, _ROWS, max(8, _NUMBERS // width // 8 * 8))

    def width_of(x: Any) -> int:
        """The width of a program's part of an array; of codes and scales, in proportion."""
        return width * x.shape[-1] // length

    def part_of(x: Any) -> pl.BlockSpec:
        return pl.BlockSpec((1, rows, width_of(x)), lambda i, j, k: (i, j, k))

    p, g, *others = arrays
    delivers = variant.update is not None
    given = [g, p] if delivers and variant.reads_param else [g]
    kept = others if delivers else [p, *others]
    like = results(variant, arrays)
    last = len(given) + len(kept)  # of the references that are read

    def program(scalars: Any, places: Any, *refs: Any) -> None:
        which, i, k = (pl.program_id(axis) for axis in range(3))
        row, place = ([table[which, n] for n in range(table.shape[1])] for table in (scalars, places))
        # Where an update is delivered, the last of what is given is stepped: without a parameter, the gradient.
        old = jax.tree.unflatten(spec.structure, refs[len(given) - delivers : last])
        new = jax.tree.unflatten(spec.structure, refs[last:])

        def step_chunk(c: Any, scales: list[Array]) -> list[Array]:
            column = lax.convert_element_type(k * width + c * _CHUNK, jnp.uint32)
            offsets = index_of((rows, _CHUNK), axes, i * rows) + column
            leaf: Any = tuple(_read(x, c) for x in old)
            stepped = step_blocks(variant, row, place, offsets, _read(refs[0], c), leaf, _scales_of)
            for x, ref in zip(stepped, new, strict=True):
                _write(x, ref, c)
            return [x + _of_blocks(y, c, x.shape[-1]) for x, y in zip(scales, _coded(stepped), strict=True)]

        zeros = [jnp.zeros((rows, x.scales.shape[-1]), jnp.int32) for x in _coded(new)]
        scales = lax.fori_loop(0, width // _CHUNK, step_chunk, zeros)
        for x, ref in zip(scales, _coded(new), strict=True):
            ref.scales[0] = x.astype(jnp.uint16)

    smem = pl.BlockSpec(memory_space=pltpu.SMEM)
    cut = [x.reshape(many, count, x.shape[-1]) for x in (*given, *kept)]
    step = pl.pallas_call(
        program,
        grid=(many, pl.cdiv(count, rows), pl.cdiv(length, width)),
        in_specs=[smem, smem, *map(part_of, cut)],
        out_specs=[*map(part_of, like)],
        out_shape=[jax.ShapeDtypeStruct((many, count, x.shape[-1]), x.dtype) for x in like],
        input_output_aliases={2 + len(given) + i: len(like) - len(kept) + i for i in range(len(kept))},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3),
        interpret=interpret,
        name="adam_step",
    )
    with jax.enable_x64(False):  # in 64 bits, which Mosaic does not have, loops would count
        new = step(scalars.reshape(many, -1), places_of(spec.shape, places.reshape(many, -1)), *cut)
    return [x.reshape(y.shape) for x, y in zip(new, like, strict=True)]


def _coded(leaf: LeafArrays) -> list[Any]:
    return [x for x in leaf if isinstance(x, QuantizedArray)]


def _chunk(c: Any, width: int) -> tuple[Any, ...]:
    return 0, slice(None), pl.ds(pl.multiple_of(c * width, width), width)


def _read(ref: Any, c: Any) -> Any:
    """Read chunk `c`; of a quantised moment, the code and the scale of each number as an integer."""
    if not isinstance(ref, QuantizedArray):
        return None if ref is None else ref[_chunk(c, _CHUNK)]
    if ref.bits == 4:
        pairs = ref.codes[_chunk(c, _CHUNK // 2)].astype(jnp.int32)
        pairs = _moved_bytes(pairs, _ones(pairs, lambda i, j: i == j >> 1, _CHUNK))
        codes = (pairs >> 4 * (_lane(pairs.shape) & 1)) & 15
    else:
        codes = ref.codes[_chunk(c, _CHUNK)].astype(jnp.int32)
    block = ref.block_size
    scales = _moved(ref.scales[0].astype(jnp.int32), lambda i, j: i * block == c * _CHUNK + (j & -block), _CHUNK)
    return replace(ref, codes=codes, scales=scales)


def _write(x: Any, ref: Any, c: Any) -> None:
    """Write chunk `c`, but for scales."""
    if not isinstance(ref, QuantizedArray):
        if ref is not None:
            ref[_chunk(c, _CHUNK)] = x
    elif ref.bits == 4:
        codes = x.codes & 15
        low, high = (
            _moved_bytes(codes, _ones(codes, where, _CHUNK // 2))
            for where in (lambda i, j: i == 2 * j, lambda i, j: i == 2 * j + 1)
        )
        ref.codes[_chunk(c, _CHUNK // 2)] = (low | high << 4).astype(ref.codes.dtype)
    else:
        ref.codes[_chunk(c, _CHUNK)] = x.codes.astype(ref.codes.dtype)


def _of_blocks(x: QuantizedArray, c: Any, count: int) -> Array:
    """Return the scales of the blocks in chunk `c`, each at its place among `count` of them, and zeros."""
    block = x.block_size
    return _moved(x.scales, lambda i, j: i + c * _CHUNK == j * block, count)


def _scales_of(code: Any, x: Array, like: QuantizedArray) -> Array:
    """Return the scale of the block of each number."""
    block = like.block_size

    def maximum(x: Array) -> Array:
        """The maximum of a block, at its first number."""
        for apart in [2**i for i in range(block.bit_length() - 1)]:
            x = jnp.maximum(x, pltpu.roll(x, _CHUNK - apart, 1))
        return x

    return _moved(code.scale(*map(maximum, code.maxima(x))), lambda i, j: i == j & -block, _CHUNK)


def _moved(x: Array, where: Callable[[Array, Array], Array], width: int) -> Array:
    """Move integers of 16 bits from lane i to all lanes j `where` (i, j) is true, among `width` lanes."""
    ones = _ones(x, where, width)
    return _moved_bytes(x & 255, ones) | _moved_bytes(x >> 8, ones) << 8


def _ones(x: Array, where: Callable[[Array, Array], Array], width: int) -> Array:
    """Return the matrix that has a one `where` it says so, and zeros."""
    shape = x.shape[-1], width
    return where(lax.broadcasted_iota(jnp.int32, shape, 0), _lane(shape)).astype(jnp.float32).astype(jnp.bfloat16)


def _moved_bytes(x: Array, ones: Array) -> Array:
    """Move integers of 8 bits, which bfloat16 holds."""
    x = x.astype(jnp.float32).astype(jnp.bfloat16)
    # Whatever `jax_default_matmul_precision` is: Mosaic has no other for bfloat16.
    moved = jnp.dot(x, ones, precision=lax.Precision.DEFAULT, preferred_element_type=jnp.float32)
    return moved.astype(jnp.int32)


def _lane(shape: tuple[int, ...]) -> Array:
    return lax.broadcasted_iota(jnp.int32, shape, 1)


KERNEL = Backend(scalars_of, _run)
INTERPRETED = Backend(scalars_of, partial(_run, interpret=True))
