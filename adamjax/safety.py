"""Protection from bad gradients: steps that are not finite are skipped, and the loss is scaled in float16.

A single NaN in the gradients stays in Adam's moments for ever. So does an infinity, which a finite gradient
above 1.8e19 becomes when it is squared in float32. Only gradients with finite squares pass. At any other step,
parameters, moments and count stay as they are, bit for bit, and the step is counted.
"""

import json
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import GetAttrKey

from adamjax._core import checks, collectives, low_precision, trees
from adamjax._core.flax_nodes import serialised_by_flax
from adamjax._core.trees import Leaves
from adamjax._core.typing import AxisName, GradientTransformation, PyTree
from adamjax._core.value import Value, static_field, value
from adamjax._transforms.base import Foreign, MaySkip, Result, StepContext, Transformation, may_skip
from adamjax._transforms.chain import Chain
from adamjax._transforms.eval_params import averaging_arrays
from adamjax._transforms.moments import find_moments

_SCALES = [2.0**k for k in range(25)]
# Skipped steps in a row that the scale of the loss cannot explain: after one fewer, it is 1 from wherever it began.
MAX_OF_SCALE = len(_SCALES)
_COUNTED = 2**31  # steps that the int32 counts of the state can tell apart


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
        if may_skip(self.inner) and _has_loss_scale(self.inner):
            warnings.warn(
                "skip_nonfinite around dynamic_loss_scale skips the steps at which the scale would be halved: it stays "
                "too large: leave skip_nonfinite out, for dynamic_loss_scale skips such steps itself",
                stacklevel=4,
            )
        if self.max_consecutive is not None:
            limit = checks.count("max_consecutive", self.max_consecutive, below=_COUNTED)
            self._replace_field("max_consecutive", limit)
        collectives.check_axis_name(self.axis_name)

    def _init(self, params: PyTree) -> SkipState:
        paths: Any = tuple(trees.path_of(path) for path, _ in jax.tree.leaves_with_path(params))
        skipped, consecutive = trees.zero_count(params), trees.zero_count(params)
        exceeded = trees.make_on_mesh_of(lambda: jnp.zeros((), jnp.bool), params)
        counts = trees.make_on_mesh_of(lambda: jnp.zeros(len(paths), jnp.int32), params)
        paths = _PlaceholderPaths() if trees.is_placeholder(params) else paths
        return SkipState(skipped, consecutive, exceeded, LeafCounts(counts, paths), self.inner._init(params))

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

        def skip(grads: Leaves, inner: PyTree) -> Result:
            params, delivery = context.params, context.delivery
            made, delivered, after = jax.eval_shape(apply, grads, inner)
            found = trees.unflatten_by_path(inner, after)
            # If the paths differ, the leaves are still in the same order.
            structure: Any = jax.tree.structure(after)
            inner = jax.tree.unflatten(structure, jax.tree.leaves(inner)) if found is None else found
            ps = [None] * len(made.leaves) if params is None else params.leaves
            unchanged = [None if delivery is None else delivery.unchanged(i, p) for i, p in enumerate(ps)]
            same = made.map(lambda like, x: _minus_zeros(like) if x is None else x, unchanged)
            kept = delivered if delivery is None or delivery.leaf_states is None else list(delivery.leaf_states)
            return same, kept, inner

        if isinstance(ok, jax.core.Tracer):
            # A branch, and not a selection by element, which would need the old moments beside the new ones.
            result, delivered, inner = jax.lax.cond(ok, apply, skip, grads, state.inner)
        else:  # Eagerly, `cond` would compile its branches at each step.
            result, delivered, inner = (apply if ok else skip)(grads, state.inner)
        consecutive = jnp.where(ok, 0, trees.increment(state.consecutive))
        exceeded = state.exceeded
        if self.max_consecutive is not None:
            exceeded |= consecutive >= self.max_consecutive
        skipped = jnp.where(ok, state.skipped, trees.increment(state.skipped))
        counts = jnp.where(bad, trees.increment(state.nonfinite.counts), state.nonfinite.counts)
        state = SkipState(skipped, consecutive, exceeded, LeafCounts(counts, state.nonfinite.paths), inner)
        return result, delivered, state


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


def _minus_zeros(like: jax.ShapeDtypeStruct) -> Array:
    """Updates that change nothing. Adding 0 would turn a parameter that is -0 into 0; adding -0 does not."""
    return collectives.pcast_like(-jnp.zeros(like.shape, like.dtype, device=like.sharding), like)


def _check_parts(state: SkipState) -> None:
    paths = getattr(state.nonfinite, "paths", ())
    expected = LeafCounts(jax.ShapeDtypeStruct((len(paths),), jnp.int32), paths)
    checks.same_structure(state.nonfinite, expected, "state.nonfinite")
    checks.same_structure(state.exceeded, jax.ShapeDtypeStruct((), jnp.bool), "state.exceeded")
    checks.arrays(state.inner, "state.inner")


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


