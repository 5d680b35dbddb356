"""Adam and its kin of 2015 to 2020: chains of transformations that other modules define."""

from adamjax._core import checks
from adamjax._core.typing import AMSGrad, AxisName, DecaySchedule, FusedMode, Mask, Scalar, ScalarOrSchedule
from adamjax._transforms.adam import scale_by_adam
from adamjax._transforms.adamax import scale_by_adamax
from adamjax._transforms.chain import Chain, chain
from adamjax._transforms.learning_rate import ScaleByLearningRate
from adamjax._transforms.moment_storage import MomentFormat
from adamjax._transforms.radam import scale_by_radam
from adamjax._transforms.weight_decay import with_coupled_decay
from adamjax.optimizers._parts import chain_or_fused, decay_like, decoupled_decay

# The arguments are documented where they act: at scale_by_adam, add_decayed_weights and
# scale_by_learning_rate. The docstrings here describe only what differs in an optimizer.


def adam(
    learning_rate: ScalarOrSchedule = 1e-3,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: MomentFormat = None,
    *,
    nu_dtype: MomentFormat = None,
    nesterov: bool = False,
    amsgrad: bool | AMSGrad = False,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: Mask = None,
    maximize: bool = False,
    cautious: bool = False,
    axis_name: AxisName = None,
    fused: FusedMode = False,
) -> Chain:
    """Adam (Kingma & Ba, 2015).

    Args:
      learning_rate: A number or a schedule; see `scale_by_learning_rate`. Each parameter moves by about
        this much per step.
      b1, b2, eps, eps_root, mu_dtype, nu_dtype, nesterov, amsgrad, cautious, axis_name: See `scale_by_adam`.
      weight_decay: A number or a schedule: L2 regularisation, added to the gradient before the
        moments, as in torch.optim.Adam. For decoupled weight decay use `adamw`. Unless it is
        the Python number 0, `update` needs `params`.
      mask: The leaves that `weight_decay` applies to; see `add_decayed_weights`.
      maximize: Ascend instead of descend. The weight decay still pulls towards 0.
      fused: True runs `step` and `update` as one pass over memory, by a compiled kernel, or raises a ValueError if
        it cannot. "auto" warns and falls back to XLA, which needs several passes. See `kernels.Fused`.

    Returns:
      A transformation whose state is a tuple that starts with an `AdamState`.

    Raises:
      ValueError, TypeError: An argument is out of range or of the wrong kind.

    >>> import adamjax, jax, jax.numpy as jnp
    >>> opt = adamjax.adam(0.1)
    >>> opt
    Chain((ScaleByAdam(b1=0.9, b2=0.999, eps=1e-08, eps_root=0.0), ScaleByLearningRate(learning_rate=0.1)))
    >>> params = jnp.array([1.0, -1.0])
    >>> state = opt.init(params)
    >>> params, state = opt.step(jax.grad(lambda p: jnp.sum(p**2))(params), state, params)
    >>> params
    Array([ 0.9, -0.9], dtype=float32)
    """
    moments = scale_by_adam(
        b1, b2, eps, eps_root, mu_dtype,
        nu_dtype=nu_dtype, nesterov=nesterov, amsgrad=amsgrad, cautious=cautious, axis_name=axis_name,
    )  # fmt: skip
    direction = with_coupled_decay(moments, weight_decay, mask, maximize)
    return chain_or_fused(fused, direction, ScaleByLearningRate(learning_rate))


