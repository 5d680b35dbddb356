"""Models of Equinox."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax

from adamjax._core.trees import abstract_key
from adamjax._core.typing import PyTree
from adamjax.problems._models._parts import Named, mode, randomness


class Equinox:
    """The module, or pair of a module and its `eqx.nn.State`, that `factory(key=key)` makes.

    It is applied to one example, and vmapped over the batch. Its inexact arrays are the parameters.
    """

    def __init__(self, factory: Callable[..., Any]) -> None:
        self._factory = factory
        jax.eval_shape(self._look, abstract_key())

    def _look(self, key: jax.Array) -> None:
        """Keep what is no array, from a module made with a traced key."""
        module, layers = _made(self._factory, key)
        params, state, self._constants = _divided(module, layers)
        self._params, self._state = Named(params), Named(state)

    def init(self, key: jax.Array) -> tuple[PyTree, PyTree]:
        params, state, _ = _divided(*_made(self._factory, key))
        return self._params.to_dict(params), self._state.to_dict(state)

    def train(self, params: PyTree, state: PyTree, inputs: PyTree, key: jax.Array) -> tuple[PyTree, PyTree]:
        module, layers = self._whole(params, state)
        outputs, after = _apply(module, layers, inputs, key, train=True)
        _, arrays, _ = _divided(module, after)
        return outputs, self._state.to_dict(arrays)

    def predict(self, params: PyTree, state: PyTree, inputs: PyTree) -> PyTree:
        module, layers = self._whole(params, state)
        module = eqx.nn.inference_mode(module)
        return _apply(module, layers, inputs, jax.random.key(0), train=False)[0]

    def _whole(self, params: PyTree, state: PyTree) -> tuple[Any, Any]:
        whole = self._state.to_tree(state)
        return eqx.combine(self._params.to_tree(params), whole["module"], self._constants), whole["state"]


def _apply(module: Any, layers: Any, inputs: PyTree, key: jax.Array, *, train: bool) -> tuple[PyTree, Any]:
    """Return the outputs for a batch, and the `eqx.nn.State` after it."""
    call = type(module).__call__
    rows = len(jax.tree.leaves(inputs)[0])

    def one(x: PyTree, key: jax.Array) -> tuple[PyTree, Any]:
        keywords = mode(call, train) | randomness(call, "key", key, optional=train)
        return (module(x, **keywords), None) if layers is None else module(x, layers, **keywords)

    return jax.vmap(one, out_axes=(0, None), axis_name="batch")(inputs, jax.random.split(key, rows))


def _made(factory: Callable[..., Any], key: jax.Array) -> tuple[Any, Any]:
    """Return the module, and its `eqx.nn.State` or None."""
    made = factory(key=key)
    module, state = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(module, eqx.Module) or not (state is None or isinstance(state, eqx.nn.State)):
        found = type(made).__name__
        raise TypeError(
            f"the factory with an argument `key` returned {found}, expected an equinox.Module, or a pair of one and "
            "its equinox.nn.State, as eqx.nn.make_with_state gives"
        )
    return module, state


def _divided(module: Any, layers: Any) -> tuple[PyTree, PyTree, PyTree]:
    """Divide into the parameters, all other arrays with those in `layers`, and what is no array."""
    params, rest = eqx.partition(module, eqx.is_inexact_array)
    arrays, constants = eqx.partition(rest, lambda x: hasattr(x, "dtype") and hasattr(x, "shape"))
    return params, {"module": arrays, "state": layers}, constants
