"""The Adam rule of one array, and Adam as a transformation."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from adamjax._core import checks, collectives
from adamjax._core.numerics import (
    Decay,
    abs_sq,
    bias_correction,
    clip_finite,
    decay,
    divide_by_real,
    ema,
    largest_square_root,
    sqrt_with_zero_slope,
)
from adamjax._core.typing import AMSGrad, AxisName, Scalar
from adamjax._core.value import precise_field, static_field, value
from adamjax._transforms.moment_storage import MomentFormat
from adamjax._transforms.moments import Moments, Parts
from adamjax._transforms.whole_array import agreeing_part, agreement, agrees


class AdamScalars(NamedTuple):
    """The hyperparameters and bias corrections of step t: 0-d arrays in the dtype of the step."""

    decay1: Decay
    decay2: Decay
    c1: Any  # 1 - b1**t
    c1_next: Any  # 1 - b1**(t + 1), for Nesterov's look ahead
    c2: Any  # 1 - b2**t
    eps: Any
    eps_root: Any
    extra: Any = None  # what another rule needs besides


@dataclass(frozen=True)
class AdamRule:
    """The step of one array (Kingma & Ba, 2015, Algorithm 1); `s` are the `AdamScalars` of the step."""

    nesterov: bool = False
    amsgrad: AMSGrad | None = None
    cautious: bool = False
    axis_name: AxisName = None  # the mapped axes over which a parameter is spread
    power: ClassVar[float] = 0.5  # of a second moment, that has the size of a first one
    has_slow_mean: ClassVar[bool] = False  # whether the third array is a mean of gradients, and not a maximum
    keeps_factor: ClassVar[bool] = False  # whether a later operation multiplies by the factor, if there is one

    def limited(self, g: Array) -> Array:
        """The gradient with which the step is made: finite ones are limited so that the second moment is finite."""
        return clip_finite(g, largest_square_root(g.dtype))

    def accumulate(self, g: Array, m: Array, v: Array, s: Any) -> tuple[Array, Array]:
        return ema(m, g, s.decay1), self.second_moment(g, v, s)

    def second_moment(self, g: Array, v: Array, s: Any) -> Array:
        return ema(v, abs_sq(g), s.decay2)

    def third(self, g: Array, v: Array, third: Array, s: Any) -> Array:
        """The next third array: AMSGrad's running maximum (Reddi et al., 2018)."""
        return jnp.maximum(third, v / s.c2 if self.amsgrad == "corrected" else v)

    def direction(self, g: Array, m: Array, v: Array, v_max: Array | None, s: Any) -> Array:
        m_hat = self.m_hat(g, m, s)
        return divide_by_real(agreeing_part(m_hat, g) if self.cautious else m_hat, self.root(v, v_max, s) + s.eps)

    def m_hat(self, g: Array, m: Array, s: Any) -> Array:
        """The first moment without its bias."""
        if self.nesterov:  # Dozat (2016), with a constant b1
            return s.decay1.b * m / s.c1_next + s.decay1.one_minus_b * g / s.c1
        return m / s.c1

    def root(self, v: Array, v_max: Array | None, s: Any) -> Array:
        """The root of the second moment without its bias."""
        # For "paper" (Reddi et al., 2018), all bias corrections are 1.
        v = v if v_max is None else v_max
        v_hat = v if self.amsgrad == "corrected" else v / s.c2
        return sqrt_with_zero_slope(v_hat + s.eps_root)

    def ratio_base(self, v: Array, v_stored: Callable[[], Array], s: Any) -> Array:
        """The second moment to which codes of a first one are ratios: `v`, or as it is stored, `v_stored()`.

        With `v`, the first moment takes on the rounding of the second, and the direction has none of it.
        """
        return v

    @property
    def has_factor(self) -> bool:
        """Whether the direction is multiplied by a factor that depends on the whole array."""
        return self.cautious

    def factor(self, g: Array, m: Array, v: Array, s: Any) -> Array:
        """The factor of the direction, if it has one, given the new moments."""
        return self.factor_of(jnp.sum(self.factor_terms(g, m, v, s)), g.size)

    def factor_terms(self, g: Array, m: Array, v: Array, s: Any) -> Array:
        """The numbers whose sum the factor is made of."""
        return agrees(self.m_hat(g, m, s), g).astype(g.real.dtype)

    def factor_of(self, total: Array, size: int) -> Array:
        """The factor, given the sum of its terms over the `size` numbers that this device has of a parameter."""
        return agreement(total, size, self.axis_name)

    def parts(self, m: Array, v: Array, v_max: Array | None, s: Any) -> Parts:
        """The parts of the direction; of Nesterov's, without the part that the gradient itself has."""
        return Parts(divide_by_real(m, s.c1), self.root(v, v_max, s), s.eps)


