"""torch.optim's Adam family in JAX: the same signatures, defaults, algorithms and numbers.

These functions differ from those of the same names in `adamjax` as torch differs from optax. Each parameter counts its
own steps, and is skipped while its gradient is None; complex parameters are treated as pairs of real ones; NAdam
schedules its momentum; RAdam adds eps before it corrects the bias. Unlike in torch, no moments are in half precision.

torch's arguments `foreach`, `capturable` and `differentiable` select an implementation, not an algorithm. They
are accepted, so that calls need no changes, and ignored. `fused=True` means the same as for `adamjax.adam`.
"""

import math

from adamjax._core import checks
from adamjax._core.typing import FusedMode, Scalar, ScalarOrSchedule
from adamjax._transforms.adam import scale_by_adam
from adamjax._transforms.adamax import scale_by_adamax
from adamjax._transforms.base import Leafwise
from adamjax._transforms.chain import Chain, chain
from adamjax._transforms.learning_rate import ScaleByLearningRate
from adamjax._transforms.weight_decay import AddDecayedWeights, with_coupled_decay
from adamjax.interop._per_parameter import PerParameter
from adamjax.interop._torch_state import export_state as export_state
from adamjax.interop._torch_state import import_state as import_state
from adamjax.interop._torch_variants import NAdamState as NAdamState
from adamjax.interop._torch_variants import ScaleByTorchNAdam, ScaleByTorchRAdam
from adamjax.kernels import Fused

Betas = tuple[Scalar, Scalar]


def adam(
    lr: ScalarOrSchedule = 1e-3,
    betas: Betas = (0.9, 0.999),
    eps: Scalar = 1e-8,
    weight_decay: ScalarOrSchedule = 0,
    amsgrad: bool = False,
    *,
    foreach: bool | None = None,
    maximize: bool = False,
    capturable: bool = False,
    differentiable: bool = False,
    fused: FusedMode | None = None,
    decoupled_weight_decay: bool = False,
) -> Chain:
    """torch.optim.Adam.

    Args:
      lr: The learning rate: a number, an array or a schedule of the step count.
      betas: The decay rates of the moments, each in [0, 1).
      eps: A number of at least 0, added to the root of the second moment.
      weight_decay: A number of at least 0: L2 regularisation, added to the gradient, or see `decoupled_weight_decay`.
      amsgrad: Divide by the largest second moment so far; take the maximum before bias correction.
      maximize: Ascend instead of descend.
      decoupled_weight_decay: Shrink the parameters by lr * weight_decay instead of adding L2 to the gradient.
      fused: True runs `step` and `update` as one pass over memory, or raises a ValueError if it cannot. "auto" warns
        and falls back to XLA. See `adamjax.kernels.Fused`.
      foreach, capturable, differentiable: Ignored.

    Returns:
      A transformation whose state is a tuple that starts with a tree of `AdamState`s, one for each parameter.

    Raises:
      ValueError: A hyperparameter is out of range (in torch's words), or another argument is invalid.

    >>> import adamjax.interop.torch as optim, jax.numpy as jnp
    >>> opt = optim.adam(lr=0.1)
    >>> params = {"w": jnp.ones(2), "b": jnp.zeros(1)}
    >>> state = opt.init(params)
    >>> params, state = opt.step({"w": jnp.ones(2), "b": None}, state, params)
    >>> int(state[0]["w"].count), int(state[0]["b"].count)
    (1, 0)
    """
    b1, b2 = _check(lr, betas, eps, weight_decay, amsgrad=amsgrad, decoupled_weight_decay=decoupled_weight_decay)
    checks.choice("fused", fused, (None, False, True, "auto"))
    moments = scale_by_adam(b1, b2, eps, amsgrad=amsgrad)
    return _of_torch(moments, lr, weight_decay, maximize, decoupled_weight_decay, fused)


def adamw(
    lr: ScalarOrSchedule = 1e-3,
    betas: Betas = (0.9, 0.999),
    eps: Scalar = 1e-8,
    weight_decay: ScalarOrSchedule = 1e-2,
    amsgrad: bool = False,
    *,
    maximize: bool = False,
    foreach: bool | None = None,
    capturable: bool = False,
    differentiable: bool = False,
    fused: FusedMode | None = None,
) -> Chain:
    """torch.optim.AdamW: `adam` with decoupled weight decay, by default 1e-2.

    Arguments, result and errors are those of `adam`.
    """
    return adam(lr, betas, eps, weight_decay, amsgrad, maximize=maximize, decoupled_weight_decay=True, fused=fused)


def nadam(
    lr: ScalarOrSchedule = 2e-3,
    betas: Betas = (0.9, 0.999),
    eps: Scalar = 1e-8,
    weight_decay: ScalarOrSchedule = 0,
    momentum_decay: Scalar = 4e-3,
    decoupled_weight_decay: bool = False,
    *,
    foreach: bool | None = None,
    maximize: bool = False,
    capturable: bool = False,
    differentiable: bool = False,
) -> Chain:
    """torch.optim.NAdam: Nesterov momentum with a rate that rises from half of betas[0] to betas[0].

    Arguments, result and errors not listed are those of `adam`.

    Args:
      momentum_decay: A number of at least 0: the speed at which the rate rises.

    Returns:
      A transformation whose state is a tuple that starts with a tree of `NAdamState`s.
    """
    b1, b2 = _check(lr, betas, eps, weight_decay, momentum_decay, decoupled_weight_decay=decoupled_weight_decay)
    moments = ScaleByTorchNAdam(b1, b2, eps, momentum_decay)
    return _of_torch(moments, lr, weight_decay, maximize, decoupled_weight_decay)


def radam(
    lr: ScalarOrSchedule = 1e-3,
    betas: Betas = (0.9, 0.999),
    eps: Scalar = 1e-8,
    weight_decay: ScalarOrSchedule = 0,
    decoupled_weight_decay: bool = False,
    *,
    foreach: bool | None = None,
    maximize: bool = False,
    capturable: bool = False,
    differentiable: bool = False,
) -> Chain:
    """torch.optim.RAdam. Arguments, result and errors are those of `adam`."""
    b1, b2 = _check(lr, betas, eps, weight_decay, decoupled_weight_decay=decoupled_weight_decay)
    return _of_torch(ScaleByTorchRAdam(b1, b2, eps, 0.0), lr, weight_decay, maximize, decoupled_weight_decay)


def adamax(
    lr: ScalarOrSchedule = 2e-3,
    betas: Betas = (0.9, 0.999),
    eps: Scalar = 1e-8,
    weight_decay: ScalarOrSchedule = 0,
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
    moments: Leafwise,
    lr: ScalarOrSchedule,
    weight_decay: ScalarOrSchedule,
    maximize: bool,
    decoupled: bool,
    fused: FusedMode | None = None,
) -> Chain:
    """Build the chain around `moments`. torch decays a parameter before its step, which gives the same sum."""
    direction = with_coupled_decay(moments, 0.0 if decoupled else weight_decay, None, maximize)
    decay = (AddDecayedWeights(weight_decay),) if decoupled else ()
    transforms = (PerParameter(direction), *decay, ScaleByLearningRate(lr))
    return Fused(transforms, fused) if fused else chain(*transforms)


def _check(
    lr: object, betas: Betas, eps: object, weight_decay: object, momentum_decay: object = 0.0, **flags: object
) -> Betas:
    """Check numbers like torch does, in its words, and flags; return the two betas. Leave out arrays and schedules."""
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
    for name, flag in flags.items():
        checks.choice(name, flag, (False, True))
    return betas[0], betas[1]
