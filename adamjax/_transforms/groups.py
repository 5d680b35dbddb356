"""Different optimizers for different parameters, by path."""

import copy
import dataclasses
import re
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any, ClassVar

import jax

from adamjax._core import checks, trees
from adamjax._core.trees import Leaves
from adamjax._core.typing import PyTree, Scalar
from adamjax._core.value import low_part_name, replaced, static_field, value
from adamjax._transforms.base import Result, StepContext, Transformation, as_transformation, rounds_params, run_inside
from adamjax._transforms.chain import Chain
from adamjax._transforms.plateau import ReduceOnPlateau
from adamjax._transforms.rates import by_group
from adamjax._transforms.schedule import Scaled

# The hyperparameters that a member changes in the default. Each has the number of the first member that sets it to an
# equal value, or None where the member scales it. Compared once: later, numbers may be tracers.
Changes = tuple[tuple[str, int | None], ...]

# Hyperparameters that the learning rate depends on.
_OF_RATE = {"learning_rate", "warmup_steps", *(field.name for field in dataclasses.fields(ReduceOnPlateau))}


@dataclasses.dataclass(frozen=True)
class Scale:
    """See `scale`."""

    factor: Scalar


def scale(factor: Scalar) -> Scale:
    """Scale a hyperparameter of the default, as a value in `groups`.

    Factors of several patterns that match one parameter multiply.

    Args:
      factor: At least 0.

    Returns:
      A value for "learning_rate" or "weight_decay" in the dict of a group. (It is not a transformation, like
      `optax.scale`.)

    Raises:
      ValueError, TypeError: `factor` is not such a number.

    >>> import adamjax
    >>> rates = {f"layer_{i}/": {"learning_rate": adamjax.scale(0.8 ** (3 - i))} for i in range(4)}
    >>> no_decay = {"bias|norm": {"weight_decay": 0.0}}
    >>> opt = adamjax.groups(rates | no_decay, default=adamjax.adamw(1e-3, weight_decay=0.1))
    """
    return Scale(checks.number("factor", factor))


