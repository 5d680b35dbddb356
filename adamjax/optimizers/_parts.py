"""The parts that chains are made of."""

from typing import Any

from adamjax._core import checks
from adamjax._core.numerics import is_zero
from adamjax._core.typing import FusedMode, Mask, ScalarOrSchedule
from adamjax._transforms.base import Transformation
from adamjax._transforms.chain import Chain, chain
from adamjax._transforms.schedule import number_or_schedule
from adamjax._transforms.weight_decay import AddDecayedWeights
from adamjax.kernels import Fused
from adamjax.schedules import Proportional, as_schedule


def chain_or_fused(fused: FusedMode, *transforms: Transformation) -> Chain:
    """Return a chain, stepped by a kernel if `fused` says so."""
    checks.choice("fused", fused, (False, True, "auto"))
    return Fused(transforms, fused) if fused else chain(*transforms)


def decoupled_decay(
    weight_decay: ScalarOrSchedule, mask: Mask, cautious: bool, *, flip_sign: bool = False
) -> AddDecayedWeights:
    """Return the decoupled weight decay of an optimizer."""
    checks.choice("cautious_decay", cautious, (False, True))
    return AddDecayedWeights(number_or_schedule("weight_decay", weight_decay), mask, flip_sign, cautious)


def decay_like(learning_rate: ScalarOrSchedule, weight_decay: ScalarOrSchedule) -> ScalarOrSchedule:
    """Return a weight decay with the shape of the learning rate's schedule."""
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


def without_zero(decay: AddDecayedWeights) -> tuple[AddDecayedWeights, ...]:
    """Return the decay as members of a chain: none if it is the number 0, so that `update` needs no parameters."""
    return () if is_zero(decay.weight_decay) else (decay,)
