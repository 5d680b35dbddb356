"""Packed trees: the small leaves of a tree, concatenated into a few flat arrays."""

import json
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from adamjax._core import trees
from adamjax._core.quantization import is_moment
from adamjax._core.typing import Path, PyTree

T = TypeVar("T")

# For each group, the (index, shape) of its leaves. Absent leaves of the tree count in the index.
Layout = tuple[tuple[tuple[int, tuple[int, ...]], ...], ...]


class PlaceholderLayout(tuple[Any, ...]):
    """The layout of the state that `optax.tree_map_params` makes, to lay it over a real one: refuses one with groups.

    An array that several parameters share cannot be mapped along with the arrays of one of them.
    """

    def __eq__(self, other: object) -> bool:
        if other:
            raise TypeError(
                "optax.tree_map_params cannot map packed moments, of which many parameters share one array: take "
                "adamjax.sharding.state_sharding(opt, params) for the shardings of a state, or jax.tree.map for all "
                "of its arrays"
            )
        return isinstance(other, tuple)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = tuple.__hash__


# Leaves per group. More leaves per group means fewer arrays, but equal groups share one compiled function,
# so smaller groups are reused more.
_GROUP = 16


@dataclass(frozen=True, eq=False)
class PackedTree:
    """A tree of arrays whose small leaves are packed in groups.

    Fields:
      rest: The tree, with None in place of each packed leaf.
      groups: One flat array per group: its leaves, concatenated.
      layout: The index and shape of each leaf, per group.
    """

    rest: PyTree
    groups: tuple[Any, ...]
    layout: Layout

    def unpack(self) -> PyTree:
        """Return the tree with every leaf in its own place."""
        pairs = zip(self.groups, self.shapes, strict=True)
        return self._filled([[None] * len(shapes) if x is None else split(x, shapes) for x, shapes in pairs])

    def pack(self, tree: PyTree) -> "PackedTree":
        """Pack another tree of arrays of these shapes with the same layout."""
        rest, groups = split_groups(tree, self.layout)
        return replace(self, rest=rest, groups=tuple(map(concat, groups, self.shapes)))

    def like(self) -> PyTree:
        """Return the unpacked tree with a `jax.ShapeDtypeStruct` for each packed leaf."""
        pairs = zip(self.groups, self.shapes, strict=True)
        return self._filled([[jax.ShapeDtypeStruct(shape, x.dtype) for shape in shapes] for x, shapes in pairs])

    def __repr__(self) -> str:
        packed, others = sum(map(len, self.layout)), len(jax.tree.leaves(self.rest))
        return f"PackedTree({packed} leaves in {len(self.layout)} groups, {others} by themselves)"

    @property
    def paths(self) -> list[Path]:
        """The paths of the packed leaves."""
        paths = [path for path, _ in jax.tree.leaves_with_path(self.rest, is_leaf=is_moment)]
        return [paths[number] for places in self.layout for number, _ in places]

    @property
    def shapes(self) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """The shapes of the packed leaves, per group."""
        return tuple(tuple(shape for _, shape in places) for places in self.layout)

    def _filled(self, groups: Sequence[Sequence[Any]]) -> PyTree:
        leaves, structure = _leaves(self.rest)
        for places, parts in zip(self.layout, groups, strict=True):
            for (number, _), x in zip(places, parts, strict=True):
                leaves[number] = x
        return structure.unflatten(leaves)


def _leaves(tree: PyTree) -> tuple[list[Any], Any]:
    return jax.tree.flatten(tree, is_leaf=is_moment)


def split_groups(tree: PyTree, layout: Layout) -> tuple[PyTree, list[list[Any]]]:
    """Return `tree` with None in place of the packed leaves, and those leaves per group."""
    leaves, structure = _leaves(tree)
    groups = [[leaves[number] for number, _ in places] for places in layout]
    for number in (number for places in layout for number, _ in places):
        leaves[number] = None
    return structure.unflatten(leaves), groups


def _unflatten(layout: Layout, children: Any) -> PackedTree:
    rest, groups = children
    return PackedTree(rest, groups, layout)


# Not `register_dataclass`: the layout itself, not a tuple of it, stands in descriptions and exports of adamjax 0.1.0.
jax.tree_util.register_pytree_with_keys(
    PackedTree,
    lambda x: ([(jax.tree_util.GetAttrKey(name), getattr(x, name)) for name in ("rest", "groups")], x.layout),
    _unflatten,
)
jax.export.register_pytree_node_serialization(
    PackedTree,
    serialized_name="adamjax.PackedTree",
    serialize_auxdata=lambda layout: json.dumps(layout).encode(),
    deserialize_auxdata=lambda found: tuple(
        tuple((number, tuple(shape)) for number, shape in places) for places in json.loads(bytes(found))
    ),
)


