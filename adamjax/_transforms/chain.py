"""Transformations one after another."""

import warnings
from collections.abc import Callable
from typing import Any

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
    check_not_fused,
    delivering,
    rounds_params,
)
from adamjax._transforms.delivery import update_dtype
from adamjax._transforms.leafwise import Executor, LeafTransform, run_leafwise


@value
class Chain(Transformation):
    """Transformations one after another; the state is the tuple of theirs."""

    transforms: tuple[Transformation, ...]

    def __post_init__(self) -> None:
        for transform in self.transforms[:-1]:
            if rounds_params(transform):
                raise ValueError(
                    f"{checks.shown(transform)} must be the last of a chain: a later transformation would change "
                    "the values that it rounds parameters to"
                )
            check_not_fused(transform, "anywhere but at the end of a chain")
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

    def _init(self, params: PyTree) -> PyTree:
        return tuple([t._init(params) for t in self.transforms])

    def _executor(self, paths: Callable[[], list[Path]]) -> Executor:
        """The way to run the leaf program that the chain ends with."""
        return Executor(paths)

    def _run(self, updates: Leaves, state: PyTree, context: StepContext) -> Result:
        checks.member_states(state, len(self.transforms), "a chain")
        grads, (params, _, delivery) = updates, context
        states: list[PyTree] = []
        program: list[LeafTransform] = []  # of the leafwise members since the last other one
        ends: list[int] = []  # of each such member's part in the program
        last = len(self.transforms) - 1
        for i, (transform, part) in enumerate(zip(self.transforms, state, strict=True)):
            if isinstance(transform, Leafwise):
                program += transform._leaf_transforms(updates, part, params)
                ends.append(len(program))
                continue
            if program:
                updates, found = run_leafwise(program, updates, params)
                states += _new_states(program, ends, found)
                program, ends = [], []
            if isinstance(transform, Foreign) and updates is not grads:
                # Others keep their state in the dtype of the updates they are given: hand them the dtype of the
                # parameters, not our wider intermediate one.
                updates = _rounded(updates, grads if params is None else params)
            inside = context if i == last else context._replace(delivery=None)
            updates, delivered, part = transform._run(updates, part, inside)
            states.append(part)
            if i == last:
                return updates, delivered, tuple(states)
        ending = [] if delivery is None else [delivery]
        updates, found = run_leafwise([*program, *ending], updates, params, self._executor)
        return updates, found[-1] if ending else [], (*states, *_new_states(program, ends, found))

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
      ValueError: One of `adamjax.rounding`'s wrappers is not the last.

    >>> import adamjax
    >>> adamjax.chain(adamjax.clip_by_global_norm(1.0), adamjax.scale_by_learning_rate(0.1))
    Chain((ClipByGlobalNorm(max_norm=1.0), ScaleByLearningRate(learning_rate=0.1)))
    """
    return Chain(tuple([as_transformation(t, f"argument {i} of chain") for i, t in enumerate(transforms)]))


def _new_states(program: list[LeafTransform], ends: list[int], found: list[list[Any]]) -> list[PyTree]:
    return [program[end - 1].new_state(found[end - 1]) for end in ends]


def _rounded(updates: Leaves, targets: Leaves) -> Leaves:
    """The updates in the dtypes of the parameters, or of the gradients."""

    def of_leaf(u: Any, x: Any) -> Any:
        return trees.cast(u, update_dtype(trees.dtype_of(u), trees.dtype_of(x)))

    return updates.map(of_leaf, targets.leaves)
