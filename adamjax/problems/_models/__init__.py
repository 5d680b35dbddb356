"""Models of several frameworks as pure functions, and how their kinds are told apart."""

from typing import Any

from adamjax._core.typing import PyTree
from adamjax.problems._models._functions import Functions
from adamjax.problems._models._parts import Network as Network
from adamjax.problems._models._parts import arguments, required

_ACCEPTED = (
    "model must be a factory of a Flax NNX module, `lambda rngs: ...`, or of an Equinox module, `lambda key: ...`; "
    "a Flax Linen module; a Haiku transform; or a pair of functions (init, apply)"
)


def as_model(model: Any, inputs: PyTree) -> Network:
    """Return `model` as pure functions; `inputs` are the shapes and dtypes of a batch.

    Frameworks are imported only for what comes from them.
    """
    if _comes_from(type(model), "haiku"):
        from adamjax.problems._models._haiku import Haiku

        return Haiku(model, inputs)
    if isinstance(model, tuple) and len(model) == 2 and all(map(callable, model)):
        return Functions(*model, inputs)
    if _comes_from(type(model), "flax.linen"):
        from adamjax.problems._models._linen import Linen

        return Linen(model, inputs)
    for framework, argument in (("flax.nnx", "rngs"), ("equinox", "key")):
        if _comes_from(type(model), framework) and not isinstance(model, type):
            raise TypeError(
                f"Invalid model value: a module of type {type(model).__name__}; give a factory, `lambda {argument}: "
                f"{type(model).__name__}(...)`, because each run begins with parameters of its own"
            )
    if _comes_from(model, "flax.linen"):
        raise TypeError(f"Invalid model value: the class {model.__name__}; give a module, {model.__name__}(...)")
    if not callable(model):
        raise TypeError(f"Invalid model value: a value of type {type(model).__name__}; {_ACCEPTED}")
    names = [p.name for p in required(model)]
    if "rngs" in arguments(model) and set(names) <= {"rngs"}:
        from adamjax.problems._models._nnx import Nnx

        return Nnx(model)
    # eqx.nn.make_with_state returns a function (*args, **kwargs).
    made_with_state = getattr(model, "__module__", "").startswith("equinox.") and "kwargs" in arguments(model)
    if made_with_state or ("key" in arguments(model) and set(names) <= {"key"}):
        from adamjax.problems._models._equinox import Equinox

        return Equinox(model)
    raise TypeError(
        f"Invalid model value: {getattr(model, '__name__', type(model).__name__)}, which requires "
        f"{', '.join(names) or 'no argument'}; {_ACCEPTED}. A factory gives the other arguments of a class"
    )


def _comes_from(cls: Any, framework: str) -> bool:
    """Return whether `cls` is a class of `framework`, or derives from one."""
    modules = (base.__module__ for base in getattr(cls, "__mro__", ()))
    return any(name == framework or name.startswith(framework + ".") for name in modules)
