"""How the parameters of two models differ: multipliers of fan-in, fan-out and depth, by path."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from adamjax._core import checks, trees
from adamjax._core.typing import PyTree
from adamjax.scaling._rules import Growth, Kind

Axes = Mapping[str, Sequence[str | None]]
_ROLES = ("in", "out", "layers", None)
_REMEDY = (
    "axes={{{pattern!r}: (...)}} says of each axis whether it is 'in', 'out', 'layers', or None for one not to count"
)


class Pair(NamedTuple):
    """A parameter of the large model, its shape, and that of its counterpart in the small model."""

    path: str
    counterpart: str  # the path in the small model
    small: tuple[int, ...]
    large: tuple[int, ...]
    growth: Growth


@dataclass(frozen=True)
class Blocks:
    """The residual blocks of two models, which may have different numbers of them."""

    pattern: str | None
    depth: float = 1.0

    @classmethod
    def of(cls, pattern: str | None, small: Sequence[str], large: Sequence[str]) -> "Blocks":
        """Count the blocks that the pattern finds in the paths of both models."""
        if pattern is None:
            return cls(None)
        _check_pattern("blocks", pattern)
        counts = []
        for name, paths in (("small", small), ("large", large)):
            found = {match[0] for path in paths if (match := re.search(pattern, path))}
            if not found:
                raise ValueError(f"blocks={pattern!r} is in no path of {name}; those are {checks.listed(paths)}")
            counts.append(len(found))
        return cls(pattern, counts[1] / counts[0])

    def contains(self, path: str) -> bool:
        return self.pattern is not None and re.search(self.pattern, path) is not None

    def generic(self, path: str) -> str:
        """The path without the number of its block."""
        return path if self.pattern is None else re.sub(self.pattern, "<block>", path, count=1)


def pairs_of(small: PyTree, large: PyTree, axes: Axes | None, blocks: str | None) -> list[Pair]:
    """Pair the parameters of two models, and infer how each grows.

    Raises:
      TypeError: A leaf has no shape, or `axes` is not such a dict.
      ValueError: A parameter has no counterpart, or its shapes do not tell which axis is the fan-in.
    """
    roles = _checked_axes(axes)
    before, after = shapes_of("small", small), shapes_of("large", large)
    found = Blocks.of(blocks, list(before), list(after))
    counterparts: dict[str, str] = {}
    for path, shape in before.items():
        first = counterparts.setdefault(found.generic(path), path)
        if before[first] != shape:
            raise ValueError(
                f"small has {first} of shape {before[first]} and {path} of shape {shape}, and blocks={blocks!r} takes "
                "them for one: let it match only blocks that are alike"
            )
    pairs, unused = [], set(roles)
    for path, shape in after.items():
        counterpart = counterparts.get(found.generic(path))
        if counterpart is None:
            raise ValueError(f"large has {checks.shortened(path)}, which small lacks{_depth_remedy(blocks)}")
        pattern = next((pattern for pattern in roles if re.search(pattern, path)), None)
        unused.discard(pattern or "")
        depth = found.depth if found.contains(path) else 1.0
        growth = _growth(path, before[counterpart], shape, roles[pattern] if pattern else None, depth)
        pairs.append(Pair(path, counterpart, before[counterpart], shape, growth))
    missing = [path for path in before if found.generic(path) not in {found.generic(p) for p in after}]
    if missing:
        raise ValueError(f"small has {checks.shortened(missing[0])}, which large lacks{_depth_remedy(blocks)}")
    if unused:
        raise ValueError(f"axes: {sorted(unused)[0]!r} is in no path; those are {checks.listed(after)}")
    return pairs


def _depth_remedy(blocks: str | None) -> str:
    known = "" if blocks is None else f", with blocks={blocks!r}"
    return f"{known}: give two sizes of one model; if the number of its blocks differs, blocks='block_[0-9]+', or alike"


def _check_pattern(name: str, pattern: Any) -> None:
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        shown = checks.shown(pattern)
        raise ValueError(f"Invalid {name} value: {shown}; it is not a regular expression: {error}") from None


def shapes_of(name: str, tree: PyTree) -> dict[str, tuple[int, ...]]:
    """Return the shape of each parameter by its path; `name` is the argument's."""
    found = {}
    for key, x in jax.tree.leaves_with_path(tree):
        if not (hasattr(x, "shape") and hasattr(x, "dtype")):
            where = checks.at(name, key)
            raise TypeError(f"{where} is {checks.shown(x)}, expected an array or a jax.ShapeDtypeStruct")
        found[trees.path_of(key)] = tuple(x.shape)
    if not found:
        raise ValueError(f"{name} has no parameters: give a tree of arrays, or of jax.ShapeDtypeStruct")
    return found


