"""Signals that ask a process to stop: Ctrl-C, and those by which schedulers and closing terminals end it."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

# SIGHUP is not known everywhere.
STOPS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))

STOPPED = 130  # exit status of a command that a signal stopped
UNREAD = 141  # exit status of a command whose output nobody reads any more, as of one that SIGPIPE ends
PATIENCE = 5.0  # seconds that a command has to end by itself
_AGAIN = 0.05  # seconds until a lost interrupt is raised again
_LEFT = b"\0"  # which is no signal

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
    """Let all signals that ask to stop raise KeyboardInterrupt, whatever Python is doing at that moment."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with _handled_by(interrupt, STOPS), _raised_again():
        yield


@contextmanager
def _raised_again() -> Iterator[None]:
    """Interrupt again a little later if an interrupt was raised in a finalizer, or in a callback of the collector.

    Python prints exceptions there, and goes on. JAX has such a callback.
    """
    before, main = sys.unraisablehook, threading.main_thread().ident
    raised: list[threading.Timer] = []

    def hear(unraisable: "sys.UnraisableHookArgs") -> None:
        if unraisable.exc_type is not KeyboardInterrupt:
            before(unraisable)
            return
        # Python prints what is raised here, too, so another thread sends the signal.
        raised.append(threading.Timer(_AGAIN, signal.pthread_kill, (main, signal.SIGINT)))
        raised[-1].start()

    sys.unraisablehook = hear
    try:
        yield
    finally:
        sys.unraisablehook = before
        for again in raised:
            again.cancel()


def end_process(last_words: str) -> NoReturn:
    """End the process and those that it started at once, also while a compiled program runs, which crashes an exit."""
    try:
        print(last_words, file=sys.stderr, flush=True)
        sys.stdout.flush()
        for child in multiprocessing.active_children():
            child.kill()
    finally:
        os._exit(STOPPED)


@contextmanager
def _handled_by(handler: Handler, numbers: Sequence[int]) -> Iterator[None]:
    """Handle signals, but a SIGHUP that is ignored, as under `nohup`."""
    if threading.current_thread() is not threading.main_thread():  # which alone can set handlers
        yield
        return
    before = {number: signal.getsignal(number) for number in numbers}
    for number, found in before.items():
        if not (found is signal.SIG_IGN and number == getattr(signal, "SIGHUP", None)):
            signal.signal(number, handler)
    try:
        yield
    finally:
        for number, found in before.items():
            if found is not None:  # one that Python did not set cannot be set again
                signal.signal(number, found)


@contextmanager
def interrupted_in_time(last_words: Callable[[], str]) -> Iterator[None]:
    """As `interrupted`, and end the process if a signal has not ended the block after a while.

    Python handles no signal while the main thread waits for a compiled program, and the block may wait for others on
    its way out.
    """
    if threading.current_thread() is not threading.main_thread():  # which alone handles signals
        yield
        return
    reads, writes = os.pipe()
    os.set_blocking(writes, False)
    left = threading.Event()

    def watch() -> None:
        while (received := os.read(reads, 1)) != _LEFT:
            if received[0] in STOPS and not left.wait(PATIENCE):
                end_process(last_words())

    watcher = threading.Thread(target=watch, name="adamjax-signals", daemon=True)
    watcher.start()
    # Unlike handlers, this hears of a signal at once.
    before = signal.set_wakeup_fd(writes, warn_on_full_buffer=False)
    try:
        with interrupted():
            yield
    finally:
        signal.set_wakeup_fd(before)
        left.set()
        os.write(writes, _LEFT)
        watcher.join()
        os.close(reads)
        os.close(writes)
