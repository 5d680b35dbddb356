"""The space that a search covers: ranges of hyperparameters, and points spread over them."""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

import numpy as np

from adamjax._core import checks
from adamjax._core.optional import require
from adamjax._core.typing import GradientTransformation

Setting = dict[str, Any]  # keyword arguments of an optimizer
OptimizerFactory = Callable[..., GradientTransformation]  # called with a setting

METHODS = ("halton", "sobol", "random", "grid")


@dataclasses.dataclass(frozen=True)
class Interval:
    """The base of the ranges of numbers; a subclass says how values and fractions of the range correspond."""

    low: float
    high: float

    def __post_init__(self) -> None:
        for name in ("low", "high"):
            x = getattr(self, name)
            if isinstance(x, bool) or not isinstance(x, (int, float, np.integer, np.floating)) or not math.isfinite(x):
                raise ValueError(f"Invalid range: {self}; {name} must be a finite number")
            if isinstance(x, np.generic):  # JSON has no NumPy scalars
                object.__setattr__(self, name, x.item())
        if self.low >= self.high:
            raise ValueError(f"Invalid range: {self}; low must be below high")

    def _value(self, u: float) -> float:
        raise NotImplementedError

    def at(self, u: float) -> float:
        """Return the value at the fraction `u` of the range."""
        return min(max(self._value(u), self.low), self.high)

    def fraction(self, x: float) -> float:
        """Return the fraction of the range at which `x` lies: the inverse of `at`."""
        raise NotImplementedError

    def between(self, u: float, v: float) -> Self:
        """Return the range from the fraction `u` to the fraction `v`, which may lie outside this one."""
        return type(self)(self._value(u), self._value(v))


