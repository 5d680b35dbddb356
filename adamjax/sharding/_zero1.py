"""ZeRO, stage 1, under `jax.jit`: each device keeps, and steps, a part of the moments."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.export
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from adamjax._core import checks, trees
from adamjax._core.trees import Leaves
from adamjax._core.typing import Extra, PyTree
from adamjax._core.value import Value, static_field, value
from adamjax._transforms.base import Result, StepsParts
from adamjax._transforms.delivery import Delivery
from adamjax.sharding import _layout
from adamjax.sharding._layout import Names, Plan


class Specs:
    """A tree of `PartitionSpec`s as a hashable value."""

    def __init__(self, tree: PyTree) -> None:
        self.leaves, self.structure = jax.tree.flatten(tree, is_leaf=_is_spec)
        if not all(map(_is_spec, self.leaves)):
            raise TypeError(f"Invalid specs value: {tree!r}; specs must be a tree of jax.sharding.PartitionSpec")

    def of(self, params: PyTree) -> list[PartitionSpec]:
        """One for each leaf of `params`."""
        try:
            return jax.tree.leaves(jax.tree.broadcast(self.tree, params, is_leaf=_is_spec), is_leaf=_is_spec)
        except ValueError:
            raise ValueError(f"specs is {self!r}, which is no tree like params, and no prefix of it") from None

    @property
    def tree(self) -> PyTree:
        return jax.tree.unflatten(self.structure, self.leaves)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Specs) and (self.leaves, self.structure) == (other.leaves, other.structure)

    def __hash__(self) -> int:
        return hash((self.structure, *self.leaves))

    def __repr__(self) -> str:
        return repr(self.tree)


def _is_spec(x: Any) -> bool:
    return isinstance(x, PartitionSpec)


@value
class Zero1State(Value):
    """State of `zero1`.

    Fields:
      inner: The state of the wrapped transformation.
      specs: How each parameter is sharded, in the order of the tree: a compiled function does not see that.
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
        """A table: what each array of the state costs a device, and why some stay whole; see `describe`."""
        return _layout.describe(self.inner, params, zero_axis=self.axis)

    def _init(self, params: PyTree) -> Zero1State:
        leaves = jax.tree.leaves(params)
        given = [None] * len(leaves) if self.specs is None else self.specs.of(params)
        if trees.any_abstract(params) and not any(map(_layout.sharding_of, leaves)):
            return Zero1State(self.inner._init(params), _shortest(spec or PartitionSpec() for spec in given))
        plan, whole = self._plan(params, given, "zero1 was given specs that say")
        specs = _shortest(s.spec for s in jax.tree.leaves(whole))
        return Zero1State(_layout.init_sharded(self.inner, params, plan.state), specs)

    def _run(
        self, updates: Leaves, state: PyTree, params: Leaves | None, extra: Extra, delivery: Delivery | None
    ) -> Result:
        checks.params_given(params, updates, "zero1")
        params = updates if params is None else params  # without parameters, there are no gradients
        plan, whole = self._plan_of(state, params.tree)
        grads, own = [x.like(x.column(_layout.pin(x.tree, plan.params))) for x in (updates, params)]

        def together(found: Leaves) -> Leaves:
            return found.like(found.column(_layout.pin(found.tree, whole)))

        found, delivered, inner = self._run_parts(grads, state.inner, own, extra, delivery, (params, together))
        return found, delivered, Zero1State(_layout.pin(inner, plan.state), state.specs)

    def _plan_of(self, state: PyTree, params: PyTree) -> tuple[Plan, PyTree]:
        checks.state(state, Zero1State, "zero1")
        count = len(jax.tree.leaves(params))
        if len(state.specs) != count:
            raise ValueError(
                f"the state of zero1 is that of {len(state.specs)} parameters, and params has {count}: "
                "call init(params) for these"
            )
        return self._plan(params, state.specs, "the state of zero1 was made where it was")

    def _plan(self, params: PyTree, specs: Sequence[PartitionSpec | None], said: str) -> tuple[Plan, PyTree]:
        """Where everything is during a step, and where the parameters are before and after it."""
        leaves = jax.tree.leaves_with_path(params)
        mesh = _mesh_of(leaves, self.mesh)
        names = _layout.check_axes("axis", self.axis, mesh)
        whole = [_whole(path, p, mesh, spec, said) for (path, p), spec in zip(leaves, specs, strict=True)]
        structs = [jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=s) for (_, p), s in zip(leaves, whole, strict=True)]
        structure = jax.tree.structure(params)
        plan = _layout.plan(self.inner, jax.tree.unflatten(structure, structs), mesh, names)
        return plan, jax.tree.unflatten(structure, whole)


