"""Steps at which a gradient is not finite are skipped, and counted by parameter."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
from jax import Array
from jax.tree_util import GetAttrKey

from adamjax._core import checks, collectives, trees
from adamjax._core.flax_nodes import serialised_by_flax
from adamjax._core.trees import Leaves
from adamjax._core.typing import AxisName, GradientTransformation, PyTree
from adamjax._core.value import Value, static_field, value
from adamjax._transforms.base import MaySkip, Result, StepContext
from adamjax.safety._skipping import (
    check_state,
    checked_limit,
    count_step,
    step_if,
    warn_of_loss_scale,
    zero_counts,
)


class _PlaceholderPaths:
    """The paths in a state that `optax.tree_map_params` makes from a placeholder, to lay it over a real one.

    They are those they are compared with, so the result has the structure of the real state.
    """

    found: tuple[str, ...] | None = None

    def __eq__(self, other: object) -> bool:
        if isinstance(other, tuple):
            self.found = other
        return isinstance(other, tuple | _PlaceholderPaths)

    def __hash__(self) -> int:
        return hash(_PlaceholderPaths)


@serialised_by_flax
@dataclass(frozen=True, eq=False, repr=False)
class LeafCounts(Value):
    """One number for each parameter.

    Fields:
      counts: int32[number of parameters].
      paths: The paths of the parameters, in the order of the tree.
    """

    counts: Any
    paths: Any = field(metadata={"static": True, "described": True})


def _flatten_counts(x: LeafCounts) -> tuple[tuple[tuple[GetAttrKey, Any]], tuple[Any]]:
    return ((GetAttrKey("counts"), x.counts),), (x.paths,)


def _unflatten_counts(static: tuple[Any], children: Iterable[Any]) -> LeafCounts:
    (counts,), (paths,) = children, static
    return LeafCounts(counts, getattr(paths, "found", None) or paths)


jax.tree_util.register_pytree_with_keys(LeafCounts, _flatten_counts, _unflatten_counts)
jax.export.register_pytree_node_serialization(
    LeafCounts,
    serialized_name="adamjax.LeafCounts",
    serialize_auxdata=lambda static: json.dumps(static).encode(),
    deserialize_auxdata=lambda found: tuple(tuple(paths) for paths in json.loads(bytes(found))),
)


class SkipState(NamedTuple):
    """State of `skip_nonfinite`.

    Fields:
      skipped: int32 scalar, the number of steps skipped so far.
      consecutive: int32 scalar, the number of steps skipped in a row just now.
      exceeded: bool scalar, True once `max_consecutive` steps were skipped in a row.
      nonfinite: For each parameter, the number of steps at which its gradient was not finite.
      inner: The state of the wrapped transformation.
    """

    skipped: Array
    consecutive: Array
    exceeded: Array
    nonfinite: LeafCounts
    inner: PyTree


jax.export.register_namedtuple_serialization(SkipState, serialized_name="adamjax.SkipState")


@value
class SkipNonfinite(MaySkip):
    """See `skip_nonfinite`."""

    inner: Any
    max_consecutive: int | None = static_field(default=None)
    axis_name: AxisName = static_field(default=None)

    def __post_init__(self) -> None:
        self._wrap("skip_nonfinite")
        remedy = "leave skip_nonfinite out, for dynamic_loss_scale skips such steps itself"
        warn_of_loss_scale("skip_nonfinite", self.inner, remedy)
        self._replace_field("max_consecutive", checked_limit(self.max_consecutive))
        collectives.check_axis_name(self.axis_name)

    def _init(self, params: PyTree) -> SkipState:
        paths: Any = tuple(trees.path_of(path) for path, _ in jax.tree.leaves_with_path(params))
        counts = trees.make_on_mesh_of(lambda: jnp.zeros(len(paths), jnp.int32), params)
        paths = _PlaceholderPaths() if trees.is_placeholder(params) else paths
        return SkipState(*zero_counts(params), LeafCounts(counts, paths), self.inner._init(params))

    def _run(self, updates: Leaves, state: PyTree, context: StepContext) -> Result:
        return self._step_if_finite(partial(self.inner._run, context=context), updates, state, context)

    def _step_if_finite(
        self, apply: Callable[[Leaves, PyTree], Result], grads: Leaves, state: PyTree, context: StepContext
    ) -> Result:
        """Apply the gradients if they are finite; else deliver results that change nothing."""
        state = checks.state(state, SkipState, "skip_nonfinite")
        _check_parts(state)
        bad = _nonfinite(grads.tree, state.nonfinite.paths, self.axis_name)
        ok = ~jnp.any(bad)
        result, delivered, inner = step_if(ok, apply, grads, state.inner, context)
        counts = jnp.where(bad, trees.increment(state.nonfinite.counts), state.nonfinite.counts)
        nonfinite = LeafCounts(counts, state.nonfinite.paths)
        return result, delivered, SkipState(*count_step(ok, state, self.max_consecutive), nonfinite, inner)


def skip_nonfinite(
    opt: GradientTransformation, *, max_consecutive: int | None = None, axis_name: AxisName = None
) -> SkipNonfinite:
    """Skip the steps at which a gradient is NaN, infinite, or too large for its square to be finite.

    A skipped step leaves the parameters and the state of `opt`, its step counts included, bit for bit as they
    were. A run with bad gradients here and there ends where a run without these steps does. All parameters
    are skipped together. A transformation outside of `opt` is not held back, so put this around everything
    that counts steps.

    The squares of the gradients are summed leaf by leaf, in float32 or wider; a step is skipped if a sum is
    not finite. So the norm of a parameter's gradient may be up to 1.8e19. The sum costs one more
    reading of the gradients. `step` works in place; `update` has to store its updates, which the compiler
    avoids without this wrapper.

    Args:
      opt: A transformation, ours or optax's.
      max_consecutive: At least 1: after so many steps skipped in a row, the state says so from then
        on, and `check` raises. Steps go on being skipped. None: as many as there are; `check` warns of many.
      axis_name: Where `update` runs inside `jax.shard_map` or `jax.pmap`, and devices have different
        gradients or shards of them: the mapped axis (or axes) over which they agree to skip.
        Sharded arrays under `jax.jit` need no axis.

    Returns:
      A transformation with state `SkipState`. Its updates at a skipped step are -0.0, which leaves
      every number that it is added to as it is.

    Raises:
      TypeError, ValueError: `opt` is not a transformation, or an argument is not as above.

    >>> import adamjax, jax.numpy as jnp
    >>> opt = adamjax.skip_nonfinite(adamjax.adam(0.1))
    >>> params = {"a": jnp.ones(2), "b": jnp.ones(1)}
    >>> state = opt.init(params)
    >>> grads = {"a": jnp.array([jnp.nan, 1.0]), "b": jnp.ones(1)}
    >>> params, state = opt.step(grads, state, params)
    >>> params
    {'a': Array([1., 1.], dtype=float32), 'b': Array([1.], dtype=float32)}
    >>> int(state.skipped), int(state.inner[0].count), state.nonfinite.paths, state.nonfinite.counts
    (1, 0, ('a', 'b'), Array([1, 0], dtype=int32))
    """
    return SkipNonfinite(opt, max_consecutive, axis_name)


def _check_parts(state: SkipState) -> None:
    paths = getattr(state.nonfinite, "paths", ())
    expected = LeafCounts(jax.ShapeDtypeStruct((len(paths),), jnp.int32), paths)
    checks.same_structure(state.nonfinite, expected, "state.nonfinite")
    check_state(state)


def _nonfinite(grads: PyTree, paths: tuple[str, ...], axis_name: AxisName) -> Array:
    """Return bool[len(paths)]: True for the parameters whose gradient is not finite on some device."""
    found = {trees.path_of(path): collectives.sum_of_squares(g) for path, g in jax.tree.leaves_with_path(grads)}
    # Match by order, since frameworks may wrap gradients differently; match by path if some gradients are missing.
    sums = dict(zip(paths, found.values(), strict=True)) if len(found) == len(paths) else found
    if unknown := sums.keys() - set(paths):
        raise ValueError(
            f"there is a gradient for {checks.shortened(min(unknown))}, which the state of skip_nonfinite does not "
            "know: this state belongs to other parameters, call init(params) for these"
        )
    if not sums:
        return jnp.zeros(len(paths), jnp.bool)
    dtype = trees.compute_dtype(*(x.dtype for x in sums.values()))
    fine = jnp.zeros((), dtype)
    bad = ~jnp.isfinite(jnp.stack([sums.get(path, fine).astype(dtype) for path in paths]))
    return collectives.pmax(bad.astype(jnp.int32), axis_name) > 0
