"""How half precision parameters take their updates: what a wrapper tells the step that it wraps."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from adamjax._core.low_precision import Dither
from adamjax._core.trees import PyTree

Rule = Callable[..., tuple[Array, Any]]


class Landing(NamedTuple):
    """How a half precision parameter lands.

    Fields:
      name: What it is called, to those that have it compiled otherwise.
      read: From the parameter and what is kept: the parameter in float32, as the wrapped transformation sees it.
      rule: From the parameter itself in float32, the update, what is kept, a dither and the parameter's dtype: the
        difference to what the parameter is to become, and what is kept then.
    """

    name: str
    read: Callable[[Array, Any], Array]
    rule: Rule

    def land(self, p: Array, u: Array, kept: Any, dither: Dither) -> tuple[Array, Any]:
        """The parameter after the update, and what is kept then."""
        wide = p.astype(jnp.float32)
        u, kept = self.rule(wide, u, kept, dither, p.dtype)
        return (wide + u).astype(p.dtype), kept


class Narrow(NamedTuple):
    """Parameters for a step that lands them itself, or leaves it to `land`.

    Fields:
      params: The parameters, of which those in half precision are to land.
      kept: What those cannot hold, if that is kept.
      landing: How they do.
      dither: That of a parameter, by its place among the leaves.
      land: From updates in float32 (None where parameters are to stay): all parameters, and all that is kept.
    """

    params: PyTree
    kept: PyTree
    landing: Landing
    dither: Callable[[int], Dither]
    land: Callable[[PyTree], tuple[PyTree, PyTree]]
