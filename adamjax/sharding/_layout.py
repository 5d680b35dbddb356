"""Where the arrays of a state are: with their parameters, and spread further over an axis of the mesh.

The rule of spreading: over the first axis of the array that can be divided, in equal parts and in whole
blocks of what is quantised. It is decided for a parameter, and everything in the state that has its
shape follows: a step is then done where the moments are, without moving them.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from adamjax._core import checks, trees
from adamjax._core.ownership import Key, params_of_state
from adamjax._core.packing import PackedTree
from adamjax._core.quantization import is_quantized
from adamjax._core.typing import PyTree
from adamjax._transforms.base import as_transformation

Names = tuple[str, ...]


def state_sharding(
    opt: Any, params: PyTree, *, mesh: Mesh | AbstractMesh | None = None, zero_axis: str | Names | None = None
) -> PyTree:
    """Where each array of the state is to be, from where the parameters are.

    An array that has the shape of a parameter goes where that is. With a `zero_axis`, its parts are divided once
    more, over the devices that would else hold copies of them (ZeRO, stage 1): along its first axis that can be
    divided into equal parts, in whole blocks where it is quantised. An array without such an axis stays as it
    is, and `describe` says so. Counts and other scalars are on all devices.

    Args:
      opt: A transformation, ours or optax's.
      params: The parameters, replicated or sharded: arrays, or `jax.ShapeDtypeStruct`s with a sharding.
      mesh: The mesh that they are on. None: that of their shardings.
      zero_axis: The axis of the mesh, or axes, that the state is spread over; as a rule, that of the data.

    Returns:
      A tree of `jax.sharding.NamedSharding`s with the structure of `opt.init(params)`: for `init_sharded`,
      as `in_shardings` and `out_shardings`, or to restore a checkpoint to.

    Raises:
      TypeError, ValueError: A parameter is on no mesh, or on another one (the message has its path); the mesh has
        no such axis; `opt` is no transformation.

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
    return _plan_of(opt, params, mesh, zero_axis, "state_sharding").state


def init_sharded(opt: Any, params: PyTree, sharding: PyTree) -> PyTree:
    """`opt.init(params)`, each array made where it is to be: none is ever whole on one device.

    Args:
      opt: A transformation, ours or optax's.
      params: The parameters: arrays, also inside of `jax.jit`, or `jax.ShapeDtypeStruct`s, which give a state of
        those.
      sharding: A tree of `jax.sharding.NamedSharding`s with the structure of the state, as `state_sharding` makes it.

    Returns:
      The state.

    Raises:
      TypeError, ValueError: `sharding` does not fit the state; `opt` is no transformation; a leaf of
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
        # Devices are those of the arguments that a compiled function needs. A state needs none, and would be on one.
        state, _ = jax.lax.optimization_barrier((pin(state, sharding), traced[0]))
        return pin(state, sharding)
    like = init(jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=sharding_of(p)), params))
    _check_sharding(sharding, like)
    if trees.any_abstract(params):
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), like, sharding)

    def make(params: PyTree) -> list[Any]:
        return pin(jax.tree.leaves(init(params)), jax.tree.leaves(sharding))

    # What a state is made of may not depend on the parameters, but which devices it is made on does. Its structure
    # may say how they are sharded, which is not seen in there.
    return jax.tree.unflatten(jax.tree.structure(like), jax.jit(make, keep_unused=True)(params))


def describe(
    opt: Any, params: PyTree, *, mesh: Mesh | AbstractMesh | None = None, zero_axis: str | Names | None = None
) -> str:
    """A table of what `state_sharding` decides: what each array costs a device, and why some stay whole.

    Args:
      opt, params, mesh, zero_axis: Those of `state_sharding`.

    Returns:
      For each array of the state its path, shape and sharding, the bytes on a device without the `zero_axis` and
      with it, and why it is not spread over that.

    Raises:
      TypeError, ValueError: Those of `state_sharding`.

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
    before = _plan_of(opt, params, mesh, None, "describe")
    after = _plan_of(opt, params, mesh, zero_axis, "describe")
    rows: list[tuple[str, ...]] = [("array", "shape", "sharding", "before", "after", "")]
    totals = [0, 0]
    placed = zip(jax.tree.leaves(before.state), jax.tree.leaves(after.state), strict=True)
    for (path, x), why, pair in zip(jax.tree.leaves_with_path(after.like), after.whole, placed, strict=True):
        sizes = [math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize for s in pair]
        totals = [total + size for total, size in zip(totals, sizes, strict=True)]
        shape = f"[{','.join(map(str, x.shape))}]"
        rows.append((trees.path_of(path), shape, str(pair[1].spec), *map(str, sizes), why))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    width = sum(widths[:3]) + 4
    lines = [_line(row, widths) for row in rows]
    return "\n".join([*lines, _line(("bytes a device", *map(str, totals)), [width, *widths[3:5]], numbers=(1, 2))])


