"""torch.optim's Adam family, in JAX: the same signatures, defaults, algorithms and numbers.

They differ from the functions of the same names in `adamjax` as torch does from optax: each
parameter counts its own steps, and one whose gradient is None is left out; complex parameters
are pairs of real ones; NAdam follows a schedule of its momentum; RAdam adds eps before it
corrects. Moments of half precision parameters are float32, unlike torch's.

Of torch's arguments, `foreach`, `capturable` and `differentiable` say how torch computes, not what. They are
taken, so that calls can stay as they are, and change nothing. `fused=True` is what it is for `adamjax.adam`.
"""

import math
from typing import Any

from adamjax._core import checks
from adamjax._transforms.adam import scale_by_adam
from adamjax._transforms.adamax import scale_by_adamax
from adamjax._transforms.base import Transformation
from adamjax._transforms.chain import Chain, chain
from adamjax._transforms.learning_rate import ScaleByLearningRate
from adamjax._transforms.weight_decay import AddDecayedWeights, with_coupled_decay
from adamjax.interop._per_parameter import PerParameter
from adamjax.interop._torch_state import export_state as export_state
from adamjax.interop._torch_state import import_state as import_state
from adamjax.interop._torch_variants import NAdamState as NAdamState
from adamjax.interop._torch_variants import ScaleByTorchNAdam, ScaleByTorchRAdam
from adamjax.kernels import Fused


def adam(
    lr: Any = 1e-3,
    betas: tuple[Any, Any] = (0.9, 0.999),
    eps: Any = 1e-8,
    weight_decay: Any = 0,
    amsgrad: bool = False,
    *,
    foreach: bool | None = None,
    maximize: bool = False,
    capturable: bool = False,
    differentiable: bool = False,
    fused: bool | str | None = None,
    decoupled_weight_decay: bool = False,
) -> Chain:
    """torch.optim.Adam.

    Args:
      lr: Learning rate: a number, an array or a schedule of the step count.
      betas: Decay rates of the moments, each in [0, 1).
      eps: At least 0, added to the root of the second moment.
      weight_decay: At least 0; added to the gradient as L2, or `decoupled_weight_decay`.
      amsgrad: Divide by the largest second moment so far, uncorrected before the maximum is taken.
      maximize: Ascend instead of descend.
      decoupled_weight_decay: Shrink the parameters by lr * weight_decay instead.
      fused: True: `step` is one pass over memory, or a ValueError says what cannot be. "auto": where it can be;
        else, after a warning, by XLA. See `adamjax.kernels.Fused`; within the wrappers of `adamjax.rounding`, True is
        refused.
      foreach, capturable, differentiable: Change nothing.

    Returns:
      A transformation whose state is a tuple that starts with a tree of `AdamState`s, one for each
      parameter.

    Raises:
      ValueError: A hyperparameter is out of range, in torch's words; or something else is not as above.

    >>> import adamjax.interop.torch as optim, jax.numpy as jnp
    >>> opt = optim.adam(lr=0.1)
    >>> params = {"w": jnp.ones(2), "b": jnp.zeros(1)}
    >>> state = opt.init(params)
    >>> params, state = opt.step({"w": jnp.ones(2), "b": None}, state, params)
    >>> int(state[0]["w"].count), int(state[0]["b"].count)
    (1, 0)
    """
    b1, b2 = _check(lr, betas, eps, weight_decay)
    _check_flags(amsgrad=amsgrad, decoupled_weight_decay=decoupled_weight_decay)
    checks.choice("fused", fused, (None, False, True, "auto"))
    moments = scale_by_adam(b1, b2, eps, amsgrad=amsgrad)
    return _of_torch(moments, lr, weight_decay, maximize, decoupled_weight_decay, fused)


def adamw(
    lr: Any = 1e-3,
    betas: tuple[Any, Any] = (0.9, 0.999),
    eps: Any = 1e-8,
    weight_decay: Any = 1e-2,
    amsgrad: bool = False,
    *,
    maximize: bool = False,
    foreach: bool | None = None,
    capturable: bool = False,
    differentiable: bool = False,
    fused: bool | str | None = None,
) -> Chain:
    """torch.optim.AdamW: `adam` with decoupled weight decay, of 1e-2 where nothing else is said.

    Arguments, result and errors are those of `adam`.
    """
    return adam(lr, betas, eps, weight_decay, amsgrad, maximize=maximize, decoupled_weight_decay=True, fused=fused)


