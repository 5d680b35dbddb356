"""The step of one parameter by a kernel, under all that JAX does to functions."""

import math
from collections.abc import Callable, Sequence
from functools import cache, partial, reduce
from typing import Any, NamedTuple, TypeGuard

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
from adamjax._transforms.adam import AdamRule
from adamjax._transforms.ademamix import AdEMAMixRule, SimplifiedAdEMAMixRule
from adamjax._transforms.adopt import ADOPTRule
from adamjax._transforms.atan2 import AdamAtan2Rule
from adamjax._transforms.clipping import clip_leaf
from adamjax._transforms.delivery import RoundTo, add_to_param
from adamjax._transforms.leafwise import Leaf, LeafFunction, run_program
from adamjax._transforms.learning_rate import scale_update
from adamjax._transforms.moment_storage import Moment
from adamjax._transforms.moments import StepLeaf
from adamjax._transforms.param_rounding import ParamRounding, RoundParam
from adamjax._transforms.schedule_free import ScheduleFreeRule, StepScheduleFree
from adamjax._transforms.stable import StableAdamRule, scale_by_kept
from adamjax._transforms.weight_decay import ADDS_PARAM, add_agreeing_param, add_scaled_param, negate

Functions = tuple[tuple[int, LeafFunction], ...]
LeafArrays = tuple[Array, Moment, Moment, Moment | None, Array | None]  # p, m, v, v_max, and the residual of p
Dithers = tuple[Dither | None, ...]  # of both moments, and of p if it is rounded by one


# The rules that kernels know: the C++ kernel all, those for accelerators some.
RULES = (
    *(AdamRule, StableAdamRule, SimplifiedAdEMAMixRule, AdEMAMixRule, ADOPTRule, AdamAtan2Rule),
    ScheduleFreeRule,  # whose z stands in place of the first moment
)


class StepVariant(NamedTuple):
    """The static part of a step of Adam or its kin, compiled into a kernel."""

    rule: AdamRule  # the rule of one array
    coupled: bool  # whether the parameter is added to the gradient
    decays: bool  # whether the parameter is added to the direction
    rounding: ParamRounding | None = None  # the way that the parameter takes the update, if it is not just added
    update: np.dtype | None = None  # the dtype of the update to deliver; None to deliver the new parameter
    clips: bool = False  # whether the gradient is clipped first
    cautious: bool = False  # whether a number decays only if that agrees with its update

    @property
    def reads_param(self) -> bool:
        """Whether the step needs the parameter."""
        return self.coupled or self.decays or self.rounding is not None or self.update is None


class StepScalars(NamedTuple):
    """The hyperparameters of a step: float32 scalars."""

    adam: Any  # those of the rule: `AdamScalars`, or `ScheduleFreeScalars`
    limit: Any  # the limit of the finite numbers of a gradient that is clipped; None if it is not
    sign: Any  # the factor of the gradient: 1, or -1 to ascend, times that of clipping
    coupled: Any  # the factor of the parameter in the gradient
    rate: Any  # the factor of the direction
    decay: Any  # the factor of the parameter in the update