def _line(row: Sequence[str], widths: Sequence[int], numbers: tuple[int, ...] = (3, 4)) -> str:
    cells = [x.rjust(w) if i in numbers else x.ljust(w) for i, (x, w) in enumerate(zip(row, widths, strict=False))]
    return "  ".join(cells).rstrip()


class Plan(NamedTuple):
    """Where everything is.

    Fields:
      params: `NamedSharding`s of the parts of the parameters that a step is done on.
      state: `NamedSharding`s of the state.
      like: The state, of `jax.ShapeDtypeStruct`s.
      whole: For each array of the state, why it is not spread; "" where it is, or where there is nothing to say.
    """

    params: PyTree
    state: PyTree
    like: PyTree
    whole: list[str]


def plan(opt: Any, params: PyTree, mesh: Any, names: Names) -> Plan:
    """The plan for `params`, `jax.ShapeDtypeStruct`s with `NamedSharding`s on `mesh`, spread over the axes `names`."""
    like = opt.init(params)
    owned = params_of_state(like, params)
    units, packed = _units(owned), _packed(like)
    spread = {
        path: (p.sharding, "packed") if path in packed else _spread(p, names, units.get(path, 1))
        for path, p in jax.tree.leaves_with_path(params)
    }
    slices = jax.tree.map_with_path(lambda path, p: spread[path][0], params)
    state = opt.init(jax.tree.map(lambda p, s: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=s), params, slices))
    shardings, whole = [], []
    placed = iter(jax.tree.leaves(state))
    for owner, x in owned:
        s, why = (NamedSharding(mesh, PartitionSpec()), "") if owner is None else spread[owner]
        for part in jax.tree.leaves(x):
            found = next(placed).sharding
            if not (isinstance(found, NamedSharding) and found.mesh == mesh):
                found = s
            shardings.append(_named(mesh, dimensions(found, part.ndim), found.memory_kind))
            whole.append(why)
    return Plan(slices, jax.tree.unflatten(jax.tree.structure(like), shardings), like, whole)


def divided(opt: Any, params: PyTree, count: int) -> PyTree:
    """For each leaf of `params`, whole arrays, the axis that its state is divided along by `count`; -1 if none is."""
    like = opt.init(trees.abstract_like(params))
    units, packed = _units(params_of_state(like, params)), _packed(like)

    def axis(path: Key, p: Any) -> int:
        divides = count > 1 and path not in packed
        found = first_divisible(p.shape, [1] * p.ndim, count, units.get(path, 1)) if divides else None
        return -1 if found is None else found

    return jax.tree.map_with_path(axis, params)


def _units(owned: list[tuple[Key | None, Any]]) -> dict[Key, int]:
    """How many numbers along its last axis must stay together, for each parameter of which something is quantised."""
    units: dict[Key, int] = {}
    for owner, x in owned:
        if owner is not None and is_quantized(x):
            units[owner] = math.lcm(units.get(owner, 1), x.block_size, 8 // x.bits)
    return units


def _packed(state: PyTree) -> set[Key]:
    """The paths of parameters whose moments are in groups, which are whole on each device."""
    nodes = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, PackedTree))
    return {path for tree in nodes if isinstance(tree, PackedTree) for path in tree.paths}


def _plan_of(opt: Any, params: PyTree, mesh: Any, zero_axis: Any, who: str) -> Plan:
    opt = as_transformation(opt, f"argument opt of {who}")
    checks.parameters(params)
    if mesh is None:
        meshes = [s.mesh for p in jax.tree.leaves(params) if isinstance(s := sharding_of(p), NamedSharding)]
        if not meshes:
            raise ValueError(f"no leaf of params is on a mesh: {_PUT}, or give {who} abstract ones with shardings")
        mesh = meshes[0]
    check_mesh(mesh)
    names = () if zero_axis is None else check_axes("zero_axis", zero_axis, mesh)

    def placed(path: Key, p: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=on_mesh(path, sharding_of(p), mesh))

    return plan(opt, jax.tree.map_with_path(placed, params), mesh, names)


_PUT = "put them there, by jax.device_put(params, NamedSharding(mesh, PartitionSpec()))"


def check_mesh(mesh: Any) -> None:
    """Check the argument `mesh`."""
    if not isinstance(mesh, (Mesh, AbstractMesh)):
        raise TypeError(f"Invalid mesh value: {mesh!r}; mesh must be a jax.sharding.Mesh")
    if len(set(mesh.axis_types)) > 1:
        raise ValueError(
            f"Invalid mesh value: {mesh}; its axes must be all in Auto or all in Explicit mode: "
            "make it with the same axis_types for all"
        )