def adam_scalars(opt: Any, t: Array, amsgrad: AMSGrad | None = None) -> AdamScalars:
    """The scalars of step `t`, in its dtype, for an `opt` that has Adam's hyperparameters and `nesterov`."""
    decay1, decay2 = decay(opt, "b1", t.dtype), decay(opt, "b2", t.dtype)
    c1, c2 = bias_correction(t, decay1), bias_correction(t, decay2)
    c1_next = bias_correction(t + 1, decay1) if opt.nesterov else None
    if amsgrad == "paper":
        c1 = c1_next = c2 = jnp.ones_like(t)
    eps_root = checks.as_scalar("eps_root", opt.eps_root, t.dtype)
    return AdamScalars(decay1, decay2, c1, c1_next, c2, epsilon(opt.eps, decay2), eps_root)


def epsilon(eps: Scalar, decay2: Decay) -> Any:
    """The `eps` of a step, at least the size of gradients whose squares are too small for the second moment.

    So a gradient that leaves it 0 gives no larger step than another, and 0 / 0 is 0.
    """
    a: Any = decay2.one_minus_b
    least, eps = (jnp.finfo(a.dtype).tiny / a) ** 0.5, checks.as_scalar("eps", eps, a.dtype)
    return (
        np.maximum(eps, least) if isinstance(eps, np.ndarray) and isinstance(a, np.ndarray) else jnp.maximum(eps, least)
    )


@value
class ScaleByAdam(Moments):
    """Adam's direction; see `scale_by_adam`."""

    b1: Scalar = precise_field()
    b2: Scalar = precise_field()
    eps: Scalar
    eps_root: Scalar
    mu_dtype: MomentFormat = static_field(default=None)
    nu_dtype: MomentFormat = static_field(default=None)
    nesterov: bool = static_field(default=False)
    amsgrad: bool | AMSGrad | None = static_field(default=None)
    cautious: bool = static_field(default=False)
    axis_name: AxisName = static_field(default=None, described=False)

    def __post_init__(self) -> None:
        self._check_numbers("b1", "b2", below=1.0)
        self._check_numbers("eps", "eps_root")
        self._check_dtypes()
        checks.choice("nesterov", self.nesterov, (False, True))
        checks.choice("cautious", self.cautious, (False, True))
        collectives.check_axis_name(self.axis_name)
        variant = checks.choice("amsgrad", self.amsgrad, (None, False, True, "torch", "corrected", "paper"))
        self._replace_field("amsgrad", "torch" if variant is True else variant or None)

    @property
    def columns(self) -> tuple[str, ...]:
        return ("mu", "nu", "nu_max") if self.amsgrad is not None else ("mu", "nu")

    @property
    def rule(self) -> AdamRule:
        amsgrad: Any = self.amsgrad  # normalised by __post_init__
        return AdamRule(self.nesterov, amsgrad, self.cautious, self.axis_name)

    def _scalars(self, t: Array) -> AdamScalars:
        amsgrad: Any = self.amsgrad  # normalised by __post_init__
        return adam_scalars(self, t, amsgrad)


