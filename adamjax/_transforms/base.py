"""What every transformation is: a value with `init`, `update` and `step`, alone or in a chain."""

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from adamjax._core import checks, low_precision, trees
from adamjax._core.ownership import placed_like
from adamjax._core.trees import PyTree
from adamjax._core.value import Value, name_of, static_field, value
from adamjax._transforms.leafwise import Doing, Plan, carry_out
from adamjax._transforms.param_rounding import Narrow

Extra = Mapping[str, Any]


class Transformation(Value):
    """A gradient transformation: a pure `init`/`update` pair that is also a value.

    Its fields are its hyperparameters and the leaves of a pytree: it can be passed to a jitted
    function (changing a hyperparameter then compiles nothing), stacked by `jax.vmap`,
    differentiated, compared, hashed and pickled. It unpacks into `init, update` and goes wherever
    optax takes a transformation.
    """

    # Whether the updates are made for the values that the parameters are to have: not to be rounded.
    lands = False
    # Whether there are steps at which nothing in it moves: what counts steps around it would not know.
    holds = False
    # Whether its step is to be one pass over memory, which what is made of its updates is not; see `kernels.Fused`.
    fused: bool | str = False
    # Whether `_step_narrow` is that, too.
    fuses_narrow = False

    def __iter__(self) -> Iterator[Callable[..., Any]]:
        return iter((self.init, self.update))

    def init(self, params: PyTree) -> PyTree:
        """The state before the first step.

        Args:
          params: A pytree of floating point or complex arrays; None is an absent parameter. Of
            `jax.ShapeDtypeStruct`s the state is made of those too, and nothing is allocated.

        Returns:
          The state: each array has the shape and sharding of its parameter.

        Raises:
          TypeError: A leaf is not a floating point or complex array; the message has its path.
        """
        checks.parameters(params)
        return self._init(params)

    def update(
        self, updates: PyTree, state: PyTree, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, PyTree]:
        """Transform the gradients: one step, without applying it.

        Args:
          updates: The gradients, or what the transformation before this one made of them: like
            `params` in structure and shapes. A None freezes what stands at its place in `params`.
          state: What `init` or the last `update` returned.
          params: The current parameters. Needed by weight decay only, but see Returns.
          **extra: Passed on to the members of a chain that take them, ignored by the others.

        Returns:
          The updates, ready for `apply_updates`, and the new state. With `params` the updates have
          their structure and dtypes (zeros where the gradient is None; of `adamjax.rounding`'s
          wrappers, float32 for half precision parameters); without, those of the gradients (complex
          ones where the moments are). The state keeps its structure, shapes, dtypes and shardings.

        Raises:
          TypeError, ValueError: The trees do not fit each other; the message names the path.
        """
        checks.updates(updates, params)
        direction, state = self._update(updates, state, params, extra)
        if not self.lands:
            direction = _round(direction, updates, params)
        # Zeros and not None: what applies the updates may not know None.
        return direction if params is None else _fill(direction, params, wide=self.lands), state

    def step(self, grads: PyTree, state: PyTree, params: PyTree, **extra: Any) -> tuple[PyTree, PyTree]:
        """One whole step: `update`, then `apply_updates`.

        To have it done in place, donate parameters and state to a jitted function that takes them in the order
        in which it returns them: JAX gives the memory of a donated array to the first result of its shape.

        Args:
          grads: The gradients: like `params` in structure and shapes. A None freezes what stands at its place.
          state: What `init` or the last step returned.
          params: The current parameters.
          **extra: As for `update`.

        Returns:
          The new parameters (first, as in the arguments of a training step), in the structure and dtypes of
          `params`, and the new state.

        Raises:
          TypeError, ValueError: The trees do not fit each other; the message names the path.
        """
        checks.given(params, grads, "step", "step(grads, state, params)")
        updates, state = self.update(grads, state, params, **extra)
        return apply_updates(params, updates), state

    def _step_narrow(
        self, grads: PyTree, state: PyTree, params: PyTree, narrow: Narrow, extra: Extra
    ) -> tuple[PyTree, PyTree, PyTree]:
        """One whole step, for a wrapper that lands half precision parameters.

        Args:
          grads, state: As for `step`, once they are checked.
          params: The parameters in float32, as this is to see them.
          narrow: The parameters themselves, and how they land.
          extra: As for `step`.

        Returns:
          The new parameters, what they cannot hold, and the new state.
        """
        updates, state = self._update(widened(grads), state, params, extra)
        return *narrow.land(updates), state

    def _init(self, params: PyTree) -> PyTree:
        """What `init` does once the parameters are checked."""
        return ()

    def _update(self, updates: PyTree, state: PyTree, params: PyTree | None, extra: Extra) -> tuple[PyTree, PyTree]:
        """What `update` does once the trees are checked.

        Takes and returns updates in any dtype; arithmetic is in float32 or wider, and only the end
        of the outermost `update` rounds to the dtype of the parameters.
        """
        raise NotImplementedError


