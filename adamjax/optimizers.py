"""The optimizers: chains of transformations that other modules define."""

from typing import Any

from adamjax._core import checks
from adamjax._core.typing import AMSGrad, DecaySchedule, FusedMode, Mask, Scalar, ScalarOrSchedule
from adamjax._transforms.adam import scale_by_adam
from adamjax._transforms.adamax import scale_by_adamax
from adamjax._transforms.base import Transformation
from adamjax._transforms.chain import Chain, chain
from adamjax._transforms.learning_rate import ScaleByLearningRate
from adamjax._transforms.moment_storage import MomentFormat
from adamjax._transforms.radam import scale_by_radam
from adamjax._transforms.schedule import number_or_schedule
from adamjax._transforms.schedule_free import ScheduleFreeAdamW
from adamjax._transforms.weight_decay import AddDecayedWeights, with_coupled_decay
from adamjax.kernels import Fused
from adamjax.schedules import Proportional, as_schedule

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
    fused: FusedMode = False,
) -> Chain:
    """Adam (Kingma & Ba, 2015).

    Args:
      learning_rate: A number or a schedule; see `scale_by_learning_rate`. Each parameter moves by about
        this much per step.
      b1, b2, eps, eps_root, mu_dtype, nu_dtype, nesterov, amsgrad: See `scale_by_adam`.
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
    moments = scale_by_adam(b1, b2, eps, eps_root, mu_dtype, nu_dtype=nu_dtype, nesterov=nesterov, amsgrad=amsgrad)
    direction = with_coupled_decay(moments, weight_decay, mask, maximize)
    return _chain_or_fused(fused, direction, ScaleByLearningRate(learning_rate))


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
    cautious_decay: bool = False,
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
    moments = scale_by_adam(b1, b2, eps, eps_root, mu_dtype, nu_dtype=nu_dtype, nesterov=nesterov, amsgrad=amsgrad)
    direction = with_coupled_decay(moments, 0.0, None, maximize)
    if checks.choice("decay_schedule", decay_schedule, ("lr", "independent")) == "lr":
        decay = _decay(weight_decay, mask, cautious_decay)
        return _chain_or_fused(fused, direction, decay, ScaleByLearningRate(learning_rate))
    decay = _decay(_decay_like(learning_rate, weight_decay), mask, cautious_decay, flip_sign=True)
    return _chain_or_fused(fused, direction, ScaleByLearningRate(learning_rate), decay)


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
    return _chain_or_fused(fused, direction, ScaleByLearningRate(learning_rate))


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
    cautious_decay: bool = False,
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
        nu_dtype=nu_dtype, nesterov=True, cautious_decay=cautious_decay,
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
        _decay(weight_decay, mask, cautious_decay),
        ScaleByLearningRate(learning_rate),
    )


def schedule_free_adamw(
    learning_rate: ScalarOrSchedule = 0.0025,
    warmup_steps: Scalar | None = None,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    weight_decay: ScalarOrSchedule = 0.0,
    weight_lr_power: Scalar = 2.0,
    *,
    nu_dtype: MomentFormat = None,
    mask: Mask = None,
) -> Chain:
    r"""Schedule-Free AdamW (Defazio et al., 2024): AdamW whose learning rate need not decay, for runs of any length.

    Steps of Adam without a first moment move z, and x is the mean of all z. Gradients are taken at y, between the two,
    and y are the parameters that are trained:

    .. math::

       d_t &= g(y_t) / (\sqrt{\hat v_t} + arepsilon) + \lambda y_t, \qquad z_{t+1} = z_t - \gamma_t d_t, \
       x_{t+1} &= (1 - c_{t+1}) x_t + c_{t+1} z_{t+1}, \qquad
       c_{t+1} = w_t / 	extstyle\sum_{i \le t} w_i, \qquad w_t = (\max_{i \le t} \gamma_i)^r, \
       y_{t+1} &= (1 - b_1) z_{t+1} + b_1 x_{t+1}.

    Evaluate at x, by `eval_params(state, params)`: at y, a model is worse, and nothing else says so. `training.train`
    and `tuning` do this by themselves. The state holds z and the second moment, as much as Adam's.

    Args:
      learning_rate: A number, best the whole run long, and larger than Adam's. A schedule is possible: the weights
        :math:`w_t` follow it.
      warmup_steps: The steps in which the learning rate rises linearly to its value, which it has from step
        `warmup_steps` on; None or 0 for none. As in the authors' code, step t (from 1) has t / warmup_steps of it;
        optax's begins with a step of 0.
      b1: The part of x in y, above 0 and below 1. Long runs may want 0.95 or 0.98.
      b2, eps, nu_dtype: See `scale_by_adam`. z is never less than float32.
      weight_decay: A number or a schedule: added to the direction as a multiple of y, and so scaled by the learning
        rate.
      weight_lr_power: The power r, at least 0.
      mask: The leaves that decay; see `add_decayed_weights`.

    Returns:
      A transformation whose state is a tuple of a `ScheduleFreeState`; `update` needs `params`. In a chain it must be
      the last. Of half precision parameters, wrap it in `master_weights`: rounding y moves x.

    Raises:
      ValueError, TypeError: An argument is out of range or of the wrong kind.

    References:
      Defazio et al., 2024, https://arxiv.org/abs/2405.15682.

    >>> import adamjax, jax, jax.numpy as jnp
    >>> opt = adamjax.schedule_free_adamw(0.1, warmup_steps=5)
    >>> params = jnp.array([1.0, -1.0])
    >>> state = opt.init(params)
    >>> for _ in range(60):
    ...     params, state = opt.step(jax.grad(lambda p: jnp.sum(p**2))(params), state, params)
    >>> bool(jnp.all(jnp.abs(adamjax.eval_params(state, params)) < 0.1))
    True
    """
    warmup = 0.0 if warmup_steps is None else warmup_steps
    return chain(ScheduleFreeAdamW(learning_rate, warmup, b1, b2, eps, weight_decay, weight_lr_power, nu_dtype, mask))


def _chain_or_fused(fused: FusedMode, *transforms: Transformation) -> Chain:
    checks.choice("fused", fused, (False, True, "auto"))
    return Fused(transforms, fused) if fused else chain(*transforms)


def _decay(weight_decay: ScalarOrSchedule, mask: Mask, cautious: bool, *, flip_sign: bool = False) -> AddDecayedWeights:
    checks.choice("cautious_decay", cautious, (False, True))
    return AddDecayedWeights(number_or_schedule("weight_decay", weight_decay), mask, flip_sign, cautious)


def _decay_like(learning_rate: ScalarOrSchedule, weight_decay: ScalarOrSchedule) -> ScalarOrSchedule:
    if not callable(learning_rate):
        return weight_decay
    schedule: Any = as_schedule(learning_rate)
    if not hasattr(schedule, "peak"):
        raise ValueError(
            f"decay_schedule='independent' needs the peak of the learning rate, and {learning_rate!r} has none: "
            "use one of adamjax.schedules, or decay_schedule='lr'"
        )
    level: Any = number_or_schedule("weight_decay", weight_decay)
    return Proportional(level, schedule)
