"""Scaling of hyperparameters to another batch size."""

import inspect
import math
import numbers
from collections.abc import Mapping

from adamjax._core import checks
from adamjax.optimizers import adam
from adamjax.scaling import _batch
from adamjax.tuning._space import Setting


def scale_for_batch(hparams: Mapping[str, object], *, old: int, new: int, rule: str = "sqrt") -> Setting:
    """Scale Adam's hyperparameters from batch size `old` to batch size `new`.

    Args:
      hparams: Keyword arguments of an optimizer. Hyperparameters that the rule changes and that are not
        given are taken to be adamjax's defaults.
      old: The batch size that `hparams` were tuned for.
      new: The batch size to scale to.
      rule: With k = new / old, "sqrt" multiplies the learning rate by sqrt(k), divides eps by sqrt(k), and
        multiplies 1 - b1 and 1 - b2 by k. It holds while noise dominates the gradients (Malladi et
        al., 2022, who also divide the number of steps by k). "half_life" does the same to the learning rate and
        eps, and raises b1 and b2 to the power of k: their half-lives in examples stay the same, as those of "sqrt"
        nearly do, and no k is too large. "beta2_half_life" raises b2 to the power of k and changes nothing else:
        the second moment then has the same half-life in examples as before (Marek et al., 2025, who found this
        sufficient for training at any small batch size).

    Returns:
      A copy of `hparams` with the scaled values.

    Raises:
      ValueError: A batch size is not positive, a hyperparameter is out of its range, or a larger batch would bring
        b1 or b2 down to 0; the message has the largest possible factor.
      TypeError: A hyperparameter is a schedule or an array: scale its peak instead.

    References:
      Malladi et al., 2022, https://arxiv.org/abs/2205.10287;
      Marek et al., 2025, https://arxiv.org/abs/2507.07101.

    >>> from adamjax.tuning import scale_for_batch
    >>> scale_for_batch({"learning_rate": 1e-3, "b1": 0.9, "b2": 0.99, "eps": 1e-8}, old=256, new=1024)
    {'learning_rate': 0.002, 'b1': 0.6, 'b2': 0.96, 'eps': 5e-09}
    """
    checks.choice("rule", rule, _batch.RULES)
    if not isinstance(hparams, Mapping):
        raise TypeError(f"Invalid hparams value: {hparams!r}; hparams must be a dict of an optimizer's arguments")
    for name, size in (("old", old), ("new", new)):
        if not (isinstance(size, numbers.Real) and 0 < size < math.inf):
            raise ValueError(f"Invalid {name} value: {size!r}; {name} must be a positive batch size")
    names, factor = _batch.names_of(rule), float(new) / float(old)
    defaults = inspect.signature(adam).parameters
    now = {name: _number(name, hparams.get(name, defaults[name].default)) for name in names}
    scaled = _batch.scaled_decays({name: x for name, x in now.items() if name in ("b1", "b2")}, factor, rule)
    if "learning_rate" in now:
        rate = _batch.rate_factor(factor, rule)
        scaled = {"learning_rate": now["learning_rate"] * rate, **scaled, "eps": now["eps"] / rate}
    return {**hparams, **scaled}


def _number(name: str, x: object) -> float:
    checked = x if callable(x) else checks.number(name, x, below=1.0 if name in ("b1", "b2") else math.inf)
    if not isinstance(checked, float):
        raise TypeError(f"{name} is {x!r}, and only a number can be scaled: scale its peak, or each of its values")
    return checked
