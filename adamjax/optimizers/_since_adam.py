"""Optimizers that came after Adam and have evidence: chains of transformations that other modules define."""

from adamjax._core.typing import AxisName, FusedMode, Mask, Scalar, ScalarOrSchedule
from adamjax._transforms.ademamix import scale_by_ademamix, scale_by_simplified_ademamix
from adamjax._transforms.adopt import scale_by_adopt
from adamjax._transforms.atan2 import scale_by_adam_atan2
from adamjax._transforms.base import Transformation
from adamjax._transforms.chain import Chain
from adamjax._transforms.learning_rate import ScaleByLearningRate
from adamjax._transforms.moment_storage import MomentFormat
from adamjax._transforms.stable import scale_by_stable_adam
from adamjax.optimizers._parts import chain_or_fused, decoupled_decay, without_zero


def ademamix(
    learning_rate: ScalarOrSchedule = 1e-3,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    b3: ScalarOrSchedule = 0.9999,
    alpha: ScalarOrSchedule = 5.0,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: MomentFormat = None,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: Mask = None,
    *,
    mu_slow_dtype: MomentFormat = None,
    nu_dtype: MomentFormat = None,
    cautious_decay: bool = False,
    fused: FusedMode = False,
) -> Chain:
    """AdamW with a second, slow mean of the gradients beside the first (Pagliardini et al., 2024).

    The defaults are optax's and the authors'. For runs of N steps, the authors begin both `b3` and `alpha` low:
    ``b3=schedules.half_life(0.9, 0.9999, N)``, ``alpha=schedules.linear(0, 5, N)``; for short ones, a `b3` of 0.999.

    Args:
      learning_rate: A number or a schedule; see `scale_by_learning_rate`.
      b1, b2, b3, alpha, eps, eps_root, mu_dtype, mu_slow_dtype, nu_dtype: See `scale_by_ademamix`.
      weight_decay, mask, cautious_decay, fused: See `adamw` and `adam`.

    Returns:
      A transformation whose state is a tuple that starts with an `AdEMAMixState`; with weight decay, `update` needs
      `params`.

    Raises:
      ValueError, TypeError: An argument is out of range or of the wrong kind.

    References:
      Pagliardini et al., 2024, https://arxiv.org/abs/2409.03137.

    >>> import adamjax
    >>> opt = adamjax.ademamix(1e-3, b3=adamjax.schedules.half_life(0.9, 0.9999, 1000))
    >>> [round(float(opt.transforms[0].b3(t)), 4) for t in (0, 500, 1000)]
    [0.9, 0.9998, 0.9999]
    """
    moments = scale_by_ademamix(
        b1, b2, b3, alpha, eps, eps_root, mu_dtype, mu_slow_dtype=mu_slow_dtype, nu_dtype=nu_dtype
    )
    return _decayed(moments, weight_decay, mask, cautious_decay, learning_rate, fused)


def simplified_ademamix(
    learning_rate: ScalarOrSchedule = 1e-5,
    b1: Scalar = 0.99,
    b2: Scalar = 0.95,
    alpha: ScalarOrSchedule = 0.0,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: Mask = None,
    *,
    mu_dtype: MomentFormat = None,
    nu_dtype: MomentFormat = None,
    cautious_decay: bool = False,
    fused: FusedMode = False,
) -> Chain:
    """AdEMAMix with one mean (Morwani et al., 2025), as in optax.contrib.

    The momentum is a sum of gradients: with the same learning rate, a step is 1 / (1 - b1) + alpha times as long as
    Adam's, so the default is a hundredth of that.

    Args:
      learning_rate: A number or a schedule; see `scale_by_learning_rate`.
      b1, b2, alpha, eps, eps_root, mu_dtype, nu_dtype: See `scale_by_simplified_ademamix`.
      weight_decay, mask, cautious_decay, fused: See `adamw` and `adam`.

    Returns:
      A transformation whose state is a tuple that starts with an `AdamState`; with weight decay, `update` needs
      `params`.

    Raises:
      ValueError, TypeError: An argument is out of range or of the wrong kind.

    References:
      Morwani et al., 2025, https://arxiv.org/abs/2502.02431.
    """
    moments = scale_by_simplified_ademamix(b1, b2, alpha, eps, eps_root, mu_dtype=mu_dtype, nu_dtype=nu_dtype)
    return _decayed(moments, weight_decay, mask, cautious_decay, learning_rate, fused)


