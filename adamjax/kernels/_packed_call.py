"""The step of several arrays by the compiled kernel, whose moments stand behind each other in one."""

from functools import cache, partial
from typing import Any

import jax
from jax import Array
from jax.custom_batching import custom_vmap

from adamjax._core import collectives
from adamjax._core.packing import join, split
from adamjax.kernels import _backend, _compile
from adamjax.kernels._backend import Call, Dithers, Form, Moment, Numbers
from adamjax.kernels._cpu import KERNEL, attributes

Moments = tuple[Moment, Moment, Moment | None]


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _step(
    form: Form, params: list[Array], moments: Moments, grads: list[Array], numbers: Numbers, dithers: Dithers
) -> tuple[list[Array], Moments]:
    """The parameters and their moments after one step, as of `_backend.step` for what they are together."""
    kept = [x for x in moments if x is not None]
    new = _batched(form, len(params))(*_backend.rows(KERNEL, form, numbers, dithers, 1), *params, *grads, *kept)
    m, v, *v_max = new[len(params) :]
    return new[: len(params)], (m, v, v_max[0] if v_max else None)


@_step.defjvp
def _step_jvp(form: Form, primals: Any, tangents: Any) -> Any:
    return jax.jvp(partial(_plain_step, form), primals, tangents)


step = jax.jit(_step, static_argnums=0)


def _plain_step(
    form: Form, params: list[Array], moments: Moments, grads: list[Array], numbers: Numbers, dithers: Dithers
) -> tuple[list[Array], Moments]:
    p, m, v, v_max, _ = _backend.plain_step(form, (join(params), *moments, None), join(grads), numbers, dithers)
    return split(p, tuple(x.shape for x in params)), (m, v, v_max)


@cache
def _batched(form: Form, count: int) -> Any:
    """The kernel for so many arrays with moments in one; mapped by `jax.vmap`, that for many of one array."""

    def as_one(scalars: Array, places: Array, *arrays: Array) -> list[Array]:
        params, grads, kept = arrays[:count], arrays[count : 2 * count], arrays[2 * count :]
        whole = join(params)
        call = Call(form, whole.shape, jax.tree.structure((whole, *kept, *[None] * (4 - len(kept)))))
        p, *new = _backend.batched(KERNEL, call)(scalars, places, whole, join(grads), *kept)
        return [*split(p, tuple(x.shape for x in params)), *new]

    @custom_vmap
    def step_all(*operands: Array) -> list[Array]:
        return _run(form, count, *operands)

    @step_all.def_vmap
    def _(size: int, is_mapped: list[bool], *operands: Array) -> tuple[list[Array], list[bool]]:
        new = jax.vmap(as_one, in_axes=[0 if mapped else None for mapped in is_mapped], axis_size=size)(*operands)
        return new, [True] * len(new)

    return step_all


def _run(form: Form, count: int, *operands: Array) -> list[Array]:
    scalars, places, *arrays = collectives.varying_alike(*operands)
    changed = [*range(count), *range(2 * count, len(arrays))]  # all but the gradients
    like = jax.eval_shape(lambda *arrays: [arrays[i] for i in changed], *arrays)
    # In place: scalars and places come first.
    aliases = {i + 2: result for result, i in enumerate(changed)}
    new = jax.ffi.ffi_call(f"{_compile.target()}-group", like, input_output_aliases=aliases)(
        scalars,
        places,
        *arrays,
        **attributes(form),
    )
    return list(new)
