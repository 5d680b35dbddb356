"""The end of a tuning before all its trials have ended."""

from collections.abc import Callable

Check = Callable[[], None]  # raises Stopped where the tuning is to end


class Stopped(Exception):  # noqa: N818
    """The tuning is to end here, and can go on later."""


def go_on() -> None:
    """Never stop."""
