"""The step of several arrays by the compiled kernel, whose moments stand behind each other in one."""

from collections.abc import Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_batching import custom_vmap

from adamjax._core import collectives
from adamjax._core.low_precision import Dither
from adamjax._core.packing import concat, split
from adamjax._transforms.leafwise import Done, Executor, GroupProgram, Leaf, LeafProgram
from adamjax._transforms.moment_storage import Moment
from adamjax._transforms.param_rounding import RoundParam
from adamjax._transforms.weight_decay import ADDS_PARAM
from adamjax.kernels import _backend, _library
from adamjax.kernels._backend import Functions, LeafSpec, StepVariant
from adamjax.kernels._cpu import KERNEL, attributes

PackedMoments = tuple[Moment, Moment, Moment | None]


class Group(NamedTuple):
    """The static part of the step of a group. Its leaves differ only in shape and in whether they decay."""

    parts: tuple[Functions, Functions, Functions]  # the functions of a leaf that does all that any of them does
    variants: tuple[StepVariant, ...]  # the variant of each leaf
    most: int  # the number of that leaf

    @property
    def functions(self) -> Functions:
        """The functions of that leaf, those of its moments among them."""
        return sum(self.parts, ())

    @property
    def variant(self) -> StepVariant:
        """The variant of that leaf."""
        return self.variants[self.most]

    def programs(self, operands: Sequence[list[Any]], dithers: Sequence[Any], leaves: Sequence[Array]) -> GroupProgram:
        """The programs of all leaves."""
        before, together, after = map(LeafProgram, self.parts, operands)
        rows = list(zip(self.variants, dithers or [None] * len(leaves), strict=True))
        return GroupProgram(
            [_of_leaf(before, v.coupled, dither) for v, dither in rows],
            together,
            [_of_leaf(after, v.decays, dither) for v, dither in rows],
            tuple([x.shape for x in leaves]),
        )


def _of_leaf(program: LeafProgram, decays: bool, dither: Dither | None) -> LeafProgram:
    rows = [
        (number, function, dither if isinstance(function, RoundParam) else operand)
        for (number, function), operand in zip(*program, strict=True)
        if decays or function not in ADDS_PARAM
    ]
    return LeafProgram(tuple([(number, f) for number, f, _ in rows]), [operand for *_, operand in rows])


@cache
def _group_of(leaves: tuple[tuple[Functions, Functions], ...], together: Functions) -> Group | None:
    wholes = [before + together + after for before, after in leaves]
    variants = tuple([v for whole in wholes if (v := _backend.variant_of(whole)) is not None])
    most = max(range(len(wholes)), key=lambda i: len(wholes[i]))
    if len(variants) < len(wholes) or any(
        _without_decay(whole) != _without_decay(wholes[most]) or not set(whole) <= set(wholes[most]) for whole in wholes
    ):
        return None
    return Group((leaves[most][0], together, leaves[most][1]), variants, most)


def _without_decay(functions: Functions) -> list[Any]:
    return [f for _, f in functions if f not in ADDS_PARAM]


def group_of(program: GroupProgram) -> Group | None:
    """Recognise a group that the kernel steps as one."""
    pairs = zip(program.before, program.after, strict=True)
    return _group_of(
        tuple([(before.functions, after.functions) for before, after in pairs]), program.together.functions
    )


def run_group(
    group: Group, leaves: Sequence[Leaf], program: GroupProgram, moments: PackedMoments
) -> tuple[list[Done], PackedMoments]:
    """Run the program of a group by the kernel: the result of each leaf, and the new moments."""
    operands = program.before[group.most].operands, program.together.operands, program.after[group.most].operands
    arrays = [_backend.arrays_of(group.variant, group.functions, leaf, moments) for leaf in leaves]
    params, residuals = [x[0] for x in arrays], [x[-1] for x in arrays]
    rounds = group.variant.rounding is not None
    dithers = [x.operands[-1] for x in program.after] if rounds else []
    new, kept, moments = _run_kernel(group, [leaf.u for leaf in leaves], params, residuals, moments, operands, dithers)
    states = [list(leaf.states) for leaf in leaves]
    if rounds:
        for of_leaf, p, residual in zip(states, params, kept, strict=True):
            of_leaf[group.functions[-1][0]] = (p, residual)
    return list(zip(new, states, strict=True)), moments


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _of_kernel(
    group: Group,
    grads: list[Array],
    params: list[Array],
    residuals: list[Any],
    moments: PackedMoments,
    operands: tuple[list[Any], ...],
    dithers: list[Dither],
) -> tuple[list[Array], list[Any], PackedMoments]:
    count, kept = len(params), [x for x in moments if x is not None]
    scalars, of_moments = _backend.step_scalars(group.functions, [x for part in operands for x in part])
    floats = _backend.pack_scalars(KERNEL, group.variant, scalars)
    integers = _backend.pack_dithers([_backend.first_dither(of_moments[:2]), *dithers], 2 * (1 + count))
    stored = [x for x in residuals if x is not None]
    new = _batched(group)(floats, integers, *params, *grads, *kept, *stored)
    m, v, *v_max = new[count : count + len(kept)]
    return new[:count], new[count + len(kept) :] or residuals, (m, v, v_max[0] if v_max else None)


