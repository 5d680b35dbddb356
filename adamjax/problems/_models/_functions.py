"""Models that are two functions."""

from collections.abc import Callable
from typing import Any

import jax

from adamjax._core.typing import PyTree
from adamjax.problems._models._parts import arguments, mode, required, zeros


class Functions:
    """The pair (init, apply): `init(key)` or `init(key, inputs)`, and `apply(params, inputs)`."""

    def __init__(self, init: Callable[..., Any], apply: Callable[..., Any], inputs: PyTree) -> None:
        self._init, self._apply, self._inputs = init, apply, inputs
        variadic = any(p.kind is p.VAR_POSITIONAL for p in arguments(init).values())
        self._init_takes_inputs = variadic or len(required(init)) > 1
        self._takes_key = "key" in arguments(apply)

    def init(self, key: jax.Array) -> tuple[PyTree, PyTree]:
        return self._init(key, *([zeros(self._inputs)] if self._init_takes_inputs else [])), {}

    def train(self, params: PyTree, state: PyTree, inputs: PyTree, key: jax.Array) -> tuple[PyTree, PyTree]:
        return self._call(params, inputs, key, train=True), {}

    def predict(self, params: PyTree, state: PyTree, inputs: PyTree) -> PyTree:
        return self._call(params, inputs, jax.random.key(0), train=False)

    def _call(self, params: PyTree, inputs: PyTree, key: jax.Array, train: bool) -> PyTree:
        keys = {"key": key} if self._takes_key else {}
        return self._apply(params, inputs, **keys, **mode(self._apply, train))
