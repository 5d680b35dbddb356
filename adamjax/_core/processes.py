"""Agreement among the processes of one run: what the first says, and the failure of any."""

from collections.abc import Iterator
from contextlib import contextmanager

import jax
import numpy as np
from jax.experimental import multihost_utils

_MESSAGE_BYTES = 1024


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
    kind = b"" if error is None else b"V" if isinstance(error, ValueError) else b"O"
    text = kind + (b"" if error is None else str(error).encode(errors="replace"))
    texts = gather(np.frombuffer(text[:_MESSAGE_BYTES].ljust(_MESSAGE_BYTES, b"\0"), np.uint8))
    if error is not None:
        raise error
    for row in texts:
        if found := bytes(row.astype(np.uint8)).rstrip(b"\0").decode(errors="replace"):
            raise (ValueError if found[0] == "V" else OSError)(found[1:])
