"""The step of one array by the compiled kernel, under all that JAX does to functions."""

from collections.abc import Sequence
from functools import cache, partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from adamjax import _across
from adamjax._adam import Scalars, adam_step
from adamjax._moments import step_leaf
from adamjax._stochastic import Dither
from adamjax.kernels import _build


class Form(NamedTuple):
    """What is compiled in: which of the steps it is."""

    nesterov: bool
    amsgrad: str | None
    coupled: bool
    decays: bool


class Numbers(NamedTuple):
    """The hyperparameters of a step: float32 scalars.

    Fields:
      adam: Those of the moments.
      sign: 1, or -1 to ascend.
      coupled: What of the parameter is added to the gradient.
      rate: By what the direction is multiplied.
      decay: What of the parameter is added to that.
    """

    adam: Scalars
    sign: Any
    coupled: Any
    rate: Any
    decay: Any


Leaf = tuple[Array, Array, Array, Array | None]  # p, m, v, v_max
Dithers = tuple[Dither | None, Dither | None]


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _step(form: Form, leaf: Leaf, g: Array, numbers: Numbers, dithers: Dithers) -> Leaf:
    """The parameter and its moments after one step: those of `plain_step`, but for the last digits."""
    p, m, v, v_max = leaf
    arrays = [x for x in (p, g, m, v, v_max) if x is not None]
    zero = jnp.uint32(0)
    places = _row([x for d in dithers for x in (d or (zero, zero))], 4 + p.ndim)
    scalars = [lax.bitcast_convert_type(jnp.asarray(x, jnp.float32), jnp.uint32) for x in _scalars(form, numbers)]
    row = lax.bitcast_convert_type(_row(scalars, len(scalars)), jnp.float32)
    new = iter(_batched(form, p.shape)(row, places, *arrays))
    return next(new), next(new), next(new), None if v_max is None else next(new)


@_step.defjvp
def _step_jvp(form: Form, primals: Any, tangents: Any) -> Any:
    return jax.jvp(partial(plain_step, form), primals, tangents)


# A compiled function of its own: traced once per distinct leaf.
step = jax.jit(_step, static_argnums=0)


def plain_step(form: Form, leaf: Leaf, g: Array, numbers: Numbers, dithers: Dithers) -> Leaf:
    """The same by XLA."""
    p, m, v, v_max = leaf
    wide, g = p.astype(jnp.float32), numbers.sign * g.astype(jnp.float32)
    if form.coupled:
        g = g + numbers.coupled * wide
    options = (form.nesterov, form.amsgrad)
    direction, m, v, v_max = step_leaf(g, m, v, v_max, numbers.adam, dithers, rule=adam_step, options=options)
    update = numbers.rate * direction + (numbers.decay * wide if form.decays else 0)
    return (wide + update.astype(p.dtype).astype(jnp.float32)).astype(p.dtype), m, v, v_max


def _row(numbers: Sequence[Array], length: int) -> Array:
    """The first numbers of a row of uint32.

    A sum, and not put beside each other: some may be those of many optimizers, and spread over devices.
    """
    return reduce(jnp.add, [x * np.eye(1, length, i, np.uint32)[0] for i, x in enumerate(numbers)])


def _scalars(form: Form, numbers: Numbers) -> tuple[Any, ...]:
    """The first operand of the kernel; see `Scalars` there."""
    s = numbers.adam
    one, zero = jnp.float32(1), jnp.float32(0)
    of_m, of_g = (s.decay1.b / s.c1_next, s.decay1.a / s.c1) if form.nesterov else (one / s.c1, zero)
    by_c2, kept_by_c2 = (one, one / s.c2) if form.amsgrad == "corrected" else (one / s.c2, one)
    mean = (s.decay1.keep, s.decay1.a, s.decay1.undo, of_m, of_g)
    square = (s.decay2.keep, s.decay2.a, s.decay2.undo, by_c2, s.eps_root, s.eps)
    rest = (numbers.sign, numbers.coupled, numbers.rate, numbers.decay, kept_by_c2)
    return (*mean, *square, *rest)


