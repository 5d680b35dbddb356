"""Optimizers whose numbers frameworks trace, so that a compiled step of a training loop serves all trials."""

import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp

from adamjax._transforms.base import Transformation

# Their transformations of functions trace arrays, but not Python numbers.
_FRAMEWORKS = ("equinox", "flax.nnx")


def traceable(opt: Transformation) -> Transformation:
    """Return `opt` in the form that the frameworks in use take for data; the same if there are none.

    It is equal to `opt`, but its leaves are arrays. Its type is one of its own, which Flax NNX is told to take for data
    inside an `nnx.Optimizer`, where it would otherwise be a constant: all other optimizers stay what they are.
    """
    if not any(name in sys.modules for name in _FRAMEWORKS):
        return opt
    original: Any = type(opt)
    kind, nnx = _traced_type(original), sys.modules.get("flax.nnx")
    if nnx is not None and hasattr(nnx, "register_data_type"):
        nnx.register_data_type(kind)
    made: Transformation = _made(kind, vars(opt))
    return made


@functools.cache
def _traced_type(kind: Any) -> Any:
    """Return a type like `kind` whose instances are pytrees of arrays; pickled, they are instances of `kind`."""

    def plain(self: Any) -> Any:
        return _made(kind, vars(self)) if type(self) is traced else self

    def flatten(self: Any) -> tuple[list[Any], Any]:
        leaves, structure = jax.tree.flatten(plain(self))
        return [jnp.asarray(x, jnp.result_type(float)) if isinstance(x, (int, float)) else x for x in leaves], structure

    methods = {
        "__module__": kind.__module__,
        "__eq__": lambda self, other: plain(self) == plain(other),
        "__hash__": lambda self: hash(plain(self)),
        "__reduce__": lambda self: (_made, (kind, vars(self))),
    }
    traced: Any = type(kind.__name__, (kind,), methods)
    jax.tree_util.register_pytree_node(
        traced, flatten, lambda structure, leaves: _made(traced, vars(jax.tree.unflatten(structure, leaves)))
    )
    return traced


def _made(kind: Any, fields: dict[str, Any]) -> Any:
    made = object.__new__(kind)
    vars(made).update(fields)
    return made
