"""Models of Haiku."""

from typing import Any

import haiku as hk
import jax

from adamjax._core.typing import PyTree
from adamjax.problems._models._parts import mode, zeros


class Haiku:
    """A Haiku transform."""

    def __init__(self, transformed: Any, inputs: PyTree) -> None:
        if not isinstance(transformed, (hk.Transformed, hk.TransformedWithState)):
            raise TypeError(
                f"Invalid model value: a value of type {type(transformed).__name__} of Haiku, expected what "
                "hk.transform or hk.transform_with_state returns"
            )
        f = getattr(transformed.apply, "_original_fn", transformed.apply)
        if isinstance(transformed, hk.Transformed):
            transformed = hk.with_empty_state(transformed)
        self._transformed, self._inputs = transformed, inputs
        self._training, self._evaluation = mode(f, True), mode(f, False)

    def init(self, key: jax.Array) -> tuple[PyTree, PyTree]:
        # Modules draw from one sequence of keys: only a call in the mode of training gives the usual parameters.
        return self._transformed.init(key, zeros(self._inputs), **self._training)

    def train(self, params: PyTree, state: PyTree, inputs: PyTree, key: jax.Array) -> tuple[PyTree, PyTree]:
        return self._transformed.apply(params, state, key, inputs, **self._training)

    def predict(self, params: PyTree, state: PyTree, inputs: PyTree) -> PyTree:
        outputs, _ = self._transformed.apply(params, state, jax.random.key(0), inputs, **self._evaluation)
        return outputs
