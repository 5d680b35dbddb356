"""The tree helpers that all transformations share.

`None` counts as a leaf here. In both parameters and gradients it is an absent parameter; in the
gradients alone it freezes the leaf, or the subtree, at its place in the other trees.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from adamjax._core.typing import Path
from adamjax._core.typing import PyTree as PyTree


def is_none(x: Any) -> bool:
    return x is None


@dataclass(eq=False, slots=True)
class Leaves:
    """A tree taken apart, once a step: its structure, in which None is a leaf, and its leaves in order."""

    leaves: list[Any]
    structure: Any

    @classmethod
    def of(cls, tree: PyTree) -> "Leaves":
        """Take a tree apart."""
        return cls(*jax.tree.flatten(tree, is_leaf=is_none))

    @property
    def tree(self) -> PyTree:
        """The tree, put together again."""
        return self.structure.unflatten(self.leaves)

    @property
    def has_none(self) -> bool:
        """Whether a leaf is None."""
        return type(None) in map(type, self.leaves)

    def like(self, leaves: list[Any]) -> "Leaves":
        """Other leaves in the same structure."""
        return Leaves(leaves, self.structure)

    def column(self, tree: PyTree) -> list[Any]:
        """The nodes of `tree` at the places of these leaves; None for each where `tree` is None as a whole."""
        return [None] * len(self.leaves) if tree is None else self.structure.flatten_up_to(tree)

    def map(self, f: Callable[..., Any], *columns: list[Any]) -> "Leaves":
        """`f` of each leaf and what `columns` hold at its place; a leaf that is None stays None."""
        return self.like([None if x is None else f(x, *rest) for x, *rest in zip(self.leaves, *columns, strict=True)])

    def paths(self) -> list[Path]:
        """The key path of each leaf."""
        return [path for path, _ in jax.tree.leaves_with_path(self.tree, is_leaf=is_none)]


jax.tree_util.register_dataclass(Leaves, data_fields=["leaves"], meta_fields=["structure"])


def map_leaves(f: Callable[..., Any], tree: PyTree, *others: PyTree) -> PyTree:
    """Map `f` over the leaves of `tree` and the subtrees at their places in `others`; keep None where `tree` has it."""
    leaves = Leaves.of(tree)
    return leaves.map(f, *map(leaves.column, others)).tree


def dtype_of(x: Any) -> np.dtype:
    """Return the dtype JAX gives to an array, a tracer, a `ShapeDtypeStruct` or a Python number."""
    if isinstance(x, (np.ndarray, np.generic, float, complex, jax.ShapeDtypeStruct)):
        return jnp.result_type(x)
    return x.dtype


@cache
def real_dtype(dtype: np.dtype) -> np.dtype:
    """Return the dtype of the real and imaginary parts of `dtype`, or a real `dtype` itself."""
    return jnp.finfo(dtype).dtype


@cache
def compute_dtype(*dtypes: np.dtype) -> np.dtype:
    """Return the dtype in which arrays of `dtypes` are combined: float32 or wider."""
    # Leave out dtypes of a byte or less: JAX does not promote them, and float32 holds all their values.
    wider = [dtype for dtype in dtypes if dtype.itemsize > 1]
    # This promotion is explicit, so allow it even if JAX is set to refuse implicit ones.
    with jax.numpy_dtype_promotion("standard"):
        return reduce(jnp.promote_types, wider, jnp.dtype(jnp.float32))


def is_key(x: Any) -> bool:
    """Return whether `x` is an array of JAX's typed random keys, which are not numbers."""
    return hasattr(x, "dtype") and bool(jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key))


def abstract_key() -> jax.ShapeDtypeStruct:
    """Return the type of a key; no device is touched, which must wait for `jax.distributed.initialize`."""
    return jax.eval_shape(jax.random.key, 0)


def path_of(key: Path) -> str:
    """Return the path of a leaf as users write it: "layer_0/kernel"."""
    return jax.tree_util.keystr(key, simple=True, separator="/")


def unflatten_by_path(tree: PyTree, like: PyTree) -> PyTree | None:
    """Put the leaves of `tree` into the structure of `like`, by path.

    Return None if the paths differ or are not unique. Frameworks turn the nodes of a state into mappings
    with the fields in another order and without those that are None.
    """
    leaves = {path_of(path): x for path, x in jax.tree.leaves_with_path(tree)}
    paths = [path_of(path) for path, _ in jax.tree.leaves_with_path(like)]
    if leaves.keys() != set(paths) or len(leaves) < len(paths):
        return None
    structure: Any = jax.tree.structure(like)
    return structure.unflatten([leaves[path] for path in paths])