def nadam(
    lr: Any = 2e-3,
    betas: tuple[Any, Any] = (0.9, 0.999),
    eps: Any = 1e-8,
    weight_decay: Any = 0,
    momentum_decay: Any = 4e-3,
    decoupled_weight_decay: bool = False,
    *,
    foreach: bool | None = None,
    maximize: bool = False,
    capturable: bool = False,
    differentiable: bool = False,
) -> Chain:
    """torch.optim.NAdam: Nesterov momentum whose rate rises from half of betas[0] to all of it.

    Arguments, result and errors are those of `adam`, but for these.

    Args:
      momentum_decay: At least 0: how fast it rises.

    Returns:
      A transformation whose state is a tuple that starts with a tree of `NAdamState`s.
    """
    b1, b2 = _check(lr, betas, eps, weight_decay, momentum_decay=momentum_decay)
    _check_flags(decoupled_weight_decay=decoupled_weight_decay)
    moments = ScaleByTorchNAdam(b1, b2, eps, momentum_decay)
    return _of_torch(moments, lr, weight_decay, maximize, decoupled_weight_decay)


def radam(
    lr: Any = 1e-3,
    betas: tuple[Any, Any] = (0.9, 0.999),
    eps: Any = 1e-8,
    weight_decay: Any = 0,
    decoupled_weight_decay: bool = False,
    *,
    foreach: bool | None = None,
    maximize: bool = False,
    capturable: bool = False,
    differentiable: bool = False,
) -> Chain:
    """torch.optim.RAdam. Arguments, result and errors are those of `adam`."""
    b1, b2 = _check(lr, betas, eps, weight_decay)
    _check_flags(decoupled_weight_decay=decoupled_weight_decay)
    return _of_torch(ScaleByTorchRAdam(b1, b2, eps, 0.0), lr, weight_decay, maximize, decoupled_weight_decay)


def adamax(
    lr: Any = 2e-3,
    betas: tuple[Any, Any] = (0.9, 0.999),
    eps: Any = 1e-8,
    weight_decay: Any = 0,
    foreach: bool | None = None,
    *,
    maximize: bool = False,
    differentiable: bool = False,
    capturable: bool = False,
) -> Chain:
    """torch.optim.Adamax. Arguments, result and errors are those of `adam`."""
    b1, b2 = _check(lr, betas, eps, weight_decay)
    return _of_torch(scale_by_adamax(b1, b2, eps), lr, weight_decay, maximize, False)


def _of_torch(
    moments: Transformation, lr: Any, weight_decay: Any, maximize: bool, decoupled: bool, fused: Any = None
) -> Chain:
    """The chain around `moments`. torch shrinks a parameter before its step, which gives the same sum."""
    direction = with_coupled_decay(moments, 0.0 if decoupled else weight_decay, None, maximize)
    decay = (AddDecayedWeights(weight_decay),) if decoupled else ()
    transforms = (PerParameter(direction), *decay, ScaleByLearningRate(lr))
    return Fused(transforms, fused) if fused else chain(*transforms)


def _check(lr: Any, betas: Any, eps: Any, weight_decay: Any, momentum_decay: Any = 0.0) -> tuple[Any, Any]:
    """Refuse what torch refuses, in its words; the two betas. Arrays and schedules go on unseen."""
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"Invalid betas: {betas!r}, expected a pair of numbers")
    rules = (
        ("learning rate", lr, math.inf),
        ("epsilon value", eps, math.inf),
        ("beta parameter at index 0", betas[0], 1.0),
        ("beta parameter at index 1", betas[1], 1.0),
        ("weight_decay value", weight_decay, math.inf),
        ("momentum_decay value", momentum_decay, math.inf),
    )
    for name, x, below in rules:
        if isinstance(x, (int, float)) and not 0.0 <= x < below:
            raise ValueError(f"Invalid {name}: {x}")
    return tuple(betas)


def _check_flags(**flags: Any) -> None:
    for name, x in flags.items():
        checks.choice(name, x, (False, True))
