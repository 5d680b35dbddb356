"""RAdam: its difference from Adam."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from adamjax._core import checks
from adamjax._core.numerics import decay, log
from adamjax._core.typing import Scalar
from adamjax._core.value import precise_field, static_field, value
from adamjax._transforms.adam import AdamRule, AdamScalars, adam_scalars
from adamjax._transforms.moment_storage import MomentFormat
from adamjax._transforms.moments import Moments


class RAdamRule(AdamRule):
    """The step of one array (Liu et al., 2020, Algorithm 2)."""

    def direction(self, g: Array, m: Array, v: Array, v_max: Array | None, s: Any) -> Array:
        """Adam's direction, rectified; the first moment alone while the second is not tractable."""
        tractable, rectifier = s.extra
        adaptive = rectifier * super().direction(g, m, v, v_max, s)
        return jnp.where(tractable, adaptive, self.m_hat(g, m, s))

    def ratio_base(self, v: Array, v_stored: Callable[[], Array], s: Any) -> Array:
        tractable, _ = s.extra
        return jnp.where(tractable, v, v_stored())  # a first moment that is the direction keeps its size


def sma_lengths(opt: Any, t: Array) -> tuple[Any, Array]:
    """Return Liu et al.'s rho, the length of the average with the `b2` of `opt`: in the end, and at step t.

    2 / (1 - b) - 1 - 2 t b**t / (1 - b**t) is a small difference of numbers as large as 2 / (1 - b).
    With x = -t log(b) and phi(x) = 1 - x / (exp(x) - 1) it is bracket - 2 / log(b) * phi(x), where
    bracket = 2 / (1 - b) - 1 + 2 / log(b), and both have power series where they would cancel.
    """
    _, a, log_b, _, _ = decay(opt, "b2", t.dtype)
    b = opt.b2
    near = 0.5 if t.dtype == jnp.float32 else 0.1
    x = jnp.minimum(-t * log_b, 80.0)  # phi is 1 there; exp, and log(0), would overflow
    series = x * (1 / 2 - x * (1 / 12 - x**2 * (1 / 720 - x**2 * (1 / 30240 - x**2 / 1209600))))
    far = jnp.where(x < near, 1.0, x)
    phi = jnp.where(x < near, series, 1 - far / jnp.expm1(far))
    bracket: Any
    if isinstance(b, float):
        bracket = np.asarray(2 / (1 - b) - 1 + 2 / log(b), t.dtype)
    else:
        series = a * (1 / 6 + a * (1 / 12 + a * (19 / 360 + a * (3 / 80 + a * 863 / 30240))))
        bracket = jnp.where(a < near / 5, series, 2 / a - 1 + 2 / log_b)
    return 2 / a - 1, bracket - 2 / log_b * phi


@value
class ScaleByRAdam(Moments):
    """RAdam's direction; see `scale_by_radam`."""

    b1: Scalar = precise_field()
    b2: Scalar = precise_field()
    eps: Scalar
    eps_root: Scalar
    threshold: Scalar
    mu_dtype: MomentFormat = static_field(default=None)
    nu_dtype: MomentFormat = static_field(default=None)
    nesterov: bool = static_field(default=False)

    def __post_init__(self) -> None:
        self._check_numbers("b1", "b2", below=1.0)
        self._check_numbers("eps", "eps_root")
        self._check_numbers("threshold", low=4.0)
        self._check_dtypes()
        checks.choice("nesterov", self.nesterov, (False, True))

    @property
    def rule(self) -> RAdamRule:
        return RAdamRule(self.nesterov)

    def _scalars(self, t: Array) -> AdamScalars:
        longest, length = sma_lengths(self, t)
        # Whether the second moment rests on enough gradients to divide by it.
        tractable = length >= jnp.maximum(checks.as_scalar("threshold", self.threshold, t.dtype), 4.0)
        # If it is not, any lengths do, as long as the root below has a slope.
        longest, length = jnp.where(tractable, longest, 6.0), jnp.where(tractable, length, 6.0)
        variance = (length - 4) / (longest - 4) * ((length - 2) / (longest - 2)) * (longest / length)
        return adam_scalars(self, t)._replace(extra=(tractable, jnp.sqrt(variance)))


def scale_by_radam(
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    threshold: Scalar = 5.0,
    *,
    mu_dtype: MomentFormat = None,
    nu_dtype: MomentFormat = None,
    nesterov: bool = False,
) -> ScaleByRAdam:
    """Rectified Adam's direction: the first moment alone until the second can be trusted.

    Arguments not listed are those of `scale_by_adam`.

    Args:
      threshold: Length of the second moment's average (in gradients; at least 4) from which on it
        is divided by, with a factor below 1 that makes up for its variance.

    Returns:
      A transformation with state `AdamState`.

    Raises:
      ValueError: A number is out of range, or a dtype is not one that moments can have.
      TypeError: A hyperparameter is not a number.

    References:
      Liu et al., 2020, https://arxiv.org/abs/1908.03265.
    """
    return ScaleByRAdam(b1, b2, eps, eps_root, threshold, mu_dtype, nu_dtype, nesterov)
