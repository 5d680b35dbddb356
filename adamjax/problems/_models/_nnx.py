"""Models of Flax NNX."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from adamjax._core.trees import abstract_key
from adamjax._core.typing import PyTree
from adamjax.problems._models._parts import Named, mode, randomness

_VALUE = (jax.tree_util.GetAttrKey("value"),)  # of a Variable; it would end every path


class Nnx:
    """The module that `factory(rngs=nnx.Rngs(key))` makes; each `nnx.Param` is a parameter."""

    def __init__(self, factory: Callable[..., Any]) -> None:
        self._factory = factory
        jax.eval_shape(self._look, abstract_key())

    def _look(self, key: jax.Array) -> None:
        """Keep what is no array, from a module made with a traced key."""
        self._graphdef, params, state = _split(_made(self._factory, key))
        self._params, self._state = Named(params, _VALUE), Named(state, _VALUE)

    def init(self, key: jax.Array) -> tuple[PyTree, PyTree]:
        _, params, state = _split(_made(self._factory, key))
        return self._params.to_dict(params), self._state.to_dict(state)

    def train(self, params: PyTree, state: PyTree, inputs: PyTree, key: jax.Array) -> tuple[PyTree, PyTree]:
        module = self._merge(params, state)
        module.train()
        outputs = module(inputs, **_keywords(module, key, train=True))
        _, _, after = _split(module)
        # Only what was there before: calls may add Variables, as `sow` does.
        known = self._state.to_tree(Named(after, _VALUE).to_dict(after))
        return outputs, self._state.to_dict(known)

    def predict(self, params: PyTree, state: PyTree, inputs: PyTree) -> PyTree:
        module = self._merge(params, state)
        module.eval()
        return module(inputs, **_keywords(module, jax.random.key(0), train=False))

    def _merge(self, params: PyTree, state: PyTree) -> Any:
        return nnx.merge(self._graphdef, self._params.to_tree(params), self._state.to_tree(state))


def _made(factory: Callable[..., Any], key: jax.Array) -> nnx.Module:
    module = factory(rngs=nnx.Rngs(key))
    if not isinstance(module, nnx.Module):
        raise TypeError(
            f"the factory with an argument `rngs` returned {type(module).__name__}, expected a flax.nnx.Module"
        )
    for _, part in nnx.iter_modules(module):
        for name, x in list(vars(part).items()):
            # Flax 0.12 takes arrays for data, as they are, but traced ones for constants.
            if isinstance(x, jax.core.Tracer):
                setattr(part, name, nnx.data(x))
    return module


def _keywords(module: Any, key: jax.Array, *, train: bool) -> dict[str, Any]:
    call = type(module).__call__
    # Where they are optional, the module's own are meant.
    return mode(call, train) | randomness(call, "rngs", nnx.Rngs(key), optional=False)


def _split(module: nnx.Module) -> Any:
    """Return the definition of the module, its parameters, and all other arrays."""
    return nnx.split(module, nnx.Param, ...)