class Leafwise(Transformation):
    """Base of the transformations that treat each leaf by itself.

    Those that follow each other in a chain are carried out together; see `_leafwise`.
    """

    def _plan(self, updates: PyTree, state: PyTree, params: PyTree | None) -> Plan:
        """What a step does; of the `updates` only structure and shapes are those that it will be given."""
        raise NotImplementedError

    def _update(self, updates: PyTree, state: PyTree, params: PyTree | None, extra: Extra) -> tuple[PyTree, PyTree]:
        updates, (state,) = carry_out([self._plan(updates, state, params)], updates, params)
        return updates, state


class Wrapper(Transformation):
    """Base of the transformations around another one: they land, hold and fuse as that does, or say otherwise."""

    inner: Any

    @property
    def lands(self) -> bool:  # type: ignore[override]
        return self.inner.lands

    @property
    def holds(self) -> bool:  # type: ignore[override]
        return self.inner.holds

    @property
    def fused(self) -> bool | str:  # type: ignore[override]
        return self.inner.fused

    def _wrap(self, name: str) -> None:
        """For `__post_init__` only: put `inner` in place as a transformation; `name` is the public function's."""
        self._replace_field("inner", as_transformation(self.inner, f"argument opt of {name}"))


@value
class Foreign(Transformation):
    """A transformation from elsewhere (any pair of `init` and `update`), as a member of a chain.

    Its hyperparameters live in closures, so all of it is static.
    """

    transform: Any = static_field()

    def _init(self, params: PyTree) -> PyTree:
        if trees.any_abstract(params):
            return placed_like(jax.eval_shape(self.transform.init, params), params)
        return self.transform.init(params)

    def _update(self, updates: PyTree, state: PyTree, params: PyTree | None, extra: Extra) -> tuple[PyTree, PyTree]:
        accepted = inspect.signature(self.transform.update).parameters
        if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values()):
            extra = {name: x for name, x in extra.items() if name in accepted}
        return self.transform.update(updates, state, params, **extra)

    def __repr__(self) -> str:
        return f"Foreign({name_of(self.transform.update)})"


