"""The moments of many small parameters in a few flat arrays."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adamjax._core import checks, collectives, packing, trees
from adamjax._core.packing import PackedTree
from adamjax._core.quantization import is_quantized
from adamjax._core.trees import PyTree
from adamjax._core.value import static_field, value
from adamjax._transforms.base import Chain, Extra, Transformation, Wrapper, as_transformation
from adamjax._transforms.groups import Groups
from adamjax._transforms.moments import AdamState, Moments
from adamjax._transforms.weight_decay import Objective

_BELOW = 16384


@value
class Packed(Wrapper):
    """See `packed`; `inner` is what keeps the moments."""

    inner: Any
    below: int = static_field(default=_BELOW)

    def __post_init__(self) -> None:
        if not isinstance(self.inner, Moments):
            raise TypeError(f"Invalid inner value: {self.inner!r}; inner must be what keeps moments, as scale_by_adam")
        self._replace_field("below", checks.count("below", self.below))

    def _init(self, params: PyTree) -> AdamState:
        like = self.inner._init(trees.shapes_of(params))
        structure, rows = trees.flatten(params, like.mu, like.nu, like.nu_max)
        small = [
            (i, np.shape(p), (trees.dtype_of(p), m.dtype, v.dtype))
            for i, (p, m, v, v_max) in enumerate(rows)
            if p is not None and np.size(p) < self.below and not any(map(is_quantized, (m, v, v_max)))
        ]
        layout = packing.layout_of(small)
        packed = {i for i, *_ in small}
        rest = self.inner._init(structure.unflatten([None if i in packed else p for i, (p, *_) in enumerate(rows)]))
        sizes = [(places[0][0], size) for places, size in zip(layout, packing.sizes_of(layout), strict=True)]
        columns = [1, 2, 3] if self.inner.keeps_maximum else [1, 2]

        def zeros() -> list[tuple[Any, ...]]:
            return [tuple(jnp.zeros(size, rows[first][j].dtype) for first, size in sizes) for j in columns]

        pairs = zip((rest.mu, rest.nu, rest.nu_max), trees.fresh(zeros, params), strict=False)
        return AdamState(trees.zero_count(params), *(PackedTree(tree, groups, layout) for tree, groups in pairs))

    def checked(self, updates: PyTree, state: PyTree) -> AdamState:
        """`state`, if it is one of these moments for such gradients."""
        checks.state(state, AdamState, "packed")
        kept = {"state.mu": state.mu, "state.nu": state.nu}
        if self.inner.keeps_maximum:
            kept["state.nu_max"] = state.nu_max
        for name, tree in kept.items():
            if not isinstance(tree, PackedTree):
                raise TypeError(
                    f"{name} of packed is {type(tree).__name__}, expected PackedTree: call init(params); moments to go "
                    f"on with are put in its place by {name}.pack(moments) of that"
                )
            checks.groups(tree.groups, packing.sizes_of(tree.layout), name)
            if tree.layout != state.mu.layout:
                raise ValueError(f"{name} has other groups than state.mu: they belong to different optimizers")
        checks.moments(updates, state.mu.like(), "state.mu")
        return state

    def _update(self, updates: PyTree, state: PyTree, params: PyTree | None, extra: Extra) -> tuple[PyTree, AdamState]:
        state = self.checked(updates, state)
        layout = state.mu.layout
        rest, groups = packing.taken_apart(updates, layout)
        for places, group in zip(layout, groups, strict=True):
            _check_alike(updates, [number for number, _ in places], group)
        grads = PackedTree(rest, tuple(map(_joined, groups, state.mu.shapes)), layout)
        direction, new = self.inner._update(grads, state, None, extra)
        frozen = [tuple(g is None for g in group) for group in groups]
        after = (_kept(new_tree, before, frozen) for new_tree, before in zip(new[1:], state[1:], strict=True))
        direction = trees.map_leaves(lambda g, u: packing.sharded_like(u, g), updates, direction.unpack())
        return direction, AdamState(new.count, *after)


def _check_alike(updates: PyTree, numbers: list[int], group: list[Any]) -> None:
    """Check that gradients of a group differ over the same mapped axes, as far as JAX knows."""
    axes = [None if g is None else collectives.varying_over(g) for g in group]
    if len(known := {found for found in axes if found is not None}) > 1:
        paths = [path for path, _ in jax.tree.leaves_with_path(updates, is_leaf=trees.is_none)]
        said = " and ".join(
            f"that for params{jax.tree_util.keystr(paths[numbers[axes.index(found)]])} "
            f"over {', '.join(map(repr, sorted(found))) or 'none'}"
            for found in sorted(known, key=sorted)
        )
        raise ValueError(
            f"packed has gradients in one group that differ over other axes of jax.shard_map: {said}. Choose a "
            "`below` that leaves one of them out, or keep parameters whole there"
        )


def _joined(group: list[Any], shapes: tuple[tuple[int, ...], ...]) -> Any:
    """The gradients of a group; of those that are frozen, any number will do. None if all are."""
    given = [g for g in group if g is not None]
    if not given:
        return None
    dtype = trees.dtype_of(given[0])
    return packing.join([jnp.zeros(s, dtype) if g is None else g for g, s in zip(group, shapes, strict=True)])


def _kept(new: Any, old: Any, frozen: list[tuple[bool, ...]]) -> Any:
    """The moments to keep: the new ones, but for those that are frozen."""
    if new is None:
        return None
    groups = [
        packing.pinned(packing.restored(a, b, shapes, which) if any(which) and not all(which) else a)
        for a, b, shapes, which in zip(new.groups, old.groups, new.shapes, frozen, strict=True)
    ]
    return dataclasses.replace(new, groups=tuple(groups))


def packed(opt: Any, below: int = _BELOW) -> Transformation:
    """Keep the moments of small parameters in a few flat arrays, and step those together.

    For a model of a thousand small arrays, handing them all over, and compiling a step of each, takes longer than
    the arithmetic. Here up to 16 of them share one array for each moment: their gradients are put behind each
    other, stepped as one, and taken apart again. The parameters stay the tree that they are.

    What is packed is the moments alone, wherever in `opt` they are kept: in a chain, a group, or a wrapper. All else
    sees the trees that it always sees, so that weight decay, masks, schedules, clipping, gradients that are None
    and the wrappers are as they were, and `packed(kahan(opt))` is `kahan(packed(opt))`. The numbers are those of `opt`;
    only what moments in half precision are rounded by comes from elsewhere, and is as good.

    Moments of larger parameters, and those that are quantised, stay in the tree. On a mesh, those that are packed
    are whole on each device, wherever the parameters are; `zero1` spreads the others. With `fused=True` in `opt`, on
    one device, `step` takes each group through memory once, without putting anything behind each other.

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
            f"packed found nothing to pack in {opt!r}: it packs the moments of adamjax's optimizers. Those of "
            "adamjax.interop.torch are kept for each parameter by itself, and what optax's keep is not known"
        )
    return found


def _packed(opt: Transformation, below: int) -> tuple[Any, int]:
    """`opt` with its moments packed, and in how many places it keeps some."""
    if isinstance(opt, Packed):
        raise ValueError(f"{opt!r} is packed already")
    if isinstance(opt, Moments):
        return Packed(opt, below), 1
    if isinstance(opt, Chain | Groups):
        name = "transforms" if isinstance(opt, Chain) else "members"
        pairs = [_packed(member, below) for member in getattr(opt, name)]
        return _with(opt, name, tuple(member for member, _ in pairs)), sum(places for _, places in pairs)
    if isinstance(opt, Wrapper | Objective):
        inner, places = _packed(opt.inner, below)
        return _with(opt, "inner", inner), places
    return opt, 0


def _with(opt: Any, name: str, content: Any) -> Any:
    return dataclasses.replace(opt, **{name: content})
