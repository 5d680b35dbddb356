"""Schedule-free optimizers."""

from adamjax._core.typing import FusedMode, Mask, Scalar, ScalarOrSchedule
from adamjax._transforms.chain import Chain
from adamjax._transforms.moment_storage import MomentFormat
from adamjax._transforms.schedule_free import ScheduleFreeAdamW
from adamjax.optimizers._parts import chain_or_fused


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
    fused: FusedMode = False,
) -> Chain:
    r"""Schedule-Free AdamW (Defazio et al., 2024): AdamW whose learning rate need not decay, for runs of any length.

    Steps of Adam without a first moment move z, and x is the mean of all z. Gradients are taken at y, between the two,
    and y are the parameters that are trained:

    .. math::

       d_t &= g(y_t) / (\sqrt{\hat v_t} + \varepsilon) + \lambda y_t, \qquad z_{t+1} = z_t - \gamma_t d_t, \\
       x_{t+1} &= (1 - c_{t+1}) x_t + c_{t+1} z_{t+1}, \qquad
       c_{t+1} = w_t / \textstyle\sum_{i \le t} w_i, \qquad w_t = (\max_{i \le t} \gamma_i)^r, \\
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
      fused: See `adam`.

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
    opt = ScheduleFreeAdamW(learning_rate, warmup, b1, b2, eps, weight_decay, weight_lr_power, nu_dtype, mask)
    return chain_or_fused(fused, opt)