class LossScaleState(NamedTuple):
    """State of `dynamic_loss_scale`.

    Fields:
      scale: float32 scalar, the factor of the loss: a power of two from 1 to 2**24.
      good: int32 scalar, the steps since it last changed.
      inner: The state of `skip_nonfinite`.
    """

    scale: Array
    good: Array
    inner: SkipState


jax.export.register_namedtuple_serialization(LossScaleState, serialized_name="adamjax.LossScaleState")


@value
class DynamicLossScale(MaySkip):
    """See `dynamic_loss_scale`."""

    unscales_gradients: ClassVar[bool] = True

    inner: SkipNonfinite
    initial: float = static_field(default=2.0**15)
    growth_interval: int = static_field(default=2000)

    def __post_init__(self) -> None:
        if not isinstance(self.inner, SkipNonfinite):
            raise TypeError(
                f"Invalid inner value: {checks.shown(self.inner)}; inner must be what skip_nonfinite returns"
            )
        initial = checks.number("initial", self.initial)
        if not (isinstance(initial, float) and initial in _SCALES):
            raise ValueError(f"Invalid initial value: {self.initial!r}; initial must be a power of two from 1 to 2**24")
        self._replace_field("initial", initial)
        self._replace_field("growth_interval", checks.count("growth_interval", self.growth_interval, below=_COUNTED))

    def scale(self, loss: Array, state: LossScaleState) -> Array:
        """Return the loss to differentiate: `loss` times the scale of this step, in float32 or wider."""
        state = checks.state(state, LossScaleState, "dynamic_loss_scale")
        dtype = trees.compute_dtype(trees.dtype_of(loss))
        return loss.astype(dtype) * state.scale.astype(dtype)

    def unscale(self, grads: PyTree, state: LossScaleState) -> PyTree:
        """Return the gradients of the loss itself, in float32 or wider; None stays."""
        state = checks.state(state, LossScaleState, "dynamic_loss_scale")
        # Exact: a power of two.
        return trees.map_leaves(partial(_times, factor=1 / state.scale), grads)

    def _init(self, params: PyTree) -> LossScaleState:
        for path, p in jax.tree.leaves_with_path(params):
            if low_precision.is_low_precision(trees.dtype_of(p)) and _has_foreign(self.inner.inner):
                raise ValueError(
                    f"{checks.at('params', path)} is {trees.dtype_of(p)}, and {checks.shown(self.inner.inner)} would "
                    "be given its gradient in that dtype, where it is lost once it is unscaled: put "
                    "adamjax.master_weights (or kahan) around what is not from adamjax"
                )
        scale = trees.make_on_mesh_of(lambda: jnp.asarray(self.initial, jnp.float32), params)
        return LossScaleState(scale, trees.zero_count(params), self.inner._init(params))

    def _run(self, updates: Leaves, state: PyTree, context: StepContext) -> Result:
        state = checks.state(state, LossScaleState, "dynamic_loss_scale")

        def apply(grads: Leaves, inner: PyTree) -> Result:
            return self.inner.inner._run(grads.map(partial(_times, factor=1 / state.scale)), inner, context)

        found, delivered, inner = self.inner._step_if_finite(apply, updates, state.inner, context)
        return found, delivered, self._rescaled(state, inner)

    def _rescaled(self, state: LossScaleState, inner: SkipState) -> LossScaleState:
        overflown = inner.consecutive > 0
        good = jnp.where(overflown, 0, trees.increment(state.good))
        grows = good >= self.growth_interval
        factor = jnp.where(overflown, np.float32(0.5), jnp.where(grows, np.float32(2), np.float32(1)))
        scale = jnp.clip(state.scale * factor, np.float32(_SCALES[0]), np.float32(_SCALES[-1]))
        return LossScaleState(scale, jnp.where(grows, 0, good), inner)


def dynamic_loss_scale(
    opt: GradientTransformation,
    *,
    initial: float = 2.0**15,
    growth_interval: int = 2000,
    max_consecutive: int | None = MAX_OF_SCALE,
    axis_name: AxisName = None,
) -> DynamicLossScale:
    """Scale the loss for float16, in which gradients below 6e-8 are 0.

    Multiply the loss by the scale before it is differentiated, with the method `scale`; the step divides
    the gradients by it again, in float32. If they are not finite, the step is skipped as by
    `skip_nonfinite`, and the scale is halved. After `growth_interval` steps without that, it is
    doubled. It stays a power of two between 1 and 2**24, so that scaling rounds nothing.

    Args:
      opt: A transformation. For float16 parameters, one of optax's must be inside `master_weights` or `kahan`.
      initial: The scale to begin with: a power of two from 1 to 2**24.
      growth_interval: At least 1.
      max_consecutive: See `skip_nonfinite`. By default 25, before which the scale has come down to 1: then it is not
        the scale that makes the gradients infinite or NaN.
      axis_name: See `skip_nonfinite`.

    Returns:
      A transformation with state `LossScaleState`, and the methods `scale(loss, state)`, and
      `unscale(grads, state)` to look at the gradients.

    Raises:
      TypeError, ValueError: An argument is not as above; at `init`, a transformation of optax's
        would be given half precision.

    References:
      Micikevicius et al., 2018, https://arxiv.org/abs/1710.03740, section 3.2.

    >>> import adamjax, jax, jax.numpy as jnp
    >>> opt = adamjax.dynamic_loss_scale(adamjax.master_weights(adamjax.adam(0.1, eps=1e-12)))
    >>> params = jnp.ones(2, jnp.float16)
    >>> state = opt.init(params)
    >>> def loss(params):
    ...     return jnp.sum(params * jnp.float16(1e-4)) * jnp.float16(1e-4)  # float16 has no 1e-8
    >>> jax.grad(loss)(params)
    Array([0., 0.], dtype=float16)
    >>> params, state = opt.step(jax.grad(lambda p: opt.scale(loss(p), state))(params), state, params)
    >>> params
    Array([0.9, 0.9], dtype=float16)
    """
    return DynamicLossScale(SkipNonfinite(opt, max_consecutive, axis_name), initial, growth_interval)


