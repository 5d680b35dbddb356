"""The leaf program: the operations of a step on one leaf, as data, and XLA's way to run them.

The last operation delivers the result: as an update, added to the parameter, or as a wrapper that rounds parameters
says. All operations on a leaf are one compiled function, so that a tree of a thousand leaves is traced once per
distinct leaf, and so that a kernel can recognise them and run them in one pass.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple, TypeVar

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
    """One operation on one leaf.

    Fields:
      function: The `LeafFunction`.
      operands: The arrays that it takes besides update, parameter and leaf state.
      dtype: The dtype of the update after it.
    """

    function: LeafFunction
    operands: Any
    dtype: np.dtype


class LeafTransform:
    """One transformation's part in a step.

    Fields:
      leaf_states: The state of each leaf, and behind them that of each group of `layout`; None if there is none.
      layout: The groups of leaves whose states are packed, and which are stepped together.
    """

    leaf_states: Sequence[Any] | None = None
    layout: Layout = ()

    def ops_for(self, index: int, dtype: np.dtype, p: Any) -> Sequence[LeafOp]:
        """The operations on leaf `index`, whose update has `dtype`; empty to leave it as it is."""
        raise NotImplementedError

    def new_state(self, leaf_states: list[Any]) -> PyTree:
        """The transformation's state after the step."""
        return ()


class LeafProgram(NamedTuple):
    """The operations on one leaf, in order.

    Fields:
      functions: The `LeafFunction`s, each behind the number of its transformation, whose leaf state it takes.
      operands: The operands of each.
    """

    functions: tuple[tuple[int, LeafFunction], ...]
    operands: list[Any]


class GroupProgram(NamedTuple):
    """The operations on a group of leaves.

    Fields:
      before: A program for each leaf.
      together: The program for all leaves in one flat array, whose leaf state is packed.
      after: A program for each leaf.
      shapes: The shapes of the leaves.
    """

    before: list[LeafProgram]
    together: LeafProgram
    after: list[LeafProgram]
    shapes: tuple[tuple[int, ...], ...]


class Executor:
    """Runs leaf programs by XLA. A subclass may run those that it recognises by a kernel.

    Fields:
      paths: Returns the key path of each leaf, for messages.
    """

    def __init__(self, paths: Callable[[], list[Path]]) -> None:
        self.paths = paths

    def run_leaf(self, index: int, program: LeafProgram, u: Any, p: Any, states: list[Any]) -> tuple[Any, list[Any]]:
        """Run a program on leaf `index`; return its result and the new leaf states, one of each transformation."""
        if not program.functions:
            return u, states
        return run_program(program.functions, u, p, states, program.operands)

    def run_group(
        self,
        indices: Sequence[int],
        program: GroupProgram,
        us: list[Any],
        ps: list[Any],
        states: list[list[Any]],
        packed_state: Any,
    ) -> tuple[list[Any], list[list[Any]], Any]:
        """Run a program on the leaves `indices`; return results, new leaf states of each, and the new packed state."""
        frozen = tuple([u is None for u in us])
        leaves = list(zip(indices, us, ps, states, strict=True))
        before = [
            (None, s) if u is None else self.run_leaf(i, program_, u, p, s)
            for program_, (i, u, p, s) in zip(program.before, leaves, strict=True)
        ]
        joined = packing.concat([u for u, _ in before], program.shapes)
        direction, [new_packed] = self.run_leaf(-1, program.together, joined, None, [packed_state])
        parts = packing.split(direction, program.shapes)
        after = [
            (None, s) if u is None else self.run_leaf(i, program_, packing.sharded_like(part, u), p, s)
            for program_, part, (i, u, p, _), (_, s) in zip(program.after, parts, leaves, before, strict=True)
        ]
        new_packed = packing.where_frozen(new_packed, packed_state, program.shapes, frozen)
        return [u for u, _ in after], [s for _, s in after], new_packed


