"""Which parameter each array of a state belongs to."""

from typing import Any

import jax

from adamjax._core.quantization import is_quantized
from adamjax._core.typing import PyTree

Key = tuple[Any, ...]


def params_of_state(state: PyTree, params: PyTree) -> list[tuple[Key | None, Any]]:
    """For each array of `state` (one that is quantised counts as one), the path of the parameter that it belongs to.

    It is the longest path that the array's own contains, of a parameter of its shape, or of a complex one
    of whose parts it is; of two such, the one that stands further behind.
    """
    by_path = dict(jax.tree.leaves_with_path(params))

    def owner(path: Key, x: Any) -> Key | None:
        best: tuple[tuple[int, int], Key] | None = None
        for start in range(len(path) + 1):
            for end in range(start, len(path) + 1):
                p = by_path.get(path[start:end])
                rank = (end - start, start)
                if p is not None and x.shape[: len(p.shape)] == p.shape and (best is None or rank > best[0]):
                    best = rank, path[start:end]
        return None if best is None else best[1]

    leaves = jax.tree.leaves_with_path(state, is_leaf=is_quantized)
    return [(owner(path, x), x) for path, x in leaves]


def with_param_shardings(state: PyTree, params: PyTree) -> PyTree:
    """`state`, of `jax.ShapeDtypeStruct`s, each where the parameter is that it belongs to; None says of others."""
    where: dict[Key | None, Any] = {path: getattr(p, "sharding", None) for path, p in jax.tree.leaves_with_path(params)}
    leaves = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where.get(path), weak_type=x.weak_type)
        for path, x in params_of_state(state, params)
    ]
    return jax.tree.unflatten(jax.tree.structure(state), leaves)
