"""Imports of optional dependencies when they are needed."""

import importlib
from typing import Any


def require(module: str, extra: str, purpose: str) -> Any:
    """Import and return `module`.

    Raises:
      ImportError: The module is not installed; the message has the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{purpose} needs {module.split('.')[0]}: run  pip install 'adamjax[{extra}]'") from error
