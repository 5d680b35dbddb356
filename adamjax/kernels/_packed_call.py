"""The step of several arrays by the compiled kernel, whose moments stand behind each other in one."""

from functools import cache, partial
from typing import Any

import jax
from jax import Array
from jax.custom_batching import custom_vmap

from adamjax._core import collectives
from adamjax._core.packing import concat, split
from adamjax._transforms.leafwise import Executor, GroupProgram, Leaf, LeafProgram
from adamjax._transforms.moment_storage import Moment
from adamjax.kernels import _backend, _library
from adamjax.kernels._backend import Functions, LeafSpec, StepVariant
from adamjax.kernels._cpu import KERNEL, attributes

PackedMoments = tuple[Moment, Moment, Moment | None]


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _run_group(
    functions: tuple[Functions, Functions, Functions],
    grads: list[Array],
    params: list[Array],
    moments: PackedMoments,
    operands: tuple[list[Any], ...],
) -> tuple[list[Array], PackedMoments]:
    """Run a group program, the same for each leaf, by the kernel: the new parameters and the new moments."""
    whole = sum(functions, ())
    variant = _backend.variant_of(whole)
    assert variant is not None
    scalars, dithers = _backend.step_scalars(whole, [x for part in operands for x in part])
    kept = [x for x in moments if x is not None]
    packed = _backend.pack_operands(KERNEL, variant, scalars, dithers, 1)
    new = _batched(variant, len(params))(*packed, *params, *grads, *kept)
    m, v, *v_max = new[len(params) :]
    return new[: len(params)], (m, v, v_max[0] if v_max else None)


@_run_group.defjvp
def _run_group_jvp(functions: tuple[Functions, Functions, Functions], primals: Any, tangents: Any) -> Any:
    return jax.jvp(partial(_run_by_xla, functions), primals, tangents)


run_group = jax.jit(_run_group, static_argnums=0)


def _run_by_xla(functions: tuple[Functions, Functions, Functions], *args: Any) -> tuple[list[Array], PackedMoments]:
    grads, params, moments, operands = args
    before, together, after = map(LeafProgram, functions, operands)
    count = len(params)
    program = GroupProgram([before] * count, together, [after] * count, tuple([x.shape for x in params]))
    states: list[Any] = [()] * (1 + max(number for number, _ in functions[2]))
    leaves = [Leaf(i, g, p, states) for i, (g, p) in enumerate(zip(grads, params, strict=True))]
    new, moments = Executor(list).run_group(leaves, program, moments)
    return [p for p, _ in new], moments


@cache
def _batched(variant: StepVariant, count: int) -> Any:
    """The kernel for so many arrays with moments in one; mapped by `jax.vmap`, that for many of one array."""

    def as_one(scalars: Array, integers: Array, *arrays: Array) -> list[Array]:
        params, grads, kept = arrays[:count], arrays[count : 2 * count], arrays[2 * count :]
        shapes = tuple([x.shape for x in params])
        whole = concat(params, shapes)
        leaf = LeafSpec.of(variant, (whole, *kept, *[None] * (4 - len(kept))))  # type: ignore[arg-type]
        p, *new = _backend.batched(KERNEL, leaf)(scalars, integers, whole, concat(grads, shapes), *kept)
        return [*split(p, shapes), *new]

    @custom_vmap
    def step_all(*operands: Array) -> list[Array]:
        return _run(variant, count, *operands)

    @step_all.def_vmap
    def _(size: int, is_mapped: list[bool], *operands: Array) -> tuple[list[Array], list[bool]]:
        new = jax.vmap(as_one, in_axes=[0 if mapped else None for mapped in is_mapped], axis_size=size)(*operands)
        return new, [True] * len(new)

    return step_all


def _run(variant: StepVariant, count: int, *operands: Array) -> list[Array]:
    scalars, integers, *arrays = collectives.pcast_all(*operands)
    kept = [*range(count), *range(2 * count, len(arrays))]  # all but the gradients
    like = jax.eval_shape(lambda *arrays: [arrays[i] for i in kept], *arrays)
    # In place: scalars and integers come first.
    aliases = {i + 2: result for result, i in enumerate(kept)}
    call = jax.ffi.ffi_call(f"{_library.target()}-group", like, input_output_aliases=aliases)
    return list(call(scalars, integers, *arrays, **attributes(variant)))