def _shortest(specs: Iterable[PartitionSpec]) -> tuple[PartitionSpec, ...]:
    return tuple(map(_layout.shortest, specs))


def _mesh_of(leaves: list[tuple[Any, Any]], given: Any) -> Any:
    """The mesh of parameters, of which tracers know what it is like, if not which devices it has; or the one given."""
    for path, p in leaves:
        found = jax.typeof(p).sharding if isinstance(p, jax.core.Tracer) else _layout.sharding_of(p)
        mesh = getattr(found, "mesh", None)
        if mesh is None or mesh.empty:
            traced = isinstance(p, jax.core.Tracer)
            if traced and given is not None:
                return given
            raise ValueError(
                f"params{jax.tree_util.keystr(path)} is on no mesh: put the parameters there, by "
                "jax.device_put(params, NamedSharding(mesh, PartitionSpec()))"
                + (", or give zero1 the mesh" if traced else "")
            )
        if AxisType.Manual in mesh.axis_types:
            raise ValueError("zero1 is for arrays under jax.jit: inside of jax.shard_map, take zero1_mapped")
        _layout.check_mesh(mesh)
        if given is not None and given.abstract_mesh != mesh.abstract_mesh:
            raise ValueError(f"params{jax.tree_util.keystr(path)} is on {mesh}, expected {given}, the mesh of zero1")
        return mesh
    raise ValueError("zero1 needs the parameters to know their mesh, and there are none")


def _whole(path: Any, p: Any, mesh: Any, spec: PartitionSpec | None, said: str) -> NamedSharding:
    """How the parameter `p` is sharded: what is known of it, or else `spec`."""
    found = _layout.sharding_of(p)
    if found is None:
        return NamedSharding(mesh, spec or PartitionSpec())
    found = _layout.on_mesh(path, found, mesh)
    if spec is not None and _layout.dimensions(found, p.ndim) != _layout.dimensions(NamedSharding(mesh, spec), p.ndim):
        raise ValueError(
            f"params{jax.tree_util.keystr(path)} is sharded by {found.spec}, and {said} {spec}: "
            "shard it so, or call init(params) for these parameters"
        )
    return found


def zero1(opt: Any, *, mesh: Mesh | AbstractMesh | None = None, axis: str | Names, specs: PyTree = None) -> Zero1:
    """Spread the state of `opt` over an axis of the mesh: of n devices there, each keeps and steps an n-th (ZeRO-1).

    For arrays under `jax.jit`, as if there were one device: gradients are those of the whole batch. Each device steps
    its part of the parameters, and these are then brought together: they come back sharded as they
    were. Where the state is, `state_sharding` decides, and the method `describe(params)` shows; neither `in_shardings`
    nor `out_shardings` are needed. Put it outermost: what is around it keeps its own state whole.

    `step` brings the parameters together in their dtype, `update` the updates, which may be wider. With `step` the
    numbers are those of `opt`, bit for bit as far as the compiler rounds both programs alike: it may
    differ in the last bit where parameters are divided along another axis than the first, or moments quantised.

    Args:
      opt: A transformation, ours or optax's.
      mesh: The mesh that the parameters are on. None: the one that they say.
      axis: The axis of the mesh, or axes, that the state is spread over; as a rule, that of the data.
      specs: The `jax.sharding.PartitionSpec`s of the parameters, or of subtrees of them. Needed only where
        `init` itself is compiled, the parameters are sharded, and the axes of the mesh in Auto mode,
        in which a compiled function does not see that. None: what the parameters say; replicated where they cannot.

    Returns:
      A transformation with state `Zero1State`, that of `opt` and what the parameters said at `init` of how they are
      sharded. Its `update` needs `params`.

    Raises:
      TypeError, ValueError: `opt` is no transformation, `axis` no name, or `specs` no such tree; at `init`, a
        parameter is on no mesh, or sharded otherwise than `specs` says; later, otherwise than it was at
        `init` (the message has its path).

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
