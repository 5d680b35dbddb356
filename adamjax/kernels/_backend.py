"""The step of one parameter by a kernel, under all that JAX does to functions."""

import math
from collections.abc import Callable, Sequence
from functools import cache, partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import SymbolicZero
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from adamjax._core import collectives, quantization
from adamjax._core.low_precision import Dither
from adamjax._core.quantization import QuantizedArray
from adamjax._transforms.adam import Scalars, adam_step
from adamjax._transforms.moments import Step, step_leaf
from adamjax._transforms.param_rounding import Landing


class Form(NamedTuple):
    """What is compiled in: which of the steps it is, and how the parameter takes its update if it is not just added."""

    nesterov: bool
    amsgrad: str | None
    coupled: bool
    decays: bool
    landing: Landing | None = None


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


Moment = Array | QuantizedArray
Leaf = tuple[Array, Moment, Moment, Moment | None, Array | None]  # p, m, v, v_max, and what p cannot hold
Dithers = tuple[Dither | None, ...]  # of both moments, and of p if it lands by one


class Call(NamedTuple):
    """What is compiled in for one leaf.

    Fields:
      form: Which of the steps it is.
      shape: That of the parameter; of the whole, where a device has a part.
      structure: That of the leaf, which has the formats of the moments.
    """

    form: Form
    shape: tuple[int, ...]
    structure: Any

    @property
    def formats(self) -> list[tuple[int, int]]:
        """The bits and the block size of each moment's codes; 0 where it is of floats, or is not kept."""
        _, *moments, _ = jax.tree.unflatten(self.structure, range(self.structure.num_leaves))
        return [(x.bits, x.block_size) if isinstance(x, QuantizedArray) else (0, 0) for x in moments]

    @property
    def unit(self) -> int:
        """How many numbers of a row belong together."""
        return math.lcm(*(max(block, 8 // bits) for bits, block in self.formats if bits))


class Kernel(NamedTuple):
    """A kernel, by what calls it.

    Fields:
      scalars: What it takes of the form and the numbers of a step: float32 scalars.
      run: Its results for a `Call` and arrays that are on one device: those scalars, side by side; uint32
        integers (seed and turn of the moments' dither and of the parameter's, the index of the part in the whole
        along each axis); parameter, gradient, and all arrays of the moments and of what is kept. Where these are
        of many leaves, all have the same leading axes more. Results are all but the gradient, which come in place
        of their operands.
    """

    scalars: Callable[[Form, Numbers], Sequence[Any]]
    run: Callable[..., Sequence[Array]]


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _step(kernel: Kernel, form: Form, leaf: Leaf, g: Array, numbers: Numbers, dithers: Dithers) -> Leaf:
    """The parameter and its moments after one step: those of `plain_step`, but for the last digits."""
    p, *others = leaf
    call = Call(form, p.shape, jax.tree.structure(leaf))
    operands = (*rows(kernel, form, numbers, dithers, p.ndim), p, g, *jax.tree.leaves(others))
    return jax.tree.unflatten(call.structure, batched(kernel, call)(*operands))


@partial(_step.defjvp, symbolic_zeros=True)
def _step_jvp(kernel: Kernel, form: Form, primals: Any, tangents: Any) -> Any:
    """Along what changes only: moments that stay as they are may be codes, which have no derivative."""
    structure: Any
    operands, structure = jax.tree.flatten(primals)
    changes = {i: t for i, t in enumerate(jax.tree.leaves(tangents)) if not isinstance(t, SymbolicZero)}

    def of_changing(changing: dict[int, Any]) -> Leaf:
        return plain_step(form, *structure.unflatten([changing.get(i, x) for i, x in enumerate(operands)]))

    return jax.jvp(of_changing, ({i: operands[i] for i in changes},), (changes,))


# A compiled function of its own: traced once per distinct leaf.
step = jax.jit(_step, static_argnums=(0, 1))


def plain_step(form: Form, leaf: Leaf, g: Array, numbers: Numbers, dithers: Dithers) -> Leaf:
    """The same by XLA."""
    p, m, v, v_max, kept = leaf
    options = (form.nesterov, form.amsgrad)

    def of_moments(g: Array) -> Step:
        return step_leaf(g, m, v, v_max, numbers.adam, dithers[:2], rule=adam_step, options=options)

    if form.landing is None:
        update, *moments = around(form, p.astype(jnp.float32), g, numbers, of_moments)
        return add_rounded(p, update), *moments, None
    update, *moments = around(form, form.landing.read(p, kept), g, numbers, of_moments)
    *_, dither = dithers
    assert dither is not None
    p, kept = form.landing.land(p, update, kept, dither)
    return p, *moments, kept


def around(form: Form, wide: Array, g: Array, numbers: Numbers, of_moments: Callable[[Array], Step]) -> Step:
    """The update in float32 of a parameter that is that, of which `of_moments` is the part that the moments have."""
    g = numbers.sign * g.astype(jnp.float32)
    if form.coupled:
        g = g + numbers.coupled * wide
    direction, *moments = of_moments(g)
    return numbers.rate * direction + (numbers.decay * wide if form.decays else 0), *moments


def add_rounded(p: Array, update: Array) -> Array:
    """The parameter and its update, which was rounded to its dtype before."""
    return (p.astype(jnp.float32) + update.astype(p.dtype).astype(jnp.float32)).astype(p.dtype)


# Where in the integers of a kernel the offsets begin.
OFFSETS = 4


def rows(kernel: Kernel, form: Form, numbers: Numbers, dithers: Dithers, ndim: int) -> tuple[Array, Array]:
    """The first two operands of a kernel, for a parameter of `ndim` axes."""
    # Both moments share the hashes: `_stochastic.Dither.other`.
    none = Dither(jnp.uint32(0), jnp.uint32(0))
    of_moments, of_p = (next((d for d in found if d is not None), none) for found in (dithers[:2], dithers[2:]))
    places = _row([of_moments.seed, of_moments.turn, of_p.seed, of_p.turn], OFFSETS + ndim)
    scalars = [lax.bitcast_convert_type(jnp.asarray(x, jnp.float32), jnp.uint32) for x in kernel.scalars(form, numbers)]
    return lax.bitcast_convert_type(_row(scalars, len(scalars)), jnp.float32), places


def _row(numbers: Sequence[Array], length: int) -> Array:
    """The first numbers of a row of uint32.

    A sum, and not put beside each other: some may be those of many optimizers, and spread over devices.
    """
    return reduce(jnp.add, [x * np.eye(1, length, i, np.uint32)[0] for i, x in enumerate(numbers)])


@cache
def batched(kernel: Kernel, call: Call) -> Any:
    """The kernel for arrays of a shape; mapped by `jax.vmap`, for many at once, each with a row of scalars."""

    @custom_vmap
    def step_all(scalars: Array, places: Array, *arrays: Array) -> list[Array]:
        return _placed(kernel, call, scalars, places, *arrays)

    @step_all.def_vmap
    def _(size: int, is_mapped: list[bool], *operands: Array) -> tuple[list[Array], list[bool]]:
        mapped = [x if y else jnp.broadcast_to(x, (size, *x.shape)) for x, y in zip(operands, is_mapped, strict=True)]
        new = step_all(*mapped)
        return new, [True] * len(new)

    return step_all


def _placed(kernel: Kernel, call: Call, scalars: Array, places: Array, *arrays: Array) -> list[Array]:
    """The kernel for arrays on many devices, each of which steps what it has."""
    batch = arrays[0].ndim - len(call.shape)
    if is_on_one_device(arrays):
        return _run(kernel, call._replace(shape=arrays[0].shape[batch:]), scalars, places, *arrays)
    mesh = jax.typeof(arrays[0]).sharding.mesh
    if AxisType.Explicit in mesh.axis_types:
        spec = _in_whole_blocks(call, jax.typeof(arrays[0]).sharding, arrays[0].shape)
        row, count = _of_row(spec, batch), len(arrays)
        part = jax.shard_map(
            partial(_part, kernel, call, spec),
            mesh=mesh,  # of the arrays: there need not be one set
            in_specs=(row, row, *[spec] * count),
            out_specs=[spec] * (count - 1),
            check_vma=False,  # as in `_pallas.why_not`
        )
        rows = [jax.sharding.reshard(x, NamedSharding(mesh, row)) for x in (scalars, places)]
        new = part(*rows, *[jax.sharding.reshard(x, NamedSharding(mesh, spec)) for x in arrays])
        return [quantization.sharded_like(x, like) for x, like in zip(new, changed(arrays), strict=True)]
    return _partitioned(kernel, call, tuple(x.shape for x in arrays))(scalars, places, *arrays)


def is_on_one_device(arrays: Sequence[Array]) -> bool:
    """Whether there is but one, or all that is seen here is what one device has."""
    kinds = {kind for x in arrays for kind in _kinds(x)}
    return kinds == {AxisType.Manual} or (not kinds & {AxisType.Manual, AxisType.Explicit} and jax.device_count() == 1)


def why_not_here(x: Array) -> str | None:
    """Why no kernel can step an array that is where `x` is, if none can: it would have to be gathered."""
    if len(kinds := _kinds(x)) <= 1:
        return None
    modes = " and ".join(sorted(kind.name for kind in kinds))
    return f"the axes of its mesh are in several modes, {modes} (as inside of a jax.shard_map over some of them)"


def _kinds(x: Array) -> set[AxisType]:
    """The modes of the axes of its mesh, but for axes in Auto mode of one device."""
    mesh = jax.typeof(x).sharding.mesh
    sizes = zip(mesh.axis_types, mesh.axis_sizes, strict=True)
    return {kind for kind, size in sizes if size > 1 or kind != AxisType.Auto}


@cache
def _partitioned(kernel: Kernel, call: Call, shapes: tuple[tuple[int, ...], ...]) -> Any:
    @custom_partitioning
    def step_all(scalars: Array, places: Array, *arrays: Array) -> list[Array]:
        return _run(kernel, call, scalars, places, *arrays)

    ndim, count = len(shapes[0]), len(shapes)
    batch = ndim - len(call.shape)

    def partition(mesh: Any, _: Any, results: Any) -> Any:
        # As the first moment is: its parts are what a device keeps.
        of_m = results[1].sharding
        spec = _in_whole_blocks(call, of_m, shapes[0])
        row, array = NamedSharding(of_m.mesh, _of_row(spec, batch)), NamedSharding(of_m.mesh, spec)
        return mesh, partial(_part, kernel, call, spec), [array] * (count - 1), (row, row, *[array] * count)

    # Of codes and scales, the last axis is shorter than that of the parameter.
    leading = [f"b{i}" for i in range(batch)] + [f"i{i}" for i in range(len(call.shape) - 1)]
    names = [" ".join([*leading, f"n{shape[-1]}"] if call.shape else leading) for shape in shapes]
    row, place = (" ".join([*leading[:batch], x]) for x in ("k", "l"))
    step_all.def_partition(
        partition=partition,
        sharding_rule=f"{row}, {place}, {', '.join(names)} -> {', '.join(changed(names))}",
        need_replication_factors=("k", "l"),
    )
    return step_all


def changed(arrays: Sequence[Any]) -> list[Any]:
    """All but the gradient, which comes second."""
    return [x for i, x in enumerate(arrays) if i != 1]


def _in_whole_blocks(call: Call, sharding: NamedSharding, shape: tuple[int, ...]) -> PartitionSpec:
    """How arrays are spread, with the last axis in one piece where devices would have parts of blocks."""
    return (sharding if quantization.is_divisible(shape, sharding, call.unit) else quantization.whole(sharding)).spec


def _of_row(spec: PartitionSpec, batch: int) -> PartitionSpec:
    """How scalars are sharded, of which there is a row for each of many arrays."""
    return PartitionSpec(*spec[:batch])


def _part(kernel: Kernel, call: Call, spec: PartitionSpec, scalars: Array, places: Array, *parts: Array) -> list[Array]:
    """The kernel for what this device has of the arrays."""
    ndim, batch = parts[0].ndim, parts[0].ndim - len(call.shape)
    names, sizes = [*spec, *[None] * (ndim - len(spec))][batch:], parts[0].shape[batch:]
    indices = [jnp.zeros((), jnp.int32) if name is None else lax.axis_index(name) for name in names]
    offsets = jnp.stack([i.astype(jnp.uint32) * np.uint32(size) for i, size in zip(indices, sizes, strict=True)])
    places = places.at[..., -len(call.shape) :].set(offsets)
    return _run(kernel, call, scalars, places, *parts)


def _run(kernel: Kernel, call: Call, *operands: Array) -> list[Array]:
    return list(kernel.run(call, *collectives.varying_alike(*operands)))
