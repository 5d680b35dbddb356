"""RAdam and Adamax: what differs from Adam."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from adamjax._core import checks
from adamjax._core.numerics import Decay, correction, decay, divide, log, sqrt
from adamjax._core.value import static_field, value
from adamjax._transforms.adam import Parts, Scalars, adam_parts, adam_scalars, epsilon, first_moment, second_moment
from adamjax._transforms.moments import Keep, Moments, Step


class RAdamScalars(NamedTuple):
    adam: Scalars
    tractable: Array  # whether the second moment rests on enough gradients to divide by it
    rectifier: Array


def radam_step(g: Array, m: Array, v: Array, v_max: None, s: RAdamScalars, keep: Keep, nesterov: bool) -> Step:
    """One step of one array (Liu et al., 2020, Algorithm 2)."""
    m, m_hat = first_moment(g, m, s.adam, keep, nesterov)
    v, _, v_hat = second_moment(g, v, None, s.adam, keep, None)
    adaptive = s.rectifier * divide(m_hat, sqrt(v_hat + s.adam.eps_root) + s.adam.eps)
    return jnp.where(s.tractable, adaptive, m_hat), m, v, None


def sma_lengths(b: Any, t: Array) -> tuple[Any, Array]:
    """Liu et al.'s rho, the length of the second moment's average: in the end, and at step t.

    2 / (1 - b) - 1 - 2 t b**t / (1 - b**t) is a small difference of numbers as large as 2 / (1 - b).
    With x = -t log(b) and phi(x) = 1 - x / (exp(x) - 1) it is bracket - 2 / log(b) * phi(x), where
    bracket = 2 / (1 - b) - 1 + 2 / log(b), and both have power series where they would cancel.
    """
    _, a, log_b, _, _ = decay("b2", b, t.dtype)
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


class AdamaxScalars(NamedTuple):
    decay1: Decay
    c1: Any
    b2: Any
    eps: Any


def adamax_step(g: Array, m: Array, v: Array, v_max: None, s: AdamaxScalars, keep: Keep) -> Step:
    """One step of one array (Kingma & Ba, 2015, Algorithm 2); `v` is the infinity norm."""
    m, m_hat = first_moment(g, m, s, keep, nesterov=False)
    v = keep.nu(jnp.maximum(s.b2 * v, jnp.abs(g) + s.eps))
    return divide(m_hat, v), m, v, None


@value
class ScaleByRAdam(Moments):
    """RAdam's direction; see `scale_by_radam`."""

    b1: Any
    b2: Any
    eps: Any
    eps_root: Any
    threshold: Any
    mu_dtype: Any = static_field(default=None)
    nu_dtype: Any = static_field(default=None)
    nesterov: bool = static_field(default=False)

    def __post_init__(self) -> None:
        self._check_numbers("b1", "b2", below=1.0)
        self._check_numbers("eps", "eps_root")
        self._check_numbers("threshold", low=4.0)
        self._check_dtypes()
        checks.choice("nesterov", self.nesterov, (False, True))

    def _rule(self) -> tuple[Callable[..., Step], tuple[Any, ...]]:
        return radam_step, (self.nesterov,)

    def _scalars(self, t: Array) -> RAdamScalars:
        longest, length = sma_lengths(self.b2, t)
        tractable = length >= jnp.maximum(checks.scalar("threshold", self.threshold, t.dtype), 4.0)
        # Where it is not, any number does in their place, as long as its root has a slope.
        longest, length = jnp.where(tractable, longest, 6.0), jnp.where(tractable, length, 6.0)
        variance = (length - 4) / (longest - 4) * ((length - 2) / (longest - 2)) * (longest / length)
        return RAdamScalars(adam_scalars(self, t), tractable, jnp.sqrt(variance))

    def parts(self, m: Array, v: Array, v_max: Any, t: Array) -> Parts:
        return adam_parts(m, v, None, self._scalars(t).adam, None)


def scale_by_radam(
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    eps_root: Any = 0.0,
    threshold: Any = 5.0,
    *,
    mu_dtype: Any = None,
    nu_dtype: Any = None,
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


@value
class ScaleByAdamax(Moments):
    """Adamax' direction; see `scale_by_adamax`."""

    b1: Any
    b2: Any
    eps: Any
    mu_dtype: Any = static_field(default=None)
    nu_dtype: Any = static_field(default=None)

    def __post_init__(self) -> None:
        self._check_numbers("b1", "b2", below=1.0)
        self._check_numbers("eps")
        self._check_dtypes()

    def _rule(self) -> tuple[Callable[..., Step], tuple[Any, ...]]:
        return adamax_step, ()

    def _scalars(self, t: Array) -> AdamaxScalars:
        decay1, b2 = decay("b1", self.b1, t.dtype), checks.scalar("b2", self.b2, t.dtype)
        return AdamaxScalars(decay1, correction(t, decay1), b2, epsilon(self.eps, t.dtype))

    def parts(self, m: Array, v: Array, v_max: Any, t: Array) -> Parts:
        s = self._scalars(t)
        return Parts(divide(m, s.c1), jnp.maximum(v - s.eps, 0.0), s.eps)


def scale_by_adamax(
    b1: Any = 0.9, b2: Any = 0.999, eps: Any = 1e-8, *, mu_dtype: Any = None, nu_dtype: Any = None
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
