"""The end of a process of a distributed run, in bounded time and with an explanation."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax

from adamjax.cli._flags import CommandError

# Another process prints the message, since JAX or a signal may end this one before it could.
_EXPLAIN = "import sys; sys.stdin.read() or print(sys.argv[1], file=sys.stderr)"


@contextmanager
def explained(message: str) -> Iterator[None]:
    """Have another process print the message, if this one ends for any reason but a `CommandError`."""
    # A session of its own, so that Ctrl-C does not end it.
    command = [sys.executable, "-c", _EXPLAIN, message]
    watch = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield
    except CommandError:
        watch.communicate(b"done")
        raise
    watch.communicate(b"done")


class StallTimer:
    """Ends this process if it makes no progress for so many seconds, in which it was not suspended.

    A process that waits for one that hangs would otherwise wait for ever, since JAX only notices one that has died.
    """

    def __init__(self, seconds: int) -> None:
        self._limit, self._left, self._stopped = seconds, seconds, threading.Event()
        threading.Thread(target=self._count, name="adamjax-stall", daemon=True).start()

    def around(self, stop: Callable[[], bool]) -> Callable[[], bool]:
        """Return a function like `stop`, which is called after each update: every call is progress."""

        def progress() -> bool:
            self._left = self._limit
            return stop()

        return progress

    def stop(self) -> None:
        self._stopped.set()

    def _count(self) -> None:
        while not self._stopped.is_set():
            time.sleep(1)
            self._left -= 1  # not the time of a clock, which goes on while a process is suspended
            if self._left < 0 and not self._stopped.is_set():
                print(
                    f"adamjax: process {jax.process_index()} of {jax.process_count()} made no update for "
                    f"{self._limit} s, so one of them hangs, or --stall-timeout is too short",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(1)