class LeafSpec(NamedTuple):
    """The static part of the step of one leaf."""

    variant: StepVariant  # the variant of the step
    shape: tuple[int, ...]  # the shape of the parameter; of the whole, where a device has a part
    structure: Any  # the structure of the `LeafArrays`
    # The bits and the block size of each moment's codes; 0 where it is of floats, or is not kept.
    formats: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, variant: StepVariant, leaf: LeafArrays) -> "LeafSpec":
        """Describe a leaf."""
        formats = [(x.bits, x.block_size) if isinstance(x, QuantizedArray) else (0, 0) for x in leaf[1:4]]
        return cls(variant, leaf[0].shape, jax.tree.structure(leaf), tuple(formats))

    @property
    def unit(self) -> int:
        """The elements of a row that belong together."""
        return math.lcm(*(max(block, 8 // bits) for bits, block in self.formats if bits))


class Backend(NamedTuple):
    """A kernel, by what calls it."""

    # From the variant and the scalars of a step, the float32 scalars that the kernel takes.
    scalars: Callable[[StepVariant, StepScalars], Sequence[Any]]
    # Runs the kernel for a `LeafSpec` and arrays that are on one device: those scalars, side by side; uint32 integers
    # (seed and phase of the moments' dither and of the parameter's, the index of the part in the whole along each
    # axis); parameter, gradient, and all arrays of the moments and of the residual. Where these are of many leaves,
    # all have the same leading axes more. The results are those of `results`; all that are like their operands come in
    # place of them
    run: Callable[..., Sequence[Array]]
    # Takes scalars and integers of the same form, the gradient and both moments, and returns the float32 sum of the
    # `factor_terms` of the rule: of many leaves, one for each. None if XLA computes factors.
    sum: Callable[..., Array] | None = None


class Split(NamedTuple):
    """A leaf program with a step of Adam in it, cut into three; the operations outside of it may be none."""

    before: slice
    step: slice  # the operations that a kernel runs
    after: slice


@cache
def split(functions: Functions) -> Split | None:
    """Find the operations of a leaf program that a kernel can run; None if it has no step of a rule that it knows."""
    body = [function for _, function in functions]
    at = next((i for i, f in enumerate(body) if _steps(f) and type(f.rule) in RULES), None)
    if at is None:
        return None
    first, end = at, at + 1
    rule: Any = body[at].rule  # type: ignore[attr-defined]
    is_adam = type(rule) is AdamRule and not rule.has_factor
    for takes in (_adds_param, _negates, _clips) if is_adam else (_negates, _clips):
        first -= first > 0 and takes(body[first - 1])
    while end < len(body) and (_decays(body[end], body[at:end]) or body[end] in (scale_update, scale_by_kept)):
        end += 1
    end += end < len(body) and _delivers(body[end])
    return Split(slice(0, first), slice(first, end), slice(end, len(body)))


def _steps(function: Any) -> TypeGuard[StepLeaf | StepScheduleFree]:
    return isinstance(function, StepLeaf | StepScheduleFree)


def _adds_param(function: LeafFunction) -> bool:
    return function is add_scaled_param


def _decays(function: LeafFunction, before: Sequence[LeafFunction]) -> bool:
    """Whether a kernel can add the parameter: to what was added before, if neither depends on signs."""
    return (_adds_param(function) and add_agreeing_param not in before) or (
        function is add_agreeing_param and not any(map(ADDS_PARAM.__contains__, before))
    )


def _negates(function: LeafFunction) -> bool:
    return function is negate


def _clips(function: LeafFunction) -> bool:
    return function is clip_leaf


def _delivers(function: LeafFunction) -> bool:
    return function is add_to_param or isinstance(function, RoundParam | RoundTo)


@cache
def variant_of(functions: Functions) -> StepVariant | None:
    """The variant of the operations that `split` found; None if they are not all that there are."""
    found = split(functions)
    if found is None or found.step != slice(0, len(functions)):
        return None
    body: list[Any] = [function for _, function in functions]
    at = next(i for i, function in enumerate(body) if _steps(function))
    rule, last = body[at].rule, body[-1]
    is_rounded = isinstance(last, RoundParam)
    update = None if last is add_to_param or (is_rounded and not last.as_update) else np.dtype(np.float32)
    return StepVariant(
        rule,
        coupled=add_scaled_param in body[:at],
        decays=any(map(ADDS_PARAM.__contains__, body[at:])) or isinstance(body[at], StepScheduleFree),
        rounding=last.rounding if is_rounded else None,
        update=last.dtype if isinstance(last, RoundTo) else update,
        clips=clip_leaf in body,
        cautious=add_agreeing_param in body,
    )


def step_scalars(
    functions: Functions, operands: Sequence[Any], factor: Array | None = None
) -> tuple[StepScalars, Dithers]:
    """Fold the operands of a program that was recognised into the scalars of a step; and its dithers.

    `factor` is that of the rule, if it has one.
    """
    limit: Any = None
    sign, coupled, rate, decay = jnp.float32(1), jnp.float32(0), jnp.float32(1), jnp.float32(0)
    adam: Any = None
    dithers: Dithers = ()
    for (_, function), x in zip(functions, operands, strict=True):
        if isinstance(function, StepScheduleFree):
            adam, dithers = x[0], (None, x[1])
            decay = adam.weight_decay if function.decays else decay
        elif isinstance(function, StepLeaf):
            adam, dithers = x
            if function.rule.has_factor and not function.rule.keeps_factor:
                rate = rate * factor
        elif isinstance(function, RoundParam):
            dithers = (*dithers, x)
        elif function is clip_leaf:
            sign, limit = x
        elif function is negate:
            sign = -sign
        elif function in (scale_update, scale_by_kept):
            x = factor if function is scale_by_kept else x
            rate, decay = rate * x, decay * x
        elif function is add_scaled_param and adam is None:
            coupled = x
        elif function in ADDS_PARAM:
            decay = decay + x
    return StepScalars(adam, limit, sign, coupled, rate, decay), dithers


def moments_of(functions: Functions, states: Sequence[Any]) -> tuple[Moment, Moment, Moment | None]:
    """The moments that a program that was recognised steps."""
    m, v, *third = states[_moments_number(functions)]
    return m, v, third[0] if third else None


def arrays_of(
    variant: StepVariant, functions: Functions, leaf: Leaf, moments: tuple[Moment, Moment, Moment | None]
) -> LeafArrays:
    """The arrays that a program that was recognised steps; the gradient, where it needs no parameter."""
    if variant.rounding is not None:
        own, residual = leaf.states[functions[-1][0]]
        return (own, *moments, residual)
    return (leaf.p if variant.reads_param else leaf.u, *moments, None)


@cache
def _moments_number(functions: Functions) -> int:
    return next(number for number, function in functions if _steps(function))


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _run_kernel(
    backend: Backend, functions: Functions, u: Array, p: Array, states: list[Any], operands: list[Any]
) -> tuple[Array, list[Any]]:
    """Run the step of a leaf program by a kernel: the numbers of `run_program`, but for the last digits."""
    variant = variant_of(functions)
    assert variant is not None
    moments = moments_of(functions, states)
    given = Leaf(-1, u, p, states)
    scalars, dithers = step_scalars(functions, operands, _factor(backend, functions, given, operands))
    leaf = arrays_of(variant, functions, given, moments)
    new, m, v, v_max, residual = step_leaf(backend, variant, leaf, u, scalars, dithers)
    after = list(states)
    number = _moments_number(functions)
    after[number] = (m, v, v_max)[: len(states[number])]
    if variant.rounding is not None:
        after[functions[-1][0]] = (leaf[0], residual)
    return new, after


def _factor(backend: Backend, functions: Functions, leaf: Leaf, operands: list[Any]) -> Array | None:
    """The factor of the rule, if it has one. It is made of the gradient that the rule is given, and the new moments."""
    at, step = next((i, f) for i, (_, f) in enumerate(functions) if _steps(f))
    if not isinstance(step, StepLeaf) or not step.rule.has_factor:
        return None
    variant, moments = variant_of(functions), moments_of(functions, leaf.states)
    assert variant is not None
    arrays = [leaf.u, *jax.tree.leaves(moments[:2])]
    if backend.sum is None or not is_on_one_device(arrays):
        u, _ = run_program(functions[:at], leaf.u, leaf.p, leaf.states, operands[:at])
        return step.factor(u, moments, operands[at]).astype(jnp.float32)
    # The learning rate, which comes after the step, is left out: it could make directions underflow.
    scalars, dithers = step_scalars(functions[: at + 1], operands[: at + 1], jnp.float32(1))
    spec = LeafSpec.of(variant, (leaf.u, *moments[:2], None, None))
    packed = pack_operands(backend, variant, scalars, dithers, leaf.u.ndim)
    return step.rule.factor_of(_batched_sum(backend, spec)(*packed, *arrays), leaf.u.size)


@partial(_run_kernel.defjvp, symbolic_zeros=True)
def _run_kernel_jvp(backend: Backend, functions: Functions, primals: Any, tangents: Any) -> Any:
    """Differentiate XLA's step, along what changes only: codes that stay as they are have no derivative."""
    structure: Any
    operands, structure = jax.tree.flatten(primals)
    changes = {i: t for i, t in enumerate(jax.tree.leaves(tangents)) if not isinstance(t, SymbolicZero)}

    def of_changing(changing: dict[int, Any]) -> Any:
        return run_program(functions, *structure.unflatten([changing.get(i, x) for i, x in enumerate(operands)]))

    return jax.jvp(of_changing, ({i: operands[i] for i in changes},), (changes,))


# A compiled function of its own: traced once per distinct leaf.
run_kernel = jax.jit(_run_kernel, static_argnums=(0, 1))


def step_leaf(
    backend: Backend, variant: StepVariant, leaf: LeafArrays, g: Array, scalars: StepScalars, dithers: Dithers
) -> LeafArrays:
    """Step one leaf by a kernel."""
    p, *others = leaf
    spec = LeafSpec.of(variant, leaf)
    packed = pack_operands(backend, variant, scalars, dithers, p.ndim)
    return jax.tree.unflatten(spec.structure, batched(backend, spec)(*packed, p, g, *jax.tree.leaves(others)))


# The index at which the offsets begin in the integers of a kernel.
OFFSETS = 4


def pack_operands(
    backend: Backend, variant: StepVariant, scalars: StepScalars, dithers: Dithers, ndim: int
) -> tuple[Array, Array]:
    """Make the first two operands of a kernel, for a parameter of `ndim` axes: its scalars and its integers."""
    of_moments, of_p = first_dither(dithers[:2]), first_dither(dithers[2:])
    return pack_scalars(backend, variant, scalars), pack_dithers([of_moments, of_p], OFFSETS + ndim)


def first_dither(dithers: Dithers) -> Dither:
    """The first that there is. Both moments share the hashes: `Dither.second_array`."""
    return next((d for d in dithers if d is not None), Dither(jnp.uint32(0), jnp.uint32(0)))


def pack_scalars(backend: Backend, variant: StepVariant, scalars: StepScalars) -> Array:
    """Make the row of scalars of a kernel."""
    floats = [jnp.asarray(x, jnp.float32) for x in backend.scalars(variant, scalars)]
    bits = _one_hot_sum([lax.bitcast_convert_type(x, jnp.uint32) for x in floats], len(floats))
    return lax.bitcast_convert_type(bits, jnp.float32)


def pack_dithers(dithers: Sequence[Dither], length: int) -> Array:
    """Make the row of integers of a kernel: seeds and phases, and then zeros."""
    return _one_hot_sum([x for dither in dithers for x in (dither.seed, dither.phase)], length)


def _one_hot_sum(numbers: Sequence[Array], length: int) -> Array:
    """Put uint32 numbers at the beginning of a row.

    By a sum, because stacking does not shard: some may be those of many optimizers, and spread over devices.
    """
    return reduce(jnp.add, [x * np.eye(1, length, i, np.uint32)[0] for i, x in enumerate(numbers)])


@cache
def batched(backend: Backend, leaf: LeafSpec) -> Any:
    """The kernel for arrays of a shape; mapped by `jax.vmap`, for many at once, each with a row of scalars."""
    return _batched(partial(_placed, backend, leaf))


@cache
def _batched_sum(backend: Backend, leaf: LeafSpec) -> Any:
    """The sum that a factor is made of, over arrays of a shape that are on one device; mapped likewise."""

    def sum_all(*operands: Array) -> Array:
        assert backend.sum is not None
        return backend.sum(leaf, *collectives.pcast_all(*operands))

    return _batched(sum_all)


def _batched(call: Callable[..., Any]) -> Any:
    """Let `jax.vmap` map a call by one more leading axis of all its operands."""

    @custom_vmap
    def call_all(*operands: Array) -> Any:
        return call(*operands)

    @call_all.def_vmap
    def _(size: int, is_mapped: list[bool], *operands: Array) -> tuple[Any, Any]:
        mapped = [x if y else jnp.broadcast_to(x, (size, *x.shape)) for x, y in zip(operands, is_mapped, strict=True)]
        new = call_all(*mapped)
        return new, jax.tree.map(lambda _: True, new)

    return call_all


def _placed(backend: Backend, leaf: LeafSpec, scalars: Array, integers: Array, *arrays: Array) -> list[Array]:
    """Run the kernel on arrays that are on many devices, each of which steps what it has."""
    batch = arrays[0].ndim - len(leaf.shape)
    if is_on_one_device(arrays):
        return _run(backend, leaf._replace(shape=arrays[0].shape[batch:]), scalars, integers, *arrays)
    mesh = jax.typeof(arrays[0]).sharding.mesh
    if AxisType.Explicit in mesh.axis_types:
        spec = _in_whole_blocks(leaf, jax.typeof(arrays[0]).sharding, arrays[0].shape)
        row, count = _of_row(spec, batch), len(arrays)
        part = jax.shard_map(
            partial(_run_part, backend, leaf, spec),
            mesh=mesh,  # that of the arrays: there need not be one set
            in_specs=(row, row, *[spec] * count),
            out_specs=[spec] * (count - 1),
            check_vma=False,  # as in `_pallas.unsupported_reason`
        )
        rows = [jax.sharding.reshard(x, NamedSharding(mesh, row)) for x in (scalars, integers)]
        new = part(*rows, *[jax.sharding.reshard(x, NamedSharding(mesh, spec)) for x in arrays])
        return [quantization.sharded_like(x, like) for x, like in zip(new, all_but_grad(arrays), strict=True)]
    return _partitioned(backend, leaf, tuple([x.shape for x in arrays]))(scalars, integers, *arrays)


def is_on_one_device(arrays: Sequence[Array]) -> bool:
    """Return whether there is one device only, or one device's part of the arrays is all that is seen here."""
    kinds = {kind for x in arrays for kind in _axis_types(x)}
    return kinds == {AxisType.Manual} or (not kinds & {AxisType.Manual, AxisType.Explicit} and jax.device_count() == 1)


def unsupported_placement(x: Array) -> str | None:
    """Return the reason why no kernel can run on this sharding, or None."""
    if len(kinds := _axis_types(x)) <= 1:
        return None
    modes = " and ".join(sorted(kind.name for kind in kinds))
    return f"the axes of its mesh are in several modes, {modes} (as inside of a jax.shard_map over some of them)"


def _axis_types(x: Array) -> set[AxisType]:
    """The modes of the axes of its mesh, but for axes in Auto mode of one device."""
    mesh = jax.typeof(x).sharding.mesh
    sizes = zip(mesh.axis_types, mesh.axis_sizes, strict=True)
    return {kind for kind, size in sizes if size > 1 or kind != AxisType.Auto}


@cache
def _partitioned(backend: Backend, leaf: LeafSpec, shapes: tuple[tuple[int, ...], ...]) -> Any:
    @custom_partitioning
    def step_all(scalars: Array, integers: Array, *arrays: Array) -> list[Array]:
        return _run(backend, leaf, scalars, integers, *arrays)

    ndim, count = len(shapes[0]), len(shapes)
    batch = ndim - len(leaf.shape)

    def partition(mesh: Any, _: Any, results: Any) -> Any:
        # Follow the first moment: a device keeps its parts.
        of_m = results[1].sharding
        spec = _in_whole_blocks(leaf, of_m, shapes[0])
        row, array = NamedSharding(of_m.mesh, _of_row(spec, batch)), NamedSharding(of_m.mesh, spec)
        return mesh, partial(_run_part, backend, leaf, spec), [array] * (count - 1), (row, row, *[array] * count)

    # The last axis of codes and scales is shorter than that of the parameter.
    leading = [f"b{i}" for i in range(batch)] + [f"i{i}" for i in range(len(leaf.shape) - 1)]
    names = [" ".join([*leading, f"n{shape[-1]}"] if leaf.shape else leading) for shape in shapes]
    row, integer = (" ".join([*leading[:batch], x]) for x in ("k", "l"))
    step_all.def_partition(
        partition=partition,
        sharding_rule=f"{row}, {integer}, {', '.join(names)} -> {', '.join(all_but_grad(names))}",
        need_replication_factors=("k", "l"),
    )
    return step_all


def all_but_grad(arrays: Sequence[Any]) -> list[Any]:
    """All but the gradient, which comes second."""
    return [x for i, x in enumerate(arrays) if i != 1]


def results(variant: StepVariant, arrays: Sequence[Array]) -> list[jax.ShapeDtypeStruct]:
    """The types of a kernel's results: those of all but the gradient, with the update in place of the parameter."""
    like = jax.eval_shape(lambda *arrays: all_but_grad(arrays), *arrays)
    return like if variant.update is None else [like[0].update(dtype=variant.update), *like[1:]]


def _in_whole_blocks(leaf: LeafSpec, sharding: NamedSharding, shape: tuple[int, ...]) -> PartitionSpec:
    """The spec of arrays, with the last axis in one piece where devices would have parts of blocks."""
    return (sharding if quantization.is_divisible(shape, sharding, leaf.unit) else quantization.whole(sharding)).spec


def _of_row(spec: PartitionSpec, batch: int) -> PartitionSpec:
    """The spec of scalars, of which there is a row for each of many arrays."""
    return PartitionSpec(*spec[:batch])


def _run_part(
    backend: Backend, leaf: LeafSpec, spec: PartitionSpec, scalars: Array, integers: Array, *parts: Array
) -> list[Array]:
    ndim, batch = parts[0].ndim, parts[0].ndim - len(leaf.shape)
    names, sizes = [*spec, *[None] * (ndim - len(spec))][batch:], parts[0].shape[batch:]
    indices = [jnp.zeros((), jnp.int32) if name is None else lax.axis_index(name) for name in names]
    offsets = jnp.stack([i.astype(jnp.uint32) * np.uint32(size) for i, size in zip(indices, sizes, strict=True)])
    integers = integers.at[..., -len(leaf.shape) :].set(offsets)
    return _run(backend, leaf, scalars, integers, *parts)


def _run(backend: Backend, leaf: LeafSpec, *operands: Array) -> list[Array]:
    return list(backend.run(leaf, *collectives.pcast_all(*operands)))