def adamw(
    learning_rate: ScalarOrSchedule = 1e-3,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: MomentFormat = None,
    weight_decay: ScalarOrSchedule = 1e-4,
    mask: Mask = None,
    *,
    nu_dtype: MomentFormat = None,
    nesterov: bool = False,
    amsgrad: bool | AMSGrad = False,
    maximize: bool = False,
    decay_schedule: DecaySchedule = "lr",
    cautious: bool = False,
    cautious_decay: bool = False,
    axis_name: AxisName = None,
    fused: FusedMode = False,
) -> Chain:
    """Adam with decoupled weight decay (Loshchilov & Hutter, 2019).

    Arguments not listed are those of `adam`.

    Args:
      weight_decay: A number or a schedule; see `add_decayed_weights`. The default is optax's;
        torch.optim.AdamW has 1e-2.
      mask: The leaves that decay; see `add_decayed_weights`.
      decay_schedule: The factor of the decay. "lr": the learning rate, so each step subtracts
        lr * weight_decay of a parameter (optax, torch). "independent": only the shape of the
        learning rate's schedule, lr / peak, so that a new learning rate needs no new weight decay;
        with a constant learning rate the factor is 1. A schedule whose peak is unknown raises.
      cautious_decay: If True, a number decays only where that does not oppose its update (Chen et al., 2025);
        see `add_decayed_weights`.

    Returns:
      A transformation whose state is a tuple that starts with an `AdamState`; `update` needs
      `params`.

    Raises:
      ValueError, TypeError: An argument is out of range or of the wrong kind.

    References:
      Loshchilov & Hutter, 2019, https://arxiv.org/abs/1711.05101; Chen et al., 2025, https://arxiv.org/abs/2510.12402.

    >>> import adamjax
    >>> adamjax.adamw(3e-4, weight_decay=0.1).transforms[1:]
    (AddDecayedWeights(weight_decay=0.1), ScaleByLearningRate(learning_rate=0.0003))
    """
    moments = scale_by_adam(
        b1, b2, eps, eps_root, mu_dtype,
        nu_dtype=nu_dtype, nesterov=nesterov, amsgrad=amsgrad, cautious=cautious, axis_name=axis_name,
    )  # fmt: skip
    direction = with_coupled_decay(moments, 0.0, None, maximize)
    if checks.choice("decay_schedule", decay_schedule, ("lr", "independent")) == "lr":
        decay = decoupled_decay(weight_decay, mask, cautious_decay)
        return chain_or_fused(fused, direction, decay, ScaleByLearningRate(learning_rate))
    decay = decoupled_decay(decay_like(learning_rate, weight_decay), mask, cautious_decay, flip_sign=True)
    return chain_or_fused(fused, direction, ScaleByLearningRate(learning_rate), decay)


def amsgrad(
    learning_rate: ScalarOrSchedule = 1e-3,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: MomentFormat = None,
    *,
    nu_dtype: MomentFormat = None,
    nesterov: bool = False,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: Mask = None,
    maximize: bool = False,
    variant: AMSGrad = "torch",
    fused: FusedMode = False,
) -> Chain:
    """Adam with the largest second moment so far (Reddi et al., 2018).

    Arguments not listed are those of `adam`.

    Args:
      variant: "torch", "corrected" (optax's default) or "paper" (optax with `bias_correction_mu` and
        `bias_correction_nu` False); see `amsgrad` of `scale_by_adam`.

    Returns:
      A transformation whose state is a tuple that starts with an `AdamState`.

    Raises:
      ValueError, TypeError: An argument is out of range or of the wrong kind.

    References:
      Reddi et al., 2018, https://openreview.net/forum?id=ryQu7f-RZ.
    """
    checks.choice("variant", variant, ("torch", "corrected", "paper"))
    moments = scale_by_adam(b1, b2, eps, eps_root, mu_dtype, nu_dtype=nu_dtype, nesterov=nesterov, amsgrad=variant)
    direction = with_coupled_decay(moments, weight_decay, mask, maximize)
    return chain_or_fused(fused, direction, ScaleByLearningRate(learning_rate))


def nadam(
    learning_rate: ScalarOrSchedule = 1e-3,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: MomentFormat = None,
    *,
    nu_dtype: MomentFormat = None,
) -> Chain:
    """Adam with Nesterov momentum (Dozat, 2016), as in optax: `b1` is constant.

    Arguments are those of `adam`. torch.optim.NAdam schedules `b1`, which is another algorithm: see
    `adamjax.interop.torch.nadam`.

    Returns:
      A transformation whose state is a tuple that starts with an `AdamState`.

    Raises:
      ValueError, TypeError: An argument is out of range or of the wrong kind.

    References:
      Dozat, 2016, https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ.
    """
    return adam(learning_rate, b1, b2, eps, eps_root, mu_dtype, nu_dtype=nu_dtype, nesterov=True)


