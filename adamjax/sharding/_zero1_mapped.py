"""ZeRO, stage 1, inside `jax.shard_map`: the same mathematics with explicit collectives."""

from typing import Any, ClassVar

import jax
from jax import Array, lax
from jax.sharding import AxisType

from adamjax._core import checks, collectives, trees
from adamjax._core.quantization import is_quantized
from adamjax._core.trees import Leaves
from adamjax._core.typing import GradientTransformation, PyTree
from adamjax._core.value import static_field, value
from adamjax._transforms.base import Result, StepContext, StepsParts, Transformation
from adamjax.sharding import _layout
from adamjax.sharding._layout import Names


@value
class Zero1Mapped(StepsParts):
    """See `zero1_mapped`."""

    has_own_state: ClassVar[bool] = False

    inner: Any
    axis: str | Names = static_field(described=False)

    def __post_init__(self) -> None:
        self._wrap("zero1_mapped")
        _layout.check_axes("axis", self.axis)

    def _init(self, params: PyTree) -> PyTree:
        leaves = jax.tree.leaves(params)
        meshes = [jax.typeof(p).sharding.mesh for p in leaves if isinstance(p, jax.core.Tracer)]
        if any(AxisType.Manual in mesh.axis_types for mesh in meshes):
            raise ValueError("call init of zero1_mapped outside of jax.shard_map: the state goes in as an argument")
        if trees.any_abstract(params) and not any(map(_layout.sharding_of, leaves)):
            return self.inner._init(params)
        sharding = _layout.state_sharding(self.inner, params, zero_axis=self.axis)
        state = _layout.init_sharded(self.inner, params, sharding)
        _check_blocks(state)
        return state

    def _run(self, updates: Leaves, state: PyTree, context: StepContext) -> Result:
        checks.params_given(context.params, updates, "zero1_mapped")
        params = context.params or updates  # without parameters, there are no gradients
        parts = _Parts(self.inner, self.axis, params.tree)
        return self._run_parts((parts.sum(updates), parts.take(params)), state, context, parts.gather)


class _Parts:
    """The shard of each array that belongs to this device."""

    def __init__(self, inner: Transformation, axis: str | Names, params: PyTree) -> None:
        names = axis if isinstance(axis, tuple) else (axis,)
        self.names = tuple(name for name in names if lax.axis_size(name) > 1)
        self.idle = tuple(name for name in names if name not in self.names)
        self.count = lax.axis_size(self.names)
        self.axes = _layout.split_axes(inner, params, self.count)

    def sum(self, grads: Leaves) -> Leaves:
        """Add up the gradients over the devices, and take this device's part."""

        def of_leaf(g: Array, axis: int) -> Array:
            if idle := collectives.axes_varying(g, self.idle):
                g = lax.psum(g, idle)
            varying = collectives.axes_varying(g, self.names)
            if axis >= 0 and len(varying) == len(self.names):
                return lax.psum_scatter(g, self.names, scatter_dimension=axis, tiled=True)
            # A gradient that does not vary is the sum already: jax.grad adds up the parts of replicated parameters.
            return self._part(lax.psum(g, varying) if varying else g, axis)

        return grads.map(of_leaf, grads.column(self.axes))

    def take(self, params: Leaves) -> Leaves:
        return params.map(self._part, params.column(self.axes))

    def gather(self, leaves: Leaves) -> Leaves:
        def of_leaf(x: Array, axis: int) -> Array:
            return x if axis < 0 else lax.all_gather(x, self.names, axis=axis, tiled=True, to="invarying")

        return leaves.map(of_leaf, leaves.column(self.axes))

    def _part(self, x: Array, axis: int) -> Array:
        if axis < 0:
            return x
        size = x.shape[axis] // self.count
        return lax.dynamic_slice_in_dim(x, lax.axis_index(self.names) * size, size, axis)


def _check_blocks(state: PyTree) -> None:
    """Check that no block is split over devices, because each device computes the scales of its own shard."""
    for path, x in jax.tree.leaves_with_path(state, is_leaf=is_quantized):
        if not is_quantized(x):
            continue
        bytes_here = x.codes.sharding.shard_shape(x.codes.shape)[-1]
        size = bytes_here * (8 // x.bits)
        if bytes_here < x.codes.shape[-1] and size % x.block_size:
            raise ValueError(
                f"the moments at {trees.path_of(path)} are quantised in blocks of {x.block_size}, of which a device "
                f"has parts: {size} numbers of each row. Choose a block_size that divides {size}, or take zero1"
            )


def zero1_mapped(opt: GradientTransformation, *, axis: str | Names) -> Zero1Mapped:
    """`zero1` for use inside `jax.shard_map`: reduce-scatter the gradients, step a shard, gather the parameters.

    Each device passes the gradient of its part of the loss. These are summed, as `jax.grad` sums the gradients
    of a replicated parameter: for a mean over the devices, divide the loss by their number. If shard_map tracks
    what varies (`check_vma=True`), a gradient that does not vary counts as that sum. Otherwise
    (`check_vma=False`) all gradients count as parts of it.

    Call `init` outside; the shardings of its state are the in_specs and out_specs of the state. Transformations
    that look at all gradients together need the axis too: `clip_by_global_norm(..., axis_name=axis)` and
    `skip_nonfinite(..., axis_name=axis)` (with `check_vma=False`, the norm counts unspread arrays once per
    device). Stochastic rounding uses the same random numbers on each device.

    Args:
      opt: A transformation of adamjax or optax.
      axis: The mapped axis, or axes, over which the parameters are replicated and the state is spread.

    Returns:
      A transformation with the state of `opt`, whose `update` needs `params`.

    Raises:
      TypeError, ValueError: `opt` is not a transformation, or `axis` not a name; `init` is called inside, or a
        quantised block would be split over devices.

    >>> import adamjax, jax, jax.numpy as jnp
    >>> from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    >>> params = jax.device_put(jnp.ones(8), NamedSharding(mesh, P()))
    >>> opt = adamjax.sharding.zero1_mapped(adamjax.adam(0.1), axis="data")
    >>> state = opt.init(params)
    >>> specs = jax.tree.map(lambda x: x.sharding.spec, state)
    >>> def train_step(params, state, batch):
    ...     grads = jax.grad(lambda p: jnp.sum(batch @ p))(params)
    ...     return opt.step(grads, state, params)
    >>> mapped = jax.shard_map(train_step, mesh=mesh, in_specs=(P(), specs, P("data")), out_specs=(P(), specs))
    >>> params, state = jax.jit(mapped)(params, state, jnp.ones((1, 8)))
    >>> print(params[:2])
    [0.9 0.9]
    """
    return Zero1Mapped(opt, axis)
