"""ZeRO, stage 1, under `jax.jit`: each device stores and steps a shard of the moments."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.export
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from adamjax._core import checks, trees
from adamjax._core.flax_nodes import serialised_by_flax
from adamjax._core.trees import Leaves
from adamjax._core.typing import GradientTransformation, PyTree
from adamjax._core.value import StaticTree, Value, static_field, value
from adamjax._transforms.base import Result, StepContext, StepsParts
from adamjax.sharding import _layout
from adamjax.sharding._layout import MeshLike, Names, StateLayout


class Specs(StaticTree):
    """A tree of `PartitionSpec`s as a hashable value."""

    def __init__(self, tree: PyTree) -> None:
        super().__init__(tree, is_leaf=_is_spec)
        if not all(map(_is_spec, self.leaves)):
            raise TypeError(
                f"Invalid specs value: {checks.shown(tree)}; specs must be a tree of jax.sharding.PartitionSpec"
            )

    def of(self, params: PyTree) -> list[PartitionSpec]:
        """Return the spec of each leaf of `params`."""
        try:
            return jax.tree.leaves(jax.tree.broadcast(self.tree, params, is_leaf=_is_spec), is_leaf=_is_spec)
        except ValueError:
            raise ValueError(
                f"specs is {checks.shown(self)}, which is no tree like params, and no prefix of it"
            ) from None


def _is_spec(x: Any) -> bool:
    return isinstance(x, PartitionSpec)


@serialised_by_flax
@value
class Zero1State(Value):
    """State of `zero1`.

    Fields:
      inner: The state of the wrapped transformation.
      specs: The sharding of each parameter, in the order of the tree. A compiled function does not see it.
    """

    inner: Any
    specs: tuple[PartitionSpec, ...] = static_field(described=False)


jax.export.register_pytree_node_serialization(
    Zero1State,
    serialized_name="adamjax.Zero1State",
    serialize_auxdata=lambda static: json.dumps([tuple(spec) for spec in static[0]]).encode(),
    deserialize_auxdata=lambda found: (tuple(map(_spec_from_json, json.loads(bytes(found)))),),
)


def _spec_from_json(parts: list[Any]) -> PartitionSpec:
    return PartitionSpec(*(tuple(part) if isinstance(part, list) else part for part in parts))


@value
class Zero1(StepsParts):
    """See `zero1`."""

    inner: Any
    axis: str | Names = static_field(described=False)
    mesh: Any = static_field(default=None, described=False)
    specs: Any = static_field(default=None, described=False)

    def __post_init__(self) -> None:
        self._wrap("zero1")
        if self.mesh is not None:
            _layout.check_mesh(self.mesh)
        _layout.check_axes("axis", self.axis, self.mesh)
        if self.specs is not None and not isinstance(self.specs, Specs):
            self._replace_field("specs", Specs(self.specs))

    def describe(self, params: PyTree) -> str:
        """Return a table of the bytes of each array of the state on a device; see `describe`."""
        return _layout.describe(self.inner, params, zero_axis=self.axis)

    def _init(self, params: PyTree) -> Zero1State:
        leaves = jax.tree.leaves(params)
        given = [None] * len(leaves) if self.specs is None else self.specs.of(params)
        if trees.any_abstract(params) and not any(map(_layout.sharding_of, leaves)):
            return Zero1State(self.inner._init(params), _canonical(spec or PartitionSpec() for spec in given))
        plan, whole = self._plan(params, given, "zero1 was given specs that say")
        specs = _canonical(s.spec for s in jax.tree.leaves(whole))
        return Zero1State(_layout.init_sharded(self.inner, params, plan.state), specs)

    def _run(self, updates: Leaves, state: PyTree, context: StepContext) -> Result:
        checks.params_given(context.params, updates, "zero1")
        params = context.params or updates  # without parameters, there are no gradients
        checks.state(state, Zero1State, "zero1")
        if len(state.specs) != (count := len(jax.tree.leaves(params))):
            raise ValueError(
                f"the state of zero1 is that of {len(state.specs)} parameters, and params has {count}: "
                "call init(params) for these"
            )
        plan, whole = self._plan(params.tree, state.specs, "the state of zero1 was made where it was")

        def constrain(x: Leaves, shardings: PyTree) -> Leaves:
            return x.like(x.column(_layout.constrain(x.tree, shardings)))

        parts = constrain(updates, plan.params), constrain(params, plan.params)
        found, delivered, inner = self._run_parts(parts, state.inner, context, lambda x: constrain(x, whole))
        return found, delivered, Zero1State(_layout.constrain(inner, plan.state), state.specs)

    def _plan(self, params: PyTree, specs: Sequence[PartitionSpec | None], said: str) -> tuple[StateLayout, PyTree]:
        """Return the layout during a step, and the shardings of the parameters before and after it."""
        leaves = jax.tree.leaves_with_path(params)
        mesh = _mesh_of(leaves, self.mesh)
        names = _layout.check_axes("axis", self.axis, mesh)
        found = [_whole(path, p, mesh, spec, said) for (path, p), spec in zip(leaves, specs, strict=True)]
        whole = jax.tree.unflatten(jax.tree.structure(params), found)
        structs = jax.tree.map(lambda p, s: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=s), params, whole)
        return _layout.state_layout(self.inner, structs, mesh, names), whole


def _canonical(specs: Iterable[PartitionSpec]) -> tuple[PartitionSpec, ...]:
    return tuple(map(_layout.canonical_spec, specs))


def _mesh_of(leaves: list[tuple[Any, Any]], given: Any) -> Any:
    """Return the mesh of the parameters, or the given one: tracers know only the abstract mesh."""
    if not leaves:
        raise ValueError("zero1 needs the parameters to know their mesh, and there are none")
    path, p = leaves[0]
    traced, where = isinstance(p, jax.core.Tracer), checks.at("params", path)
    mesh = getattr(jax.typeof(p).sharding if traced else _layout.sharding_of(p), "mesh", None)
    if mesh is None or mesh.empty:
        if traced and given is not None:
            return given
        remedy = "jax.device_put(params, NamedSharding(mesh, PartitionSpec()))" + ", or give zero1 the mesh" * traced
        raise ValueError(f"{where} is on no mesh: put the parameters there, by {remedy}")
    if AxisType.Manual in mesh.axis_types:
        raise ValueError("zero1 is for arrays under jax.jit: inside of jax.shard_map, take zero1_mapped")
    _layout.check_mesh(mesh)
    if given is not None and given.abstract_mesh != mesh.abstract_mesh:
        raise ValueError(f"{where} is on {mesh}, expected {given}, the mesh of zero1")
    return mesh


def _whole(path: Any, p: Any, mesh: Any, spec: PartitionSpec | None, said: str) -> NamedSharding:
    """Return the sharding of the parameter `p`, or the one of `spec` if it is unknown."""
    found = _layout.sharding_of(p)
    if found is None:
        return NamedSharding(mesh, spec or PartitionSpec())
    found = _layout.on_mesh(path, found, mesh)
    expected = found if spec is None else NamedSharding(mesh, spec)
    if _layout.mesh_axes_by_dim(found, p.ndim) != _layout.mesh_axes_by_dim(expected, p.ndim):
        raise ValueError(
            f"{checks.at('params', path)} is sharded by {found.spec}, and {said} {spec}: "
            "shard it so, or call init(params) for these parameters"
        )
    return found


def zero1(
    opt: GradientTransformation, *, mesh: MeshLike | None = None, axis: str | Names, specs: PyTree = None
) -> Zero1:
    """Spread the state of `opt` over an axis of the mesh: each of its n devices stores and steps an n-th (ZeRO-1).

    Use it on global arrays under `jax.jit`, with the gradients of the whole batch. Each device steps its shard of the
    parameters, and the new parameters are then gathered into the sharding they had. `state_sharding` decides the
    layout of the state, and the method `describe(params)` shows it; neither `in_shardings` nor `out_shardings` are
    needed. Make it the outermost wrapper: wrappers around it do not spread their own state.

    `step` gathers the parameters in their dtype; `update` gathers the updates, which may be wider. `step` gives the
    numbers of `opt`, bit for bit if the compiler rounds both programs alike. They may differ in the last bit if
    parameters are split along another axis than the first, or if moments are quantised.

    Args:
      opt: A transformation of adamjax or optax.
      mesh: The mesh that the parameters are on. None: the mesh of their shardings.
      axis: The axis of the mesh, or axes, to spread the state over; usually the data axis.
      specs: The `jax.sharding.PartitionSpec`s of the parameters, or of subtrees of them. Needed only if
        `init` itself is compiled, the parameters are sharded, and the mesh is in Auto mode, because a compiled
        function does not see shardings then. None: the shardings of the parameters, or replicated if unknown.

    Returns:
      A transformation with state `Zero1State`, whose `update` needs `params`.

    Raises:
      TypeError, ValueError: `opt` is not a transformation, `axis` not a name, or `specs` not a tree of specs; a
        parameter (the message has its path) is on no mesh, or not sharded as in `specs` or at `init`.

    References:
      Rajbhandari et al., 2020, https://arxiv.org/abs/1910.02054.

    >>> import adamjax, jax
    >>> from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
    >>> replicated = NamedSharding(AbstractMesh((8,), ("data",), (AxisType.Auto,)), PartitionSpec())
    >>> params = {"w": jax.ShapeDtypeStruct((64, 32), "float32", sharding=replicated)}
    >>> opt = adamjax.sharding.zero1(adamjax.adamw(1e-3), axis="data")
    >>> state = opt.init(params)  # of arrays, it would be arrays
    >>> state.inner[0].mu["w"].sharding.spec, state.inner[0].count.sharding.spec
    (P('data',), P())
    """
    return Zero1(opt, axis, mesh, specs)
