"""StableAdamW: Adam with weight decay, whose rate is lower where gradients outgrow their second moment."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jax import Array

from adamjax._core import checks, collectives
from adamjax._core.numerics import abs_sq, is_zero, scale
from adamjax._core.trees import Leaves
from adamjax._core.typing import AxisName, Mask, PyTree, Scalar, ScalarOrSchedule
from adamjax._core.value import precise_field, static_field, value
from adamjax._transforms.adam import AdamRule, AdamScalars, adam_scalars
from adamjax._transforms.leafwise import LeafOp, LeafTransform
from adamjax._transforms.moment_storage import MomentFormat
from adamjax._transforms.moments import Moments, StepMoments
from adamjax._transforms.schedule import number_or_schedule
from adamjax._transforms.weight_decay import DecayLeaves, as_mask, decay_leaves
from adamjax._transforms.whole_array import update_clipping


class StableAdamRule(AdamRule):
    """The step of one array (Wortsman et al., 2023, Algorithm 2)."""

    keeps_factor: ClassVar[bool] = True

    @property
    def has_factor(self) -> bool:
        """Whether the direction is multiplied by a factor that depends on the whole array."""
        return True

    def factor_terms(self, g: Array, m: Array, v: Array, s: Any) -> Array:
        """The squares of what an Adam without memory would do."""
        return abs_sq(g) / jnp.maximum(v / s.c2, s.eps * s.eps)

    def factor_of(self, total: Array, size: int) -> Array:
        """The factor of the learning rate."""
        return update_clipping(total, size, self.axis_name)


@dataclass(frozen=True)
class StableLeaves(LeafTransform):
    """The step of each leaf, its weight decay, and the factor of both."""

    step: StepMoments
    decay: DecayLeaves | None

    @property
    def leaf_states(self) -> Sequence[Any]:  # type: ignore[override]
        return self.step.leaf_states

    def ops_for(self, index: int, dtype: np.dtype, p: Any) -> Sequence[LeafOp]:
        ops = list(self.step.ops_for(index, dtype, p))
        if self.decay is not None:
            ops += self.decay.ops_for(index, ops[-1].dtype, p)
        return (*ops, LeafOp(scale_by_kept, None, ops[-1].dtype))

    def new_state(self, leaf_states: list[Any]) -> PyTree:
        return self.step.new_state(leaf_states)


def scale_by_kept(u: Array, p: Any, state: Any, operands: None) -> tuple[Array, Any]:
    """A `LeafFunction`: the update times the factor that the step kept behind the moments."""
    *moments, factor = state
    return scale(u, factor.astype(u.dtype)), tuple(moments)


@value
class ScaleByStableAdam(Moments):
    """The direction of StableAdamW, with its weight decay; see `scale_by_stable_adam`."""

    b1: Scalar = precise_field()
    b2: Scalar = precise_field()
    eps: Scalar
    mu_dtype: MomentFormat = static_field(default=None)
    weight_decay: ScalarOrSchedule = 0.0
    mask: Mask = static_field(default=None)
    nu_dtype: MomentFormat = static_field(default=None)
    axis_name: AxisName = static_field(default=None, described=False)
    nesterov: ClassVar[bool] = False
    eps_root: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        self._check_numbers("b1", "b2", below=1.0)
        self._check_numbers("eps")
        self._check_dtypes()
        self._replace_field("weight_decay", number_or_schedule("weight_decay", self.weight_decay))
        self._replace_field("mask", as_mask(self.mask))
        collectives.check_axis_name(self.axis_name)

    @property
    def rule(self) -> StableAdamRule:
        return StableAdamRule(axis_name=self.axis_name)

    def _scalars(self, t: Array) -> AdamScalars:
        return adam_scalars(self, t)

    def _leaf_transforms(self, updates: Leaves, state: PyTree, params: Leaves | None) -> list[LeafTransform]:
        (step,) = super()._leaf_transforms(updates, state, params)
        weight_decay: Any = self.weight_decay
        if is_zero(weight_decay):
            return [StableLeaves(step, None)]  # type: ignore[arg-type]
        checks.params_given(params, updates, "the weight decay of stable_adamw")
        weight_decay = weight_decay(state.count) if callable(weight_decay) else weight_decay
        return [StableLeaves(step, decay_leaves(updates, params, weight_decay, self.mask, 1))]  # type: ignore[arg-type]


def scale_by_stable_adam(
    b1: Scalar = 0.9,
    b2: Scalar = 0.99,
    eps: Scalar = 1e-6,
    mu_dtype: MomentFormat = None,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: Mask = None,
    *,
    nu_dtype: MomentFormat = None,
    axis_name: AxisName = None,
) -> ScaleByStableAdam:
    r"""The direction of StableAdamW: that of AdamW over :math:`\max(1, \mathrm{RMS}(g / \sqrt{\hat v}))`.

    The mean is that of each parameter. So one whose gradients suddenly outgrow their second moment, as before a spike
    of the loss, takes no longer a step than others. Arguments not listed are those of `scale_by_adam`.

    Args:
      eps: At least 0, added to the root, and the least root in the mean.
      weight_decay: A number or a schedule: decoupled weight decay, which is added here, for the factor is that of the
        learning rate.
      mask: The leaves that decay; see `add_decayed_weights`.
      axis_name: Where `update` runs inside `jax.shard_map` or `jax.pmap`: the mapped axis (or axes) that parameters are
        spread over; () if they are whole on each device. Sharded arrays under `jax.jit` need none.

    Returns:
      A transformation with state `AdamState`; with weight decay, `update` needs `params`.

    Raises:
      ValueError: A number is out of range, or a dtype is not one that moments can have; at the first update,
        `axis_name` or `params` are missing.
      TypeError: A hyperparameter is not a number.

    References:
      Wortsman et al., 2023, https://arxiv.org/abs/2304.13013.
    """
    return ScaleByStableAdam(b1, b2, eps, mu_dtype, weight_decay, mask, nu_dtype, axis_name)
