"""AdEMAMix and its simplified form: their differences from Adam."""

from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
from jax import Array

from adamjax._core import checks
from adamjax._core.numerics import Decay, decay, decay_by, divide_by_real, ema
from adamjax._core.typing import Scalar, ScalarOrSchedule
from adamjax._core.value import precise_field, static_field, value
from adamjax._transforms.adam import AdamRule, AdamScalars, adam_scalars
from adamjax._transforms.moment_storage import MomentFormat, moment_format
from adamjax._transforms.moments import AdEMAMixState, Moments, Parts
from adamjax._transforms.schedule import Schedule, number_or_schedule


class Mixture(NamedTuple):
    """The scalars of a step that AdEMAMix has besides Adam's."""

    decay3: Decay
    alpha: Any


class AdEMAMixRule(AdamRule):
    """The step of one array (Pagliardini et al., 2024, Algorithm 1); the third array is the slow mean."""

    has_slow_mean: ClassVar[bool] = True

    def third(self, g: Array, v: Array, third: Array, s: Any) -> Array:
        """The slow mean, whose bias stays: it fills slowly on purpose."""
        return ema(third, g, s.extra.decay3)

    def direction(self, g: Array, m: Array, v: Array, third: Array | None, s: Any) -> Array:
        """Adam's direction, with a multiple of the slow mean beside the fast one."""
        return divide_by_real(self.m_hat(g, m, s) + s.extra.alpha * third, self.root(v, None, s) + s.eps)

    def root(self, v: Array, v_max: Array | None, s: Any) -> Array:
        """The root of the second moment without its bias; the third array is no maximum of it."""
        return super().root(v, None, s)

    def parts(self, m: Array, v: Array, third: Array | None, s: Any) -> Parts:
        """The parts of the direction; the slow mean is in the first."""
        return Parts(divide_by_real(m, s.c1) + s.extra.alpha * third, self.root(v, None, s), s.eps)


@value
class ScaleByAdEMAMix(Moments):
    """AdEMAMix' direction; see `scale_by_ademamix`."""

    state_type: ClassVar[Any] = AdEMAMixState

    b1: Scalar = precise_field()
    b2: Scalar = precise_field()
    b3: ScalarOrSchedule = precise_field()
    alpha: ScalarOrSchedule
    eps: Scalar
    eps_root: Scalar
    mu_dtype: MomentFormat = static_field(default=None)
    mu_slow_dtype: MomentFormat = static_field(default=None)
    nu_dtype: MomentFormat = static_field(default=None)
    nesterov: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self._check_numbers("b1", "b2", below=1.0)
        self._check_numbers("eps", "eps_root")
        b3 = number_or_schedule("b3", self.b3)
        self._replace_field("b3", b3)
        if not callable(b3):
            self._check_numbers("b3", below=1.0)
        self._replace_field("alpha", number_or_schedule("alpha", self.alpha))
        self._check_dtypes()
        self._replace_field("mu_slow_dtype", moment_format("mu_slow_dtype", self.mu_slow_dtype, signed=True))

    @property
    def columns(self) -> tuple[str, ...]:
        return "mu", "nu", "mu_slow"

    @property
    def rule(self) -> AdEMAMixRule:
        return AdEMAMixRule()

    def _scalars(self, t: Array) -> AdamScalars:
        decay3 = _scheduled_decay(self.b3, t) if callable(self.b3) else decay(self, "b3", t.dtype)
        return adam_scalars(self, t)._replace(extra=Mixture(decay3, _mixing("alpha", self.alpha, t)))


def _scheduled_decay(schedule: Any, t: Array) -> Decay:
    count = _steps_before(t)
    b = checks.as_scalar("b3", schedule(count), t.dtype)
    distance = schedule.below_one(count) if isinstance(schedule, Schedule) else 1 - b
    # As of a number that rounds to 1: an average with rate 1 would never begin.
    distance = jnp.maximum(checks.as_scalar("b3", distance, t.dtype), float(jnp.finfo(t.dtype).epsneg))
    return decay_by(jnp.minimum(b, 1 - float(jnp.finfo(t.dtype).epsneg)), distance)


def _mixing(name: str, x: ScalarOrSchedule, t: Array) -> Any:
    return checks.as_scalar(name, x(_steps_before(t)) if callable(x) else x, t.dtype)


def _steps_before(t: Array) -> Array:
    """The count that schedules take: 0 at the first step."""
    return (t - 1).astype(jnp.int32)


