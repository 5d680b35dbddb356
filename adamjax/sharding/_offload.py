"""Keep a state in host memory and move it to the device for a step."""

from typing import Any, ClassVar

import jax
from jax.sharding import NamedSharding, PartitionSpec

from adamjax._core import trees
from adamjax._core.trees import Leaves
from adamjax._core.typing import GradientTransformation, PyTree
from adamjax._core.value import value
from adamjax._transforms.base import Result, StepContext, Wrapper


@value
class Offload(Wrapper):
    """See `offload`."""

    has_own_state: ClassVar[bool] = False

    inner: Any

    def __post_init__(self) -> None:
        self._wrap("offload")

    def _init(self, params: PyTree) -> PyTree:
        return _settle(_move(self.inner._init(params), jax.memory.Space.Host))

    def _run(self, updates: Leaves, state: PyTree, context: StepContext) -> Result:
        on_device = _move(state, jax.memory.Space.Device)
        found, delivered, state = self.inner._run(updates, on_device, context)
        return found, delivered, _move(state, jax.memory.Space.Host)


def _move(state: PyTree, space: Any) -> PyTree:
    """Move `state` to a memory space, except scalars: moving them costs more than their space."""

    def move(x: Any) -> Any:
        if x.ndim == 0:
            return x
        if not trees.is_abstract(x):
            return jax.device_put(x, space)
        sharding = None if x.sharding is None else x.sharding.with_memory_kind("pinned_host")
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(move, state)


def _settle(state: PyTree) -> PyTree:
    """Move the scalars of a new `state` to the devices of its other arrays, where a step will put them."""
    moved = [x for x in jax.tree.leaves(state) if isinstance(x, jax.Array) and x.ndim]
    if not moved or isinstance(moved[0], jax.core.Tracer):
        return state
    place = moved[0].sharding
    place = NamedSharding(place.mesh, PartitionSpec()) if isinstance(place, NamedSharding) else place
    place = place.with_memory_kind("device")
    return jax.tree.map(lambda x: x if x.ndim else jax.device_put(x, place), state)


def offload(opt: GradientTransformation) -> Offload:
    """Keep the state of `opt` in pinned host memory, and move it to the device for each step.

    This frees device memory, at the cost of transferring twice the bytes of the state at each step. Scalars stay on the
    device. Make it the outermost wrapper, around `zero1` too, and use it under `jax.jit`. Donate the state only
    together with the parameters, and after them, as `Transformation.step` says: JAX gives the memory of a donated array
    to the first result of its shape, in whichever memory space it is, and parameters in host memory crash the process.

    Args:
      opt: A transformation of adamjax or optax.

    Returns:
      A transformation with the state of `opt`.

    Raises:
      TypeError, ValueError: `opt` is not a transformation; at `init`, the device has no pinned host memory.

    >>> import adamjax, jax, jax.numpy as jnp
    >>> opt = adamjax.sharding.offload(adamjax.adam(0.1))
    >>> params = {"w": jnp.ones(3)}
    >>> params, state = jax.jit(opt.step)(params, opt.init(params), params)
    >>> state[0].mu["w"].sharding.memory_kind
    'pinned_host'
    """
    return Offload(opt)
