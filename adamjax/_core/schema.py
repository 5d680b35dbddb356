"""Schemas of pytrees in JSON's types, by which a checkpoint tells whether it fits."""

import dataclasses
import re
from typing import Any

import jax

from adamjax._core.checks import shortened
from adamjax._core.typing import PyTree
from adamjax._core.value import Value, is_low_part

Schema = dict[str, str | int | float]  # by path: the type of a node, the dtype and shape of an array, or a number

# The part of a function's repr that differs between processes.
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def tree_schema(name: str, tree: PyTree) -> Schema:
    """Describe each node, parents first, by its type and static fields, each array by its type, and each number."""
    schema: Schema = {}

    def walk(path: str, x: PyTree) -> None:
        children = [] if x is None else jax.tree.leaves_with_path(x, is_leaf=lambda y: y is not x)
        if any(child is x for _, child in children):
            schema[path] = _leaf(x)
            return
        schema[path] = _node(x)
        for key, child in children:
            if not is_low_part(key):  # it follows from the number whose part it is
                walk(path + jax.tree_util.keystr(key), child)

    walk(name, tree)
    return schema


def first_difference(there: Schema, here: Schema, *, numbers: bool = True) -> str | None:
    """Return the first difference between the schema of a checkpoint and one from here, in words; None if none."""
    for path in here | there:
        a, b = there.get(path, "nothing"), here.get(path, "nothing")
        if a != b and (numbers or isinstance(a, str) or isinstance(b, str)):
            path, there_, here_ = map(shortened, (path, str(a), str(b)))
            return f"{path} is {there_} there and {here_} here"
    return None


def _leaf(x: Any) -> str | int | float:
    if hasattr(x, "dtype"):
        return f"{x.dtype}[{','.join(map(str, x.shape))}]"
    return x if isinstance(x, (int, float)) else _print(x)


def _node(x: PyTree) -> str:
    """Return the type of a node, with the static fields unless it is a plain container."""
    if x is None:
        return "None"
    name = getattr(x, "described_as", type(x).__qualname__)
    if isinstance(x, (dict, list, tuple)):  # the paths contain their keys
        return name
    if isinstance(x, Value):
        fields = [field for field in dataclasses.fields(x) if field.metadata.get("described")]  # type: ignore[arg-type]
        # Fields at their defaults are left out, so that adding a field later does not change old schemas.
        chosen = [f"{f.name}={_print(y)}" for f in fields if (y := getattr(x, f.name)) != f.default]
        return f"{name}({', '.join(chosen)})"
    structure: Any = jax.tree.structure(x, is_leaf=lambda y: y is not x)
    return f"{name} {_print(structure.node_data()[1])}"


def _print(x: object) -> str:
    return _ADDRESS.sub("", repr(x))