def layout_of(small: Sequence[tuple[int, tuple[int, ...], Hashable]]) -> Layout:
    """Group leaves, given as (index, shape, key). The leaves of a group have equal keys.

    Leaves of one shape fill as many groups as they can, because equal groups share one compiled function.
    """
    by_key: dict[Hashable, dict[tuple[int, ...], list[int]]] = {}
    for number, shape, key in small:
        by_key.setdefault(key, {}).setdefault(shape, []).append(number)
    layout: list[tuple[tuple[int, tuple[int, ...]], ...]] = []
    for by_shape in by_key.values():
        left: list[tuple[int, tuple[int, ...]]] = []
        for shape, numbers in by_shape.items():
            full = len(numbers) - len(numbers) % _GROUP
            layout += _groups([(number, shape) for number in numbers[:full]])
            left += [(number, shape) for number in numbers[full:]]
        layout += _groups(left)
    return tuple(layout)


def group_sizes(layout: Layout) -> list[int]:
    """Return how many elements each group has."""
    return [sum(math.prod(shape) for _, shape in places) for places in layout]


def _groups(places: list[T]) -> list[tuple[T, ...]]:
    return [tuple(places[i : i + _GROUP]) for i in range(0, len(places), _GROUP)]


def concat_dtype(dtypes: Sequence[np.dtype]) -> np.dtype:
    """Return the dtype in which a group holds leaves of these dtypes."""
    return dtypes[0] if len(set(dtypes)) == 1 else trees.compute_dtype(*dtypes)


def concat(leaves: Sequence[Any], shapes: tuple[tuple[int, ...], ...]) -> Array:
    """Concatenate `leaves`, flattened; a leaf that is None counts as zeros."""
    dtype = concat_dtype([trees.dtype_of(x) for x in leaves if x is not None])
    return _concat(
        [jnp.zeros(shape, dtype) if x is None else x for x, shape in zip(leaves, shapes, strict=True)], dtype
    )


@partial(jax.jit, static_argnums=1)
def _concat(leaves: list[Array], dtype: np.dtype) -> Array:
    return replicated(jnp.concatenate([_reshard_replicated(x.astype(dtype)).reshape(-1) for x in leaves]))


@partial(jax.jit, static_argnums=1)
def split(x: Array, shapes: tuple[tuple[int, ...], ...]) -> list[Array]:
    """Split a group into its leaves. It may have leading axes, those of a population."""
    x = replicated(x)
    ends = np.cumsum([math.prod(shape) for shape in shapes]).tolist()
    return [
        x[..., begin:end].reshape(*x.shape[:-1], *shape)
        for begin, end, shape in zip([0, *ends], ends, shapes, strict=False)
    ]


def where_frozen(new: T, old: T, shapes: tuple[tuple[int, ...], ...], frozen: tuple[bool, ...]) -> T:
    """Return the group `new` (or a tree of such arrays), with the frozen leaves taken from `old`."""
    return jax.tree.map(lambda a, b: replicated(_where_frozen(a, b, shapes, frozen) if any(frozen) else a), new, old)


@partial(jax.jit, static_argnums=(2, 3))
def _where_frozen(new: Array, old: Array, shapes: tuple[tuple[int, ...], ...], frozen: tuple[bool, ...]) -> Array:
    parts = zip(split(new, shapes), split(old, shapes), frozen, strict=True)
    return jnp.concatenate([(b if keep else a).reshape(-1) for a, b, keep in parts])


def _reshard_replicated(x: Array) -> Array:
    """Replicate `x` in Explicit mode, where the sharding is part of its type."""
    if not _is_typed(x):
        return x
    return jax.sharding.reshard(x, NamedSharding(jax.typeof(x).sharding.mesh, PartitionSpec(*[None] * x.ndim)))


def replicated(x: Array) -> Array:
    """Replicate `x` in Auto mode; otherwise the compiler would shard it like most of the leaves."""
    mesh = jax.typeof(x).sharding.mesh
    if mesh.empty or set(mesh.axis_types) != {AxisType.Auto} or x.size == 0:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec()))


def sharded_like(x: Array, like: Array) -> Array:
    """Undo `_reshard_replicated`: give `x` the sharding of `like`."""
    return jax.sharding.reshard(x, jax.typeof(like).sharding) if _is_typed(like) else x


def _is_typed(x: Array) -> bool:
    sharding = jax.typeof(x).sharding
    return AxisType.Explicit in sharding.mesh.axis_types and any(sharding.spec)


def unpacked(tree: PyTree) -> PyTree:
    """Return `tree` without groups."""
    return tree.unpack() if isinstance(tree, PackedTree) else tree


def packed_like(like: PyTree, tree: PyTree) -> PyTree:
    """Pack `tree` with the layout of `like`, if `like` is packed."""
    return like.pack(tree) if isinstance(like, PackedTree) else tree
