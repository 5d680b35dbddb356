"""Clipping by the global norm."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from adamjax._core import checks, collectives, trees
from adamjax._core.numerics import clip_finite, largest_square_root, scale, sqrt_with_zero_slope
from adamjax._core.trees import Leaves
from adamjax._core.typing import AxisName, PyTree, Scalar
from adamjax._core.value import static_field, value
from adamjax._transforms.base import Leafwise
from adamjax._transforms.leafwise import LeafOp, LeafTransform


@dataclass(frozen=True)
class ClipLeaves(LeafTransform):
    """Multiply each leaf by a factor, and limit its huge numbers before."""

    is_pure: ClassVar[bool] = True

    factor: Callable[[np.dtype], Any]  # from a real dtype, the factor in it
    limit: Callable[[np.dtype], Any]  # from a real dtype, the limit in it

    def ops_for(self, index: int, dtype: np.dtype, p: Any) -> Sequence[LeafOp]:
        dtype = trees.compute_dtype(dtype)
        real = trees.real_dtype(dtype)
        return (LeafOp(clip_leaf, (self.factor(real), self.limit(real)), dtype),)


def clip_leaf(u: Array, p: Any, state: Any, operands: tuple[Any, Any]) -> tuple[Array, Any]:
    """A `LeafFunction`: the update, with its huge numbers limited, times a factor."""
    factor, limit = operands
    dtype = trees.compute_dtype(u.dtype)
    return scale(clip_finite(u.astype(dtype), limit), factor.astype(dtype)), state


@value
class ClipByGlobalNorm(Leafwise):
    """See `clip_by_global_norm`."""

    max_norm: Scalar
    axis_name: AxisName = static_field(default=None)

    reads_updates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self._check_numbers("max_norm")
        collectives.check_axis_name(self.axis_name)

    def _leaf_transforms(self, updates: Leaves, state: PyTree, params: Leaves | None) -> list[LeafTransform]:
        leaves = [jnp.asarray(u) for u in updates.leaves if u is not None]
        norm, limit = _norm(leaves, self.axis_name)
        max_norm = checks.as_scalar("max_norm", self.max_norm, norm.dtype)
        # With `norm > max_norm`, a NaN would pass unclipped instead of reaching all updates.
        exceeds = ~(norm <= max_norm)
        shrink = jnp.where(exceeds, max_norm / jnp.where(exceeds, norm, 1.0), 1.0)
        return [ClipLeaves(cache(shrink.astype), cache(limit.astype))]


def _norm(leaves: Sequence[Array], axis_name: AxisName) -> tuple[Array, Array]:
    """The norm of all leaves, and the limit to which it counts finite numbers: a huge one would make it infinite."""
    dtype = trees.real_dtype(trees.compute_dtype(*[x.dtype for x in leaves]))
    least = collectives.limit_of_squares(dtype, sum(x.size for x in leaves), axis_name)
    total = partial(collectives.psum_of_scalars, axis_name=axis_name, dtype=dtype)

    def of_limited() -> list[Array]:
        return [collectives.sum_of_squares(_limited(x.astype(trees.compute_dtype(x.dtype)), least)) for x in leaves]

    if jax.default_backend() != "cpu":
        return sqrt_with_zero_slope(total(of_limited())), jnp.asarray(least, dtype)
    # On a CPU, the sum of limited numbers takes thrice as long, and is seldom needed.
    squares = [collectives.sum_of_squares(x) for x in leaves]
    fine = jnp.isfinite(total(squares))
    if isinstance(fine, jax.core.Tracer):
        squares = jax.lax.cond(fine, lambda: squares, of_limited)
    elif not fine:
        squares = of_limited()
    limit = jnp.where(fine, jnp.asarray(largest_square_root(dtype), dtype), jnp.asarray(least, dtype))
    return sqrt_with_zero_slope(total(squares)), limit


def _limited(x: Array, largest: float) -> Array:
    """The sizes of what `clip_finite` gives: XLA's fast reductions on CPU take minima, and no selections."""
    if jnp.iscomplexobj(x):
        return clip_finite(x, largest)
    size = jnp.abs(x)
    # The product is below both unless `x` is infinite.
    return jnp.maximum(jnp.minimum(size, largest), size * (0.5 * largest / float(jnp.finfo(x.dtype).max)))


def clip_by_global_norm(max_norm: Scalar, *, axis_name: AxisName = None) -> ClipByGlobalNorm:
    """Scale all updates by one factor, so that their joint norm is at most `max_norm`.

    Numbers whose squares have no finite sum count as the largest that have: 1.27e19 over the root of the number of
    elements, in float32.

    Args:
      max_norm: At least 0.
      axis_name: Where `update` runs inside `jax.shard_map` or `jax.pmap` on shards of the gradients:
        the mapped axis (or axes) over which they are sharded. Without it each shard would be
        clipped by its own norm. Under `jax.shard_map` a leaf that is replicated over the axis is
        recognised and counted once; under `jax.pmap`, or with `check_vma=False`, every leaf is taken for
        a shard. Gradients that are whole, and sharded arrays under `jax.jit`, need no axis.

    Returns:
      A transformation without state.

    Raises:
      ValueError, TypeError: An argument is not as above.

    References:
      Pascanu et al., 2013, https://arxiv.org/abs/1211.5063.

    >>> import adamjax, jax.numpy as jnp
    >>> opt = adamjax.clip_by_global_norm(1.0)
    >>> opt.update({"a": jnp.array([3.0]), "b": jnp.array([4.0])}, ())[0]
    {'a': Array([0.6], dtype=float32), 'b': Array([0.8], dtype=float32)}
    """
    return ClipByGlobalNorm(max_norm, axis_name)
