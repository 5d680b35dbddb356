"""The progress of a long command: a bar on a terminal and in a notebook, a few lines in a log."""

import os
import sys
import time
from typing import Any, Self

from adamjax._core.optional import require
from adamjax._core.text import printable

_MANY = 100_000  # units from which on a bar counts thousands


def progress_bar(total: int, unit: str, extra: str, *, done: int = 0) -> Any:
    """Return a tqdm of `total` units, or `Lines` where nothing can be written over.

    Raises:
      ImportError: There is a terminal, and tqdm is not installed; the message names the extra that has it.
    """
    if not is_live():
        return Lines(total, unit, done)
    tqdm = require("tqdm", extra, "the progress bar").tqdm
    return tqdm(total=total, initial=done, unit=unit, unit_scale=total >= _MANY, dynamic_ncols=True)


def is_live() -> bool:
    """Return whether a line of stderr can be written over."""
    if type(sys.stderr).__module__.startswith("ipykernel."):
        return True
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


class Lines:
    """Prints a line whenever another tenth is done, with those methods of a tqdm that are called here."""

    def __init__(self, total: int, unit: str, done: int) -> None:
        self.n = done
        self._total, self._unit, self._text, self._begin = total, unit, "", time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def set_postfix_str(self, text: str, refresh: bool) -> None:
        self._text = f": {text}"

    def update(self, n: int) -> None:
        before, self.n = self.n, self.n + n
        if self.n * 10 // self._total > before * 10 // self._total:
            seconds = time.monotonic() - self._begin
            done = f"{self.n} of {self._total} {self._unit}s after {seconds:.0f} s{self._text}"
            print(printable(f"adamjax: {done}"), file=sys.stderr, flush=True)

    def close(self) -> None:
        """Do nothing: each line was ended."""