@value
class Groups(Transformation):
    """See `groups`."""

    takes_first: ClassVar[bool] = True

    members: tuple[Transformation, ...]
    patterns: tuple[str | None, ...] = static_field()  # None: whatever no other matches
    changes: tuple[Changes | None, ...] = static_field(described=False)  # None: not a change of the default

    def _delivered_by(self) -> tuple[Transformation, ...]:
        return self.members

    def _learning_rate(self, state: PyTree) -> Any:
        checks.state(state, tuple, "groups")
        checks.member_states(state[: len(self.members)], len(self.members), "groups")  # combinations come after them
        rates = {}
        for pattern, changes, member, part in zip(self.patterns, self.changes, self.members, state, strict=False):
            if changes is None or not _OF_RATE.isdisjoint(dict(changes)):
                rates[pattern or "default"] = member._learning_rate(part)
        if list(rates) == ["default"]:
            return rates["default"]
        return {key: x for name, rate in rates.items() for key, x in by_group(name, rate).items()}

    def describe(self, params: PyTree) -> str:
        """A table: each parameter's path and shape, the patterns that match it, and its optimizer."""
        rows = [("parameter", "shape", "group", "optimizer")]
        for path, leaf, owner in self._owners(params):
            shape = ",".join(map(str, getattr(leaf, "shape", ())))
            group = " + ".join(self.patterns[i] or "default" for i in owner)
            rows.append((path, f"[{shape}]", group, repr(self._member(owner))))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)

    def members_for(self, params: PyTree) -> list[Transformation]:
        """The members in the order of the state: `members`, then the combinations that these parameters need."""
        return self._assign(Leaves.of(params))[0]

    def split_params(self, params: PyTree) -> list[PyTree]:
        """The parameters of each of `members_for`: a tree in which those of the others are None."""
        leaves = Leaves.of(params)
        members, owners = self._assign(leaves)
        return [_select(leaves, owners, i).tree for i in range(len(members))]

    def _owners(self, params: PyTree) -> list[tuple[str, Any, tuple[int, ...]]]:
        """Path, leaf and the numbers of the groups of each parameter; several if they combine."""
        named = [(i, pattern) for i, pattern in enumerate(self.patterns) if pattern is not None]
        default = tuple([i for i, pattern in enumerate(self.patterns) if pattern is None])
        owners, unused = [], {pattern for _, pattern in named}
        for key, leaf in jax.tree.leaves_with_path(params):
            path = trees.path_of(key)
            found = tuple([i for i, pattern in named if re.search(pattern, path)])
            unused -= {self.patterns[i] for i in found}
            if len(found) > 1:
                self._check_combines(path, found)
            if not (found or default):
                patterns = checks.listed(repr(pattern) for _, pattern in named)
                raise ValueError(
                    f"{checks.shortened(path)} is matched by none of {patterns}: give a default=, or a pattern for it"
                )
            owners.append((path, leaf, found or default))
        if unused and owners:
            patterns, paths = checks.listed(map(repr, sorted(unused))), checks.listed(path for path, _, _ in owners)
            raise ValueError(f"{patterns} matches no parameter; those are {paths}")
        return owners

    def _check_combines(self, path: str, found: tuple[int, ...]) -> None:
        """Raise if the groups `found` cannot all have the parameter at `path`."""
        path = checks.shortened(path)
        setters: dict[str, int] = {}  # by hyperparameter, the first member that sets it
        for i in found:
            changes = self.changes[i]
            if changes is None:
                both = " and ".join(repr(self.patterns[j]) for j in (i, next(j for j in found if j != i)))
                raise ValueError(
                    f"{path} is matched by {both}: a parameter whose group is an optimizer must be in one group; "
                    "only dicts of hyperparameters combine"
                )
            for name, source in changes:
                if source is None:
                    continue
                first = setters.setdefault(name, i)
                if dict(self.changes[first] or ())[name] != source:
                    raise ValueError(
                        f"{path} is matched by {self.patterns[first]!r} and {self.patterns[i]!r}, which do not "
                        f"set {name} to one number or object: let one pattern exclude the other's parameters"
                    )

    def _member(self, owner: tuple[int, ...]) -> Transformation:
        """The optimizer of the parameters that are in all of these groups."""
        if len(owner) == 1:
            return self.members[owner[0]]
        rows = [(name, source, i) for i in owner for name, source in self.changes[i] or ()]
        opt = self.members[-1]  # the default
        for name, source, i in sorted(rows, key=lambda row: row[1] is None):  # first set, then scale
            opt = _merged(opt, self.members[i], name, scales=source is None)
        return opt

    def _assign(self, leaves: Leaves) -> tuple[list[Transformation], list[int]]:
        """The members for these parameters, and the number of each leaf's.

        Any will do for an absent leaf, and for a subtree that stands where the gradient is None.
        """
        owners = [owner for _, _, owner in self._owners(leaves.tree)]
        combined = sorted({owner for owner in owners if len(owner) > 1})
        singles = [(i,) for i in range(len(self.members))]
        numbers = {owner: k for k, owner in enumerate([*singles, *combined])}
        members = [*self.members, *map(self._member, combined)]
        below, found = iter(owners), []
        for x in leaves.leaves:
            inside = list(islice(below, len(jax.tree.leaves(x))))
            found.append(numbers[inside[0]] if inside else 0)
        return members, found

    def __repr__(self) -> str:
        return f"Groups(members={self.members!r}, patterns={self.patterns!r})"

    def _init(self, params: PyTree) -> tuple[PyTree, ...]:
        leaves = Leaves.of(params)
        members, owners = self._assign(leaves)
        return tuple([member._init(_select(leaves, owners, i).tree) for i, member in enumerate(members)])

    def _run(self, updates: Leaves, state: PyTree, context: StepContext) -> Result:
        params = context.params
        members, owners = self._assign(updates if params is None else params)
        checks.member_states(state, len(members), "groups")
        results, delivered, states = [], [], []
        for i, (member, part) in enumerate(zip(members, state, strict=True)):
            inside = context._replace(params=None if params is None else _select(params, owners, i))
            found, of_delivery, part = run_inside(member, _select(updates, owners, i), part, inside)
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
        hyperparameters that differ from those of `default`, such as {"weight_decay": 0.0} or
        {"learning_rate": adamjax.scale(0.1)}. Dicts combine where several match: values of `scale` multiply,
        and a value that only one of them sets holds.
      default: A transformation for all other parameters. None: there must be none.

    Returns:
      A transformation whose state is a tuple: that of each member, the default last but for the combinations of
      several members; the parameters of the others are None in each. Its method `describe(params)` gives a table.

    Raises:
      ValueError, TypeError: A member is neither, or overrides what `default` does not have. At `init` and
        `update`: a parameter is matched by no expression, by two that set a hyperparameter to different values,
        or by an optimizer and another; or an expression by no parameter.

    >>> import adamjax, jax.numpy as jnp
    >>> opt = adamjax.groups(
    ...     {"encoder": {"learning_rate": adamjax.scale(0.1)}, "bias|scale": {"weight_decay": 0.0}},
    ...     default=adamjax.adamw(1e-3, weight_decay=0.1),
    ... )
    >>> layer = {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)}
    >>> for row in opt.describe({"encoder": layer, "head": layer}).splitlines():
    ...     print(row[:47])
    parameter       shape  group                 op
    encoder/bias    [2]    encoder + bias|scale  Ch
    encoder/kernel  [4,2]  encoder               Ch
    head/bias       [2]    bias|scale            Ch
    head/kernel     [4,2]  default               Ch
    """
    if not isinstance(members, Mapping):
        raise TypeError(f"Invalid members value: {checks.shown(members)}; members must be a dict of optimizers by path")
    given: list[tuple[str | None, Transformation]] = []
    changes: list[Changes | None] = []
    for pattern, member in members.items():
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
        overrides = member if isinstance(member, Mapping) else None
        if overrides is not None:
            if default is None:
                raise ValueError(f"the group {pattern!r} overrides {', '.join(overrides)} of no default: give default=")
            member = _overridden(as_transformation(default, "default"), pattern, overrides)
        given.append((pattern, as_transformation(member, f"the group {pattern!r}")))
        changes.append(None if overrides is None else _sources(overrides, [x for _, x in given], changes))
    if default is not None:
        given.append((None, as_transformation(default, "default")))
        changes.append(None)
    if not given:
        raise ValueError("groups needs at least one group, or a default")
    for name, transform in given:
        if rounds_params(transform):
            raise ValueError(
                f"the group {name!r} rounds parameters ({checks.shown(transform)}): put that around groups(...) instead"
            )
    return Groups(tuple(transform for _, transform in given), tuple(name for name, _ in given), tuple(changes))


def _overridden(opt: Transformation, pattern: str, overrides: Mapping[str, Any]) -> Transformation:
    """`opt` with other hyperparameters, wherever in its chain they are."""
    for name, x in overrides.items():
        if isinstance(x, Scale) and name not in ("learning_rate", "weight_decay"):
            raise ValueError(
                f"the group {pattern!r} scales {name}, and only learning_rate and weight_decay can be scaled: "
                "give a number"
            )
        opt, places = _changed(opt, name, _scaled_by(x.factor) if isinstance(x, Scale) else _set_to(x))
        if not places:
            names = ", ".join(sorted(_contents(opt)))
            raise ValueError(
                f"the group {pattern!r} overrides {name}, which {checks.shown(opt)} does not have; it has {names}"
            )
    return opt


def _sources(overrides: Mapping[str, Any], members: list[Transformation], before: list[Changes | None]) -> Changes:
    """The changes of the last of the `members`, which has the `overrides`; `before` are those of the others."""

    def source(name: str) -> int:
        content = _contents(members[-1])[name]
        for i, changes in enumerate(before):
            if dict(changes or ()).get(name) == i and _equal(_contents(members[i])[name], content):
                return i
        return len(before)

    return tuple([(name, None if isinstance(x, Scale) else source(name)) for name, x in overrides.items()])


def _equal(a: Any, b: Any) -> bool:
    """Compare as values do: arrays by identity."""
    return a is b or (type(a) is type(b) and not hasattr(a, "dtype") and bool(a == b))


def _set_to(x: Any) -> Callable[[Any], Any]:
    return lambda old: x


def _scaled_by(factor: Scalar) -> Callable[[Any], Any]:
    return lambda old: Scaled(factor, old)


def _changed(opt: Any, name: str, change: Callable[[Any], Any]) -> tuple[Any, int]:
    """`opt` with its fields `name`, and those of its members, changed; and how many there were."""
    if isinstance(opt, Chain):
        pairs = [_changed(t, name, change) for t in opt.transforms]
        return replaced(opt, {"transforms": tuple(t for t, _ in pairs)}), sum(n for _, n in pairs)
    changes: dict[str, Any] = {}
    count = 0
    for field in dataclasses.fields(opt):
        content = getattr(opt, field.name)
        if field.name == name:
            changes[name], count = change(content), count + 1
        elif isinstance(content, Transformation):
            changes[field.name], n = _changed(content, name, change)
            count += n
    return replaced(opt, changes) if changes else opt, count


def _merged(opt: Any, other: Any, name: str, *, scales: bool) -> Any:
    """`opt` with the fields `name` that `other` has, or scaled as they are there; both are changes of one default."""
    if isinstance(opt, Chain):
        pairs = zip(opt.transforms, other.transforms, strict=True)
        changes: dict[str, Any] = {"transforms": tuple([_merged(*pair, name, scales=scales) for pair in pairs])}
    else:
        inner = {key: x for key, x in vars(opt).items() if isinstance(x, Transformation)}
        changes = {key: _merged(x, getattr(other, key), name, scales=scales) for key, x in inner.items()}
    merged = copy.copy(opt)
    if not scales:
        # A traced decay rate has its low part beside it, which `dataclasses.replace` would lose.
        for key in (name, low_part_name(name)):
            vars(merged).pop(key, None)
            if key in vars(other):
                changes[key] = vars(other)[key]
    elif name in vars(opt):
        changes[name] = Scaled(getattr(other, name).factor, getattr(opt, name))
    vars(merged).update(changes)
    return merged


def _contents(opt: Any) -> dict[str, Any]:
    """The hyperparameters of `opt` and its members; of those with one name, the first."""
    if isinstance(opt, Chain):
        return {name: x for t in reversed(opt.transforms) for name, x in _contents(t).items()}
    fields = {field.name: getattr(opt, field.name) for field in dataclasses.fields(opt)}
    inner = {name: y for x in fields.values() if isinstance(x, Transformation) for name, y in _contents(x).items()}
    return inner | {name: x for name, x in fields.items() if not isinstance(x, Transformation)}