def adopt(
    learning_rate: ScalarOrSchedule = 1e-3,
    b1: Scalar = 0.9,
    b2: Scalar = 0.9999,
    eps: Scalar = 1e-6,
    mu_dtype: MomentFormat = None,
    *,
    use_clipping: bool = True,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: Mask = None,
    nu_dtype: MomentFormat = None,
    cautious_decay: bool = False,
    fused: FusedMode = False,
) -> Chain:
    """Adam whose gradient is no part of its own second moment (Taniguchi et al., 2024).

    The first step changes no parameter, but by weight decay.

    Args:
      learning_rate: A number or a schedule; see `scale_by_learning_rate`.
      b1, b2, eps, mu_dtype, nu_dtype, use_clipping: See `scale_by_adopt`.
      weight_decay, mask, cautious_decay, fused: See `adamw` and `adam`.

    Returns:
      A transformation whose state is a tuple that starts with an `AdamState`; with weight decay, `update` needs
      `params`.

    Raises:
      ValueError, TypeError: An argument is out of range or of the wrong kind.

    References:
      Taniguchi et al., 2024, https://arxiv.org/abs/2411.02853.
    """
    moments = scale_by_adopt(b1, b2, eps, mu_dtype, nu_dtype=nu_dtype, use_clipping=use_clipping)
    return _decayed(moments, weight_decay, mask, cautious_decay, learning_rate, fused)


def adam_atan2(
    learning_rate: ScalarOrSchedule = 1e-4,
    b1: Scalar = 0.9,
    b2: Scalar = 0.99,
    a: Scalar = 1.27,
    b: Scalar = 1.0,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: Mask = None,
    *,
    mu_dtype: MomentFormat = None,
    nu_dtype: MomentFormat = None,
    nesterov: bool = False,
    cautious_decay: bool = False,
    fused: FusedMode = False,
) -> Chain:
    """AdamW without eps: the arctangent of the quotient (Everett et al., 2024).

    The defaults are those of the package adam-atan2-pytorch.

    Args:
      learning_rate: A number or a schedule; see `scale_by_learning_rate`.
      b1, b2, a, b, mu_dtype, nu_dtype, nesterov: See `scale_by_adam_atan2`.
      weight_decay, mask, cautious_decay, fused: See `adamw` and `adam`.

    Returns:
      A transformation whose state is a tuple that starts with an `AdamState`; with weight decay, `update` needs
      `params`.

    Raises:
      ValueError, TypeError: An argument is out of range or of the wrong kind.

    References:
      Everett et al., 2024, https://arxiv.org/abs/2407.05872.
    """
    moments = scale_by_adam_atan2(b1, b2, a, b, mu_dtype=mu_dtype, nu_dtype=nu_dtype, nesterov=nesterov)
    return _decayed(moments, weight_decay, mask, cautious_decay, learning_rate, fused)


def stable_adamw(
    learning_rate: ScalarOrSchedule = 1e-3,
    b1: Scalar = 0.9,
    b2: Scalar = 0.99,
    eps: Scalar = 1e-6,
    mu_dtype: MomentFormat = None,
    weight_decay: ScalarOrSchedule = 1e-2,
    mask: Mask = None,
    *,
    nu_dtype: MomentFormat = None,
    axis_name: AxisName = None,
    fused: FusedMode = False,
) -> Chain:
    """AdamW that steps less far where gradients outgrow their second moment (Wortsman et al., 2023).

    The learning rate of a parameter, also that of its weight decay, is divided by the root mean square of g / sqrt(v)
    over it, if that is above 1. The defaults are those of the package optimi.

    Args:
      learning_rate: A number or a schedule; see `scale_by_learning_rate`.
      b1, b2, eps, mu_dtype, weight_decay, mask, nu_dtype, axis_name: See `scale_by_stable_adam`.
      fused: See `adam`.

    Returns:
      A transformation whose state is a tuple that starts with an `AdamState`; with weight decay, `update` needs
      `params`.

    Raises:
      ValueError, TypeError: An argument is out of range or of the wrong kind.

    References:
      Wortsman et al., 2023, https://arxiv.org/abs/2304.13013.
    """
    moments = scale_by_stable_adam(b1, b2, eps, mu_dtype, weight_decay, mask, nu_dtype=nu_dtype, axis_name=axis_name)
    return chain_or_fused(fused, moments, ScaleByLearningRate(learning_rate))


def _decayed(
    moments: Transformation,
    weight_decay: ScalarOrSchedule,
    mask: Mask,
    cautious_decay: bool,
    learning_rate: ScalarOrSchedule,
    fused: FusedMode,
) -> Chain:
    decay = decoupled_decay(weight_decay, mask, cautious_decay)
    return chain_or_fused(fused, moments, *without_zero(decay), ScaleByLearningRate(learning_rate))
