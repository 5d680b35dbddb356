"""Models of Flax Linen."""

from typing import Any

import jax
from flax.core import meta, unfreeze

from adamjax._core.trees import abstract_key
from adamjax._core.typing import PyTree
from adamjax.problems._models._parts import mode, zeros


class Linen:
    """A Linen module; the collection "params" holds the parameters, the others are the state."""

    def __init__(self, module: Any, inputs: PyTree) -> None:
        self._module, self._inputs = module, inputs
        self._training, self._evaluation = mode(module.__call__, True), mode(module.__call__, False)
        self._dropped: set[str] = set()
        params, state = jax.eval_shape(self.init, abstract_key())
        _, after = jax.eval_shape(self.train, params, state, inputs, abstract_key())
        # Each `sow` adds to its collection: these are outputs, and no state to carry on.
        self._dropped = {
            name for name in state if len(jax.tree.leaves(after[name])) > len(jax.tree.leaves(state[name]))
        }

    def init(self, key: jax.Array) -> tuple[PyTree, PyTree]:
        rngs = {"params": key, "dropout": jax.random.fold_in(key, 1)}
        variables: dict[str, Any] = unfreeze(
            meta.unbox(self._module.init(rngs, zeros(self._inputs), **self._evaluation))
        )
        params = variables.pop("params", {})
        return params, {name: x for name, x in variables.items() if name not in self._dropped}

    def train(self, params: PyTree, state: PyTree, inputs: PyTree, key: jax.Array) -> tuple[PyTree, PyTree]:
        # Flax draws from "params" for the names that are not here.
        rngs = {"dropout": key, "params": jax.random.fold_in(key, 1)}
        outputs, after = self._module.apply(
            {"params": params, **state}, inputs, **self._training, rngs=rngs, mutable=list(state)
        )
        return outputs, unfreeze(after)

    def predict(self, params: PyTree, state: PyTree, inputs: PyTree) -> PyTree:
        return self._module.apply({"params": params, **state}, inputs, **self._evaluation)