def _checked_axes(axes: Any) -> dict[str, tuple[str | None, ...]]:
    if axes is None:
        return {}
    if not isinstance(axes, Mapping):
        raise TypeError(
            f"Invalid axes value: {checks.shown(axes)}; axes must be a dict from patterns of paths to tuples"
        )
    for pattern, roles in axes.items():
        _check_pattern("axes", pattern)
        if isinstance(roles, str) or not isinstance(roles, Sequence) or any(role not in _ROLES for role in roles):
            raise ValueError(
                f"Invalid axes value: {checks.shown(roles)} of {pattern!r}; expected a tuple of 'in', 'out', 'layers' "
                "and None, one for each axis"
            )
    return {pattern: tuple(roles) for pattern, roles in axes.items()}


def _growth(
    path: str, small: tuple[int, ...], large: tuple[int, ...], roles: tuple[str | None, ...] | None, depth: float
) -> Growth:
    """How a parameter grows; `roles` of its axes, if they are given."""
    if len(small) != len(large):
        raise ValueError(f"{checks.shortened(path)} has shape {small} in small and {large} in large: not as many axes")
    if 0 in small + large:
        raise ValueError(f"{checks.shortened(path)} has shape {small} in small and {large} in large: an axis is empty")
    ratios = [b / a for a, b in zip(small, large, strict=True)]
    if roles is None:
        roles = _inferred(path, small, large, ratios)
    elif len(roles) != len(small):
        raise ValueError(
            f"axes gives {len(roles)} roles to {checks.shortened(path)}, whose shape is {large}: give one for each axis"
        )
    by_role = {role: math.prod(r for r, x in zip(ratios, roles, strict=True) if x == role) for role in _ROLES}
    fan_in, fan_out = by_role["in"], by_role["out"]
    return Growth(_kind(fan_in, fan_out, len(small)), fan_in, fan_out, depth * by_role["layers"])


def _kind(fan_in: float, fan_out: float, ndim: int) -> Kind:
    if fan_in == 1 and fan_out == 1:
        return "fixed"
    if fan_in == 1:
        return "input" if ndim > 1 else "vector"
    return "output" if fan_out == 1 else "hidden"


def _inferred(path: str, small: tuple[int, ...], large: tuple[int, ...], ratios: list[float]) -> tuple[str | None, ...]:
    """The roles of the axes by JAX's convention: a vector is an output's, a kernel is (..., fan-in, fan-out)."""
    ndim = len(ratios)
    if ndim < 2:
        return ("out",) * ndim
    *leading, fan_in, fan_out = ratios
    growing = [i for i, ratio in enumerate(ratios) if ratio != 1]
    why = ""
    if any(ratio != 1 for ratio in leading):
        why = f"axes {', '.join(map(str, growing))} grow, and by convention only the last two may"
    elif fan_in != 1 and fan_out != 1 and fan_in != fan_out:
        why = f"its last axes grow by {fan_in:g} and {fan_out:g}, so that one may be no width"
    elif len(growing) == 1 and path.rpartition("/")[2].strip(".") == "weight":
        why = "one axis grows, and a weight may be (out, in), as in torch and Equinox, or (in, out)"
    if why:
        pattern = path if re.escape(path) == path else re.escape(path)
        raise ValueError(
            f"{checks.shortened(path)} has shape {small} in small and {large} in large: {why}. "
            + _REMEDY.format(pattern=pattern)
        )
    return (None,) * len(leading) + ("in", "out")
