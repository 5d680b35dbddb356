"""The Pallas kernel: steps with quantised moments in one pass over the memory of a GPU.

XLA compiles a step of float moments to one loop. Quantised moments need two, because their scales come in between: one
loop finds the largest new moment of each block, and one rounds with it. The kernel keeps a block in registers.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu
from jax.extend.core import primitives

from adamjax._core.quantization import QuantizedArray
from adamjax.kernels._backend import Backend, LeafArrays, LeafSpec, StepVariant, results
from adamjax.kernels._blocks import WHOLE, axes_of, common_reason, index_of, places_of, scalars_of, step_blocks
from adamjax.kernels._blocks import is_faster as is_faster

# Typed as Any: parts of this API are missing in our minimum jax.
plgpu: Any = mosaic_gpu

# 8 rows and 4 warps per program: the fastest of 4, 8 and 16 rows on an H200.
_ROWS, _WARPS = 8, 4


def unsupported_reason(variant: StepVariant, leaf: LeafArrays, g: Array) -> str | None:
    """Return the reason why the kernel cannot step a parameter whose moments are quantised, or None."""
    return common_reason(variant, leaf, g) or _unsupported_blocks(leaf[1:4], g.shape[-1]) or _missing()


def _unsupported_blocks(moments: Sequence[Any], length: int) -> str | None:
    sizes = sorted({x.block_size for x in moments if isinstance(x, QuantizedArray)})
    if sizes[0] % 32:
        return f"its moments are quantised in blocks of {sizes[0]}, and the kernel steps multiples of 32"
    if sizes[0] < 64 and any(isinstance(x, QuantizedArray) and x.bits == 4 for x in moments):
        return (
            f"it has codes of 4 bits and blocks of {sizes[0]}, and the kernel steps blocks of 64 numbers beside 4 bits"
        )
    if sizes[-1] % sizes[0]:
        return f"the blocks of its moments, of {sizes[0]} and of {sizes[-1]} numbers, do not begin together"
    return (
        f"its last axis, {length}, is no multiple of the {sizes[-1]} numbers in a block" if length % sizes[-1] else None
    )


@cache
def _missing() -> str | None:
    """Return the reason why there is no kernel on this machine, or None."""
    if jax.__version_info__ < (0, 11):
        return f"the kernel needs jax 0.11, and this is {jax.__version__}: pip install --upgrade jax"
    # "9.0" is Hopper; "gfx942" and the like are AMD's.
    found = getattr(jax.devices()[0], "compute_capability", "9.0")
    if found.startswith("gfx") or float(found) < 9:
        return f"the kernel is for NVIDIA's Hopper and later, and this GPU is {jax.devices()[0].device_kind} ({found})"
    return None


class _Rows(NamedTuple):
    """The cut of arrays into rows, one for each block of quantised moments."""

    unit: int  # the elements per block; of the smaller block if the moments differ
    span: int  # the number of these blocks in a row, which is one block of the moment with larger blocks
    pairs: bool  # whether the codes of one of the moments are stored two per byte

    @property
    def shape(self) -> tuple[int, ...]:
        inner = (self.unit // 2, 2) if self.pairs else (self.unit,)
        return (self.span, *inner) if self.span > 1 else inner

    def shapes_of(self, stored: Any) -> list[tuple[int, ...]]:
        """Return the shape, per row, of each array of a moment."""
        if not isinstance(stored, QuantizedArray):
            return [self.shape]
        codes = self.shape[:-1] if stored.bits == 4 else self.shape
        return [codes, (self.span,) if self.span > 1 and stored.block_size == self.unit else ()]

    def cut(self, stored: Any, many: int) -> Any:
        """Reshape a moment or a parameter to rows: [many, rows, *shape]."""
        arrays, structure = jax.tree.flatten(stored)
        shapes = self.shapes_of(stored) if arrays else []
        cut = [x.reshape(many, -1, *shape) for x, shape in zip(arrays, shapes, strict=True)]
        return jax.tree.unflatten(structure, cut)


def _rows_of(spec: LeafSpec) -> _Rows:
    coded = [(bits, block) for bits, block in spec.formats if bits]
    sizes = [block for _, block in coded]
    return _Rows(min(sizes), max(sizes) // min(sizes), any(bits == 4 for bits, _ in coded))


def _run(spec: LeafSpec, scalars: Array, places: Array, *arrays: Array, interpret: bool = False) -> list[Array]:
    """Step a batch of parameters. Its axes are the leading axes of the scalars."""
    batch = scalars.ndim - 1
    many, part = math.prod(scalars.shape[:batch]), arrays[0].shape[batch:]
    rows = _rows_of(spec)
    p, g, *moments = arrays
    leaf = tuple(rows.cut(x, many) for x in jax.tree.unflatten(spec.structure, (p, *moments)))
    g = rows.cut(g, many)
    scalars = scalars.reshape(many, -1)
    places = places_of(spec.shape, places.reshape(many, -1))
    variant = spec.variant
    axes = axes_of(part, spec.shape, math.prod(rows.shape))

    def step(row: list[Any], places: Any, start: Any, g: Array, leaf: LeafArrays) -> LeafArrays:
        return step_blocks(variant, row, places, index_of(g.shape, axes, start), g, leaf)

    given, new = (g,), leaf
    if variant.update is not None:  # it has an array of its own, and the parameter is read at most
        given, new = (g, leaf[0])[: 1 + variant.reads_param], (lax.empty(g.shape, variant.update), *leaf[1:])
    count = g.shape[1]
    whole = count - count % _ROWS
    if whole:
        new = _programs(step, rows, whole // _ROWS, scalars, places, given, new, variant.update is not None, interpret)
    if count > whole:
        # The kernel has not touched the last rows, which do not fill a program: step them here.
        old = new if variant.update is None else (leaf[0], *new[1:])
        rest = jax.tree.map(lambda x: x[:, whole:], (g, old))
        of_one = jax.vmap(lambda scalars, places, rest: step(list(scalars), list(places), np.uint32(whole), *rest))
        last = of_one(scalars, places, rest)
        # Without the barrier, XLA would fuse their step with the writes, which then need copies.
        last = lax.optimization_barrier(last)
        new = jax.tree.map(lambda x, y: lax.dynamic_update_slice_in_dim(x, y, whole, 1), new, last)
    return [x.reshape(y.shape) for x, y in zip(jax.tree.leaves(new), results(variant, arrays), strict=True)]


def _programs(
    step: Callable[..., LeafArrays],
    rows: _Rows,
    count: int,
    scalars: Array,
    places: Array,
    given: tuple[Array, ...],
    kept: LeafArrays,
    delivers_update: bool,
    interpret: bool,
) -> LeafArrays:
    """Run the kernel, with `count` programs for each of many parameters, in place of what is `kept`.

    `given` are the gradient and, if an update is delivered, the parameter. The kernel does not read what is in place
    of the update. It steps the last of what is given instead: without a parameter, the gradient.
    """
    arrays, structure = jax.tree.flatten(kept)
    layouts = [layout for x in (*given, *kept[delivers_update:]) if x is not None for layout in _layouts(rows, x)]

    def read(ref: Any, layout: Any) -> Array:
        return ref[...] if interpret else plgpu.load(ref, layout=layout, optimized=False)

    def write(ref: Any, x: Array) -> None:
        # Only jax 0.12 and later have a store with options.
        if interpret or not hasattr(plgpu, "store"):
            ref[...] = x
        else:
            plgpu.store(ref, x, optimized=False)

    def program(scalars: Any, places: Any, *refs: Any) -> None:
        which, start = lax.axis_index("many"), lax.axis_index("program") * _ROWS
        of_one = [[table[which, i] for i in range(table.shape[1])] for table in (scalars, places)]
        refs = tuple(ref.at[which, pl.ds(start, _ROWS)] for ref in refs)
        sources, targets = refs[: len(given)], refs[len(given) :]
        read_refs = (*sources, *targets[delivers_update:])
        found = [read(ref, layout) for ref, layout in zip(read_refs, layouts, strict=True)]
        old = jax.tree.unflatten(structure, found[len(given) - delivers_update :])
        new = _lowered(step, *of_one, start, found[0], old)
        for ref, x in zip(targets, jax.tree.leaves(new), strict=True):
            write(ref, x)

    @pl.run_state
    def in_place(kept: Any) -> None:
        pl.kernel(
            program,
            out_type=(),
            mesh=plgpu.Mesh(grid=(scalars.shape[0], count), grid_names=("many", "program")),
            compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
            interpret=plgpu.InterpretGPUParams() if interpret else False,
            name="adam_step",
        )(scalars, places, *given, *kept)

    return jax.tree.unflatten(structure, in_place(arrays))


def _layouts(rows: _Rows, stored: Any) -> list[Any]:
    """Return the register layouts of the arrays: a row per warp, so that its lanes find the largest of a block."""
    span = (rows.span,) if rows.span > 1 else ()
    if rows.pairs:
        vector, tiles = 2, [(_WARPS, *span, 32, 2)]
    else:
        vector = math.gcd(rows.unit, 128) // 32
        tiles = [(_WARPS, *span, 32 * vector), (vector,)]
    whole = plgpu.Layout.TILED(plgpu.Tiling(tuple(tiles)), warp_dims=(-3 - len(span),), lane_dims=(-2,), vector_dim=-1)
    ndim = len(rows.shape)
    return [
        whole.reduce(tuple(range(1 + len(shape), 1 + ndim))) if len(shape) < ndim else whole
        for shape in rows.shapes_of(stored)
    ]


def _lowered(function: Callable[..., Any], *args: Any) -> Any:
    """Call `function` without derivative rules and a few primitives, which Mosaic does not have."""
    closed, shape = jax.make_jaxpr(function, return_shape=True)(*args)
    found = _evaluate(closed.jaxpr, closed.consts, jax.tree.leaves(args))
    return jax.tree.unflatten(jax.tree.structure(shape), found)


def _evaluate(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    values: dict[Any, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
    for eqn in jaxpr.eqns:
        operands = [x.val if isinstance(x, jax.extend.core.Literal) else values[x] for x in eqn.invars]
        inner = eqn.params.get("call_jaxpr", eqn.params.get("jaxpr"))
        if inner is not None:
            found = _evaluate(inner.jaxpr, inner.consts, operands)
        elif eqn.primitive in _OTHERWISE:
            found = [_OTHERWISE[eqn.primitive](*operands)]
        else:
            found = eqn.primitive.bind(*operands, **eqn.params)
            found = found if eqn.primitive.multiple_results else [found]
        values.update(zip(eqn.outvars, found, strict=True))
    return [x.val if isinstance(x, jax.extend.core.Literal) else values[x] for x in jaxpr.outvars]


def _round(x: Array) -> Array:
    """Round to an integer; all that is rounded is small."""
    return lax.optimization_barrier(x + WHOLE) - WHOLE


_OTHERWISE: dict[Any, Callable[..., Array]] = {
    primitives.is_finite_p: lambda x: jnp.abs(x) < jnp.inf,
    primitives.round_p: _round,
    primitives.floor_p: lambda x: _round(lax.optimization_barrier(x - 0.5)),
    # Divide by a scalar with one reciprocal.
    primitives.div_p: lambda x, d: x * (1 / d) if jnp.ndim(d) == 0 else lax.div(x, d),
}

KERNEL = Backend(scalars_of, _run)
INTERPRETED = Backend(scalars_of, partial(_run, interpret=True))
