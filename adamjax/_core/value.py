"""Values: frozen, hashable dataclasses that are pytrees of their numbers and equal by content."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar, dataclass_transform

import jax
import numpy as np
from jax.tree_util import GetAttrKey

from adamjax._core import checks
from adamjax._core.typing import Path, PyTree

T = TypeVar("T")


def static_field(*, described: bool = True, **kwargs: Any) -> Any:
    """A dataclass field that is part of the tree's structure and not one of its leaves.

    If not `described`, a checkpoint may be restored with another value of it.
    """
    return dataclasses.field(metadata={"static": True, "described": described}, **kwargs)


def precise_field(**kwargs: Any) -> Any:
    """A dataclass field for a number near 1 whose distance to 1 matters: a decay rate.

    A float32 leaf would keep three digits of 1 - 0.9999. So a Python number has a second leaf, `low_part`: the rest
    of the number that its float32 leaf leaves out. Both are numbers whose sum is the field, so sums, means and
    stacks of trees stay right.
    """
    return dataclasses.field(metadata={"precise": True}, **kwargs)


@dataclass_transform(
    frozen_default=True, eq_default=False, field_specifiers=(dataclasses.field, static_field, precise_field)
)
def value(cls: type[T]) -> type[T]:
    """Make `cls`, a subclass of `Value`, a frozen dataclass and register it as a pytree.

    Fields made by `static_field` must be hashable and become part of the structure; all others
    are children. Only the constructor validates. Flattening and unflattening do not, because
    transformations of JAX put tracers, shapes or plain `object()`s in place of the leaves.
    """
    cls = dataclasses.dataclass(frozen=True, eq=False, repr=False)(cls)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    children = tuple(f.name for f in fields if not f.metadata.get("static"))
    statics = tuple(f.name for f in fields if f.metadata.get("static"))
    precise = tuple(f.name for f in fields if f.metadata.get("precise"))
    low_parts = tuple(low_part_name(name) for name in precise)
    keys = tuple(GetAttrKey(name) for name in (*children, *low_parts))

    def flatten(self: T) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        leaves = (*(getattr(self, n) for n in children), *(low_part(self, n) for n in precise))
        return leaves, tuple(getattr(self, n) for n in statics)

    def flatten_with_keys(self: T) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        leaves, aux = flatten(self)
        return tuple(zip(keys, leaves, strict=True)), aux

    def unflatten(aux: tuple[object, ...], leaves: Iterable[object]) -> T:
        self = object.__new__(cls)
        self.__dict__.update(zip((*children, *low_parts), leaves, strict=True))
        self.__dict__.update(zip(statics, aux, strict=True))
        return self

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls


_LOW_PART = "_low_part"


def low_part_name(name: str) -> str:
    """Return the attribute that has the low part of the field called `name`."""
    return name + _LOW_PART


def low_part(x: object, name: str) -> Any:
    """Return the part of the number in the `precise_field` called `name` that its float32 leaf leaves out."""
    number = getattr(x, name)
    if isinstance(number, float):
        return number - float(np.float32(number))
    return x.__dict__.get(low_part_name(name), 0.0)


def is_low_part(path: Path) -> bool:
    """Return whether a path of JAX's keys ends at a low part."""
    return str(getattr(path[-1] if path else "", "name", "")).endswith(_LOW_PART)


def replaced(x: T, changes: Mapping[str, Any]) -> T:
    """Return a value with some fields changed; unlike `dataclasses.replace`, with the low parts of the others."""
    new = dataclasses.replace(x, **changes)  # type: ignore[type-var]
    kept = {key: part for key, part in vars(x).items() if key.endswith(_LOW_PART)}
    vars(new).update({key: part for key, part in kept.items() if key.removesuffix(_LOW_PART) not in changes})
    return new


class Value:
    """Base of all values: equality, hash and a readable repr, made from fields and leaves.

    Numbers compare by value; arrays and all other leaves compare by identity. So a value that holds
    an array can be a static argument of `jax.jit` or metadata of another pytree, where an elementwise
    comparison would fail.
    """

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        structure: Any
        leaves, structure = jax.tree.flatten(self)
        others, other_structure = jax.tree.flatten(other)
        return bool(structure == other_structure) and all(map(_same, leaves, others))

    def __hash__(self) -> int:
        leaves, structure = jax.tree.flatten(self)
        return hash((structure, *(leaf if _is_number(leaf) else id(leaf) for leaf in leaves)))

    def __repr__(self) -> str:
        shown = []
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            content = getattr(self, field.name)
            # Leave out static fields that have their default.
            if not field.metadata.get("static") or content != field.default:
                shown.append(f"{field.name}={_show(content)}")
        return f"{type(self).__name__}({', '.join(shown)})"

    def _replace_field(self, name: str, content: object) -> None:
        """Set a field to its checked and normalised content. For `__post_init__` only."""
        object.__setattr__(self, name, content)

    def _check_numbers(self, *names: str, low: float = 0.0, below: float = math.inf) -> None:
        """Check fields that hold numbers in [low, below). For `__post_init__` only."""
        for name in names:
            self._replace_field(name, checks.number(name, getattr(self, name), low=low, below=below))

    def _check_whole(self, *names: str, low: float = 0.0, below: float = math.inf) -> None:
        """Check fields that hold whole numbers of steps in [low, below). For `__post_init__` only."""
        self._check_numbers(*names, low=low, below=below)
        for name in names:
            steps = getattr(self, name)
            if isinstance(steps, float) and not steps.is_integer():
                raise ValueError(f"Invalid {name} value: {steps}; {name} must be a whole number of steps")


class StaticTree:
    """A tree of hashable leaves as a hashable value."""

    def __init__(self, tree: PyTree, is_leaf: Callable[[Any], bool] | None = None) -> None:
        self.leaves, self.structure = jax.tree.flatten(tree, is_leaf=is_leaf)

    @property
    def tree(self) -> PyTree:
        """The tree."""
        return jax.tree.unflatten(self.structure, self.leaves)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StaticTree) and (self.leaves, self.structure) == (other.leaves, other.structure)

    def __hash__(self) -> int:
        return hash((self.structure, *self.leaves))

    def __repr__(self) -> str:
        return repr(self.tree)


def is_static_callable(x: object) -> bool:
    """Return whether `x` is a callable without leaves: a function, not a callable pytree."""
    return callable(x) and jax.tree_util.all_leaves([x])


def name_of(fn: Callable[..., Any]) -> str:
    """Return a function's name without the `<locals>` of the factory that made it."""
    return getattr(fn, "__qualname__", type(fn).__name__).split(".<locals>")[0]


def _is_number(x: object) -> bool:
    return isinstance(x, (int, float))


def _same(a: object, b: object) -> bool:
    return a is b or (_is_number(a) and _is_number(b) and a == b)


def _show(x: Any) -> str:
    if isinstance(x, np.dtype):
        return x.name
    if isinstance(x, (jax.Array, np.ndarray)) and not isinstance(x, jax.core.Tracer):
        return f"{x.dtype.name}[{','.join(map(str, x.shape))}]" if x.ndim else f"{x.dtype.name}({x.item():.6g})"
    if hasattr(x, "__qualname__"):
        return name_of(x)
    return repr(x)