class SimplifiedAdEMAMixRule(AdamRule):
    """The step of one array (Morwani et al., 2025, Algorithm 3); their momentum is the first moment over 1 - b1."""

    def m_hat(self, g: Array, m: Array, s: Any) -> Array:
        """Their momentum, which has no bias correction, and a multiple of the gradient itself."""
        return m / s.decay1.one_minus_b + s.extra * g

    def parts(self, m: Array, v: Array, v_max: Array | None, s: Any) -> Parts:
        """The parts of the direction, without the part that the gradient itself has."""
        return Parts(divide_by_real(m, s.decay1.one_minus_b), self.root(v, None, s), s.eps)


@value
class ScaleBySimplifiedAdEMAMix(Moments):
    """The direction of the simplified AdEMAMix; see `scale_by_simplified_ademamix`."""

    b1: Scalar = precise_field()
    b2: Scalar = precise_field()
    alpha: ScalarOrSchedule
    eps: Scalar
    eps_root: Scalar
    mu_dtype: MomentFormat = static_field(default=None)
    nu_dtype: MomentFormat = static_field(default=None)
    nesterov: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self._check_numbers("b1", "b2", below=1.0)
        self._check_numbers("eps", "eps_root")
        self._replace_field("alpha", number_or_schedule("alpha", self.alpha))
        self._check_dtypes()

    @property
    def rule(self) -> SimplifiedAdEMAMixRule:
        return SimplifiedAdEMAMixRule()

    def _scalars(self, t: Array) -> AdamScalars:
        return adam_scalars(self, t)._replace(extra=_mixing("alpha", self.alpha, t))


def scale_by_ademamix(
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    b3: ScalarOrSchedule = 0.9999,
    alpha: ScalarOrSchedule = 5.0,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: MomentFormat = None,
    *,
    mu_slow_dtype: MomentFormat = None,
    nu_dtype: MomentFormat = None,
) -> ScaleByAdEMAMix:
    r"""AdEMAMix' direction, :math:`(\hat m + \alpha\, m_s) / (\sqrt{\hat v + \bar\varepsilon} + \varepsilon)`.

    The slow mean :math:`m_s \leftarrow \beta_3 m_s + (1 - \beta_3) g` has no bias correction. Arguments not listed are
    those of `scale_by_adam`.

    Args:
      b3: Decay rate of the slow mean, in [0, 1), or a schedule of it, as `schedules.half_life`: early in training, a
        mean of ten thousand gradients would point to where the parameters were.
      alpha: At least 0: the weight of the slow mean, or a schedule of it, as `schedules.linear`.
      mu_slow_dtype: The storage of the slow mean, as `mu_dtype`. None: at least float32, for one step changes it by
        1e-4 of the gradient, and the random rounding of ten thousand steps adds up: to up to 8 % of it in bfloat16,
        and in 8 or 4 bits to as much as the mean itself, or more.

    Returns:
      A transformation with state `AdEMAMixState`.

    Raises:
      ValueError: A number is out of range, or a dtype is not one that moments can have.
      TypeError: A hyperparameter is not a number.

    References:
      Pagliardini et al., 2024, The AdEMAMix Optimizer: Better, Faster, Older, https://arxiv.org/abs/2409.03137.
    """
    return ScaleByAdEMAMix(b1, b2, b3, alpha, eps, eps_root, mu_dtype, mu_slow_dtype, nu_dtype)


def scale_by_simplified_ademamix(
    b1: Scalar = 0.99,
    b2: Scalar = 0.95,
    alpha: ScalarOrSchedule = 0.0,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    *,
    mu_dtype: MomentFormat = None,
    nu_dtype: MomentFormat = None,
) -> ScaleBySimplifiedAdEMAMix:
    r"""The direction of AdEMAMix with one mean.

    It is :math:`(M + \alpha g) / (\sqrt{\hat v + \bar\varepsilon} + \varepsilon)`.
    The momentum :math:`M \leftarrow \beta_1 M + g` is a sum, up to 1 / (1 - b1) times as large as a mean: so is the
    step. Its state has the mean, (1 - b1) M. Arguments not listed are those of `scale_by_adam`.

    Args:
      b1: Decay rate of the momentum, in [0, 1); 0.999 and more with many steps.
      alpha: At least 0: the weight of the gradient itself, or a schedule of it.

    Returns:
      A transformation with state `AdamState`.

    Raises:
      ValueError: A number is out of range, or a dtype is not one that moments can have.
      TypeError: A hyperparameter is not a number.

    References:
      Morwani et al., 2025, https://arxiv.org/abs/2502.02431.
    """
    return ScaleBySimplifiedAdEMAMix(b1, b2, alpha, eps, eps_root, mu_dtype, nu_dtype)
