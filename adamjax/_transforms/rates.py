"""The learning rate of the next step, wherever in an optimizer it is."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from adamjax._core import checks
from adamjax._core.typing import GradientTransformation, PyTree
from adamjax._transforms.base import as_transformation, contains_foreign

Rates = Array | dict[str, Array]


def learning_rate_of(opt: GradientTransformation, state: PyTree) -> Rates:
    """The learning rate of the next step, to log it.

    It is what the schedule says at the count in the state, times the scale of `reduce_on_plateau` and the warmup of
    `schedule_free_adamw`. Only a plateau that ends with the next step changes it once more. A chain has the product of
    its members' rates. A pure function, for use inside or outside `jax.jit`; it does not wait for the device.

    Args:
      opt: The optimizer. Members from elsewhere, such as those of optax, are taken to have no learning rate.
      state: The state that `init`, `update` or `step` returned.

    Returns:
      A float32 scalar. For `groups`, a dict of them by pattern, with "default" for the others: of those groups that
      have a learning rate or an optimizer of their own, or the scalar if no group has. Factors of several patterns
      that match one parameter multiply. For `interop.optax.muon` the keys are "adam" and "muon", for `hyperball` with
      a rate of its own "hyperball" and "default".

    Raises:
      TypeError, ValueError: `opt` is not a transformation, or has no learning rate that can be seen, as an optimizer of
        optax; `state` is not one of `opt`.

    >>> import adamjax, jax.numpy as jnp
    >>> opt = adamjax.adamw(adamjax.schedules.linear(0.1, 0.0, total_steps=10))
    >>> params = {"kernel": jnp.ones(2)}
    >>> state = opt.init(params)
    >>> params, state = opt.step(params, state, params)
    >>> print(adamjax.learning_rate_of(opt, state).round(3))
    0.09
    """
    transform = as_transformation(opt, "argument opt of learning_rate_of")
    found = transform._learning_rate(checks.as_arrays(jax.tree.map(_as_array, state, is_leaf=_is_boxed)))
    found = {"": found} if not isinstance(found, dict) else found
    seen = {name: jnp.asarray(rate) for name, rate in found.items() if not isinstance(rate, Factor | None)}
    if not seen:
        raise ValueError(f"{checks.shown(transform)} has no learning rate that can be seen: {_remedy(transform)}")
    return seen.get("", seen)


def _is_boxed(x: Any) -> bool:
    """Return whether `x` is a variable with an array in it: what flax's nnx.Optimizer makes of a state."""
    return hasattr(x, "__jax_array__")


def _as_array(x: Any) -> Any:
    """The scalar in a variable; only scalars decide learning rates."""
    return jnp.asarray(x) if _is_boxed(x) and getattr(x, "shape", None) == () else x


def _remedy(opt: Any) -> str:
    if contains_foreign(opt):
        return (
            "a transformation from elsewhere hides its own. Put it into adamjax.chain or groups, with the learning "
            "rate in an optimizer of adamjax; that of optax.inject_hyperparams is state.hyperparams['learning_rate']"
        )
    return "give a whole optimizer, such as adamw(1e-3)"


class Factor(NamedTuple):
    """A factor of a learning rate, which is none by itself."""

    number: Any


def as_rate(x: Any) -> Any:
    """A learning rate as a float32 scalar."""
    return checks.as_scalar("learning_rate", x, np.dtype(np.float32))


def by_group(name: str, rates: Any) -> dict[str, Any]:
    """The rates of the group `name`, which may have groups inside, as one dict."""
    return {f"{name} + {key}": x for key, x in rates.items()} if isinstance(rates, dict) else {name: rates}


def times(a: Any, b: Any) -> Any:
    """The product of the rates of two members of a chain; None is a member without one."""
    if a is None or b is None:
        return b if a is None else a
    if isinstance(a, dict):
        return {key: x for name, rate in a.items() for key, x in by_group(name, times(rate, b)).items()}
    if isinstance(b, dict):
        return {name: times(a, x) for name, x in b.items()}
    if isinstance(a, Factor) and isinstance(b, Factor):
        return Factor(a.number * b.number)
    return (a.number if isinstance(a, Factor) else a) * (b.number if isinstance(b, Factor) else b)
