"""The leaf program: the operations of a step on one leaf, as data, and XLA's way to run them.

The last operation delivers the result: as an update, added to the parameter, or as a wrapper that rounds parameters
says. All operations on a leaf are one compiled function, so that a tree of a thousand leaves is traced once per
distinct leaf, and so that a kernel can recognise them and run them in one pass.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, ClassVar, NamedTuple, TypeVar

import jax
import numpy as np

from adamjax._core import packing, trees
from adamjax._core.packing import Layout
from adamjax._core.trees import Leaves
from adamjax._core.typing import Path, PyTree

T = TypeVar("T")
# Called as `function(u, p, leaf_state, operands)` with the update and the parameter; returns the new update and the
# new leaf state. Hashable: it is part of the compiled program.
LeafFunction = Callable[[Any, Any, Any, Any], tuple[Any, Any]]


class LeafOp(NamedTuple):
    """One operation on one leaf."""

    function: LeafFunction
    operands: Any  # the arrays that it takes besides update, parameter and leaf state
    dtype: np.dtype  # the dtype of the update after it


class LeafTransform:
    """One transformation's part in a step."""

    is_pure: ClassVar[bool] = False  # whether it depends on neither parameters nor a state
    # The state of each leaf, and behind them that of each group of `layout`; None if there is none.
    leaf_states: Sequence[Any] | None = None
    state: PyTree = ()  # the transformation's state after the step, if it does not depend on leaf states
    layout: Layout = ()  # the groups of leaves whose states are packed, and which are stepped together

    def ops_for(self, index: int, dtype: np.dtype, p: Any) -> Sequence[LeafOp]:
        """The operations on leaf `index`, whose update has `dtype`; empty to leave it as it is."""
        raise NotImplementedError

    def new_state(self, leaf_states: list[Any]) -> PyTree:
        """The transformation's state after the step."""
        return self.state


class LeafProgram(NamedTuple):
    """The operations on one leaf, in order."""

    # The `LeafFunction`s, each behind the number of its transformation, whose leaf state it takes.
    functions: tuple[tuple[int, LeafFunction], ...]
    operands: list[Any]  # the operands of each


class GroupProgram(NamedTuple):
    """The operations on a group of leaves."""

    before: list[LeafProgram]  # a program for each leaf
    together: LeafProgram  # the program for all leaves in one flat array, whose leaf state is packed
    after: list[LeafProgram]  # a program for each leaf
    shapes: tuple[tuple[int, ...], ...]  # the shapes of the leaves


class Leaf(NamedTuple):
    """One leaf of a step."""

    index: int  # type: ignore[assignment]  # hides tuple.index
    u: Any  # the update so far; None if the leaf is frozen
    p: Any  # the parameter as the transformations see it, or None
    states: list[Any]  # the leaf state of each transformation

    def after(self, done: "Done") -> "Leaf":
        """The leaf after a part of its program."""
        return Leaf(self.index, done[0], self.p, done[1])


Done = tuple[Any, list[Any]]  # the result of a leaf, and its new leaf states


class Executor:
    """Runs leaf programs by XLA. A subclass may run those that it recognises by a kernel."""

    def __init__(self, paths: Callable[[], list[Path]]) -> None:
        self.paths = paths

    def run_leaf(self, leaf: Leaf, program: LeafProgram) -> Done:
        """Run a program on one leaf."""
        if not program.functions:
            return leaf.u, leaf.states
        return run_program(program.functions, leaf.u, leaf.p, leaf.states, program.operands)

    def run_group(self, leaves: Sequence[Leaf], program: GroupProgram, packed_state: Any) -> tuple[list[Done], Any]:
        """Run a program on a group of leaves; return the result of each, and the new packed state."""
        before = list(map(self.run_leaf, leaves, program.before))
        joined = packing.concat([u for u, _ in before], program.shapes)
        direction, [new] = self.run_leaf(Leaf(-1, joined, None, [packed_state]), program.together)
        parts = packing.split(direction, program.shapes)
        rest = [
            leaf._replace(u=None if leaf.u is None else packing.sharded_like(part, leaf.u), states=states)
            for leaf, part, (_, states) in zip(leaves, parts, before, strict=True)
        ]
        frozen = tuple([leaf.u is None for leaf in leaves])
        new = packing.where_frozen(new, packed_state, program.shapes, frozen)
        return list(map(self.run_leaf, rest, program.after)), new


@partial(jax.jit, static_argnums=0)
def run_program(
    functions: tuple[tuple[int, LeafFunction], ...], u: Any, p: Any, states: list[Any], operands: list[Any]
) -> Done:
    """Run the operations of one leaf one after the other: by XLA, as one compiled function."""
    for (number, function), operand in zip(functions, operands, strict=True):
        u, states[number] = function(u, p, states[number], operand)
    return u, states