def in_nodes_of(like: PyTree, tree: PyTree) -> PyTree:
    """Return `tree` with the nodes of `like`: states come back from files as lists, plain tuples and mappings.

    Mappings are matched by the names of keys and fields, sequences by position. Children of `like` without leaves
    may be missing.

    Raises:
      ValueError: They do not match.
    """
    if not is_node(like):
        if tree is None or is_node(tree):
            raise ValueError
        return tree
    keys, children, structure = _one_level(like)
    content = [bool(jax.tree.leaves(child)) for child in children]
    if type(tree) is type(like) and not isinstance(tree, Mapping):
        _, parts, found = _one_level(tree)
        if found != structure:
            raise ValueError
    elif isinstance(tree, Mapping):
        named = {str(key): part for key, part in tree.items()}
        parts = [named.pop(path_of((key,)), None) for key in keys]
        if jax.tree.leaves(named):
            raise ValueError
    elif type(tree) in (list, tuple) and not isinstance(like, Mapping) and len(tree) in (len(keys), sum(content)):
        given = iter(tree)
        parts = [next(given) if some or len(tree) == len(keys) else None for some in content]
    elif tree is None and not any(content):
        return like
    else:
        raise ValueError
    pairs = zip(children, parts, content, strict=True)
    return structure.unflatten(
        [in_nodes_of(child, part) if some else _empty(child, part) for child, part, some in pairs]
    )


def _one_level(node: PyTree) -> tuple[list[Any], list[PyTree], Any]:
    """The keys and children of a node, and the structure to put it together again."""
    pairs, structure = jax.tree.flatten_with_path(node, is_leaf=lambda x: x is not node)
    return [path[0] for path, _ in pairs], [child for _, child in pairs], structure


def _empty(like: PyTree, tree: PyTree) -> PyTree:
    """Return `like`, which has no leaves, if `tree` is empty or has such nodes, too."""
    return like if tree is None or tree in ((), [], {}) else in_nodes_of(like, tree)


def is_node(x: Any) -> bool:
    """Return whether `x` is a node of a tree, and not a leaf."""
    return not jax.tree_util.all_leaves([x])


def is_placeholder(params: PyTree) -> bool:
    """Return whether `params` is the node without leaves that `optax.tree_map_params` gives to `init`."""
    return type(params).__name__ == "_ParamsPlaceholder"


def cast(x: Any, dtype: np.dtype) -> Any:
    return (
        x if getattr(x, "dtype", None) == dtype and not getattr(x, "weak_type", False) else jnp.asarray(x).astype(dtype)
    )


def is_abstract(x: Any) -> bool:
    return isinstance(x, jax.ShapeDtypeStruct)


def any_abstract(tree: PyTree) -> bool:
    return any(map(is_abstract, jax.tree.leaves(tree)))


def abstract_like(tree: PyTree) -> PyTree:
    """Return `tree` with a `jax.ShapeDtypeStruct` without sharding for each leaf."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), dtype_of(x)), tree)


def concrete(tree: PyTree) -> PyTree:
    """Return `tree` with zeros in place of each `jax.ShapeDtypeStruct`."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype) if is_abstract(x) else x, tree)


def zeros_like(x: Any, dtype: np.dtype) -> Any:
    """Return zeros of the shape and sharding of `x`; abstract if `x` is abstract."""
    if is_abstract(x):
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)
    return jnp.zeros_like(x, dtype=dtype)


def copy(x: Any, dtype: np.dtype) -> Any:
    """Return a copy of `x` in `dtype`, in its shape and sharding and in memory of its own; abstract if `x` is."""
    if is_abstract(x):
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)
    return jnp.array(x, dtype, copy=True)


def make_on_mesh_of(make: Callable[[], PyTree], like: PyTree) -> PyTree:
    """Call `make` for part of a new state: abstractly if a leaf of `like` is abstract, else on the mesh of `like`."""
    if any_abstract(like):
        return jax.eval_shape(make)
    mesh = _mesh_of(like)
    if mesh is None:
        return make()
    # Use the exact sharding that a step returns, or the second step recompiles.
    axes = [None] if AxisType.Explicit in mesh.axis_types else []
    places = jax.tree.map(lambda x: NamedSharding(mesh, PartitionSpec(*axes * x.ndim)), jax.eval_shape(make))
    return jax.jit(make, out_shardings=places)()


def _mesh_of(tree: PyTree) -> Mesh | AbstractMesh | None:
    """Return the mesh of the first array that has one, or None. Tracers do not tell theirs."""
    for x in jax.tree.leaves(tree):
        if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer) and isinstance(x.sharding, NamedSharding):
            return x.sharding.mesh
    return None


def zero_count(like: PyTree) -> jax.Array:
    """Return the step count before the first step: an int32 scalar, abstract if a leaf of `like` is abstract."""
    return make_on_mesh_of(lambda: jnp.zeros((), jnp.int32), like)


def increment(count: jax.Array) -> jax.Array:
    """Return `count + 1`, or the largest int32 once it is reached (a wrapped count would be negative)."""
    return count + (count < np.iinfo(np.int32).max).astype(count.dtype)
