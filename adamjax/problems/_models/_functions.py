"""Models that are two functions."""

from collections.abc import Callable
from typing import Any

import jax

from adamjax._core.typing import PyTree
from adamjax.problems._models._parts import arguments, mode, randomness, required, zeros


class Functions:
    """The pair (init, apply): `init(key)` or `init(key, inputs)`, and `apply(params, inputs)`."""

    def __init__(self, init: Callable[..., Any], apply: Callable[..., Any], inputs: PyTree) -> None:
        self._init, self._apply, self._inputs = init, apply, inputs
        variadic = any(p.kind is p.VAR_POSITIONAL for p in arguments(init).values())
        self._init_takes_inputs = variadic or len(required(init)) > 1

    def init(self, key: jax.Array) -> tuple[PyTree, PyTree]:
        return self._init(key, *([zeros(self._inputs)] if self._init_takes_inputs else [])), {}

    def train(self, params: PyTree, state: PyTree, inputs: PyTree, key: jax.Array) -> tuple[PyTree, PyTree]:
        return self._apply(params, inputs, **self._keywords(key, train=True)), {}

    def predict(self, params: PyTree, state: PyTree, inputs: PyTree) -> PyTree:
        return self._apply(params, inputs, **self._keywords(jax.random.key(0), train=False))

    def _keywords(self, key: jax.Array, *, train: bool) -> dict[str, Any]:
        return mode(self._apply, train) | randomness(self._apply, "key", key, optional=train)
