"""Limits of what is kept in memory or counted, so that larger numbers are refused before they fill the machine."""

from adamjax._core import checks

MAX_STEPS = 2**31 - 1
MAX_RUNS = 10**7  # of a search
MAX_POINTS = 10**7  # of a range test


def steps(name: str, x: object, least: int = 1) -> int:
    return _limited(name, x, least, MAX_STEPS, "the updates of a run are counted in 32 bits")


def runs(name: str, x: object, least: int = 1) -> int:
    return _limited(name, x, least, MAX_RUNS, "the results of all are kept in memory")


def points(name: str, x: object) -> int:
    return _limited(name, x, 1, MAX_POINTS, "the whole curve is kept in memory")


def _limited(name: str, x: object, least: int, most: int, reason: str) -> int:
    number = checks.count(name, x, least)
    if number > most:
        raise ValueError(f"Invalid {name} value: {number:,}; {name} must be at most {most:,}, since {reason}")
    return number