@cache
def _batched(form: Form, whole: tuple[int, ...]) -> Any:
    """The kernel for arrays of a shape; mapped by `jax.vmap`, for many at once, each with a row of scalars."""

    @custom_vmap
    def call(scalars: Array, places: Array, *arrays: Array) -> list[Array]:
        return _placed(form, whole, scalars, places, *arrays)

    @call.def_vmap
    def _(size: int, is_mapped: list[bool], *operands: Array) -> tuple[list[Array], list[bool]]:
        mapped = [x if y else jnp.broadcast_to(x, (size, *x.shape)) for x, y in zip(operands, is_mapped, strict=True)]
        new = call(*mapped)
        return new, [True] * len(new)

    return call


def _placed(form: Form, whole: tuple[int, ...], scalars: Array, places: Array, *arrays: Array) -> list[Array]:
    """The kernel for arrays on many devices, each of which steps what it has."""
    axis_types = set(jax.typeof(arrays[0]).sharding.mesh.axis_types)
    if AxisType.Manual in axis_types or jax.device_count() == 1:
        return _call(form, arrays[0].shape[arrays[0].ndim - len(whole) :], scalars, places, *arrays)
    if AxisType.Explicit in axis_types:
        spec = jax.typeof(arrays[0]).sharding.spec
        row, count = _of_row(spec, arrays[0].ndim - len(whole)), len(arrays)
        part = jax.shard_map(
            partial(_part, form, whole, spec),
            in_specs=(row, row, *[spec] * count),
            out_specs=[spec] * (count - 1),
        )
        rows = [jax.sharding.reshard(x, row) for x in (scalars, places)]
        return part(*rows, *[jax.sharding.reshard(x, spec) for x in arrays])
    return _partitioned(form, whole, len(arrays), arrays[0].ndim)(scalars, places, *arrays)


@cache
def _partitioned(form: Form, whole: tuple[int, ...], count: int, ndim: int) -> Any:
    @custom_partitioning
    def call(scalars: Array, places: Array, *arrays: Array) -> list[Array]:
        return _call(form, whole, scalars, places, *arrays)

    def partition(mesh: Any, shapes: Any, results: Any) -> Any:
        # As the first moment is: its parts are what a device keeps.
        of_m = results[1].sharding
        row = NamedSharding(of_m.mesh, _of_row(of_m.spec, ndim - len(whole)))
        return mesh, partial(_part, form, whole, of_m.spec), [of_m] * (count - 1), (row, row, *[of_m] * count)

    batch = [f"b{i}" for i in range(ndim - len(whole))]
    array = " ".join([*batch, *(f"i{i}" for i in range(len(whole)))])
    row, place = " ".join([*batch, "k"]), " ".join([*batch, "l"])
    call.def_partition(
        partition=partition,
        sharding_rule=f"{row}, {place}, {', '.join([array] * count)} -> {', '.join([array] * (count - 1))}",
        need_replication_factors=("k", "l"),
    )
    return call


def _of_row(spec: PartitionSpec, batch: int) -> PartitionSpec:
    """How scalars are sharded, of which there is a row for each of many arrays."""
    return PartitionSpec(*spec[:batch])


def _part(form: Form, whole: tuple[int, ...], spec: PartitionSpec, scalars: Array, places: Array, *parts: Array) -> Any:
    """The kernel for what this device has of the arrays."""
    ndim, batch = parts[0].ndim, parts[0].ndim - len(whole)
    names, sizes = [*spec, *[None] * (ndim - len(spec))][batch:], parts[0].shape[batch:]
    indices = [jnp.zeros((), jnp.int32) if name is None else lax.axis_index(name) for name in names]
    offsets = jnp.stack([i.astype(jnp.uint32) * np.uint32(size) for i, size in zip(indices, sizes, strict=True)])
    places = places.at[..., -len(whole) :].set(offsets)
    return _call(form, whole, scalars, places, *parts)


def _call(form: Form, whole: tuple[int, ...], scalars: Array, places: Array, *arrays: Array) -> list[Array]:
    scalars, places, *same = _across.varying_alike(scalars, places, *arrays)
    changed = [x for i, x in enumerate(same) if i != 1]
    like = jax.eval_shape(lambda *arrays: list(arrays), *changed)
    # In place: scalars and places come first, and of the arrays the second, the gradient, has no result.
    aliases = {2: 0} | {i + 3: i for i in range(1, len(changed))}
    kernel = jax.ffi.ffi_call(_build.target(), like, input_output_aliases=aliases)
    new = kernel(
        scalars,
        places,
        *same,
        nesterov=form.nesterov,
        maximum=form.amsgrad is not None,
        coupled=form.coupled,
        decays=form.decays,
        whole=np.asarray(whole, np.int64),
    )
    return list(new)