@partial(jax.jit, static_argnums=0)
def run_program(
    functions: tuple[tuple[int, LeafFunction], ...], u: Any, p: Any, states: list[Any], operands: list[Any]
) -> tuple[Any, list[Any]]:
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
    """Run one step of every leaf.

    Args:
      transforms: What is done, in order.
      updates: The updates so far. A leaf that is None is frozen: nothing is done to it, and its state stays.
      params: The parameters as the transformations see them, or None.
      executor: Makes the `Executor`.

    Returns:
      The results, and for each transformation its new leaf states.
    """
    run = executor(cache(updates.paths))
    ps = [None] * len(updates.leaves) if params is None else params.leaves
    results = list(updates.leaves)
    states = [[()] * len(ps) if t.leaf_states is None else list(t.leaf_states) for t in transforms]
    grouped = _run_groups(transforms, run, updates.leaves, ps, results, states)
    for index, (u, p) in enumerate(zip(updates.leaves, ps, strict=True)):
        if u is None or index in grouped:
            continue
        dtype = trees.dtype_of(u)
        u = trees.cast(u, dtype)  # numbers and weak types, which a program may leave as they are
        program, _ = _program(transforms, range(len(transforms)), index, dtype, p)
        results[index], new = run.run_leaf(index, program, u, p, [column[index] for column in states])
        for column, state in zip(states, new, strict=True):
            column[index] = state
    return updates.like(results), states


def _run_groups(
    transforms: Sequence[LeafTransform],
    run: Executor,
    us: list[Any],
    ps: list[Any],
    results: list[Any],
    states: list[list[Any]],
) -> set[int]:
    """Run the groups of leaves, put `results` and `states` in place, and return which leaves were in groups."""
    packed = next((number for number, t in enumerate(transforms) if t.layout), None)
    if packed is None:
        return set()
    grouped: set[int] = set()
    for k, places in enumerate(transforms[packed].layout, len(us)):
        indices, shapes = zip(*places, strict=True)
        grouped.update(indices)
        if all(us[i] is None for i in indices):
            continue
        program = _group_program(transforms, packed, k, indices, shapes, us, ps)
        of_leaves = [[() if j == packed else column[i] for j, column in enumerate(states)] for i in indices]
        own_us, own_ps = [us[i] for i in indices], [ps[i] for i in indices]
        made, of_leaves, states[packed][k] = run.run_group(
            indices, program, own_us, own_ps, of_leaves, states[packed][k]
        )
        for i, result, new in zip(indices, made, of_leaves, strict=True):
            results[i] = result
            for j, column in enumerate(states):
                if j != packed:
                    column[i] = new[j]
    return grouped


def _group_program(
    transforms: Sequence[LeafTransform],
    packed: int,
    k: int,
    indices: Sequence[int],
    shapes: tuple[tuple[int, ...], ...],
    us: list[Any],
    ps: list[Any],
) -> GroupProgram:
    given = [(i, us[i]) for i in indices if us[i] is not None]
    before = {i: _program(transforms, range(packed), i, trees.dtype_of(u), ps[i]) for i, u in given}
    joined = packing.concat_dtype([dtype for _, dtype in before.values()])
    *_, last = ops = transforms[packed].ops_for(k, joined, None)
    together = LeafProgram(tuple([(0, op.function) for op in ops]), [op.operands for op in ops])
    rest = range(packed + 1, len(transforms))
    after = {i: _program(transforms, rest, i, last.dtype, ps[i])[0] for i, _ in given}
    nothing = LeafProgram((), [])
    return GroupProgram(
        [before[i][0] if i in before else nothing for i in indices],
        together,
        [after.get(i, nothing) for i in indices],
        shapes,
    )


def _program(
    transforms: Sequence[LeafTransform], numbers: Sequence[int], index: int, dtype: np.dtype, p: Any
) -> tuple[LeafProgram, np.dtype]:
    """The operations of these transformations on one leaf, and the dtype of the update after them."""
    functions, operands = [], []
    for number in numbers:
        for op in transforms[number].ops_for(index, dtype, p):
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
