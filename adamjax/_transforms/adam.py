"""The Adam step of one array, and Adam as a transformation."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from adamjax._core import checks
from adamjax._core.numerics import Decay, abs2, correction, decay, divide, mix, sqrt
from adamjax._core.value import static_field, value
from adamjax._transforms.moments import Keep, Moments, Step


class Parts(NamedTuple):
    """What the direction of one array is made of, for who wants to see it: m_hat / (root + eps)."""

    m_hat: Array
    root: Array
    eps: Any


class Scalars(NamedTuple):
    """The hyperparameters and bias corrections of step t: 0-d arrays in the dtype of the step."""

    decay1: Decay
    decay2: Decay
    c1: Any  # 1 - b1**t
    c1_next: Any  # 1 - b1**(t + 1), where it is looked ahead
    c2: Any  # 1 - b2**t
    eps: Any
    eps_root: Any


def adam_step(
    g: Array, m: Array, v: Array, v_max: Any, s: Scalars, keep: Keep, nesterov: bool, amsgrad: str | None
) -> Step:
    """One step of one array (Kingma & Ba, 2015, Algorithm 1): the direction and the new moments."""
    m, m_hat = first_moment(g, m, s, keep, nesterov)
    v, v_max, v_hat = second_moment(g, v, v_max, s, keep, amsgrad)
    return divide(m_hat, sqrt(v_hat + s.eps_root) + s.eps), m, v, v_max


def first_moment(g: Array, m: Array, s: Any, keep: Keep, nesterov: bool) -> tuple[Array, Array]:
    m = keep.mu(mix(m, g, s.decay1))
    if nesterov:  # Dozat (2016), with a constant b1
        return m, s.decay1.b * m / s.c1_next + s.decay1.a * g / s.c1
    return m, m / s.c1


def second_moment(
    g: Array, v: Array, v_max: Any, s: Scalars, keep: Keep, amsgrad: str | None
) -> tuple[Array, Any, Array]:
    v = keep.nu(mix(v, abs2(g), s.decay2))
    if amsgrad is not None:
        v_max = keep.nu_max(jnp.maximum(v_max, v / s.c2 if amsgrad == "corrected" else v))
    return v, v_max, corrected(v, v_max, s.c2, amsgrad)


def corrected(v: Array, v_max: Any, c2: Any, amsgrad: str | None) -> Array:
    """The second moment that the step divides by."""
    if amsgrad is None:
        return v / c2
    # Else "torch", or "paper" (Reddi et al., 2018), for which all bias corrections are 1.
    return v_max if amsgrad == "corrected" else v_max / c2


def adam_parts(m: Array, v: Array, v_max: Any, s: Scalars, amsgrad: str | None) -> Parts:
    return Parts(divide(m, s.c1), sqrt(corrected(v, v_max, s.c2, amsgrad) + s.eps_root), s.eps)


def adam_scalars(opt: Any, t: Array, amsgrad: str | None = None) -> Scalars:
    """The scalars of step `t`, in its dtype, for an `opt` that has Adam's hyperparameters and `nesterov`."""
    decay1, decay2 = decay("b1", opt.b1, t.dtype), decay("b2", opt.b2, t.dtype)
    c1, c2 = correction(t, decay1), correction(t, decay2)
    c1_next = correction(t + 1, decay1) if opt.nesterov else None
    if amsgrad == "paper":
        c1 = c1_next = c2 = jnp.ones_like(t)
    eps_root = checks.scalar("eps_root", opt.eps_root, t.dtype)
    return Scalars(decay1, decay2, c1, c1_next, c2, epsilon(opt.eps, t.dtype), eps_root)


def epsilon(eps: Any, dtype: np.dtype) -> Any:
    """Not less than the root of the smallest number: where gradients have no squares, 0 / 0 is 0."""
    least, eps = float(jnp.finfo(dtype).tiny) ** 0.5, checks.scalar("eps", eps, dtype)
    return np.maximum(eps, np.asarray(least, dtype)) if isinstance(eps, np.ndarray) else jnp.maximum(eps, least)


