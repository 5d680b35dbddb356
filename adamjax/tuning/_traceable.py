"""Optimizers whose numbers frameworks trace, so that a compiled step of a training loop serves all trials."""

import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp

from adamjax._core.value import value
from adamjax._transforms.base import Transformation

# Their transformations of functions trace arrays, but not Python numbers.
_FRAMEWORKS = ("equinox", "flax.nnx")


def traceable(opt: Transformation) -> Transformation:
    """Return `opt` in the form that the frameworks in use take for data; the same if there are none.

    Flax NNX takes an optimizer inside an `nnx.Optimizer` for a constant, and compiles again for each, unless its type is
    registered as data. The type is one of its own, so that all others stay what they are.
    """
    if not any(name in sys.modules for name in _FRAMEWORKS):
        return opt
    if (nnx := sys.modules.get("flax.nnx")) is not None and hasattr(nnx, "register_data_type"):
        kind = _data_type(type(opt), nnx)
        fields, opt = vars(opt), object.__new__(kind)
        vars(opt).update(fields)
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(float)), opt)


@functools.cache
def _data_type(kind: type[Transformation], nnx: Any) -> type[Transformation]:
    made: type[Transformation] = value(type(kind.__name__, (kind,), {"__module__": kind.__module__}))
    nnx.register_data_type(made)
    return made