@value
class Chain(Transformation):
    """Transformations one after another; the state is the tuple of theirs."""

    transforms: tuple[Transformation, ...]

    def __post_init__(self) -> None:
        for transform in self.transforms[:-1]:
            if transform.lands:
                raise ValueError(
                    f"{transform!r} must be the last of a chain: what comes after it would change where "
                    "the parameters land"
                )
            say_unfused(transform, "anywhere but at the end of a chain")

    @property
    def lands(self) -> bool:  # type: ignore[override]
        return bool(self.transforms) and self.transforms[-1].lands

    @property
    def fused(self) -> bool | str:  # type: ignore[override]
        return bool(self.transforms) and self.transforms[-1].fused

    @property
    def fuses_narrow(self) -> bool:  # type: ignore[override]
        return bool(self.transforms) and self.transforms[-1].fuses_narrow

    def _init(self, params: PyTree) -> PyTree:
        return tuple(t._init(params) for t in self.transforms)

    def _update(self, updates: PyTree, state: PyTree, params: PyTree | None, extra: Extra) -> tuple[PyTree, PyTree]:
        updates, plans, state = self._run(updates, state, params, extra)
        updates, last = carry_out(plans, updates, params)
        return updates, (*state, *last)

    def _run(
        self, grads: PyTree, state: PyTree, params: PyTree | None, extra: Extra
    ) -> tuple[PyTree, list[Plan], tuple[PyTree, ...]]:
        """The updates, what the last members are still to do to each leaf of them, and the new states of the others."""
        checks.members(state, len(self.transforms), "a chain")
        updates = grads
        states: list[PyTree] = []
        plans: list[Plan] = []
        for transform, part in zip(self.transforms, state, strict=True):
            if isinstance(transform, Leafwise):
                plans.append(transform._plan(updates, part, params))
                continue
            if plans:
                updates, done = carry_out(plans, updates, params)
                plans, states = [], [*states, *done]
            if isinstance(transform, Foreign) and updates is not grads:
                # Others keep their state in the dtype of what they are given: hand them that of
                # the parameters, not our wider intermediate one.
                updates = _round(updates, grads, params)
            updates, part = transform._update(updates, part, params, extra)
            states.append(part)
        return updates, plans, tuple(states)

    def step(self, grads: PyTree, state: PyTree, params: PyTree, **extra: Any) -> tuple[PyTree, PyTree]:
        """One whole step, the last member's own; see `Transformation.step`."""
        checks.given(params, grads, "step", "step(grads, state, params)")
        own = self.transforms and type(self.transforms[-1]).step is not Transformation.step
        if self.lands and not own:
            return super().step(grads, state, params, **extra)
        checks.updates(grads, params)
        if not own:
            updates, plans, states = self._run(grads, state, params, extra)
            params, (*last, _) = carry_out([*plans, Plan(_land_at, tuple)], updates, params, where_none=params)
            return params, (*states, *last)
        checks.members(state, len(self.transforms), "a chain")
        updates, first = self._before_last(grads, state, params, extra)
        params, last = self.transforms[-1].step(updates, state[-1], params, **extra)
        return params, (*first, last)

    def _step_narrow(
        self, grads: PyTree, state: PyTree, params: PyTree, narrow: Narrow, extra: Extra
    ) -> tuple[PyTree, PyTree, PyTree]:
        """One whole step, landed by the last member; see `Transformation._step_narrow`."""
        if not self.fuses_narrow:
            return super()._step_narrow(grads, state, params, narrow, extra)
        checks.members(state, len(self.transforms), "a chain")
        updates, first = self._before_last(widened(grads), state, params, extra)
        params, kept, last = self.transforms[-1]._step_narrow(updates, state[-1], params, narrow, extra)
        return params, kept, (*first, last)

    def _before_last(self, grads: PyTree, state: PyTree, params: PyTree, extra: Extra) -> tuple[PyTree, PyTree]:
        return Chain(self.transforms[:-1])._update(grads, state[:-1], params, extra)

    def __repr__(self) -> str:
        members = ", ".join(map(repr, self.transforms))
        return f"Chain(({members}{',' if len(self.transforms) == 1 else ''}))"


def chain(*transforms: Any) -> Chain:
    """Apply transformations one after another.

    Args:
      *transforms: Ours, optax's, or any object with `init` and `update`. None at all: the identity.

    Returns:
      A transformation whose state is the tuple of its members' states. Extra keyword arguments of
      `update` reach those members whose own `update` takes them.

    Raises:
      TypeError: An argument has no `init` and `update`.
      ValueError: One of `adamjax.rounding`'s wrappers is not the last.

    >>> import adamjax
    >>> adamjax.chain(adamjax.clip_by_global_norm(1.0), adamjax.scale_by_learning_rate(0.1))
    Chain((ClipByGlobalNorm(max_norm=1.0), ScaleByLearningRate(learning_rate=0.1)))
    """
    return Chain(tuple(as_transformation(t, f"argument {i} of chain") for i, t in enumerate(transforms)))


