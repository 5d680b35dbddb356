"""Optional dependencies: imported when they are needed, and recognised where somebody else has imported them."""

import importlib
import sys
from functools import cache
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


def is_installed(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


def presented_class(ours: type) -> type:
    """Return the class by which `isinstance` knows a transformation of type `ours`, besides its own.

    If optax has been imported, which any test for its class implies, this class derives from `ours` and from
    `optax.GradientTransformationExtraArgs`, the type of what `optax.adam` returns. Otherwise it is `ours`.
    """
    theirs = getattr(sys.modules.get("optax"), "GradientTransformationExtraArgs", None)
    return ours if theirs is None else _joint_class(ours, theirs)


@cache
def _joint_class(ours: type, theirs: type) -> type:
    class Joint(type(ours)):  # type: ignore[misc]
        def mro(cls) -> list[type]:
            # Their class is a tuple, and ours is not: code that takes tuples apart must not find one.
            return [base for base in super().mro() if base is not tuple]

    def new(cls: type, *args: Any, **kwargs: Any) -> Any:
        return ours(*args, **kwargs)  # `dataclasses.replace` calls the class of a value

    names = {name: getattr(ours, name) for name in ("__module__", "__qualname__", "__doc__")}
    try:
        return Joint(ours.__name__, (ours, theirs), names | {"__new__": new})
    except TypeError:
        return ours  # because of `__slots__`, for instance, which no tuple can have
