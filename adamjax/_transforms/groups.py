"""Different optimizers for different parameters, by path."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax

from adamjax._core import checks, trees
from adamjax._core.trees import Leaves
from adamjax._core.typing import PyTree
from adamjax._core.value import static_field, value
from adamjax._transforms.base import Result, StepContext, Transformation, as_transformation, rounds_params
from adamjax._transforms.chain import Chain


@value
class Groups(Transformation):
    """See `groups`."""

    members: tuple[Transformation, ...]
    patterns: tuple[str | None, ...] = static_field()  # None: whatever no other matches

    def _delivered_by(self) -> tuple[Transformation, ...]:
        return self.members

    def describe(self, params: PyTree) -> str:
        """A table: each parameter's path and shape, what matched it, and its optimizer."""
        rows = [("parameter", "shape", "group", "optimizer")]
        for path, leaf, i in self._owners(params):
            shape = ",".join(map(str, getattr(leaf, "shape", ())))
            rows.append((path, f"[{shape}]", self.patterns[i] or "default", repr(self.members[i])))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)

    def _owners(self, params: PyTree) -> list[tuple[str, Any, int]]:
        """Path, leaf and the number of its group, of each parameter."""
        named = [(i, pattern) for i, pattern in enumerate(self.patterns) if pattern is not None]
        default = [i for i, pattern in enumerate(self.patterns) if pattern is None]
        owners, unused = [], {pattern for _, pattern in named}
        for key, leaf in jax.tree.leaves_with_path(params):
            path = trees.path_of(key)
            found = [i for i, pattern in named if re.search(pattern, path)]
            unused -= {self.patterns[i] for i in found}
            if len(found) > 1:
                both = " and ".join(repr(self.patterns[i]) for i in found)
                raise ValueError(f"{checks.shortened(path)} is matched by {both}: each parameter must be in one group")
            if not (found or default):
                patterns = checks.listed(repr(pattern) for _, pattern in named)
                raise ValueError(
                    f"{checks.shortened(path)} is matched by none of {patterns}: give a default=, or a pattern for it"
                )
            owners.append((path, leaf, (found or default)[0]))
        if unused and owners:
            patterns, paths = checks.listed(map(repr, sorted(unused))), checks.listed(path for path, _, _ in owners)
            raise ValueError(f"{patterns} matches no parameter; those are {paths}")
        return owners

    def split_params(self, params: PyTree) -> list[PyTree]:
        """The parameters of each member: a tree in which those of the others are None."""
        leaves = Leaves.of(params)
        owners = self._assign_groups(leaves)
        return [_select(leaves, owners, i).tree for i in range(len(self.members))]

    def _assign_groups(self, leaves: Leaves) -> list[int]:
        """The group of each leaf, absent ones included (for which any will do)."""
        owners = iter(self._owners(leaves.tree))
        return [0 if x is None else next(owners)[2] for x in leaves.leaves]

    def _init(self, params: PyTree) -> tuple[PyTree, ...]:
        return tuple([member._init(part) for member, part in zip(self.members, self.split_params(params), strict=True)])

    def _run(self, updates: Leaves, state: PyTree, context: StepContext) -> Result:
        checks.member_states(state, len(self.members), "groups")
        params = context.params
        owners = self._assign_groups(updates if params is None else params)
        results, delivered, states = [], [], []
        for i, (member, part) in enumerate(zip(self.members, state, strict=True)):
            inside = context._replace(params=None if params is None else _select(params, owners, i))
            found, of_delivery, part = member._run(_select(updates, owners, i), part, inside)
            results.append(found.leaves)
            delivered.append(of_delivery)
            states.append(part)
        merged = [results[owner][k] for k, owner in enumerate(owners)]
        kept = [] if context.delivery is None else [delivered[owner][k] for k, owner in enumerate(owners)]
        return updates.like(merged), kept, tuple(states)


def _select(leaves: Leaves, owners: list[int], i: int) -> Leaves:
    return leaves.like([x if owner == i else None for x, owner in zip(leaves.leaves, owners, strict=True)])


