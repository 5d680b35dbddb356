"""Rules that scale Adam's hyperparameters to another batch size."""

import math
from collections.abc import Mapping

RULES: tuple[str, ...] = ("sqrt", "half_life", "beta2_half_life")


def names_of(rule: str) -> tuple[str, ...]:
    """Return the hyperparameters that a rule changes."""
    return ("b2",) if rule == "beta2_half_life" else ("learning_rate", "b1", "b2", "eps")


def rate_factor(factor: float, rule: str) -> float:
    """Return the factor of the learning rate where the batch is `factor` times as large; eps is divided by it."""
    return 1.0 if rule == "beta2_half_life" else math.sqrt(factor)


def scaled_decays(decays: Mapping[str, float], factor: float, rule: str) -> dict[str, float]:
    """Return decay rates that the rule changes, for a batch that is `factor` times as large.

    Raises:
      ValueError: The square root rule would bring one of them down to 0.
    """
    if rule != "sqrt":
        return {name: b**factor for name, b in decays.items()}
    scaled = {name: _one_minus(factor * _one_minus(b)) for name, b in decays.items()}
    least = min(scaled, key=scaled.__getitem__, default="")
    if least and scaled[least] <= 0 and factor > 1:
        raise ValueError(
            f"a batch {factor:g} times as large would make {least} {scaled[least]:g}: with {least}={decays[least]:g}, "
            f"'half_life' holds for all factors, and the square root rule for factors below "
            f"{1 / _one_minus(decays[least]):g}"
        )
    return scaled


def _one_minus(x: float) -> float:
    """Return 1 - x without the digits that rounding adds, so that 1 - 0.9 is 0.1."""
    return round(1 - x, 15)
