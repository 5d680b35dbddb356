"""Steps at which the gradient or the loss spikes are skipped."""

import warnings
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax import Array

from adamjax._core import checks, collectives, trees
from adamjax._core.trees import Leaves
from adamjax._core.typing import AxisName, Extra, GradientTransformation, PyTree, Scalar
from adamjax._core.value import static_field, value
from adamjax._transforms.base import MaySkip, Result, StepContext
from adamjax.safety._nonfinite import SkipNonfinite
from adamjax.safety._skipping import (
    COUNTED,
    check_state,
    checked_limit,
    count_step,
    step_if,
    warn_of_loss_scale,
    zero_counts,
)

# A deviation counts as at least this part of the mean: without noise, any growth would be a spike.
_LEAST_DEVIATION = np.float32(0.01)


class RunningStats(NamedTuple):
    """The running mean and deviation of one number a step: of all so far, then exponentially weighted.

    Fields:
      count: int32 scalar, the number of steps it has seen.
      mean: float32 scalar.
      deviation: float32 scalar, the root of the running variance.
    """

    count: Array  # type: ignore[assignment]  # tuple.count, which nobody counts with
    mean: Array
    deviation: Array


class SpikeState(NamedTuple):
    """State of `skip_spikes`.

    Fields:
      skipped: int32 scalar, the number of steps skipped so far.
      consecutive: int32 scalar, the number of steps skipped in a row just now.
      exceeded: bool scalar, True once more than `max_consecutive` steps were skipped in a row, which happens only
        if they were not finite.
      norm: `RunningStats` of the gradient's norm.
      loss: `RunningStats` of the loss, where `step` or `update` is given one.
      inner: The state of the wrapped transformation.
    """

    skipped: Array
    consecutive: Array
    exceeded: Array
    norm: RunningStats
    loss: RunningStats
    inner: PyTree


for _kind in (RunningStats, SpikeState):
    jax.export.register_namedtuple_serialization(_kind, serialized_name=f"adamjax.{_kind.__name__}")


@value
class SkipSpikes(MaySkip):
    """See `skip_spikes`."""

    inner: Any
    sigma: Scalar = 6.0
    window: int = static_field(default=128)
    warmup: int = static_field(default=64)
    max_consecutive: int | None = static_field(default=16)
    axis_name: AxisName = static_field(default=None)

    def __post_init__(self) -> None:
        self._wrap("skip_spikes")
        warn_of_loss_scale("skip_spikes", self.inner, "put skip_spikes inside, dynamic_loss_scale(skip_spikes(...))")
        if isinstance(self.inner, SkipNonfinite):
            warnings.warn(
                "skip_spikes around skip_nonfinite skips the steps that skip_nonfinite would count by parameter: "
                "exchange them, skip_nonfinite(skip_spikes(...))",
                stacklevel=4,
            )
        self._check_numbers("sigma")
        for name in ("window", "warmup"):
            self._replace_field(name, checks.count(name, getattr(self, name), 2, below=COUNTED))
        self._replace_field("max_consecutive", checked_limit(self.max_consecutive))
        collectives.check_axis_name(self.axis_name)

    def _init(self, params: PyTree) -> SpikeState:
        norm, loss = _no_stats(params), _no_stats(params)
        return SpikeState(*zero_counts(params), norm, loss, self.inner._init(params))

    def _run(self, updates: Leaves, state: PyTree, context: StepContext) -> Result:
        state = checks.state(state, SpikeState, "skip_spikes")
        check_state(state)
        seen = {name: checks.state(getattr(state, name), RunningStats, "skip_spikes") for name in ("norm", "loss")}
        found = {"norm": _norm(updates, self.axis_name), "loss": _loss(context.extra, self.axis_name)}
        finite, usual = jnp.asarray(True), jnp.asarray(True)
        for name, x in found.items():
            if x is not None:
                finite &= jnp.isfinite(x)
                usual &= ~self._is_spike(x, seen[name])
        accepted = False if self.max_consecutive is None else state.consecutive >= self.max_consecutive
        ok = finite & (usual | accepted)
        result, delivered, inner = step_if(ok, partial(self.inner._run, context=context), updates, state.inner, context)
        norm, loss = (self._after(seen[name], x, ok, ok & ~usual) for name, x in found.items())
        limit = None if self.max_consecutive is None else self.max_consecutive + 1
        return result, delivered, SpikeState(*count_step(ok, state, limit), norm, loss, inner)

    def _is_spike(self, x: Array, stats: RunningStats) -> Array:
        deviation = jnp.maximum(stats.deviation, _LEAST_DEVIATION * jnp.abs(stats.mean))
        sigma = checks.as_scalar("sigma", self.sigma, x.dtype)
        return (stats.count >= self.warmup) & (x - stats.mean > sigma * deviation)

    def _after(self, stats: RunningStats, x: Array | None, ok: Array, restarts: Array) -> RunningStats:
        """The statistics after a step: of this number alone, if they restart; unchanged if the step is skipped."""
        count, mean, deviation = (jnp.where(restarts, jnp.zeros_like(s), s) for s in stats)
        if x is not None:
            count = trees.increment(count)
            weight = jnp.maximum(1 / count.astype(x.dtype), np.float32(1 / self.window))
            change = x - mean
            mean += weight * change
            # Neither overflows nor underflows, as the square of the deviation would.
            deviation = jnp.sqrt(1 - weight) * jnp.hypot(deviation, jnp.sqrt(weight) * change)
        return RunningStats(
            *(jnp.where(ok, new, old) for new, old in zip((count, mean, deviation), stats, strict=True))
        )