def run_leafwise(
    transforms: Sequence[LeafTransform],
    updates: Leaves,
    params: Leaves | None,
    executor: Callable[[Callable[[], list[Path]]], Executor] = Executor,
) -> tuple[Leaves, list[list[Any]]]:
    """Run one step of every leaf: what the `transforms` do to it, in order.

    A leaf of `updates` that is None is frozen: nothing is done to it, and its state stays. Returns the results, and
    the new leaf states of each transformation.
    """
    run, count = executor(cache(updates.paths)), len(updates.leaves)
    ps = [None] * count if params is None else params.leaves
    before = [[()] * count if t.leaf_states is None else t.leaf_states[:count] for t in transforms]
    leaves = [
        # Numbers and weak types become arrays of a dtype: a program may leave them as they are.
        Leaf(i, None if u is None else trees.cast(u, trees.dtype_of(u)), p, states)
        for i, (u, p, *states) in enumerate(zip(updates.leaves, ps, *before, strict=True))
    ]
    done = [(leaf.u, leaf.states) for leaf in leaves]
    packed = next((number for number, t in enumerate(transforms) if t.layout), None)
    groups: list[Any] = []
    grouped: set[int] = set()
    if packed is not None:
        groups += transforms[packed].leaf_states[count:]  # type: ignore[index]
        for k, places in enumerate(transforms[packed].layout):
            indices, shapes = zip(*places, strict=True)
            grouped.update(indices)
            group = [leaves[i] for i in indices]
            if any(leaf.u is not None for leaf in group):
                program = _group_program(transforms, packed, count + k, group, shapes)
                made, groups[k] = run.run_group(group, program, groups[k])
                for i, new in zip(indices, made, strict=True):
                    done[i] = new
    for leaf in leaves:
        if leaf.u is not None and leaf.index not in grouped:
            whole, _ = _program(transforms, range(len(transforms)), leaf, leaf.u.dtype)
            done[leaf.index] = run.run_leaf(leaf, whole)
    after = [list(column) for column in zip(*[states for _, states in done], strict=True)] or [[] for _ in transforms]
    if packed is not None:
        after[packed] += groups
    return updates.like([u for u, _ in done]), after


def _group_program(
    transforms: Sequence[LeafTransform], packed: int, k: int, group: Sequence[Leaf], shapes: tuple[tuple[int, ...], ...]
) -> GroupProgram:
    frozen = LeafProgram((), [])
    given = {leaf.index: leaf for leaf in group if leaf.u is not None}
    before = {i: _program(transforms, range(packed), leaf, leaf.u.dtype) for i, leaf in given.items()}
    *_, last = ops = transforms[packed].ops_for(k, packing.concat_dtype([dtype for _, dtype in before.values()]), None)
    together = LeafProgram(tuple([(0, op.function) for op in ops]), [op.operands for op in ops])
    rest = range(packed + 1, len(transforms))
    after = {i: _program(transforms, rest, leaf, last.dtype) for i, leaf in given.items()}
    programs = [[part[x.index][0] if x.index in part else frozen for x in group] for part in (before, after)]
    return GroupProgram(programs[0], together, programs[1], shapes)


def _program(
    transforms: Sequence[LeafTransform], numbers: Sequence[int], leaf: Leaf, dtype: np.dtype
) -> tuple[LeafProgram, np.dtype]:
    """The operations of these transformations on one leaf, and the dtype of the update after them."""
    functions, operands = [], []
    for number in numbers:
        for op in transforms[number].ops_for(leaf.index, dtype, leaf.p):
            functions.append((number, op.function))
            operands.append(op.operands)
            dtype = op.dtype
    return LeafProgram(tuple(functions), operands), dtype


class _Key:
    """One of NumPy's numbers, hashed by content."""

    def __init__(self, x: np.ndarray | np.generic) -> None:
        self.x = x
        self.content = x.dtype, x.tobytes()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.content == other.content

    def __hash__(self) -> int:
        return hash(self.content)


class _Constant:
    """One of NumPy's numbers as a node without leaves: flattened into the structure, unflattened as the number."""

    def __init__(self, x: np.ndarray | np.generic) -> None:
        self.key = _Key(x)


jax.tree_util.register_pytree_node(_Constant, lambda x: ((), x.key), lambda key, _: key.x)


def as_constants(scalars: T, like: Any) -> T:
    """Bake NumPy scalars into the compiled functions that take them, if `like` is being traced.

    They are constants of the traced program anyway. Passing them as arguments makes tracing 1000 leaves 1.7 times
    slower.
    """
    if not isinstance(like, jax.core.Tracer):
        return scalars
    return jax.tree.map(lambda x: _Constant(x) if isinstance(x, np.ndarray | np.generic) else x, scalars)
