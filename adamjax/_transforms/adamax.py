"""Adamax: its difference from Adam."""

from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array

from adamjax._core.numerics import bias_correction, clip_finite, decay, divide_by_real, ema
from adamjax._core.typing import Scalar
from adamjax._core.value import precise_field, static_field, value
from adamjax._transforms.adam import AdamRule, AdamScalars, epsilon
from adamjax._transforms.moment_storage import MomentFormat
from adamjax._transforms.moments import Moments


class AdamaxRule(AdamRule):
    """The step of one array (Kingma & Ba, 2015, Algorithm 2); `v` is the infinity norm."""

    power: ClassVar[float] = 1.0

    def limited(self, g: Array) -> Array:
        """The gradient, limited so that differences of two are finite."""
        return clip_finite(g, float(jnp.finfo(g.dtype).max) / 4)

    def accumulate(self, g: Array, m: Array, v: Array, s: Any) -> tuple[Array, Array]:
        """The new first moment, and the decaying maximum of the magnitudes."""
        return ema(m, g, s.decay1), jnp.maximum(s.decay2.b * v, jnp.abs(g) + s.eps)

    def direction(self, g: Array, m: Array, v: Array, v_max: Array | None, s: Any) -> Array:
        """The direction; the norm needs no root, and holds eps already."""
        return divide_by_real(self.m_hat(g, m, s), v)

    def root(self, v: Array, v_max: Array | None, s: Any) -> Array:
        """The norm without eps."""
        return jnp.maximum(v - s.eps, 0.0)


@value
class ScaleByAdamax(Moments):
    """Adamax' direction; see `scale_by_adamax`."""

    b1: Scalar = precise_field()
    b2: Scalar = precise_field()
    eps: Scalar
    mu_dtype: MomentFormat = static_field(default=None)
    nu_dtype: MomentFormat = static_field(default=None)

    def __post_init__(self) -> None:
        self._check_numbers("b1", "b2", below=1.0)
        self._check_numbers("eps")
        self._check_dtypes()

    @property
    def rule(self) -> AdamaxRule:
        return AdamaxRule()

    def _scalars(self, t: Array) -> AdamScalars:
        decay1, decay2 = decay(self, "b1", t.dtype), decay(self, "b2", t.dtype)
        return AdamScalars(decay1, decay2, bias_correction(t, decay1), None, None, epsilon(self.eps, decay2), None)


def scale_by_adamax(
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    *,
    mu_dtype: MomentFormat = None,
    nu_dtype: MomentFormat = None,
) -> ScaleByAdamax:
    """Adamax' direction: the first moment over a decaying maximum of the gradients' magnitudes.

    Arguments are those of `scale_by_adam`, but for these.

    Args:
      b2: Decay rate of the maximum, in [0, 1).
      eps: At least 0, added to each magnitude.

    Returns:
      A transformation with state `AdamState`, whose `nu` holds the maxima.

    Raises:
      ValueError: A number is out of range, or a dtype is not one that moments can have.
      TypeError: A hyperparameter is not a number.

    References:
      Kingma & Ba, 2015, section 7.1, https://arxiv.org/abs/1412.6980.
    """
    return ScaleByAdamax(b1, b2, eps, mu_dtype, nu_dtype)
