"""Nodes of states that flax can serialise.

flax turns a state into dicts by a registry of types, and knows only containers and named tuples. Importing flax to fill
its registry would make it a requirement, so that waits until somebody imports flax, before or after adamjax.
"""

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any, TypeVar

import jax

from adamjax._core import checks
from adamjax._core.packing import PackedTree
from adamjax._core.quantization import QuantizedArray
from adamjax._core.trees import path_of
from adamjax._core.typing import PyTree

T = TypeVar("T", bound=type)

_NAME = "flax.serialization"
_NODES: list[type] = [PackedTree, QuantizedArray]


def serialised_by_flax(cls: T) -> T:
    """Let flax serialise a node of states: its children by name. Static fields come from the target of a restore."""
    _NODES.append(cls)
    if (module := sys.modules.get(_NAME)) is not None:
        _register(module, [cls])
    return cls


def _register(module: Any, nodes: Sequence[type]) -> None:
    def to_dict(node: PyTree) -> dict[str, Any]:
        children, _ = _children(node)
        return {name: module.to_state_dict(child) for name, child in children.items()}

    def from_dict(node: PyTree, found: Any) -> PyTree:
        children, structure = _children(node)
        if not isinstance(found, dict) or children.keys() != found.keys():
            what = checks.listed(map(str, found)) if isinstance(found, dict) else checks.describe(found)
            raise ValueError(
                f"the target has a {type(node).__name__} of {', '.join(children)} at path {module.current_path()}, "
                f"where {what} was saved: restore into init(params) of the optimizer that made the state"
            )
        return structure.unflatten(
            [module.from_state_dict(child, found[name], name=name) for name, child in children.items()]
        )

    for cls in nodes:
        module.register_serialization_state(cls, to_dict, from_dict, override=True)


def _children(node: PyTree) -> tuple[dict[str, PyTree], Any]:
    pairs, structure = jax.tree.flatten_with_path(node, is_leaf=lambda x: x is not node)
    return {path_of(path): child for path, child in pairs}, structure


class _Loader(Loader):
    """Registers the nodes once the module is loaded."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        _register(module, _NODES)


class _Finder(MetaPathFinder):
    """Finds flax's module as Python does, and nothing else."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == _NAME else None
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


if (_module := sys.modules.get(_NAME)) is not None:
    _register(_module, _NODES)
else:
    sys.meta_path.insert(0, _Finder())
