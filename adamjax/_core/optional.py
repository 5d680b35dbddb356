"""Optional dependencies, imported when they are needed."""

import importlib
from typing import Any


def require(module: str, extra: str, purpose: str) -> Any:
    """Import `module`, or say what to install.

    Raises:
      ImportError: It is not installed; the message has the command to run.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{purpose} needs {module.split('.')[0]}: run  pip install 'adamjax[{extra}]'") from error