@value
class ScaleByAdam(Moments):
    """Adam's direction; see `scale_by_adam`."""

    b1: Any
    b2: Any
    eps: Any
    eps_root: Any
    mu_dtype: Any = static_field(default=None)
    nu_dtype: Any = static_field(default=None)
    nesterov: bool = static_field(default=False)
    amsgrad: Any = static_field(default=None)

    def __post_init__(self) -> None:
        self._check_numbers("b1", "b2", below=1.0)
        self._check_numbers("eps", "eps_root")
        self._check_dtypes()
        checks.choice("nesterov", self.nesterov, (False, True))
        form = checks.choice("amsgrad", self.amsgrad, (None, False, True, "torch", "corrected", "paper"))
        self._replace_field("amsgrad", "torch" if form is True else form or None)

    @property
    def keeps_maximum(self) -> bool:
        return self.amsgrad is not None

    def _rule(self) -> tuple[Callable[..., Step], tuple[Any, ...]]:
        return adam_step, (self.nesterov, self.amsgrad)

    def _scalars(self, t: Array) -> Scalars:
        return adam_scalars(self, t, self.amsgrad)

    def parts(self, m: Array, v: Array, v_max: Any, t: Array) -> Parts:
        return adam_parts(m, v, v_max, self._scalars(t), self.amsgrad)


def scale_by_adam(
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    eps_root: Any = 0.0,
    mu_dtype: Any = None,
    *,
    nu_dtype: Any = None,
    nesterov: bool = False,
    amsgrad: bool | str = False,
) -> ScaleByAdam:
    r"""Adam's direction, :math:`\hat m / (\sqrt{\hat v + \bar\varepsilon} + \varepsilon)`.

    .. math::
        m &\leftarrow m + (1 - \beta_1)(g - m), \qquad v \leftarrow v + (1 - \beta_2)(|g|^2 - v) \\
        \hat m &= m / (1 - \beta_1^t), \qquad \hat v = v / (1 - \beta_2^t)

    Arithmetic is in float32 or wider whatever the dtypes of parameters, gradients and moments.
    Where `b1` and `b2` are Python numbers, :math:`1 - \beta` and :math:`\log\beta` are formed in
    double precision. For the best accuracy leave them numbers; as traced leaves they are float32.

    Args:
      b1: Decay rate of the first moment, in [0, 1): the mean of about 1 / (1 - b1) gradients.
      b2: Decay rate of the second moment, in [0, 1). The nearer to 1, the steadier the scale, and
        the longer it takes to follow a change of it: about 1 / (1 - b2) steps.
      eps: At least 0, added to the root: bounds the direction where gradients are tiny. It is
        float32 even for half precision parameters, so 1e-8 does its work there too. Below 1e-19,
        it counts as that: no smaller gradient has a square in float32, and 0 / 0 would be NaN.
      eps_root: At least 0, added under the root, as for differentiating through the optimizer. The
        slope at a zero gradient is finite without it.
      mu_dtype: How the first moment is stored: bfloat16, float16, float32, float64, complex64 or
        complex128, or a format of `adamjax.quantized`. None: as the parameter, but at least float32.
        What is narrower than float32 is rounded stochastically (see `adamjax.storage`), since
        nearest rounding would stop a moment where one step changes it by less than it can store.
      nu_dtype: The same for the second moment, real.
      nesterov: Look ahead by one step (Dozat, 2016; NAdam with a constant `b1`).
      amsgrad: Divide by the largest second moment so far (Reddi et al., 2018). "torch" (or True):
        the maximum of the raw moments, corrected by this step's bias. "corrected": the maximum of
        the corrected ones, as in optax. "paper": no bias corrections at all.

    Returns:
      A transformation with state `AdamState`.

    Raises:
      ValueError: A number is out of range, or a dtype or a form of AMSGrad is not one of the above.
      TypeError: A hyperparameter is not a number.

    References:
      Kingma & Ba, 2015, https://arxiv.org/abs/1412.6980;
      Dozat, 2016, https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ;
      Reddi et al., 2018, https://openreview.net/forum?id=ryQu7f-RZ.

    >>> import adamjax, jax.numpy as jnp
    >>> opt = adamjax.scale_by_adam(b1=0.9)
    >>> opt
    ScaleByAdam(b1=0.9, b2=0.999, eps=1e-08, eps_root=0.0)
    >>> state = opt.init(jnp.zeros(2))
    >>> direction, state = opt.update(jnp.array([1e-3, -1e3]), state)
    >>> print(direction.round(3))
    [ 1. -1.]
    """
    return ScaleByAdam(b1, b2, eps, eps_root, mu_dtype, nu_dtype, nesterov, amsgrad)
