"""The scales of initial parameters."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adamjax._core import checks, trees
from adamjax._core.typing import PyTree

_TOLERANCE = 0.1
_STANDARD_ERRORS = 5


class Expected(NamedTuple):
    """The factor from the scale of a parameter of the small model to that of one of the large model."""

    path: str
    counterpart: str
    factor: float


class Spread(NamedTuple):
    """The standard deviation of a parameter, and the number of its numbers."""

    std: float
    size: int


def check(expected: Sequence[Expected], small: PyTree, large: PyTree) -> None:
    """Raise if a parameter has not the expected scale."""
    before, after = _spreads("small", small), _spreads("large", large)
    for path, counterpart, factor in expected:
        (a, n), (b, m) = before[counterpart], after[path]
        tolerance = max(_TOLERANCE, _STANDARD_ERRORS * (1 / (2 * n) + 1 / (2 * m)) ** 0.5)
        if a == b == 0 or (a > 0 and b > 0 and abs(b / (a * factor) - 1) <= tolerance):
            continue
        found = f"{b / a:.3g} times" if a > 0 else "not constant, unlike"
        raise ValueError(
            f"the initial {checks.shortened(path)} has a standard deviation of {b:.3g}, {found} that of the small "
            f"model ({a:.3g}), expected {factor:.3g} times: let init do that, or rescale(small, large)"
        )


def rescaled(expected: Sequence[Expected], small: PyTree, large: PyTree) -> PyTree:
    """Return `large` with the expected scales."""
    before, after = _spreads("small", small), _spreads("large", large)
    factors = {x.path: _factor(before[x.counterpart].std * x.factor, after[x.path].std) for x in expected}

    def of_leaf(key: trees.Path, x: jax.Array) -> jax.Array:
        factor = factors[trees.path_of(key)]
        return x if factor == 1 else (jnp.asarray(x) * factor).astype(x.dtype)

    return jax.tree.map_with_path(of_leaf, large)


def _factor(wanted: float, found: float) -> float:
    return wanted / found if wanted > 0 and found > 0 else 1.0


def _spreads(name: str, tree: PyTree) -> dict[str, Spread]:
    found = {}
    for key, x in jax.tree.leaves_with_path(tree):
        if not isinstance(x, (jax.Array, np.ndarray)) or isinstance(x, jax.core.Tracer):
            raise TypeError(f"{checks.at(name, key)} is {checks.shown(x)}, expected an array of initial values")
        wide = np.asarray(x, complex if jnp.iscomplexobj(x) else float)
        found[trees.path_of(key)] = Spread(float(np.std(wide)), wide.size)
    return found
