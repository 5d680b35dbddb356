"""Where to look: ranges of hyperparameters, and points spread over them."""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from adamjax._core import checks
from adamjax._core.optional import require

Setting = dict[str, Any]

METHODS = ("halton", "sobol", "random", "grid")


@dataclasses.dataclass(frozen=True)
class Log:
    """From `low` to `high`, each factor as likely as the next.

    Raises:
      ValueError: Not 0 < low < high.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        _check_range(self)
        if self.low <= 0:
            raise ValueError(f"Invalid range: {self}; a logarithmic range starts above 0")

    def at(self, u: float) -> float:
        """The value at the fraction `u` of the range."""
        return min(max(self.low * (self.high / self.low) ** u, self.low), self.high)

    def fraction(self, x: float) -> float:
        """Where in the range `x` lies: the inverse of `at`."""
        return math.log(x / self.low) / math.log(self.high / self.low) if x > 0 else -math.inf

    def between(self, u: float, v: float) -> "Log":
        """From the fraction `u` to the fraction `v`, which may lie outside."""
        factor = self.high / self.low
        return Log(self.low * factor**u, self.low * factor**v)


@dataclasses.dataclass(frozen=True)
class Linear:
    """From `low` to `high`, each difference as likely as the next.

    Raises:
      ValueError: Not low < high.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        _check_range(self)

    def at(self, u: float) -> float:
        """The value at the fraction `u` of the range."""
        return min(max(self.low + u * (self.high - self.low), self.low), self.high)

    def fraction(self, x: float) -> float:
        """Where in the range `x` lies: the inverse of `at`."""
        return (x - self.low) / (self.high - self.low)

    def between(self, u: float, v: float) -> "Linear":
        """From the fraction `u` to the fraction `v`, which may lie outside."""
        width = self.high - self.low
        return Linear(self.low + u * width, self.low + v * width)


class Choice:
    """One of some values, whatever they are; each as likely as the next.

    >>> from adamjax.tuning import Choice
    >>> Choice(False, "torch")
    Choice(False, 'torch')

    Raises:
      ValueError: There are none.
    """

    def __init__(self, *options: Any) -> None:
        if not options:
            raise ValueError("Invalid range: Choice(); a choice needs at least one value")
        self.options = options

    def at(self, u: float) -> Any:
        """The value at the fraction `u` of the list."""
        return self.options[min(int(u * len(self.options)), len(self.options) - 1)]

    def fraction(self, x: Any) -> float:
        """Where in the list `x` lies: the inverse of `at`."""
        return (self.options.index(x) + 0.5) / len(self.options)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Choice) and self.options == other.options

    def __hash__(self) -> int:
        return hash(self.options)

    def __repr__(self) -> str:
        return f"Choice({', '.join(map(repr, self.options))})"


