"""The loss is scaled for float16, and steps at which its gradients overflow are skipped."""

from functools import partial
from typing import ClassVar, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax import Array

from adamjax._core import checks, low_precision, trees
from adamjax._core.trees import Leaves
from adamjax._core.typing import AxisName, GradientTransformation, PyTree
from adamjax._core.value import static_field, value
from adamjax._transforms.base import Foreign, MaySkip, Result, StepContext, Transformation
from adamjax._transforms.chain import Chain
from adamjax.safety._nonfinite import SkipNonfinite, SkipState
from adamjax.safety._skipping import COUNTED, MAX_OF_SCALE

_SCALES = [2.0**k for k in range(MAX_OF_SCALE)]


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
        self._replace_field("growth_interval", checks.count("growth_interval", self.growth_interval, below=COUNTED))

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


def _has_foreign(opt: Transformation) -> bool:
    """Return whether a transformation from elsewhere would be given gradients in the dtype of the parameters."""
    return isinstance(opt, Foreign) or (isinstance(opt, Chain) and any(map(_has_foreign, opt.transforms)))