def _no_stats(params: PyTree) -> RunningStats:
    zeros = [trees.make_on_mesh_of(lambda: jnp.zeros((), jnp.float32), params) for _ in range(2)]
    return RunningStats(trees.zero_count(params), *zeros)


def _norm(grads: Leaves, axis_name: AxisName) -> Array:
    """The norm of all gradients, in float32; not finite if that of its square is not."""
    squares = [collectives.sum_of_squares(jnp.asarray(g)) for g in jax.tree.leaves(grads.tree)]
    dtype = trees.compute_dtype(*(x.dtype for x in squares))
    norm = jnp.sqrt(collectives.psum_of_scalars(squares, axis_name, dtype)).astype(jnp.float32)
    return jax.lax.stop_gradient(norm)  # it decides, and no number depends on it


def _loss(extra: Extra, axis_name: AxisName) -> Array | None:
    """The loss, if the step is given one; of many devices, the mean."""
    name = next((name for name in ("loss", "value") if name in extra), None)
    if name is None:
        return None
    x = jnp.asarray(checks.as_scalar(name, extra[name], np.dtype(np.float32)))
    axes = collectives.axes_varying(x, axis_name)
    return jax.lax.stop_gradient(jax.lax.pmean(x, axes) if axes else x)


def skip_spikes(
    opt: GradientTransformation,
    *,
    sigma: Scalar = 6.0,
    window: int = 128,
    warmup: int = 64,
    max_consecutive: int | None = 16,
    axis_name: AxisName = None,
) -> SkipSpikes:
    """Skip the steps at which the norm of the gradient, or the loss, lies far above its running mean.

    A batch of bad data can throw a run back by thousands of steps, though each of its gradients is finite. A
    number spikes if it exceeds its running mean by more than `sigma` running deviations, of which each counts as
    1 % of the mean at least. It also spikes, at any step, if it is NaN or infinite. The norm is that of all
    gradients. The loss is judged as well where a step is given it: `opt.step(grads, state, params, loss=loss)`;
    `value=` is the same.

    A skipped step leaves the parameters and the state of `opt`, its step counts included, bit for bit as they
    were, and does not enter the means: a run with spikes ends where a run without these steps does. If the level
    rises for good, `max_consecutive` steps are skipped, and from the next one on the statistics begin anew.

    Put this around everything that counts steps, and around `clip_by_global_norm`, which hides spikes from what comes
    after it. `skip_nonfinite` belongs around it, for counts by parameter. Inside `dynamic_loss_scale`, it sees
    gradients without their scale.

    Args:
      opt: A transformation, ours or optax's.
      sigma: At least 0: the deviations from the mean that make a spike.
      window: At least 2: the steps that mean and deviation remember. They are those of all steps at first, and after
        `window` steps exponentially weighted, by 1 / `window` for the newest.
      warmup: At least 2: so many steps are made before one can spike.
      max_consecutive: At least 1: after so many steps skipped in a row, the next finite one is made. None: a
        higher level is never accepted, and `check` warns of many skipped steps.
      axis_name: As for `skip_nonfinite`: the mapped axes over which devices have different gradients, or shards of
        them. The norm is that of all of them, and the loss is the mean over devices.

    Returns:
      A transformation with state `SpikeState`. Its updates at a skipped step are -0.0.

    Raises:
      TypeError, ValueError: `opt` is not a transformation, or an argument is not as above.

    Warns:
      UserWarning: `skip_nonfinite` or `dynamic_loss_scale` is inside, where it has no effect.

    References:
      OLMo et al., 2024, https://arxiv.org/abs/2501.00656; its SkipStepOptimizer judges both numbers by a window of 128
      steps and 6 deviations, and lets spikes into its window.

    >>> import adamjax, jax.numpy as jnp
    >>> opt = adamjax.skip_spikes(adamjax.adam(0.1), warmup=3)
    >>> params = jnp.ones(2)
    >>> state = opt.init(params)
    >>> for size in (1.0, 1.1, 0.9, 50.0, 1.0):
    ...     params, state = opt.step(jnp.full(2, size), state, params)
    >>> int(state.skipped), int(state.inner[0].count), round(float(state.norm.mean), 4)
    (1, 4, 1.4142)
    """
    return SkipSpikes(opt, sigma, window, warmup, max_consecutive, axis_name)
