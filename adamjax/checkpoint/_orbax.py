"""Orbax, imported when it is needed, and its errors in our terms."""

import errno
import logging
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from adamjax._core.optional import require

# How tensorstore words errors of the operating system.
_OS_ERROR = re.compile(r"(?:OS error |os_error_code=')(\d+)")
# Such errors come from content too: the names of files and folders are part of a step.
_OF_CONTENT = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL}
# After a failure, until the threads have ended.
_STRAGGLING_SECONDS = 0.1


def orbax() -> Any:
    logging.getLogger("asyncio").addFilter(_is_news)  # a second time, it does nothing
    return require("orbax.checkpoint", "checkpoint", "a checkpoint")


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a message of asyncio is not about a write of orbax that failed beside another, whose error is raised."""
    text = record.getMessage()
    return not ("never retrieved" in text and "OCDBT database" in text)


@contextmanager
def without_error_logs() -> Iterator[None]:
    """Keep the threads of orbax and tensorstore from printing errors with their tracebacks: they are raised, too."""

    def is_less(record: logging.LogRecord) -> bool:
        return record.levelno < logging.ERROR

    def hook(found: Any) -> None:  # by which threads that outlive orbax's event loop complain
        if "Event loop is closed" not in str(found.exc_value):
            before(found)

    before, logger = sys.unraisablehook, logging.getLogger("absl")
    sys.unraisablehook = hook
    logger.addFilter(is_less)
    try:
        yield
    except BaseException:
        time.sleep(_STRAGGLING_SECONDS)
        raise
    finally:
        sys.unraisablehook = before
        logger.removeFilter(is_less)


def os_error(error: BaseException) -> int | None:
    """Return the number of the error of the operating system that an error is, or was caused by; None if of none."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, OSError) and isinstance(found.errno, int):
            return found.errno
        if match := _OS_ERROR.search(str(found)):
            return int(match[1])
        found = found.__cause__
    return None


def is_damage(error: Exception) -> bool:
    """Return whether reading can have failed because of what was read, and not because of the machine."""
    if isinstance(error, (ImportError, MemoryError)):
        return False
    if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error):  # the memory of a device
        return False
    number = os_error(error)
    return number is None or number in _OF_CONTENT


def sentence(number: int, message: str) -> OSError:
    """Return an error of the operating system whose text is the message, without the number."""
    error = type(OSError(number, message))(message)  # the class depends on the number
    error.errno = number
    return error