class Log(Interval):
    """A range from `low` to `high` on a logarithmic scale: equal factors are equally likely.

    Raises:
      ValueError: The bounds are not 0 < low < high.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low <= 0:
            raise ValueError(f"Invalid range: {self}; a logarithmic range starts above 0")

    def _value(self, u: float) -> float:
        return self.low * (self.high / self.low) ** u

    def fraction(self, x: float) -> float:
        return math.log(x / self.low) / math.log(self.high / self.low) if x > 0 else -math.inf


class Linear(Interval):
    """A range from `low` to `high` on a linear scale: equal differences are equally likely.

    Raises:
      ValueError: The bounds are not low < high.
    """

    def _value(self, u: float) -> float:
        return self.low + u * (self.high - self.low)

    def fraction(self, x: float) -> float:
        return (x - self.low) / (self.high - self.low)


@dataclasses.dataclass(frozen=True, init=False, repr=False)
class Choice:
    """A choice among values of any type, all equally likely.

    >>> from adamjax.tuning import Choice
    >>> Choice(False, "torch")
    Choice(False, 'torch')

    Raises:
      ValueError: There are no values.
    """

    options: tuple[Any, ...]

    def __init__(self, *options: object) -> None:
        if not options:
            raise ValueError("Invalid range: Choice(); a choice needs at least one value")
        object.__setattr__(self, "options", options)

    def at(self, u: float) -> Any:
        """Return the value at the fraction `u` of the list."""
        return self.options[min(int(u * len(self.options)), len(self.options) - 1)]

    def fraction(self, x: object) -> float:
        """Return the fraction of the list at which `x` lies: the inverse of `at`."""
        return (self.options.index(x) + 0.5) / len(self.options)

    def __repr__(self) -> str:
        return f"Choice({', '.join(map(repr, self.options))})"


@dataclasses.dataclass(frozen=True)
class OneMinus:
    """The range of 1 - x, for x in another range: good betas crowd near 1."""

    complement: Log | Linear

    def at(self, u: float) -> float:
        return 1 - self.complement.at(u)

    def fraction(self, x: float) -> float:
        return self.complement.fraction(1 - x)

    def between(self, u: float, v: float) -> "OneMinus":
        return OneMinus(self.complement.between(u, v))


Range = Log | Linear | Choice | OneMinus


class Space:
    """Ranges of an optimizer's hyperparameters, by the names of its arguments.

    Args:
      **ranges: A `Log`, `Linear` or `Choice` for each argument; any other value is a constant.
        `one_minus_b1=Log(0.01, 0.3)` is a range of 1 - `b1`; the prefix works with every argument.

    Raises:
      ValueError: There is no range, or an argument has two.

    >>> from adamjax.tuning import Log, Space
    >>> space = Space(learning_rate=Log(1e-4, 1e-1), one_minus_b1=Log(0.01, 1.0), eps=1e-8)
    >>> space.points(2, method="grid")[-1]
    {'learning_rate': 0.1, 'b1': 0.0, 'eps': 1e-08}
    """

    def __init__(self, **ranges: object) -> None:
        self.ranges: dict[str, Range] = {}
        for given, r in ranges.items():
            name = given.removeprefix("one_minus_")
            if name in self.ranges:
                raise ValueError(f"Invalid space: both {name} and one_minus_{name}; give one of them")
            if given != name:
                if not isinstance(r, (Log, Linear)):
                    raise ValueError(f"Invalid space: {given}={r!r}; {given} must be a Log or a Linear")
                self.ranges[name] = OneMinus(r)
            else:
                self.ranges[name] = r if isinstance(r, (Log, Linear, Choice)) else Choice(r)
        if not self.free:
            raise ValueError(
                "Invalid space: it has no range; at least one argument must be a Log, a Linear or a Choice(a, b, ...)"
            )

    @classmethod
    def of(cls, ranges: Mapping[str, Range]) -> "Space":
        """Return the space of these ranges by the names of the arguments, without prefixes."""
        return cls(**dict(_keyword(name, r) for name, r in ranges.items()))

    @property
    def free(self) -> list[str]:
        """The arguments that have more than one value."""
        return [name for name, r in self.ranges.items() if not (isinstance(r, Choice) and len(r.options) == 1)]

    def points(self, count: int, *, method: str = "halton", seed: int = 0) -> list[Setting]:
        """Return settings spread over the space.

        Args:
          count: Number of settings; for a grid, number of values along each range (a choice has all of its own).
          method: "halton" or "sobol": scrambled quasi-random points (scipy's), which are spread evenly.
            "random": independent points. "grid": every combination, the ends of the ranges included.
          seed: Seed of the scrambling or of the random numbers.

        Returns:
          A dict of the optimizer's keyword arguments for each point.

        Raises:
          ValueError: `count` is less than 1 (2 for a grid), `seed` is negative, or `method` is unknown.
        """
        checks.choice("method", method, METHODS)
        checks.integer("count", count)
        checks.count("seed", seed, 0)
        if count < (2 if method == "grid" else 1):
            raise ValueError(f"Invalid count value: {count}; a space has at least 1 point, a grid 2 along each range")
        rows: Iterable[Sequence[float]]
        if method == "grid":
            rows = itertools.product(*(_grid_fractions(self.ranges[name], count) for name in self.free))
        elif method == "random":
            rows = np.random.default_rng(seed).random((count, len(self.free)))
        else:
            qmc = require("scipy.stats.qmc", "tune", "quasi-random points")
            engine = qmc.Halton if method == "halton" else qmc.Sobol
            # Sobol' points balance at powers of 2.
            draws = count if method == "halton" else 2 ** math.ceil(math.log2(count))
            rows = engine(len(self.free), rng=seed).random(draws)[:count]
        return [self.at(dict(zip(self.free, map(float, row), strict=True))) for row in rows]

    def at(self, fractions: dict[str, float]) -> Setting:
        """Return the setting at a fraction of each free range."""
        return {name: r.at(fractions.get(name, 0.0)) for name, r in self.ranges.items()}

    @property
    def bounds(self) -> dict[str, tuple[float, float]]:
        """The smallest and the largest value of each numeric range."""
        ends = {n: (r.at(0.0), r.at(1.0)) for n, r in self.ranges.items() if not isinstance(r, Choice)}
        return {name: (min(pair), max(pair)) for name, pair in ends.items()}

    def __repr__(self) -> str:
        keywords = (_keyword(name, r) for name, r in self.ranges.items())
        return f"Space({', '.join(f'{name}={x!r}' for name, x in keywords)})"


def stable_repr(x: object) -> str:
    """Return the `repr` of `x` without memory addresses, so that it is the same in every process."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(x))


def _keyword(name: str, r: Range) -> tuple[str, object]:
    """Return the keyword argument of `Space`, and its value, that give `name` the range `r`."""
    if isinstance(r, OneMinus):
        return f"one_minus_{name}", r.complement
    return name, r.options[0] if isinstance(r, Choice) and len(r.options) == 1 else r


def _grid_fractions(r: Range, count: int) -> list[float]:
    if isinstance(r, Choice):
        return [(i + 0.5) / len(r.options) for i in range(len(r.options))]
    return [i / (count - 1) for i in range(count)]