def scale_by_adam(
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: MomentFormat = None,
    *,
    nu_dtype: MomentFormat = None,
    nesterov: bool = False,
    amsgrad: bool | AMSGrad = False,
    cautious: bool = False,
    axis_name: AxisName = None,
) -> ScaleByAdam:
    r"""Adam's direction, :math:`\hat m / (\sqrt{\hat v + \bar\varepsilon} + \varepsilon)`.

    .. math::
        m &\leftarrow m + (1 - \beta_1)(g - m), \qquad v \leftarrow v + (1 - \beta_2)(|g|^2 - v) \\
        \hat m &= m / (1 - \beta_1^t), \qquad \hat v = v / (1 - \beta_2^t)

    Arithmetic is in float32 or wider whatever the dtypes of parameters, gradients and moments.
    Where `b1` and `b2` are Python numbers, :math:`1 - \beta` and :math:`\log\beta` are formed in
    double precision, and as leaves they keep the digits for that. Finite gradients count as at most
    1.27e19 in float32, so that their squares are finite.

    Args:
      b1: Decay rate of the first moment, in [0, 1): the mean of about 1 / (1 - b1) gradients. An array
        that is 1, as 0.9999 is in float16, counts as the number of its dtype below 1; so for `b2`.
      b2: Decay rate of the second moment, in [0, 1). The nearer to 1, the steadier the scale, and
        the longer it takes to follow a change of it: about 1 / (1 - b2) steps.
      eps: At least 0, added to the root: bounds the direction where gradients are tiny. It is
        float32 even for half precision parameters, so 1e-8 does its work there too. It counts
        as at least 1.1e-19 / sqrt(1 - b2), 3.4e-18 by default: smaller gradients leave the second
        moment 0 in float32, and would be divided by `eps` alone.
      eps_root: At least 0, added under the root, as for differentiating through the optimizer. The
        slope at a zero gradient is finite without it.
      mu_dtype: The storage of the first moment: bfloat16, float16, float32, float64, complex64 or
        complex128, or a format of `adamjax.quantized`. None: as the parameter, but at least float32.
        A moment narrower than float32 is rounded stochastically (see `adamjax.storage`), since
        nearest rounding would stop it where one step changes it by less than it can store.
      nu_dtype: The same for the second moment, real.
      nesterov: Look ahead by one step (Dozat, 2016; NAdam with a constant `b1`).
      amsgrad: Divide by the largest second moment so far (Reddi et al., 2018). "torch" (or True):
        the maximum of the raw moments, corrected by this step's bias. "corrected": the maximum of
        the corrected ones, as in optax. "paper": no bias corrections at all.
      cautious: Leave numbers alone whose direction has another sign than their gradient, and take larger steps of the
        others to make up for it: by n / (k + 1) for k of a parameter's n numbers (Liang et al., 2024, Algorithm 1).
      axis_name: For `cautious`, where `update` runs inside `jax.shard_map` or `jax.pmap`: the mapped axis (or axes)
        that parameters are spread over, so that k and n are those of a whole parameter. () if they are whole on each
        device. Sharded arrays under `jax.jit` need none.

    Returns:
      A transformation with state `AdamState`.

    Raises:
      ValueError: A number is out of range, or a dtype or a form of AMSGrad is not one of the above; at the first
        update, if `cautious` needs an `axis_name`.
      TypeError: A hyperparameter is not a number.

    References:
      Kingma & Ba, 2015, https://arxiv.org/abs/1412.6980;
      Dozat, 2016, https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ;
      Reddi et al., 2018, https://openreview.net/forum?id=ryQu7f-RZ;
      Liang et al., 2024, Cautious Optimizers, https://arxiv.org/abs/2411.16085.

    >>> import adamjax, jax.numpy as jnp
    >>> opt = adamjax.scale_by_adam(b1=0.9)
    >>> opt
    ScaleByAdam(b1=0.9, b2=0.999, eps=1e-08, eps_root=0.0)
    >>> state = opt.init(jnp.zeros(2))
    >>> direction, state = opt.update(jnp.array([1e-3, -1e3]), state)
    >>> print(direction.round(3))
    [ 1. -1.]
    """
    return ScaleByAdam(b1, b2, eps, eps_root, mu_dtype, nu_dtype, nesterov, amsgrad, cautious, axis_name)