def as_transformation(x: Any, where: str) -> Transformation:
    """`x` as one of ours; `where` it stands is for the message if it has no `init` and `update`."""
    if isinstance(x, Transformation):
        return x
    if isinstance(x, type) or not (callable(getattr(x, "init", None)) and callable(getattr(x, "update", None))):
        hint = f": call it, {name_of(x)}(...)" if callable(x) else ""
        raise TypeError(f"{where} is {x!r}, expected a transformation with init and update{hint}")
    return Foreign(x)


def say_unfused(transform: Transformation, where: str) -> None:
    """Refuse what is to step in one pass over memory, `where` it cannot; or warn, if it is to where it can."""
    if transform.fused is True:
        raise ValueError(f"{transform!r} cannot step in one pass {where}: take fused=False, or 'auto'")
    if transform.fused:
        warnings.warn(f"fused='auto' leaves the step to XLA {where}", stacklevel=2)


def widened(tree: PyTree) -> PyTree:
    """The tree, in float32 where it is of half precision."""

    def widen(x: Any) -> Any:
        if not low_precision.is_narrow(trees.dtype_of(x)):
            return x
        if trees.is_abstract(x):
            return jax.ShapeDtypeStruct(x.shape, jnp.dtype(jnp.float32), sharding=x.sharding)
        return x.astype(jnp.float32)

    return jax.tree.map(widen, tree)


def apply_updates(params: PyTree, updates: PyTree) -> PyTree:
    """Add updates to parameters: `params + updates`, rounded once to the parameters' dtype.

    Args:
      params: The parameters.
      updates: What `update` returned: the structure and shapes of `params`. The sum is taken in
        float32 or wider. A None leaves what stands at its place as it is.

    Returns:
      The new parameters, with the structure, shapes and dtypes of `params`.

    Raises:
      TypeError, ValueError: The trees do not fit each other; the message names the path.

    >>> import adamjax, jax.numpy as jnp
    >>> adamjax.apply_updates({"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([0.5, -0.5])})
    {'w': Array([1.5, 1.5], dtype=float32)}
    """
    checks.given(params, updates, "apply_updates", "apply_updates(params, updates)")
    checks.updates(updates, params)
    structure, rows = trees.flatten(updates, params)
    return jax.tree.unflatten(structure, [p if u is None else _add(p, u) for u, p in rows])


@partial(jax.jit, inline=True)
def _add(p: Array, u: Array) -> Array:
    dtype = trees.compute_dtype(p.dtype, u.dtype)
    return (p.astype(dtype) + u.astype(dtype)).astype(p.dtype)


def _land_at(place: int, dtype: np.dtype, p: Any, kept: tuple[Any, ...]) -> Doing:
    return Doing(_land, None, dtype)


def _land(u: Array, p: Array, kept: Any, numbers: None) -> tuple[Array, Any]:
    """The parameter that comes of an update: rounded to its dtype and added."""
    return _add(p, u.astype(_rounded_dtype(u.dtype, p.dtype))), kept


def _round(updates: PyTree, grads: PyTree, params: PyTree | None) -> PyTree:
    """Round to the dtypes of the parameters, or of the gradients where those are not given."""

    def round_to(u: Any, x: Any) -> Any:
        return trees.cast(u, _rounded_dtype(trees.dtype_of(u), trees.dtype_of(x)))

    return trees.map_leaves(round_to, updates, grads if params is None else params)


def _rounded_dtype(update: np.dtype, target: np.dtype) -> np.dtype:
    # A complex parameter may have a real gradient, but no real update.
    is_complex = jnp.issubdtype(update, jnp.complexfloating)
    return trees.compute_dtype(target, jnp.dtype(jnp.complex64)) if is_complex else target


def _fill(updates: PyTree, params: PyTree, *, wide: bool) -> PyTree:
    """Zeros in place of None: in the dtypes of the parameters or, if `wide`, in float32 at least."""

    def zeros(p: Any) -> jax.Array:
        dtype = trees.dtype_of(p)
        # Not 0: added to a parameter that is -0, it would make it 0.
        return -trees.zeros_like(p, trees.compute_dtype(dtype) if wide else dtype)

    structure, rows = trees.flatten(updates, params)
    return jax.tree.unflatten(structure, [jax.tree.map(zeros, p) if u is None else u for u, p in rows])
