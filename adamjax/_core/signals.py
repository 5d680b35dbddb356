"""Signals that ask a process to stop: Ctrl-C, and those by which schedulers and closing terminals end it."""

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

# SIGHUP is not known everywhere.
STOPS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))

Handler = Callable[[int, FrameType | None], object]


@contextmanager
def calls_on_signals(stop: Callable[[], object], numbers: Sequence[int] = STOPS) -> Iterator[None]:
    """Call `stop` at a signal. A second Ctrl-C interrupts as usual; other signals only ask again."""

    def ask(number: int, _: FrameType | None) -> None:
        stop()
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    with _handled_by(ask, numbers):
        yield


@contextmanager
def interrupted() -> Iterator[None]:
    """Let signals other than Ctrl-C raise KeyboardInterrupt, too."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with _handled_by(interrupt, STOPS[1:]):
        yield


@contextmanager
def _handled_by(handler: Handler, numbers: Sequence[int]) -> Iterator[None]:
    """Handle signals, but those that are ignored: `nohup` and shells ignore some for a command in the background."""
    if threading.current_thread() is not threading.main_thread():  # which alone can set handlers
        yield
        return
    before = {number: signal.getsignal(number) for number in numbers}
    for number, found in before.items():
        if found is not signal.SIG_IGN:
            signal.signal(number, handler)
    try:
        yield
    finally:
        for number, found in before.items():
            if found is not None:  # one that Python did not set cannot be set again
                signal.signal(number, found)