@partial(jax.jit, inline=True)
def _times(g: Array, factor: Array) -> Array:
    dtype = trees.compute_dtype(g.dtype)
    return g.astype(dtype) * factor.astype(trees.real_dtype(dtype)).astype(dtype)


def _has_loss_scale(opt: Transformation) -> bool:
    return isinstance(opt, DynamicLossScale) or any(map(_has_loss_scale, opt._delivered_by()))


def _has_foreign(opt: Transformation) -> bool:
    """Return whether a transformation from elsewhere would be given gradients in the dtype of the parameters."""
    return isinstance(opt, Foreign) or (isinstance(opt, Chain) and any(map(_has_foreign, opt.transforms)))


def check(state: PyTree) -> None:
    """Raise if training has gone wrong, as far as a state shows it.

    Call it on the host, now and then: it waits for the device.

    Args:
      state: A state that `init` or `update` returned, or any tree that holds one; also with a leading axis of
        devices or of a population.

    Raises:
      FloatingPointError: `max_consecutive` steps in a row were skipped (the message has the counts,
        and the parameters whose gradients were not finite), or a moment or an average is NaN or infinite (its path).

    Warns:
      UserWarning: No `max_consecutive` was given, and 25 steps in a row or more were skipped just now.

    >>> import adamjax, jax.numpy as jnp
    >>> opt = adamjax.skip_nonfinite(adamjax.adam(), max_consecutive=2)
    >>> params = {"kernel": jnp.ones(2)}
    >>> state = opt.init(params)
    >>> for _ in range(2):
    ...     params, state = opt.step({"kernel": jnp.array([1.0, jnp.inf])}, state, params)
    >>> try:
    ...     adamjax.check(state)
    ... except FloatingPointError as error:
    ...     print(str(error)[:58])
    2 steps were skipped, at least max_consecutive of them in
    """
    check_skipped(state)
    for path, node in [*find_moments(state), *averaging_arrays(state)]:
        for below, x in jax.tree.leaves_with_path(node):
            if jnp.issubdtype(jnp.result_type(x), jnp.inexact) and not jnp.all(jnp.isfinite(x)):
                raise FloatingPointError(
                    f"the state is not finite at {trees.path_of((*path, *below))}, and never will be again: a "
                    "gradient was not. Start from an earlier state, with adamjax.skip_nonfinite around the optimizer"
                )


def check_skipped(state: PyTree) -> None:
    """Raise if too many steps were skipped: the part of `check` that costs nothing."""
    for found in _skip_states(state):
        if np.any(found.exceeded):
            raise FloatingPointError(_exceeded(found, "at least max_consecutive of them"))
        if np.max(found.consecutive) >= MAX_OF_SCALE:
            warnings.warn(_exceeded(found, "many"), stacklevel=3)


def was_skipped(state: PyTree) -> Array:
    """Return, as a bool scalar, whether the step that led to this state was skipped; it can be traced."""
    return jnp.any(jnp.stack([jnp.any(found.consecutive > 0) for found in _skip_states(state)]))


def skipped(state: PyTree) -> int | None:
    """Return how many steps `skip_nonfinite` or `dynamic_loss_scale` skipped; None if the state has neither."""
    return max((int(np.max(found.skipped)) for found in _skip_states(state)), default=None)


def _skip_states(state: PyTree) -> list[SkipState]:
    nodes = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, SkipState))
    return [x for x in nodes if isinstance(x, SkipState)]


def _exceeded(state: SkipState, many: str) -> str:
    counts = np.asarray(state.nonfinite.counts)
    counts = counts.reshape(-1, counts.shape[-1]).max(axis=0)
    where = checks.listed(
        f"{state.nonfinite.paths[i] or 'the parameter'} at {counts[i]}" for i in np.argsort(-counts) if counts[i]
    )
    return (
        f"{np.max(state.skipped)} steps were skipped, {many} in a row "
        f"({np.max(state.consecutive)} just now): the gradients are not finite of {where}. Lower the learning "
        "rate, clip, or look for a division by 0 or the logarithm of one in the loss"
    )