def groups(members: Mapping[str, Any], *, default: Any = None) -> Groups:
    """Use other hyperparameters, or another optimizer, for some of the parameters.

    Args:
      members: A dict from regular expressions to members. A member steps the parameters in whose path
        ("layer_0/kernel") its expression is found: a transformation, ours or optax's, or a dict of the
        hyperparameters that differ from those of `default`, such as {"learning_rate": 1e-4, "weight_decay": 0.0}.
      default: A transformation for all other parameters. None: there must be none.

    Returns:
      A transformation whose state is a tuple: that of each member, the default last, in which the
      parameters of the others are None. Its method `describe(params)` gives a table.

    Raises:
      ValueError, TypeError: A member is neither, or overrides what `default` does not have. At `init` and
        `update`: a parameter is matched by two expressions or by none, or an expression by none.

    >>> import adamjax, jax.numpy as jnp
    >>> opt = adamjax.groups({"bias|scale": {"weight_decay": 0.0}}, default=adamjax.adamw(1e-3, weight_decay=0.1))
    >>> params = {"dense": {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)}}
    >>> for row in opt.describe(params).splitlines():
    ...     print(row[:34])
    parameter     shape  group       o
    dense/bias    [2]    bias|scale  C
    dense/kernel  [4,2]  default     C
    """
    if not isinstance(members, Mapping):
        raise TypeError(f"Invalid members value: {checks.shown(members)}; members must be a dict of optimizers by path")
    given: list[tuple[str | None, Transformation]] = []
    for pattern, member in members.items():
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
        if isinstance(member, Mapping):
            if default is None:
                raise ValueError(f"the group {pattern!r} overrides {', '.join(member)} of no default: give default=")
            member = _overridden(as_transformation(default, "default"), pattern, member)
        given.append((pattern, as_transformation(member, f"the group {pattern!r}")))
    if default is not None:
        given.append((None, as_transformation(default, "default")))
    if not given:
        raise ValueError("groups needs at least one group, or a default")
    for name, transform in given:
        if rounds_params(transform):
            raise ValueError(
                f"the group {name!r} rounds parameters ({checks.shown(transform)}): put that around groups(...) instead"
            )
    return Groups(tuple(transform for _, transform in given), tuple(name for name, _ in given))


def _overridden(opt: Transformation, pattern: str, overrides: Mapping[str, Any]) -> Transformation:
    """`opt` with other hyperparameters, wherever in its chain they are."""
    for name, x in overrides.items():
        opt, places = _replaced(opt, name, x)
        if not places:
            names = ", ".join(sorted(_names(opt)))
            raise ValueError(
                f"the group {pattern!r} overrides {name}, which {checks.shown(opt)} does not have; it has {names}"
            )
    return opt


def _replaced(opt: Any, name: str, x: Any) -> tuple[Any, int]:
    """`opt` with its field `name`, or those of its members, being `x`; and how many there were."""
    if isinstance(opt, Chain):
        pairs = [_replaced(t, name, x) for t in opt.transforms]
        return dataclasses.replace(opt, transforms=tuple(t for t, _ in pairs)), sum(n for _, n in pairs)
    changes: dict[str, Any] = {}
    count = 0
    for field in dataclasses.fields(opt):
        content = getattr(opt, field.name)
        if field.name == name:
            changes[name], count = x, count + 1
        elif isinstance(content, Transformation):
            changes[field.name], n = _replaced(content, name, x)
            count += n
    return dataclasses.replace(opt, **changes) if changes else opt, count


def _names(opt: Any) -> set[str]:
    """The hyperparameters of `opt` and its members."""
    if isinstance(opt, Chain):
        return {name for t in opt.transforms for name in _names(t)}
    fields = {field.name: getattr(opt, field.name) for field in dataclasses.fields(opt)}
    inner = {name for x in fields.values() if isinstance(x, Transformation) for name in _names(x)}
    return inner | {name for name, x in fields.items() if not isinstance(x, Transformation)}