def check_axes(name: str, axis: Any, mesh: Any = None) -> Names:
    """The names that the argument called `name` gives: one or a tuple of them, of axes of `mesh` where it is given."""
    names = axis if isinstance(axis, tuple) else (axis,)
    if not names or not all(isinstance(n, str) for n in names):
        raise TypeError(f"Invalid {name} value: {axis!r}; {name} must be the name of an axis, or a tuple of them")
    if unknown := [n for n in names if mesh is not None and n not in mesh.axis_names]:
        has = ", ".join(map(repr, mesh.axis_names))
        raise ValueError(f"Invalid {name} value: {axis!r}; the mesh has no axis {unknown[0]!r}, it has {has}")
    return names


def sharding_of(p: Any) -> Any:
    """That of an array or `jax.ShapeDtypeStruct`; of a tracer in Explicit mode. None where nothing tells."""
    if not isinstance(p, jax.core.Tracer):
        return getattr(p, "sharding", None)
    found = jax.typeof(p).sharding
    return found if is_explicit(found.mesh) else None


def on_mesh(path: Key, found: Any, mesh: Any) -> NamedSharding:
    """Check that the parameter at `path`, with the sharding `found`, is on `mesh`."""
    where = f"params{jax.tree_util.keystr(path)}"
    if not isinstance(found, NamedSharding):
        what = "has no sharding that is known here" if found is None else f"has {found}"
        raise ValueError(f"{where} {what}, expected a NamedSharding: {_PUT}")
    if found.mesh != mesh:
        raise ValueError(f"{where} is on {found.mesh}, expected all parameters on {mesh}: {_PUT}")
    return found


def is_explicit(mesh: Any) -> bool:
    return not mesh.empty and all(kind == AxisType.Explicit for kind in mesh.axis_types)


def pin(tree: PyTree, shardings: PyTree) -> PyTree:
    """`tree`, with these shardings from here on; a None of `tree` stays."""

    def place(x: Any, s: NamedSharding) -> Any:
        return jax.sharding.reshard(x, s) if is_explicit(s.mesh) else jax.lax.with_sharding_constraint(x, s)

    return trees.map_leaves(place, tree, shardings)


def dimensions(sharding: NamedSharding, ndim: int) -> list[Names]:
    """The names of mesh axes that each axis of an array is divided over."""
    parts = _names(sharding.spec)
    return [*parts, *([()] * (ndim - len(parts)))]


def shortest(spec: PartitionSpec) -> PartitionSpec:
    """The same, without what says nothing: specs of arrays that are sharded alike are then equal."""
    parts = _names(spec)
    while parts and not parts[-1]:
        parts.pop()
    return _spec(parts)


def _names(spec: PartitionSpec) -> list[Names]:
    return [() if part is None else part if isinstance(part, tuple) else (part,) for part in spec]


def _spec(parts: list[Names]) -> PartitionSpec:
    return PartitionSpec(*(part[0] if len(part) == 1 else part or None for part in parts))


def first_divisible(shape: Sequence[int], parts: Sequence[int], count: int, unit: int) -> int | None:
    """The first axis that can be divided `count` times more than into `parts`; the last one in runs of `unit`."""
    for axis, (size, taken) in enumerate(zip(shape, parts, strict=True)):
        run = unit if axis == len(shape) - 1 else 1
        if size > 0 and size % (taken * count * run) == 0:
            return axis
    return None


def _spread(p: jax.ShapeDtypeStruct, names: Names, unit: int) -> tuple[NamedSharding, str]:
    """The sharding of what is like `p` when it is spread over `names` too; or that of `p`, and why it is not."""
    taken = dimensions(p.sharding, len(p.shape))
    mesh = p.sharding.mesh
    # An axis of one device divides nothing, and compiled programs leave it out of shardings.
    free = tuple(name for name in names if mesh.shape[name] > 1 and not any(name in part for part in taken))
    count = math.prod(mesh.shape[name] for name in free)
    parts = [math.prod(mesh.shape[name] for name in part) for part in taken]
    axis = first_divisible(p.shape, parts, count, unit) if free else None
    if axis is not None:
        taken[axis] = (*taken[axis], *free)
    blocks = f" in blocks of {unit}" if unit > 1 else ""
    why = f"no axis is divisible by {count}{blocks}" if free and axis is None and p.shape else ""
    return _named(mesh, taken), why


def _named(mesh: Any, taken: list[Names], memory_kind: str | None = None) -> NamedSharding:
    spec = _spec(taken)
    # As compiled programs name the shardings of their results, which differs: or they would compile again.
    return NamedSharding(mesh, spec if is_explicit(mesh) else shortest(spec), memory_kind=memory_kind)


def _check_sharding(sharding: PyTree, state: PyTree) -> None:
    expected: Any = jax.tree.structure(state)
    found: Any = jax.tree.structure(sharding)
    if found != expected or not all(isinstance(s, NamedSharding) for s in jax.tree.leaves(sharding)):
        what = f"a tree of {found}" if found != expected else "a tree of something else"
        raise ValueError(
            f"Invalid sharding value: {what}, expected NamedShardings in {expected}: "
            "make it with state_sharding(opt, params)"
        )