def nadamw(
    learning_rate: ScalarOrSchedule = 1e-3,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: MomentFormat = None,
    weight_decay: ScalarOrSchedule = 1e-4,
    mask: Mask = None,
    *,
    nu_dtype: MomentFormat = None,
    cautious: bool = False,
    cautious_decay: bool = False,
    axis_name: AxisName = None,
) -> Chain:
    """`nadam` with decoupled weight decay.

    Arguments are those of `adamw`.

    Returns:
      A transformation whose state is a tuple that starts with an `AdamState`; `update` needs
      `params`.

    Raises:
      ValueError, TypeError: An argument is out of range or of the wrong kind.
    """
    return adamw(
        learning_rate, b1, b2, eps, eps_root, mu_dtype, weight_decay, mask,
        nu_dtype=nu_dtype, nesterov=True, cautious=cautious, cautious_decay=cautious_decay, axis_name=axis_name,
    )  # fmt: skip


def radam(
    learning_rate: ScalarOrSchedule = 1e-3,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    threshold: Scalar = 5.0,
    *,
    nesterov: bool = False,
    mu_dtype: MomentFormat = None,
    nu_dtype: MomentFormat = None,
) -> Chain:
    """Rectified Adam (Liu et al., 2020): starts without the second moment, so it needs no warmup.

    Args:
      learning_rate: A number or a schedule.
      b1, b2, eps, eps_root, threshold, nesterov, mu_dtype, nu_dtype: See `scale_by_radam`.

    Returns:
      A transformation whose state is a tuple that starts with an `AdamState`.

    Raises:
      ValueError, TypeError: An argument is out of range or of the wrong kind.

    References:
      Liu et al., 2020, https://arxiv.org/abs/1908.03265.
    """
    moments = scale_by_radam(b1, b2, eps, eps_root, threshold, mu_dtype=mu_dtype, nu_dtype=nu_dtype, nesterov=nesterov)
    return chain(moments, ScaleByLearningRate(learning_rate))


def adamax(
    learning_rate: ScalarOrSchedule = 1e-3,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    *,
    mu_dtype: MomentFormat = None,
    nu_dtype: MomentFormat = None,
) -> Chain:
    """Adam with the infinity norm in place of the second moment (Kingma & Ba, 2015, section 7.1).

    Args:
      learning_rate: A number or a schedule.
      b1, b2, eps, mu_dtype, nu_dtype: See `scale_by_adamax`.

    Returns:
      A transformation whose state is a tuple that starts with an `AdamState`.

    Raises:
      ValueError, TypeError: An argument is out of range or of the wrong kind.

    References:
      Kingma & Ba, 2015, https://arxiv.org/abs/1412.6980.
    """
    return chain(scale_by_adamax(b1, b2, eps, mu_dtype=mu_dtype, nu_dtype=nu_dtype), ScaleByLearningRate(learning_rate))


def adamaxw(
    learning_rate: ScalarOrSchedule = 1e-3,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    weight_decay: ScalarOrSchedule = 1e-4,
    mask: Mask = None,
    *,
    mu_dtype: MomentFormat = None,
    nu_dtype: MomentFormat = None,
    cautious_decay: bool = False,
) -> Chain:
    """`adamax` with decoupled weight decay.

    Args:
      learning_rate: A number or a schedule.
      b1, b2, eps, mu_dtype, nu_dtype: See `scale_by_adamax`.
      weight_decay, mask: See `add_decayed_weights`.
      cautious_decay: See `adamw`.

    Returns:
      A transformation whose state is a tuple that starts with an `AdamState`; `update` needs
      `params`.

    Raises:
      ValueError, TypeError: An argument is out of range or of the wrong kind.
    """
    return chain(
        scale_by_adamax(b1, b2, eps, mu_dtype=mu_dtype, nu_dtype=nu_dtype),
        decoupled_decay(weight_decay, mask, cautious_decay),
        ScaleByLearningRate(learning_rate),
    )
