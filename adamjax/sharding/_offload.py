"""A state in the memory of the host, which comes to the device for a step."""

from typing import Any

import jax

from adamjax import _trees
from adamjax._base import Extra, Transformation, as_transformation
from adamjax._trees import PyTree
from adamjax._value import value

_HOST = "pinned_host"


@value
class Offload(Transformation):
    """See `offload`."""

    inner: Any

    def __post_init__(self) -> None:
        self._replace_field("inner", as_transformation(self.inner, "argument opt of offload"))

    @property
    def lands(self) -> bool:  # type: ignore[override]
        return self.inner.lands

    @property
    def holds(self) -> bool:  # type: ignore[override]
        return self.inner.holds

    def _init(self, params: PyTree) -> PyTree:
        return _to_host(self.inner._init(params))

    def _update(self, updates: PyTree, state: PyTree, params: PyTree | None, extra: Extra) -> tuple[PyTree, PyTree]:
        updates, state = self.inner._update(updates, _to_device(state), params, extra)
        return updates, _to_host(state)

    def step(self, grads: PyTree, state: PyTree, params: PyTree, **extra: Any) -> tuple[PyTree, PyTree]:
        """One whole step; see `Transformation.step`."""
        params, state = self.inner.step(grads, _to_device(state), params, **extra)
        return params, _to_host(state)


def _to_host(state: PyTree) -> PyTree:
    def move(x: Any) -> Any:
        if x.ndim == 0:  # a count, which is less than what moving it costs
            return x
        if isinstance(x, jax.core.Tracer):
            return jax.device_put(x, jax.memory.Space.Host)
        if x.sharding is None:  # abstract, and nobody says where it is to be
            return x
        sharding = x.sharding.with_memory_kind(_HOST)
        if _trees.is_abstract(x):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        return jax.device_put(x, sharding)

    return jax.tree.map(move, state)


def _to_device(state: PyTree) -> PyTree:
    def move(x: Any) -> Any:
        if x.ndim == 0:
            return x
        if isinstance(x, jax.core.Tracer):
            return jax.device_put(x, jax.memory.Space.Device)
        return jax.device_put(x, x.sharding.with_memory_kind("device"))

    return jax.tree.map(move, state)


def offload(opt: Any) -> Offload:
    """Keep the state of `opt` in the pinned memory of the host; it comes to the device for each step.

    That makes room on the device, for twice the bytes of the state over the bus at each step. Scalars
    stay on the device. Put it outermost, around `zero1` too. Under `jax.jit`; donate the state.

    Args:
      opt: A transformation, ours or optax's.

    Returns:
      A transformation with the state of `opt`.

    Raises:
      TypeError, ValueError: `opt` is no transformation; at `init`, the device has no such memory.

    >>> import adamjax, jax, jax.numpy as jnp
    >>> opt = adamjax.sharding.offload(adamjax.adam(0.1))
    >>> params = {"w": jnp.ones(3)}
    >>> params, state = jax.jit(opt.step)(params, opt.init(params), params)
    >>> state[0].mu["w"].sharding.memory_kind
    'pinned_host'
    """
    return Offload(opt)
