"""Agreement among the processes of one run: what the first says, and the failure of any."""

import json
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import numpy as np
from jax.experimental import multihost_utils

_ERROR_CHARACTERS = 600
_ERROR_BYTES = 8192  # in JSON, a character takes up to 12


def is_first() -> bool:
    return jax.process_index() == 0


def broadcast(text: str) -> str:
    """Return the first process's text on every process."""
    if jax.process_count() == 1:
        return text
    encoded = text.encode(errors="surrogateescape")  # as in paths
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(encoded))))
    padded = np.frombuffer(encoded[:size].ljust(size, b"\0"), np.uint8)
    return bytes(multihost_utils.broadcast_one_to_all(padded)).decode(errors="surrogateescape")


def gather(x: np.ndarray) -> np.ndarray:
    """Return the arrays of all processes, which have one shape, stacked; of at most 32 bits a number."""
    return x[None] if jax.process_count() == 1 else np.asarray(multihost_utils.process_allgather(x))


@contextmanager
def together() -> Iterator[None]:
    """Wait for all processes at the end of the block, and raise on all of them if one has raised in it.

    Raises:
      OSError: Another process failed; a `ValueError` if it raised one. The process that failed raises its own error.
    """
    error: OSError | ValueError | None = None
    try:
        yield
    except (OSError, ValueError) as raised:
        if jax.process_count() == 1:
            raise
        error = raised
    if jax.process_count() == 1:
        return
    texts = gather(_encoded(error))
    if error is not None:
        raise error
    for row in texts:
        if found := bytes(row.astype(np.uint8)).rstrip(b"\0"):
            is_value_error, number, text = json.loads(found)
            raise ValueError(text) if is_value_error else OSError(text) if number is None else OSError(number, text)


def _encoded(error: OSError | ValueError | None) -> np.ndarray:
    if error is None:
        return np.zeros(_ERROR_BYTES, np.uint8)
    text = str(error)[:_ERROR_CHARACTERS]
    number = getattr(error, "errno", None)
    content = json.dumps([isinstance(error, ValueError), number if isinstance(number, int) else None, text]).encode()
    return np.frombuffer(content.ljust(_ERROR_BYTES, b"\0"), np.uint8)