@dataclasses.dataclass(frozen=True)
class OneMinus:
    """1 - x, for x in a range: betas crowd at 1."""

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
      **ranges: A `Log`, `Linear` or `Choice` for each. `one_minus_b1=Log(0.01, 0.3)` is a range of
        `b1`; any other argument can be prefixed like this too. What is not a range is a constant.

    Raises:
      ValueError: There is no range, or one name twice.

    >>> from adamjax.tuning import Log, Space
    >>> space = Space(learning_rate=Log(1e-4, 1e-1), one_minus_b1=Log(0.01, 1.0), eps=1e-8)
    >>> space.points(2, method="grid")[-1]
    {'learning_rate': 0.1, 'b1': 0.0, 'eps': 1e-08}
    """

    def __init__(self, **ranges: Any) -> None:
        self.ranges: dict[str, Range] = {}
        for given, r in ranges.items():
            name = given.removeprefix("one_minus_")
            if name in self.ranges:
                raise ValueError(f"Invalid space: both {name} and one_minus_{name}; give one of them")
            if not isinstance(r, (Log, Linear, Choice)):
                r = Choice(r)
            if given != name:
                if isinstance(r, Choice):
                    raise ValueError(f"Invalid space: {given}={ranges[given]!r}; {given} must be a Log or a Linear")
                r = OneMinus(r)
            self.ranges[name] = r
        if not self.free:
            raise ValueError(
                "Invalid space: it has no range, at least one argument must be a Log, a Linear or a Choice(a, b, ...)"
            )

    @classmethod
    def of(cls, ranges: Mapping[str, Range]) -> "Space":
        """The space of these ranges, by the names of the arguments themselves."""
        return cls(**{_written(name, r): _content(r) for name, r in ranges.items()})

    @property
    def free(self) -> list[str]:
        """The names that have more than one value."""
        return [name for name, r in self.ranges.items() if not (isinstance(r, Choice) and len(r.options) == 1)]

    def points(self, count: int, *, method: str = "halton", seed: int = 0) -> list[Setting]:
        """Settings spread over the space.

        Args:
          count: How many; of a grid, how many along each range (a choice has its own number).
          method: "halton" or "sobol": evenly, as quasi-random numbers (scipy's, scrambled) do.
            "random": independently. "grid": every combination, ends included.
          seed: Of the scrambling, or of the random numbers.

        Returns:
          Keyword arguments of the optimizer, a dict for each point.

        Raises:
          ValueError: `count` is less than 1 (of a grid, 2), `seed` less than 0, or `method` is not one of these.
        """
        checks.choice("method", method, METHODS)
        checks.integer("count", count)
        checks.count("seed", seed, 0)
        if count < (2 if method == "grid" else 1):
            raise ValueError(f"Invalid count value: {count}; a space has at least 1 point, a grid 2 along each range")
        rows: Iterable[Any]
        if method == "grid":
            rows = itertools.product(*(_ticks(r, count) for r in (self.ranges[name] for name in self.free)))
        elif method == "random":
            rows = np.random.default_rng(seed).random((count, len(self.free)))
        else:
            qmc = require("scipy.stats.qmc", "tune", "quasi-random points")
            engine = qmc.Halton if method == "halton" else qmc.Sobol
            draws = count if method == "halton" else 2 ** math.ceil(math.log2(count))  # Sobol' balances powers of 2
            rows = engine(len(self.free), rng=seed).random(draws)[:count]
        return [self.at(dict(zip(self.free, map(float, row), strict=True))) for row in rows]

    def at(self, fractions: dict[str, float]) -> Setting:
        """The setting at a fraction of each free range."""
        return {name: r.at(fractions.get(name, 0.0)) for name, r in self.ranges.items()}

    @property
    def bounds(self) -> dict[str, tuple[float, float]]:
        """The smallest and the largest value of each range that is one of numbers."""
        ends = {n: (r.at(0.0), r.at(1.0)) for n, r in self.ranges.items() if not isinstance(r, Choice)}
        return {name: (min(pair), max(pair)) for name, pair in ends.items()}

    def __repr__(self) -> str:
        return f"Space({', '.join(f'{_written(name, r)}={_content(r)!r}' for name, r in self.ranges.items())})"


def printed(x: Any) -> str:
    """How it prints in every process: without the address of a function or of an object."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(x))


def _written(name: str, r: Range) -> str:
    """The argument of `Space` that gives `name` the range `r`."""
    return f"one_minus_{name}" if isinstance(r, OneMinus) else name


def _content(r: Range) -> Any:
    """The value of that argument."""
    if isinstance(r, OneMinus):
        return r.complement
    return r.options[0] if isinstance(r, Choice) and len(r.options) == 1 else r


def _ticks(r: Range, count: int) -> list[float]:
    if isinstance(r, Choice):
        return [(i + 0.5) / len(r.options) for i in range(len(r.options))]
    return [i / (count - 1) for i in range(count)]


def _check_range(r: Log | Linear) -> None:
    for name in ("low", "high"):
        x = getattr(r, name)
        if isinstance(x, bool) or not isinstance(x, (int, float, np.integer, np.floating)) or not math.isfinite(x):
            raise ValueError(f"Invalid range: {r}; {name} must be a finite number")
        if isinstance(x, np.generic):  # which JSON has none of
            object.__setattr__(r, name, x.item())
    if r.low >= r.high:
        raise ValueError(f"Invalid range: {r}; low must be below high")
