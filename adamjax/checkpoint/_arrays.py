"""Trees of arrays as orbax saves them: flat dicts by path, of arrays that are neither keys nor empty."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from adamjax._core import trees
from adamjax._core.typing import PyTree

ByPath = dict[str, Any]


def as_arrays(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: x if isinstance(x, (jax.Array, jax.ShapeDtypeStruct)) else jnp.asarray(x), tree)


def default_sharding(params: PyTree) -> Sharding:
    """Return the sharding of arrays that have none, such as the step count: all devices of the parameters."""
    known = [sharding for x in jax.tree.leaves(as_arrays(params)) if (sharding := _sharding(x)) is not None]
    meshes = [sharding.mesh for sharding in known if isinstance(sharding, NamedSharding)]
    return NamedSharding(meshes[0], PartitionSpec()) if meshes else (known or [jnp.zeros(()).sharding])[0]


def abstract(tree: PyTree, default: Sharding) -> PyTree:
    tree = as_arrays(tree)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_sharding(x) or default), tree)


def by_path(params: PyTree, state: PyTree, model_state: PyTree) -> dict[str, ByPath]:
    """Return the items of a step; a model that has no state has no item."""
    found = {"params": _by_path(params), "state": _by_path(state)}
    return found if model_state is None else found | {"model_state": _by_path(model_state)}


def flat(items: dict[str, ByPath]) -> ByPath:
    """Return the arrays of all items, by their paths from the names of the items on."""
    return {name + path: x for name, arrays in items.items() for path, x in arrays.items()}


def from_paths(arrays: ByPath, like: PyTree) -> PyTree:
    def of_leaf(path: Any, x: jax.ShapeDtypeStruct) -> jax.Array:
        if not x.size:
            return jnp.zeros(x.shape, x.dtype, device=x.sharding)
        found = arrays[jax.tree_util.keystr(path)]
        return jax.random.wrap_key_data(found, impl=_key_impl(x)) if trees.is_key(x) else found

    return jax.tree.map_with_path(of_leaf, like)


def _sharding(x: jax.Array | jax.ShapeDtypeStruct) -> Sharding | None:
    """Return the sharding of `x`, or None if `x` is an uncommitted array."""
    return x.sharding if getattr(x, "committed", True) else None


# A flat dict by path makes orbax independent of the tree's node types. Leave out empty arrays, which orbax rejects.
def _by_path(tree: PyTree) -> ByPath:
    return {jax.tree_util.keystr(path): _key_data(x) for path, x in jax.tree.leaves_with_path(tree) if x.size}


def _key_data(x: Any) -> Any:
    """Return the bits of keys, since orbax does not save keys; other arrays as they are."""
    if not trees.is_key(x):
        return x
    if isinstance(x, jax.Array):
        return jax.random.key_data(x)
    bits = jax.eval_shape(jax.random.key_data, x)
    return jax.ShapeDtypeStruct(bits.shape, bits.dtype, sharding=x.sharding)


def _key_impl(like: jax.ShapeDtypeStruct) -> Any:
    found = []
    jax.eval_shape(lambda keys: found.append(jax.random.key_impl(keys)), like)  # it takes no abstract keys itself
    return found[0]
