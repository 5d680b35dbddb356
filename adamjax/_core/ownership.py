"""Find the parameter that each array of a state belongs to."""

from typing import Any

import jax

from adamjax._core.quantization import is_quantized
from adamjax._core.typing import Path, PyTree


def params_of_state(state: PyTree, params: PyTree) -> list[tuple[Path | None, Any]]:
    """Return each array of `state` with the path of its parameter, or None. A quantised array counts as one.

    The path of the parameter is a part of the path of the array: the longest that names a parameter of the
    array's shape, and of two such parts the later one. A trailing axis may hold the real and imaginary
    parts of a complex parameter.
    """
    by_path = dict(jax.tree.leaves_with_path(params))

    def owner(path: Path, x: Any) -> Path | None:
        best: tuple[tuple[int, int], Path] | None = None
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
    """Give each abstract array of `state` the sharding of its parameter, or None if it has none."""
    where: dict[Path | None, Any] = {
        path: getattr(p, "sharding", None) for path, p in jax.tree.leaves_with_path(params)
    }
    leaves = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where.get(path), weak_type=x.weak_type)
        for path, x in params_of_state(state, params)
    ]
    return jax.tree.unflatten(jax.tree.structure(state), leaves)
