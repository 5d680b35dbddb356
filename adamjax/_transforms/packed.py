"""The moments of many small parameters in a few flat arrays."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from adamjax._core import checks, collectives, packing, trees
from adamjax._core.packing import PackedTree
from adamjax._core.quantization import is_moment, is_quantized
from adamjax._core.trees import Leaves
from adamjax._core.typing import GradientTransformation, PyTree
from adamjax._core.value import static_field, value
from adamjax._transforms.base import Leafwise, Transformation, Wrapper, as_transformation
from adamjax._transforms.chain import Chain
from adamjax._transforms.groups import Groups
from adamjax._transforms.leafwise import LeafTransform
from adamjax._transforms.moments import Moments, StepMoments
from adamjax._transforms.weight_decay import CoupledDecay

_MAX_PACKED_SIZE = 16384


@value
class Packed(Leafwise):
    """See `packed`; `inner` keeps the moments."""

    may_pack: ClassVar[bool] = True

    inner: Moments
    below: int = static_field(default=_MAX_PACKED_SIZE)

    def __post_init__(self) -> None:
        if not isinstance(self.inner, Moments):
            raise TypeError(
                f"Invalid inner value: {checks.shown(self.inner)}; inner must keep moments, as scale_by_adam does"
            )
        if self.inner.rule.has_factor:
            raise ValueError(
                f"{checks.shown(self.inner)} steps by a mean over each parameter, and packed would take one over many: "
                "leave packed out, or the option (cautious=False, or adamw in place of stable_adamw)"
            )
        self._replace_field("below", checks.count("below", self.below))

    def _init(self, params: PyTree) -> PyTree:
        like = self.inner._init(trees.abstract_like(params))
        leaves = Leaves.of(params)
        names = self.inner.columns
        rows = list(zip(leaves.leaves, *[leaves.column(getattr(like, name)) for name in names], strict=True))
        small = [
            (i, np.shape(p), (trees.dtype_of(p), *[x.dtype for x in moments]))
            for i, (p, *moments) in enumerate(rows)
            if p is not None and np.size(p) < self.below and not any(map(is_quantized, moments))
        ]
        layout = packing.layout_of(small)
        grouped = {i for i, *_ in small}
        ungrouped = [None if i in grouped else p for i, p in enumerate(leaves.leaves)]
        rest = self.inner._init(leaves.like(ungrouped).tree)
        sizes = [(places[0][0], size) for places, size in zip(layout, packing.group_sizes(layout), strict=True)]

        def zeros() -> list[tuple[Any, ...]]:
            return [
                tuple(jnp.zeros(size, rows[first][j].dtype) for first, size in sizes) for j in range(1, len(names) + 1)
            ]

        pairs = zip([getattr(rest, name) for name in names], trees.make_on_mesh_of(zeros, params), strict=True)
        if trees.is_placeholder(params):
            layout = packing.PlaceholderLayout()
        packed = [PackedTree(tree, groups, layout) for tree, groups in pairs]
        return self.inner.state_type(trees.zero_count(params), *packed)

    def _leaf_transforms(self, updates: Leaves, state: PyTree, params: Leaves | None) -> list[LeafTransform]:
        state = checks.state(state, self.inner.state_type, "packed")
        columns = self._columns(updates, state)
        layout, count = state.mu.layout, len(updates.leaves)
        if count != len(jax.tree.leaves(state.mu.rest, is_leaf=is_moment)):
            raise ValueError(
                "a None in the gradients stands for several parameters, which packed cannot tell apart: call update "
                "with params, or give a None for each"
            )
        for places in layout:
            _check_varying_alike(updates, [index for index, _ in places])

        def rebuild(column: list[Any]) -> PackedTree:
            return PackedTree(updates.like(column[:count]).tree, tuple(column[count:]), layout)

        return [StepMoments.of(self.inner, state.count, columns, rebuild, layout)]

    def _columns(self, updates: Leaves, state: PyTree) -> list[list[Any]]:
        """The moments of each leaf (None in a group) and then of each group, if `state` fits the updates."""
        columns = []
        for name in self.inner.columns:
            tree = getattr(state, name)
            if not isinstance(tree, PackedTree):
                raise TypeError(
                    f"state.{name} of packed is {type(tree).__name__}, expected PackedTree: call init(params); to go "
                    f"on with other moments, put them in its place by state.{name}.pack(moments)"
                )
            checks.groups(tree.groups, packing.group_sizes(tree.layout), f"state.{name}")
            if tree.layout != state.mu.layout:
                raise ValueError(f"state.{name} has other groups than state.mu: they belong to different optimizers")
            checks.moments(updates, tree.like(), f"state.{name}", real=not name.startswith("mu"))
            columns.append([*updates.column(tree.rest), *tree.groups])
        return columns


def _check_varying_alike(updates: Leaves, indices: list[int]) -> None:
    """Check that gradients of a group differ over the same mapped axes, as far as JAX knows."""
    axes = {i: collectives.varying_over(updates.leaves[i]) for i in indices if updates.leaves[i] is not None}
    if len(known := set(axes.values())) > 1:
        paths = updates.paths()
        first = {found: next(i for i, x in axes.items() if x == found) for found in known}
        said = " and ".join(
            f"that for {checks.at('params', paths[first[found]])} over {', '.join(map(repr, sorted(found))) or 'none'}"
            for found in sorted(known, key=sorted)
        )
        raise ValueError(
            f"packed has gradients in one group that differ over other axes of jax.shard_map: {said}. Choose a "
            "`below` that leaves one of them out, or keep parameters whole there"
        )


def packed(opt: GradientTransformation, below: int = _MAX_PACKED_SIZE) -> Transformation:
    """Keep the moments of small parameters in a few flat arrays, and step those together.

    For a model of a thousand small arrays, passing them to the program and compiling a step of each takes longer than
    the arithmetic. Here up to 16 of them share one array for each moment: their gradients are concatenated,
    stepped as one, and split again. The parameters stay the tree that they are.

    Only moments are packed, wherever in `opt` they are kept: in a chain, a group, or a wrapper. Weight decay, masks,
    schedules, clipping, gradients that are None and the wrappers see the trees that they always see, and
    `packed(kahan(opt))` is `kahan(packed(opt))`. The numbers are those of `opt`, except that moments in half
    precision are rounded by other random numbers.

    Moments of larger parameters and quantised moments stay in the tree. On a mesh, packed moments
    are whole on each device, wherever the parameters are; `zero1` spreads the others. With `fused=True` in `opt`, on
    one device, `step` takes each group through memory once, and concatenates nothing.

    Args:
      opt: A transformation. At least one of its parts is to be of adamjax's Adam family.
      below: Parameters with fewer elements than this are packed.

    Returns:
      `opt`, with its moments packed. The trees in its `AdamState`s are of type `storage.PackedTree`: `mu.unpack()` is
      the tree of moments, and `mu.pack(tree)` puts such a tree in its place, as to go on with a run without groups.

    Raises:
      TypeError, ValueError: There is nothing to pack in `opt`: optimizers of `adamjax.interop.torch` treat each
        parameter by itself, and what optax's keep is not known here. It is packed already; or `below` is no int of
        at least 1.

    >>> import adamjax, jax.numpy as jnp
    >>> opt = adamjax.packed(adamjax.adamw(0.1))
    >>> params = [jnp.ones(100) for _ in range(40)]
    >>> state = opt.init(params)
    >>> state[0].mu
    PackedTree(40 leaves in 3 groups, 0 by themselves)
    >>> params, state = opt.step(params, state, params)
    >>> state[0].mu.unpack()[0].shape
    (100,)
    """
    found, places = _packed(as_transformation(opt, "argument opt of packed"), checks.count("below", below))
    if not places:
        raise TypeError(
            f"packed found nothing to pack in {checks.shown(opt)}: it packs the moments of adamjax's optimizers. Those "
            "of adamjax.interop.torch are kept for each parameter by itself, and what optax's keep is not known"
        )
    return found


def _packed(opt: Any, below: int) -> tuple[Any, int]:
    """`opt` with its moments packed, and in how many places it keeps some."""
    replace: Any = dataclasses.replace  # type checkers do not see that values are dataclasses
    if isinstance(opt, Packed):
        raise ValueError(f"{checks.shown(opt)} is packed already")
    if isinstance(opt, Moments):
        return Packed(opt, below), 1
    if isinstance(opt, Chain | Groups):
        name = "transforms" if isinstance(opt, Chain) else "members"
        pairs = [_packed(member, below) for member in getattr(opt, name)]
        members = {name: tuple(member for member, _ in pairs)}
        return replace(opt, **members), sum(places for _, places in pairs)
    if isinstance(opt, Wrapper | CoupledDecay):
        inner, places = _packed(opt.inner, below)
        return replace(opt, inner=inner), places
    return opt, 0
