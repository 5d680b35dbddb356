"""Models of Flax NNX."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from adamjax._core.typing import PyTree
from adamjax.problems._models._parts import Named, arguments, mode

_VALUE = jax.tree_util.GetAttrKey("value")  # of a Variable; it would end every path


class Nnx:
    """The module that `factory(rngs=nnx.Rngs(key))` makes; each `nnx.Param` is a parameter."""

    def __init__(self, factory: Callable[..., Any]) -> None:
        self._factory = factory
        jax.eval_shape(self._look, jax.random.key(0))

    def _look(self, key: jax.Array) -> None:
        module = self._factory(rngs=nnx.Rngs(key))
        if not isinstance(module, nnx.Module):
            raise TypeError(
                f"the factory with an argument `rngs` returned {type(module).__name__}, expected a flax.nnx.Module"
            )
        self._graphdef, params, state = nnx.split(module, nnx.Param, ...)
        self._params, self._state = Named(params, _VALUE), Named(state, _VALUE)
        self._takes_rngs = "rngs" in arguments(module.__call__)
        self._training, self._evaluation = mode(module.__call__, True), mode(module.__call__, False)

    def init(self, key: jax.Array) -> tuple[PyTree, PyTree]:
        _, params, state = nnx.split(self._factory(rngs=nnx.Rngs(key)), nnx.Param, ...)
        return self._params.to_dict(params), self._state.to_dict(state)

    def train(self, params: PyTree, state: PyTree, inputs: PyTree, key: jax.Array) -> tuple[PyTree, PyTree]:
        module = self._merge(params, state)
        module.train()
        outputs = module(inputs, **self._training, **self._rngs(key))
        _, _, after = nnx.split(module, nnx.Param, ...)
        # Only what was there before: calls may add Variables, as `sow` does.
        known = self._state.to_tree(Named(after, _VALUE).to_dict(after))
        return outputs, self._state.to_dict(known)

    def predict(self, params: PyTree, state: PyTree, inputs: PyTree) -> PyTree:
        module = self._merge(params, state)
        module.eval()
        return module(inputs, **self._evaluation, **self._rngs(jax.random.key(0)))

    def _merge(self, params: PyTree, state: PyTree) -> nnx.Module:
        return nnx.merge(self._graphdef, self._params.to_tree(params), self._state.to_tree(state))

    def _rngs(self, key: jax.Array) -> dict[str, nnx.Rngs]:
        return {"rngs": nnx.Rngs(key)} if self._takes_rngs else {}
