"""Adam-atan2: its difference from Adam."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from adamjax._core import checks
from adamjax._core.typing import Scalar
from adamjax._core.value import precise_field, static_field, value
from adamjax._transforms.adam import AdamRule, AdamScalars, adam_scalars
from adamjax._transforms.moment_storage import MomentFormat
from adamjax._transforms.moments import Moments


class AdamAtan2Rule(AdamRule):
    """The step of one array (Everett et al., 2024, section 4.4)."""

    def direction(self, g: Array, m: Array, v: Array, v_max: Array | None, s: Any) -> Array:
        """The angle between the first moment and the root of the second, times a factor."""
        a, b = s.extra
        # The least eps keeps gradients whose squares are 0 from larger steps than others.
        return a * _atan2(self.m_hat(g, m, s), b * (self.root(v, v_max, s) + s.eps))


def _atan2(y: Array, x: Array) -> Array:
    """The angle of (x, y) for x at least 0; of a complex y, that of each part."""
    if jnp.iscomplexobj(y):
        return jax.lax.complex(_atan2(y.real, x), _atan2(y.imag, x))
    # Of two infinities there is an angle, in which an infinite gradient would hide.
    return jnp.where(x < jnp.inf, jnp.arctan2(y, x), jnp.nan)


@value
class ScaleByAdamAtan2(Moments):
    """The direction of Adam-atan2; see `scale_by_adam_atan2`."""

    b1: Scalar = precise_field()
    b2: Scalar = precise_field()
    a: Scalar
    b: Scalar
    mu_dtype: MomentFormat = static_field(default=None)
    nu_dtype: MomentFormat = static_field(default=None)
    nesterov: bool = static_field(default=False)
    eps: ClassVar[float] = 0.0
    eps_root: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        self._check_numbers("b1", "b2", below=1.0)
        self._check_numbers("a", "b")
        self._check_dtypes()
        checks.choice("nesterov", self.nesterov, (False, True))

    @property
    def rule(self) -> AdamAtan2Rule:
        return AdamAtan2Rule(self.nesterov)

    def _scalars(self, t: Array) -> AdamScalars:
        extra = tuple([checks.as_scalar(name, getattr(self, name), t.dtype) for name in ("a", "b")])
        return adam_scalars(self, t)._replace(extra=extra)


def scale_by_adam_atan2(
    b1: Scalar = 0.9,
    b2: Scalar = 0.99,
    a: Scalar = 1.27,
    b: Scalar = 1.0,
    *,
    mu_dtype: MomentFormat = None,
    nu_dtype: MomentFormat = None,
    nesterov: bool = False,
) -> ScaleByAdamAtan2:
    r"""Adam's direction without eps, :math:`a \arctan(\hat m / (b \sqrt{\hat v}))`.

    It depends on the signs and ratios of gradients only, whatever their size, down to the smallest whose squares
    float32 holds (see `eps` of `scale_by_adam`), and is at most :math:`a \pi / 2`. Arguments not listed are those of
    `scale_by_adam`.

    Args:
      a: At least 0: the factor of the angle. 1.27 makes the step of a steady gradient 1, as Adam's is.
      b: At least 0: the factor of the root. With a larger one, the arctangent is nearer to Adam's quotient.

    Returns:
      A transformation with state `AdamState`.

    Raises:
      ValueError: A number is out of range, or a dtype is not one that moments can have.
      TypeError: A hyperparameter is not a number.

    References:
      Everett et al., 2024, Scaling Exponents Across Parameterizations and Optimizers, https://arxiv.org/abs/2407.05872.
    """
    return ScaleByAdamAtan2(b1, b2, a, b, mu_dtype, nu_dtype, nesterov)
