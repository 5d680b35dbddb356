"""The layout of a state on a mesh: with its parameters, and spread further over an axis of the mesh.

The axis of an array is chosen per parameter; all state arrays of its shape follow, so a step runs where they are.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from functools import wraps
from typing import Any, NamedTuple, TypeVar

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from adamjax._core import checks, trees
from adamjax._core.ownership import params_of_state
from adamjax._core.packing import PackedTree
from adamjax._core.quantization import is_divisible, is_quantized, whole
from adamjax._core.typing import GradientTransformation, Path, PyTree
from adamjax._transforms.base import Transformation, as_transformation

Names = tuple[str, ...]
MeshLike = Mesh | AbstractMesh
T = TypeVar("T")


def state_sharding(
    opt: GradientTransformation, params: PyTree, *, mesh: MeshLike | None = None, zero_axis: str | Names | None = None
) -> PyTree:
    """Return the sharding of each array of the state, derived from the shardings of the parameters.

    A state array that has the shape of a parameter is sharded like it. A `zero_axis` divides its shards once
    more, over the devices that would otherwise hold copies of them (ZeRO, stage 1): along the first axis of the
    array that divides into equal parts, in whole blocks if it is quantised. An array without such an axis keeps
    its sharding, and `describe` reports it. Counts and other scalars are replicated.

    Args:
      opt: A transformation of adamjax or optax.
      params: The parameters, replicated or sharded: arrays, or `jax.ShapeDtypeStruct`s with a sharding.
      mesh: The mesh that they are on. None: the mesh of their shardings.
      zero_axis: The axis of the mesh, or axes, to spread the state over; usually the data axis.

    Returns:
      A tree of `jax.sharding.NamedSharding`s with the structure of `opt.init(params)`: for `init_sharded`,
      as `in_shardings` and `out_shardings`, or to restore a checkpoint to.

    Raises:
      TypeError, ValueError: A parameter is on no mesh, or on another one (the message has its path); the mesh has
        no such axis; `opt` is not a transformation.

    References:
      Rajbhandari et al., 2020, https://arxiv.org/abs/1910.02054.

    >>> import adamjax, jax
    >>> from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
    >>> mesh = AbstractMesh((4, 2), ("data", "model"), (AxisType.Auto,) * 2)
    >>> sharding = NamedSharding(mesh, PartitionSpec(None, "model"))
    >>> params = {"w": jax.ShapeDtypeStruct((64, 32), "float32", sharding=sharding)}
    >>> found = adamjax.sharding.state_sharding(adamjax.adam(), params, zero_axis="data")
    >>> found[0].mu["w"].spec, found[0].count.spec
    (P('data', 'model'), P())
    """
    shardings = _layout_of(opt, params, mesh, zero_axis, "state_sharding").state
    return jax.tree.map(lambda s: s, shardings)  # a copy: the layout is cached, and its trees may be mutable


def init_sharded(opt: GradientTransformation, params: PyTree, sharding: PyTree) -> PyTree:
    """Call `opt.init(params)` and create each array in its sharding, so that no device ever holds a whole one.

    Args:
      opt: A transformation of adamjax or optax.
      params: The parameters: arrays, also inside `jax.jit`, or `jax.ShapeDtypeStruct`s, which give an abstract state.
      sharding: A tree of `jax.sharding.NamedSharding`s with the structure of the state, from `state_sharding`.

    Returns:
      The state.

    Raises:
      TypeError, ValueError: `sharding` does not fit the state; `opt` is not a transformation; a leaf of
        `params` is not a floating point or complex array.

    >>> import adamjax, jax
    >>> from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
    >>> replicated = NamedSharding(AbstractMesh((8,), ("data",), (AxisType.Auto,)), PartitionSpec())
    >>> params = {"w": jax.ShapeDtypeStruct((64, 32), "float32", sharding=replicated)}
    >>> sharding = adamjax.sharding.state_sharding(adamjax.adam(), params, zero_axis="data")
    >>> adamjax.sharding.init_sharded(adamjax.adam(), params, sharding)[0].mu["w"].sharding.spec
    P('data',)
    """
    init = as_transformation(opt, "argument opt of init_sharded").init
    checks.parameters(params)
    if traced := [p for p in jax.tree.leaves(params) if isinstance(p, jax.core.Tracer)]:
        state = init(params)
        _check_sharding(sharding, state)
        # jit places outputs on the devices of its inputs. `init` reads no input values, so without this barrier the
        # state would land on one device.
        state, _ = jax.lax.optimization_barrier((constrain(state, sharding), traced[0]))
        return constrain(state, sharding)
    like = init(jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=sharding_of(p)), params))
    _check_sharding(sharding, like)
    if trees.any_abstract(params):
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), like, sharding)

    def make(params: PyTree) -> list[jax.Array]:
        return constrain(jax.tree.leaves(init(params)), jax.tree.leaves(sharding))

    # keep_unused: the values of the state may not depend on the parameters, but its devices do. Return leaves only:
    # the structure may hold the parameters' shardings, which a traced function does not see.
    return jax.tree.unflatten(jax.tree.structure(like), jax.jit(make, keep_unused=True)(params))


def describe(
    opt: GradientTransformation, params: PyTree, *, mesh: MeshLike | None = None, zero_axis: str | Names | None = None
) -> str:
    """Return a table of the layout from `state_sharding`: the bytes of each array on a device, before and after.

    Args:
      opt, params, mesh, zero_axis: As for `state_sharding`.

    Returns:
      For each array of the state its path, shape and sharding, its bytes on a device without and with the
      `zero_axis`, and the reason if it is not spread over that.

    Raises:
      TypeError, ValueError: As for `state_sharding`.

    >>> import adamjax, jax
    >>> from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
    >>> sharding = NamedSharding(AbstractMesh((8,), ("data",), (AxisType.Auto,)), PartitionSpec())
    >>> params = {"w": jax.ShapeDtypeStruct((64, 32), "float32", sharding=sharding)}
    >>> params["b"] = jax.ShapeDtypeStruct((3,), "float32", sharding=sharding)
    >>> print(adamjax.sharding.describe(adamjax.scale_by_adam(), params, zero_axis="data"))
    array  shape    sharding    before  after
    count  []       P()              4      4
    mu/b   [3]      P()             12     12  no axis is divisible by 8
    mu/w   [64,32]  P('data',)    8192   1024
    nu/b   [3]      P()             12     12  no axis is divisible by 8
    nu/w   [64,32]  P('data',)    8192   1024
    bytes a device               16412   2076
    """
    before = _layout_of(opt, params, mesh, None, "describe")
    after = _layout_of(opt, params, mesh, zero_axis, "describe")
    rows: list[tuple[str, ...]] = [("array", "shape", "sharding", "before", "after", "")]
    totals = [0, 0]
    placed = zip(jax.tree.leaves(before.state), jax.tree.leaves(after.state), strict=True)
    arrays = jax.tree.leaves_with_path(after.like)
    for (path, x), reason, pair in zip(arrays, after.unsharded_reason, placed, strict=True):
        sizes = [math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize for s in pair]
        totals = [total + size for total, size in zip(totals, sizes, strict=True)]
        shape = f"[{','.join(map(str, x.shape))}]"
        rows.append((trees.path_of(path), shape, str(pair[1].spec), *map(str, sizes), reason))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    line = "  ".join(f"{{:{side}{width}}}" for side, width in zip("<<<>><", widths, strict=True))
    total = f"{'bytes a device':{sum(widths[:3]) + 4}}  {totals[0]:{widths[3]}}  {totals[1]:{widths[4]}}"
    return "\n".join([*(line.format(*row).rstrip() for row in rows), total])


class StateLayout(NamedTuple):
    """The `NamedSharding`s of parameters and state during a step."""

    params: PyTree
    state: PyTree
    like: PyTree  # the state, of `jax.ShapeDtypeStruct`s
    unsharded_reason: tuple[str, ...]  # why an array of the state is not spread; "" if it is, or if it is a scalar


def _once_per_structure(lay_out: Callable[..., T]) -> Callable[..., T]:
    """Cache `lay_out(opt, params, *rest)`: it does not depend on the values of arrays, which may be tracers."""
    cache: dict[Hashable, T] = {}

    @wraps(lay_out)
    def cached(opt: Transformation, params: PyTree, *rest: Hashable) -> T:
        leaves, structure = jax.tree.flatten((opt, params))
        try:
            key = (structure, *rest, *map(_leaf_key, leaves))
            found = cache.get(key)
        except TypeError:  # an optimizer of another library need not be hashable
            return lay_out(opt, params, *rest)
        if found is None:
            if len(cache) >= 64:
                cache.clear()
            found = cache[key] = lay_out(opt, params, *rest)
        return found

    return cached


def _leaf_key(x: Any) -> Hashable:
    return (type(x), x) if isinstance(x, (int, float)) else x if trees.is_abstract(x) else jax.typeof(x)


@_once_per_structure
def state_layout(opt: Transformation, params: PyTree, mesh: MeshLike, names: Names) -> StateLayout:
    """Lay out the state of `params`, `jax.ShapeDtypeStruct`s with `NamedSharding`s on `mesh`, over the axes `names`."""
    like = opt.init(params)
    owned = params_of_state(like, params)
    block_sizes, packed = _block_sizes(owned), _packed(like)
    before = {path: p.sharding for path, p in jax.tree.leaves_with_path(params)}
    after = {
        path: (p.sharding, "packed") if path in packed else _spread(p, names, block_sizes.get(path, 1))
        for path, p in jax.tree.leaves_with_path(params)
    }
    replicated = NamedSharding(mesh, PartitionSpec())
    shardings, reasons = [], []
    for path, x in owned:
        old = replicated if path is None else before[path]
        new, reason = (replicated, "") if path is None else after[path]
        for part, unit in ((x.codes, 8 // x.bits), (x.scales, x.block_size)) if is_quantized(x) else ((x, 1),):
            shardings.append(_follow(part, _in_blocks(x, old, unit), _in_blocks(x, new, unit)))
            reasons.append(reason)
    slices = jax.tree.map_with_path(lambda path, p: after[path][0], params)
    state = jax.tree.unflatten(jax.tree.structure(like), shardings)
    return StateLayout(slices, state, trees.abstract_like(like), tuple(reasons))


def _follow(x: jax.ShapeDtypeStruct, old: NamedSharding, new: NamedSharding) -> NamedSharding:
    """Return the sharding of a state array whose parameter moves from `old` to `new`."""
    found, mesh = sharding_of(x), new.mesh
    if not (isinstance(found, NamedSharding) and found.mesh == mesh):
        found = old
    moves = mesh_axes_by_dim(found, x.ndim) == mesh_axes_by_dim(old, x.ndim)
    memory_kind = new.memory_kind if found.memory_kind == old.memory_kind else found.memory_kind
    return _named(mesh, mesh_axes_by_dim(new if moves else found, x.ndim), memory_kind)


def _in_blocks(x: Any, sharding: NamedSharding, unit: int) -> NamedSharding:
    """Return `sharding`, with the last axis whole if a device would have a part of a block of `unit` elements."""
    return sharding if unit == 1 or is_divisible(x.shape, sharding, unit) else whole(sharding)


@_once_per_structure
def split_axes(opt: Transformation, params: PyTree, count: int) -> PyTree:
    """Return the axis along which the state of each unsharded leaf of `params` is split by `count`; -1 if none is."""
    like = opt.init(trees.abstract_like(params))
    block_sizes, packed = _block_sizes(params_of_state(like, params)), _packed(like)

    def axis(path: Path, p: jax.ShapeDtypeStruct) -> int:
        splits = count > 1 and path not in packed
        return first_divisible(p.shape, [1] * p.ndim, count, block_sizes.get(path, 1)) if splits else -1

    return jax.tree.map_with_path(axis, params)


def _block_sizes(owned: list[tuple[Path | None, Any]]) -> dict[Path, int]:
    """Return the elements along the last axis to keep together, for each parameter with quantised moments."""
    sizes: dict[Path, int] = {}
    for owner, x in owned:
        if owner is not None and is_quantized(x):
            sizes[owner] = math.lcm(sizes.get(owner, 1), x.block_size, 8 // x.bits)
    return sizes


def _packed(state: PyTree) -> set[Path]:
    """Return the paths of the parameters with packed moments, which are replicated."""
    nodes = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, PackedTree))
    return {path for tree in nodes if isinstance(tree, PackedTree) for path in tree.paths}


def _layout_of(
    opt: GradientTransformation, params: PyTree, mesh: MeshLike | None, zero_axis: str | Names | None, who: str
) -> StateLayout:
    transform = as_transformation(opt, f"argument opt of {who}")
    checks.parameters(params)
    if mesh is None:
        meshes = [s.mesh for s in map(sharding_of, jax.tree.leaves(params)) if isinstance(s, NamedSharding)]
        if not meshes:
            raise ValueError(f"no leaf of params is on a mesh: {_PUT}, or give {who} abstract ones with shardings")
        mesh = meshes[0]
    check_mesh(mesh)
    names = () if zero_axis is None else check_axes("zero_axis", zero_axis, mesh)

    def placed(path: Path, p: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=on_mesh(path, sharding_of(p), mesh))

    return state_layout(transform, jax.tree.map_with_path(placed, params), mesh, names)


_PUT = "put them there, by jax.device_put(params, NamedSharding(mesh, PartitionSpec()))"


def check_mesh(mesh: Any) -> None:
    if not isinstance(mesh, (Mesh, AbstractMesh)):
        raise TypeError(f"Invalid mesh value: {mesh!r}; mesh must be a jax.sharding.Mesh")
    if len(set(mesh.axis_types)) > 1:
        raise ValueError(
            f"Invalid mesh value: {mesh}; its axes must be all in Auto or all in Explicit mode: "
            "make it with the same axis_types for all"
        )


def check_axes(name: str, axis: str | Names, mesh: Any = None) -> Names:
    """Check the argument `name`, one or more axes of `mesh` (if given), and return them as a tuple."""
    names = axis if isinstance(axis, tuple) else (axis,)
    if not names or not all(isinstance(n, str) for n in names):
        raise TypeError(f"Invalid {name} value: {axis!r}; {name} must be the name of an axis, or a tuple of them")
    if unknown := [n for n in names if mesh is not None and n not in mesh.axis_names]:
        has = ", ".join(map(repr, mesh.axis_names))
        raise ValueError(f"Invalid {name} value: {axis!r}; the mesh has no axis {unknown[0]!r}, it has {has}")
    return names


def sharding_of(p: Any) -> Sharding | None:
    """Return the sharding of an array, `jax.ShapeDtypeStruct` or tracer in Explicit mode, or None if unknown."""
    if not isinstance(p, jax.core.Tracer):
        return getattr(p, "sharding", None)
    found = jax.typeof(p).sharding
    return found if is_explicit(found.mesh) else None


def on_mesh(path: Path, found: Sharding | None, mesh: MeshLike) -> NamedSharding:
    """Check that the parameter at `path`, with the sharding `found`, is on `mesh`."""
    where = checks.at("params", path)
    if not isinstance(found, NamedSharding):
        what = "has no sharding that is known here" if found is None else f"has {found}"
        raise ValueError(f"{where} {what}, expected a NamedSharding: {_PUT}")
    if found.mesh != mesh:
        raise ValueError(f"{where} is on {found.mesh}, expected all parameters on {mesh}: {_PUT}")
    return found


def is_explicit(mesh: MeshLike) -> bool:
    return not mesh.empty and all(kind == AxisType.Explicit for kind in mesh.axis_types)


def constrain(tree: PyTree, shardings: PyTree) -> PyTree:
    """Constrain the leaves of `tree` to these shardings; keep None where `tree` has it."""

    def place(x: jax.Array, s: NamedSharding) -> jax.Array:
        return jax.sharding.reshard(x, s) if is_explicit(s.mesh) else jax.lax.with_sharding_constraint(x, s)

    return trees.map_leaves(place, tree, shardings)


def mesh_axes_by_dim(sharding: NamedSharding, ndim: int) -> list[Names]:
    """Return the mesh axes that each dimension of an array is sharded over."""
    return [*_names(sharding.spec), *[()] * (ndim - len(sharding.spec))]


def canonical_spec(spec: PartitionSpec) -> PartitionSpec:
    """Remove the trailing Nones of `spec`, so that equal shardings have equal specs."""
    parts = _names(spec)
    while parts and not parts[-1]:
        parts.pop()
    return _spec(parts)


def _names(spec: PartitionSpec) -> list[Names]:
    return [() if part is None else part if isinstance(part, tuple) else (part,) for part in spec]


def _spec(parts: list[Names]) -> PartitionSpec:
    return PartitionSpec(*(part[0] if len(part) == 1 else part or None for part in parts))


def first_divisible(shape: Sequence[int], parts: Sequence[int], count: int, unit: int) -> int:
    """Return the first axis that divides into `count` times as many `parts`, the last in blocks of `unit`; or -1."""
    for axis, (size, taken) in enumerate(zip(shape, parts, strict=True)):
        run = unit if axis == len(shape) - 1 else 1
        if size > 0 and size % (taken * count * run) == 0:
            return axis
    return -1


def _spread(p: jax.ShapeDtypeStruct, names: Names, unit: int) -> tuple[NamedSharding, str]:
    """Spread the sharding of `p` over `names` too. Return it unchanged, with the reason, if that is impossible."""
    taken = mesh_axes_by_dim(p.sharding, len(p.shape))
    mesh = p.sharding.mesh
    # An axis of one device splits nothing, and compiled programs leave it out of their shardings.
    free = tuple(name for name in names if mesh.shape[name] > 1 and not any(name in part for part in taken))
    count = math.prod(mesh.shape[name] for name in free)
    parts = [math.prod(mesh.shape[name] for name in part) for part in taken]
    axis = first_divisible(p.shape, parts, count, unit) if free else -1
    if axis >= 0:
        taken[axis] = (*taken[axis], *free)
    blocks = f" in blocks of {unit}" if unit > 1 else ""
    reason = f"no axis is divisible by {count}{blocks}" if free and axis < 0 and p.shape else ""
    return _named(mesh, taken), reason


def _named(mesh: MeshLike, taken: list[Names], memory_kind: str | None = None) -> NamedSharding:
    spec = _spec(taken)
    # Spell the PartitionSpec as compiled programs do, or they recompile.
    return NamedSharding(mesh, spec if is_explicit(mesh) else canonical_spec(spec), memory_kind=memory_kind)


def _check_sharding(sharding: PyTree, state: PyTree) -> None:
    structure: Any = jax.tree.structure(sharding)
    fits = structure == jax.tree.structure(state)
    if not fits or not all(isinstance(s, NamedSharding) for s in jax.tree.leaves(sharding)):
        what = "must be NamedShardings" if fits else checks.difference(sharding, state, "state")
        raise ValueError(f"Invalid sharding value: the shardings {what}; make them with state_sharding(opt, params)")
