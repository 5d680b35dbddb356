"""What a pytree is, in JSON's types: what a checkpoint says of itself, for others to be compared with."""

import dataclasses
import re
from typing import Any

import jax
import numpy as np

from adamjax._core.typing import PyTree
from adamjax._core.value import Value

Description = dict[str, Any]

# What differs from process to process in how a function prints.
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def tree_schema(name: str, tree: PyTree) -> Description:
    """By path, what stands there: the type of a node and its static fields; the dtype and shape of an array.

    Parents come before what is below them. A Python number stands for itself.
    """
    described: Description = {}

    def walk(path: str, x: Any) -> None:
        below = [] if x is None else jax.tree.leaves_with_path(x, is_leaf=lambda y: y is not x)
        if any(child is x for _, child in below):
            described[path] = _leaf(x)
            return
        described[path] = _node(x)
        for key, child in below:
            walk(path + jax.tree_util.keystr(key), child)

    walk(name, tree)
    return described


def hyperparameter_schema(name: str, tree: PyTree) -> Description:
    """The same for a tree of hyperparameters, of which arrays count by the numbers they hold."""
    return tree_schema(name, jax.tree.map(lambda x: np.asarray(x).tolist() if hasattr(x, "dtype") else x, tree))


def first_difference(there: Description, here: Description, *, numbers: bool = True) -> str | None:
    """The first difference, in words; None if there is none.

    Args:
      there: One description.
      here: The other.
      numbers: Whether two numbers can differ.
    """
    for path in here | there:
        a, b = there.get(path, "nothing"), here.get(path, "nothing")
        if a != b and (numbers or isinstance(a, str) or isinstance(b, str)):
            return f"{path} is {a} there and {b} here"
    return None


def _leaf(x: Any) -> Any:
    if hasattr(x, "dtype"):
        return f"{x.dtype}[{','.join(map(str, x.shape))}]"
    return x if isinstance(x, (int, float)) else _print(x)


def _node(x: Any) -> str:
    """The type; of what is more than a container, with the static fields."""
    if x is None:
        return "None"
    name = getattr(x, "described_as", type(x).__qualname__)
    if isinstance(x, (dict, list, tuple)):  # their keys are in the paths
        return name
    if isinstance(x, Value):
        fields = [field for field in dataclasses.fields(x) if field.metadata.get("described")]  # type: ignore[arg-type]
        # A field that is added later changes nothing for those who leave it at its default.
        chosen = {f.name: getattr(x, f.name) for f in fields if getattr(x, f.name) != f.default}
        return f"{name}({', '.join(f'{field}={_print(content)}' for field, content in chosen.items())})"
    structure: Any = jax.tree.structure(x, is_leaf=lambda y: y is not x)
    _, static = structure.node_data()
    return f"{name} {_print(static)}"


def _print(x: Any) -> str:
    return _ADDRESS.sub("", repr(x))