@_of_kernel.defjvp
def _of_kernel_jvp(group: Group, primals: Any, tangents: Any) -> Any:
    return jax.jvp(partial(_of_xla, group), primals, tangents)


_run_kernel = jax.jit(_of_kernel, static_argnums=0)


def _of_xla(
    group: Group,
    grads: list[Array],
    params: list[Array],
    residuals: list[Any],
    moments: PackedMoments,
    operands: tuple[list[Any], ...],
    dithers: list[Dither],
) -> tuple[list[Array], list[Any], PackedMoments]:
    rounding, number = group.variant.rounding, group.functions[-1][0]
    leaves = []
    for i, (g, p, residual) in enumerate(zip(grads, params, residuals, strict=True)):
        states: list[Any] = [()] * (1 + max(number for number, _ in group.functions))
        states[number] = (p, residual)
        leaves.append(Leaf(i, g, p if rounding is None else rounding.to_float32(p, residual), states))
    done, moments = Executor(list).run_group(leaves, group.programs(operands, dithers, grads), moments)
    kept = residuals if rounding is None else [states[number][1] for _, states in done]
    return [x for x, _ in done], kept, moments


@cache
def _batched(group: Group) -> Any:
    """The kernel for the arrays of a group; mapped by `jax.vmap`, for many of them."""
    count, variant = len(group.variants), group.variant

    def as_one(scalars: Array, integers: Array, *arrays: Array) -> list[Array]:
        params, grads, kept = arrays[:count], arrays[count : 2 * count], arrays[2 * count :]
        shapes = tuple([x.shape for x in params])
        whole = concat(params, shapes)
        leaf = LeafSpec.of(variant, (whole, *kept, *[None] * (4 - len(kept))))  # type: ignore[arg-type]
        integers = jnp.pad(integers[:2], (0, _backend.OFFSETS + 1 - 2))
        p, *new = _backend.batched(KERNEL, leaf)(scalars, integers, whole, concat(grads, shapes), *kept)
        return [*split(p, shapes), *new]

    @custom_vmap
    def step_all(*operands: Array) -> list[Array]:
        return _run(group, *operands)

    @step_all.def_vmap
    def _(size: int, is_mapped: list[bool], *operands: Array) -> tuple[list[Array], list[bool]]:
        if set(group.variants) == {variant} and variant.rounding is None:
            new = jax.vmap(as_one, in_axes=[0 if mapped else None for mapped in is_mapped], axis_size=size)(*operands)
        else:
            pairs = zip(operands, is_mapped, strict=True)
            mapped = [x if y else jnp.broadcast_to(x, (size, *x.shape)) for x, y in pairs]
            new = lax.map(lambda row: step_all(*row), mapped)
        return new, [True] * len(new)

    return step_all


def _run(group: Group, *operands: Array) -> list[Array]:
    variant, count = group.variant, len(group.variants)
    scalars, integers, *arrays = collectives.pcast_all(*operands)
    params, kept = arrays[:count], arrays[2 * count :]
    new = jax.eval_shape(lambda *x: x, *params, *kept)
    if not variant.reads_param:
        arrays = arrays[count:]
    # In place, as of single arrays.
    first = 2 + len(arrays) - len(kept) - count
    aliases = {first + count + i: count + i for i in range(len(kept))}
    if variant.update is None:
        aliases |= {2 + i: i for i in range(count)}
    else:
        aliases |= {first + i: i for i in range(count) if arrays[first - 2 + i].dtype == variant.update}
        new = [*[x.update(dtype=variant.update) for x in new[:count]], *new[count:]]
    call = jax.ffi.ffi_call(f"{_library.target()}-group", new, input_output_aliases=aliases)
    decays = {name: [getattr(v, name) for v in group.variants] for name in ("coupled", "decays")}
    flags = {name: np.asarray(x, np.int64) for name, x in decays.items()}
    return list(call(scalars, integers, *arrays, **attributes(variant), **flags))
