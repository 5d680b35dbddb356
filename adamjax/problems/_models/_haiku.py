"""Models of Haiku."""

from typing import Any

import haiku as hk
import jax

from adamjax._core.typing import PyTree
from adamjax.problems._models._parts import mode, zeros


class Haiku:
    """A Haiku transform."""

    def __init__(self, transformed: hk.Transformed | hk.TransformedWithState, inputs: PyTree) -> None:
        f: Any = hk.experimental.get_original_fn(transformed) if hasattr(hk.experimental, "get_original_fn") else None
        if isinstance(transformed, hk.Transformed):
            transformed = hk.with_empty_state(transformed)
        self._transformed, self._inputs = transformed, inputs
        self._training, self._evaluation = mode(f, True), mode(f, False)

    def init(self, key: jax.Array) -> tuple[PyTree, PyTree]:
        return self._transformed.init(key, zeros(self._inputs), **self._training)

    def train(self, params: PyTree, state: PyTree, inputs: PyTree, key: jax.Array) -> tuple[PyTree, PyTree]:
        return self._transformed.apply(params, state, key, inputs, **self._training)

    def predict(self, params: PyTree, state: PyTree, inputs: PyTree) -> PyTree:
        outputs, _ = self._transformed.apply(params, state, jax.random.key(0), inputs, **self._evaluation)
        return outputs
