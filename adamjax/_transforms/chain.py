"""Transformations one after another."""

import warnings
from collections.abc import Callable, Iterator
from functools import reduce
from typing import Any, ClassVar

from adamjax._core import checks, trees
from adamjax._core.trees import Leaves
from adamjax._core.typing import GradientTransformation, Path, PyTree
from adamjax._core.value import value
from adamjax._transforms.base import (
    Foreign,
    Leafwise,
    Result,
    StepContext,
    Transformation,
    as_transformation,
    delivering,
    must_be_last,
)
from adamjax._transforms.delivery import Delivery, update_dtype
from adamjax._transforms.leafwise import Executor, LeafTransform, run_leafwise
from adamjax._transforms.rates import times


@value
class Chain(Transformation):
    """Transformations one after another; the state is the tuple of theirs."""

    takes_first: ClassVar[bool] = True
    has_executor: ClassVar[bool] = False  # whether its members are run by an executor of its own

    transforms: tuple[Transformation, ...]

    def __post_init__(self) -> None:
        for transform in self.transforms[:-1]:
            if must_be_last(transform):
                raise ValueError(
                    f"{checks.shown(transform)} must be the last of a chain: a later transformation would change "
                    "the parameters that it leads to, and that it rounds or averages"
                )
        for i, transform in enumerate(self.transforms):
            if i and any(t.unscales_gradients for t in delivering(transform)):
                before = ", ".join(type(t).__name__ for t in self.transforms[:i])
                warnings.warn(
                    f"{before} comes before dynamic_loss_scale in a chain, and is given gradients that are multiplied "
                    "by the scale of the loss: put all into it, dynamic_loss_scale(chain(...))",
                    stacklevel=4,
                )

    def _delivered_by(self) -> tuple[Transformation, ...]:
        return self.transforms[-1:]

    def _learning_rate(self, state: PyTree) -> Any:
        checks.member_states(state, len(self.transforms), "a chain")
        return reduce(times, [t._learning_rate(part) for t, part in zip(self.transforms, state, strict=True)], None)

    def _init(self, params: PyTree) -> PyTree:
        return tuple([t._init(params) for t in self.transforms])

    def _executor(self, paths: Callable[[], list[Path]]) -> Executor:
        """The executor of the leaf programs with its members, if it has one."""
        raise NotImplementedError

    def _run(self, updates: Leaves, state: PyTree, context: StepContext) -> Result:
        grads, (params, _, delivery, first) = updates, context
        members = self._members(state)
        states: list[PyTree] = []
        program = _Program(first)
        for transform, part, owner in members:
            if isinstance(transform, Leafwise):
                if transform.reads_updates or (transform.may_pack and program.may_pack):
                    updates, made, _ = program.run(updates, params)
                    states += made
                    program = _Program()
                program.may_pack |= transform.may_pack
                program.transforms += transform._leaf_transforms(updates, part, params)
                program.ends.append(len(program.transforms))
                if owner.has_executor:
                    program.executor = owner._executor
                continue
            handed_on = program.transforms[0] if transform.takes_first and program.is_pure else None
            if handed_on is None:
                updates, made, _ = program.run(updates, params)
            else:
                made = program.new_states([[]])
            states += made
            program = _Program()
            if isinstance(transform, Foreign) and updates is not grads:
                # Others keep their state in the dtype of the updates they are given: hand them the dtype of the
                # parameters, not our wider intermediate one.
                updates = _rounded(updates, grads if params is None else params)
            is_last = len(states) == len(members) - 1
            inside = context._replace(first=handed_on, delivery=delivery if is_last else None)
            updates, delivered, part = transform._run(updates, part, inside)
            states.append(part)
            if is_last:
                return updates, delivered, self._nested(iter(states))
        updates, made, delivered = program.run(updates, params, delivery)
        return updates, delivered, self._nested(iter([*states, *made]))

    def _members(self, state: PyTree) -> list[tuple[Transformation, PyTree, "Chain"]]:
        """All members, those of chains in it too, each with its state and the chain that it is in."""
        checks.member_states(state, len(self.transforms), "a chain")
        found: list[tuple[Transformation, PyTree, Chain]] = []
        for transform, part in zip(self.transforms, state, strict=True):
            is_chain = issubclass(type(transform), Chain)
            found += transform._members(part) if is_chain else [(transform, part, self)]  # type: ignore[attr-defined]
        return found

    def _nested(self, states: Iterator[PyTree]) -> tuple[PyTree, ...]:
        """The state, from those of the members in the order of `_members`."""
        found: list[PyTree] = []
        for transform in self.transforms:
            is_chain = issubclass(type(transform), Chain)
            found.append(transform._nested(states) if is_chain else next(states))  # type: ignore[attr-defined]
        return tuple(found)

    def __repr__(self) -> str:
        members = ", ".join(map(repr, self.transforms))
        return f"Chain(({members}{',' if len(self.transforms) == 1 else ''}))"


def chain(*transforms: GradientTransformation) -> Chain:
    """Apply transformations one after another.

    Args:
      *transforms: Ours, optax's, or any object with `init` and `update`. None at all: the identity.

    Returns:
      A transformation whose state is the tuple of its members' states. Extra keyword arguments of
      `update` reach those members whose own `update` takes them.

    Raises:
      TypeError: An argument has no `init` and `update`.
      ValueError: A transformation that rounds or averages the parameters is not the last: one of `adamjax.rounding`'s
        wrappers, `average_params` or `schedule_free_adamw`.

    >>> import adamjax
    >>> adamjax.chain(adamjax.clip_by_global_norm(1.0), adamjax.scale_by_learning_rate(0.1))
    Chain((ClipByGlobalNorm(max_norm=1.0), ScaleByLearningRate(learning_rate=0.1)))
    """
    return Chain(tuple([as_transformation(t, f"argument {i} of chain") for i, t in enumerate(transforms)]))


class _Program:
    """The leaf program of the leafwise members since the last other one."""

    def __init__(self, first: LeafTransform | None = None) -> None:
        self.transforms = [] if first is None else [first]
        self.ends: list[int] = []  # the end of each member's part
        self.may_pack = False  # whether one of its transforms may pack leaf states: only one may
        self.executor: Callable[[Callable[[], list[Path]]], Executor] = Executor

    @property
    def is_pure(self) -> bool:
        """Whether another program may begin with this one."""
        return len(self.transforms) == 1 and self.transforms[0].is_pure

    def run(
        self, updates: Leaves, params: Leaves | None, delivery: Delivery | None = None
    ) -> tuple[Leaves, list[PyTree], list[Any]]:
        """Run it; return the updates, the new states of the members, and the new leaf states of the delivery."""
        transforms = self.transforms if delivery is None else [*self.transforms, delivery]
        if not transforms:
            return updates, [], []
        updates, found = run_leafwise(transforms, updates, params, self.executor)
        return updates, self.new_states(found), [] if delivery is None else found[-1]

    def new_states(self, found: list[list[Any]]) -> list[PyTree]:
        """The new states of the members, from the new leaf states of their transforms."""
        states = []
        for end in self.ends:
            states.append(self.transforms[end - 1].new_state(found[end - 1]))
        return states


def _rounded(updates: Leaves, targets: Leaves) -> Leaves:
    """The updates in the dtypes of the parameters, or of the gradients."""

    def of_leaf(u: Any, x: Any) -> Any:
        return trees.cast(u, update_dtype(trees.dtype_of(u), trees.dtype_of(x)))

    return updates.map(of_leaf, targets.leaves)
