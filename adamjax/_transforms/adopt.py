"""ADOPT: its difference from Adam."""

from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jax import Array

from adamjax._core import checks
from adamjax._core.numerics import Decay, decay, divide_by_real, ema, sqrt_with_zero_slope
from adamjax._core.quantization import OF_ITSELF
from adamjax._core.typing import Scalar
from adamjax._core.value import precise_field, static_field, value
from adamjax._transforms.adam import AdamRule, AdamScalars, epsilon
from adamjax._transforms.moment_storage import MomentFormat
from adamjax._transforms.moments import Moments, Parts


class ADOPTRule(AdamRule):
    """The step of one array (Taniguchi et al., 2024, Algorithm 2, with their clipping).

    The first moment is a mean of gradients over roots of the second moments before them: it is the direction.
    """

    power: ClassVar[float] = OF_ITSELF

    def accumulate(self, g: Array, m: Array, v: Array, s: Any) -> tuple[Array, Array]:
        """The new moments; the second one has no part in this step."""
        normalised = divide_by_real(g, jnp.maximum(sqrt_with_zero_slope(v), s.eps))
        size = jnp.abs(normalised)
        # An infinity becomes NaN: limited to a number, it would hide.
        factor = jnp.where(size > s.extra, s.extra / jnp.where(size > s.extra, size, 1), 1)
        return ema(m, factor * normalised, s.decay1), self.second_moment(g, v, s)

    def direction(self, g: Array, m: Array, v: Array, v_max: Array | None, s: Any) -> Array:
        """The first moment."""
        return m

    def parts(self, m: Array, v: Array, v_max: Array | None, s: Any) -> Parts:
        """The parts of the direction: it is divided already."""
        return Parts(m, jnp.ones_like(v), 0.0)


@value
class ScaleByADOPT(Moments):
    """ADOPT's direction; see `scale_by_adopt`."""

    b1: Scalar = precise_field()
    b2: Scalar = precise_field()
    eps: Scalar
    mu_dtype: MomentFormat = static_field(default=None)
    nu_dtype: MomentFormat = static_field(default=None)
    use_clipping: bool = static_field(default=True)

    def __post_init__(self) -> None:
        self._check_numbers("b1", "b2", below=1.0)
        self._check_numbers("eps")
        self._check_dtypes()
        checks.choice("use_clipping", self.use_clipping, (False, True))

    @property
    def rule(self) -> ADOPTRule:
        return ADOPTRule()

    def _scalars(self, t: Array) -> AdamScalars:
        decay1, decay2 = decay(self, "b1", t.dtype), decay(self, "b2", t.dtype)
        is_first = t <= 1
        # The first step only sets the second moment: to the square itself, and the direction to 0.
        now = Decay(*[jnp.where(is_first, first, x) for first, x in zip((0, 1, -np.inf, 0, 0), decay2, strict=True)])
        largest = (t - 1) ** 0.25 if self.use_clipping else jnp.full_like(t, jnp.finfo(t.dtype).max)
        limit = jnp.where(is_first, 0, largest)
        return AdamScalars(decay1, now, None, None, None, epsilon(self.eps, decay2), None, limit)


def scale_by_adopt(
    b1: Scalar = 0.9,
    b2: Scalar = 0.9999,
    eps: Scalar = 1e-6,
    mu_dtype: MomentFormat = None,
    *,
    nu_dtype: MomentFormat = None,
    use_clipping: bool = True,
) -> ScaleByADOPT:
    r"""ADOPT's direction: a mean of gradients, each over the root of the second moment before it.

    .. math::
        m \leftarrow \beta_1 m + (1 - \beta_1)\, g / \max(\sqrt v, \varepsilon), \qquad
        v \leftarrow \beta_2 v + (1 - \beta_2) |g|^2

    So a gradient is not part of what it is divided by, and the method converges with any `b2`. There are no bias
    corrections: the first step sets v to the square of its gradient, and changes no parameter. Arguments not listed
    are those of `scale_by_adam`.

    Args:
      eps: At least 0: the least root.
      use_clipping: Limit each normalised gradient to the fourth root of the number of steps before, as the authors do.

    Returns:
      A transformation with state `AdamState`.

    Raises:
      ValueError: A number is out of range, or a dtype is not one that moments can have.
      TypeError: A hyperparameter is not a number.

    References:
      Taniguchi et al., 2024, https://arxiv.org/abs/2411.02853.
    """
    return ScaleByADOPT(b1, b2, eps, mu_dtype, nu_dtype, use_clipping)
