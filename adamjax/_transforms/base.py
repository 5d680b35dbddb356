"""The base of every transformation: a value with `init`, `update` and `step`."""

import inspect
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np

from adamjax._core import checks, trees
from adamjax._core.optional import presented_class
from adamjax._core.ownership import with_param_shardings
from adamjax._core.trees import Leaves
from adamjax._core.typing import Extra, GradientTransformation, PyTree
from adamjax._core.value import Value, name_of, static_field, value
from adamjax._transforms.delivery import AddToParam, AsUpdate, Delivery, deliver
from adamjax._transforms.leafwise import LeafTransform, run_leafwise


class StepContext(NamedTuple):
    """The rest of a step's arguments."""

    params: Leaves | None  # the parameters as a transformation sees them
    extra: Extra  # the keyword arguments of `update`
    delivery: Delivery | None  # the last operation on each leaf; None to hand the updates to the next transformation
    # The first operation on each leaf, which those that have `takes_first` make part of their leaf program.
    first: LeafTransform | None = None


# A step's results (None where a leaf is frozen), the new leaf states of its delivery, and the new state.
Result = tuple[Leaves, list[Any], PyTree]


class Transformation(Value):
    """A gradient transformation: a pure `init`/`update` pair that is also a value.

    Its fields are its hyperparameters and the leaves of a pytree: it can be passed to a jitted
    function (changing a hyperparameter then compiles nothing), stacked by `jax.vmap`,
    differentiated, compared, hashed and pickled. It unpacks into `init, update` and goes wherever
    optax takes a transformation: where optax is imported, it is an instance of
    `optax.GradientTransformationExtraArgs`.
    """

    unscales_gradients: ClassVar[bool] = False  # whether it expects the gradients of a scaled loss
    takes_first: ClassVar[bool] = False  # whether `_run` does the `first` operation of its context
    # Whether its state belongs to the parameters that its result leads to, so that nothing may change that afterwards.
    leads_to_params: ClassVar[bool] = False

    @property  # type: ignore[misc]
    def __class__(self) -> type[Any]:
        """The class that `isinstance` asks for, after the type itself."""
        return presented_class(type(self))

    def __reduce__(self) -> tuple[Any, ...]:
        # pickle's own way compares the type with `__class__`.
        return _empty, (type(self),), self.__getstate__()

    def __iter__(self) -> Iterator[Callable[..., Any]]:
        return iter((self.init, self.update))

    def init(self, params: PyTree) -> PyTree:
        """Make the state before the first step.

        Args:
          params: A pytree of floating point or complex arrays; None is an absent parameter. For
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
          updates: The gradients, or the updates of the transformation before this one: like
            `params` in structure and shapes. A None freezes the parameter at its place.
          state: The state that `init` or the last `update` returned.
          params: The current parameters. Only weight decay needs them, but see Returns.
          **extra: Passed on to the members of a chain that take them, ignored by the others.

        Returns:
          The updates, ready for `apply_updates`, and the new state. With `params` the updates have
          their structure and dtypes (zeros where the gradient is None; of `adamjax.rounding`'s
          wrappers, float32 for half precision parameters); without, those of the gradients (complex
          ones where the moments are). The state keeps its structure, shapes, dtypes and shardings.

        Raises:
          TypeError, ValueError: The trees do not fit each other; the message names the path.
        """
        grads, given = checks.updates(updates, params)
        leaves = None if given is None else _params_only(grads, given)
        delivery = AsUpdate((grads if leaves is None else leaves).leaves)
        found, state = self._run_restored(grads, state, StepContext(leaves, extra, delivery))
        if given is not None and any(u is None for u in found.leaves):
            # Zeros instead of None: optax.apply_updates and others do not accept None.
            wide, pairs = rounds_params(self), zip(found.leaves, given.leaves, strict=True)
            found = found.like([_minus_zeros(p, wide) if u is None else u for u, p in pairs])
        return found.tree, state

    def step(self, grads: PyTree, state: PyTree, params: PyTree, **extra: Any) -> tuple[PyTree, PyTree]:
        """Make one whole step: `update`, then `apply_updates`, in one pass.

        To step in place, donate parameters and state to a function that takes them in this order, as
        `adamjax.training.step_fn` does. JAX gives the memory of a donated array to the first result of its shape, so
        `jax.jit(opt.step, donate_argnums=(1, 2))`, which takes the state first, copies every array: 5 to 9 times the
        time, and twice the parameters' memory in temporaries. Called by name,
        `jax.jit(opt.step, donate_argnames=("params", "state"))(grads=..., state=..., params=...)` is right.

        Args:
          grads: The gradients: like `params` in structure and shapes. A None freezes the parameter at its place.
          state: The state that `init` or the last step returned.
          params: The current parameters.
          **extra: As for `update`.

        Returns:
          The new parameters (first, as in the arguments of a training step), in the structure and dtypes of
          `params`, and the new state.

        Raises:
          TypeError, ValueError: The trees do not fit each other; the message names the path.
        """
        checks.params_given(params, grads, "step", "step(grads, state, params)")
        updates, given = checks.updates(grads, params)
        given = given or updates  # without parameters, there are no gradients
        context = StepContext(_params_only(updates, given), extra, AddToParam())
        found, state = self._run_restored(updates, state, context)
        pairs = zip(found.leaves, given.leaves, strict=True)
        return found.like([p if new is None else new for new, p in pairs]).tree, state

    def _init(self, params: PyTree) -> PyTree:
        """Make the state; `params` are checked."""
        return ()

    def _run_restored(self, updates: Leaves, state: PyTree, context: StepContext) -> tuple[Leaves, PyTree]:
        """Run one step, with a state that may come from a file: of NumPy's arrays, in lists or mappings."""
        state = checks.as_arrays(state)
        try:
            found, _, new = self._run(updates, state, context)
        except (TypeError, ValueError):
            restored = self._in_own_nodes(state, (context.params or updates).tree)
            structure: Any = jax.tree.structure(restored)
            if structure == jax.tree.structure(state):
                raise
            found, _, new = self._run(updates, restored, context)
        return found, new

    def _in_own_nodes(self, state: PyTree, params: PyTree) -> PyTree:
        """Return `state` in the nodes that `init` makes; as it is if it does not fit them."""
        try:
            return trees.in_nodes_of(self._init(jax.tree.map(_abstract, params)), state)
        except (TypeError, ValueError):
            return state

    def _run(self, updates: Leaves, state: PyTree, context: StepContext) -> Result:
        """Run one step, the only way through it: `update`, `step` and the wrappers differ by the delivery.

        The `updates` fit the parameters, in any dtype; None is a frozen leaf. The `state` is not checked yet.
        """
        params, extra, delivery, _ = context
        new, state = self._update(updates.tree, state, None if params is None else params.tree, extra)
        return *deliver(updates.like(updates.column(new)), params, delivery), state

    def _update(self, updates: PyTree, state: PyTree, params: PyTree | None, extra: Extra) -> tuple[PyTree, PyTree]:
        """Transform whole trees, of a transformation that is neither leafwise nor made of others.

        Updates come and go in any dtype; arithmetic is in float32 or wider, and only the delivery rounds.
        """
        raise NotImplementedError

    def _delivered_by(self) -> tuple["Transformation", ...]:
        """The transformations inside this one whose steps deliver its result."""
        return ()

    def _learning_rate(self, state: PyTree) -> Any:
        """The learning rate of the next step: see `learning_rate_of`. None if there is none."""
        return None


def _empty(cls: type[Transformation]) -> Transformation:
    """Make a transformation without fields, which unpickling fills."""
    return cls.__new__(cls)


class Leafwise(Transformation):
    """Base of the transformations that treat each leaf by itself.

    Those that follow each other in a chain run together, as one leaf program.
    """

    takes_first: ClassVar[bool] = True
    # Whether `_leaf_transforms` depends on the numbers of the updates, and not on their structure and shapes only.
    reads_updates: ClassVar[bool] = False
    may_pack: ClassVar[bool] = False  # whether its leaf transforms may have a layout

    def _leaf_transforms(self, updates: Leaves, state: PyTree, params: Leaves | None) -> list[LeafTransform]:
        """Plan a step of each leaf; the last transform makes the new state.

        Unless it `reads_updates`, only structure and shapes of the `updates` are those that the step will be given.
        """
        raise NotImplementedError

    def _run(self, updates: Leaves, state: PyTree, context: StepContext) -> Result:
        params, _, delivery, first = context
        if first is not None and self.reads_updates:
            updates, first = apply_first(first, updates), None
        transforms = [*([] if first is None else [first]), *self._leaf_transforms(updates, state, params)]
        new, states = run_leafwise([*transforms, *([] if delivery is None else [delivery])], updates, params)
        return new, states[-1], transforms[-1].new_state(states[len(transforms) - 1])


def run_inside(opt: Transformation, updates: Leaves, state: PyTree, context: StepContext) -> Result:
    """Run one step of a transformation inside another one."""
    if context.first is not None and not opt.takes_first:
        updates, context = apply_first(context.first, updates), context._replace(first=None)
    return opt._run(updates, state, context)


def apply_first(first: LeafTransform, updates: Leaves) -> Leaves:
    """The updates after the first operation of a step."""
    found, _ = run_leafwise([first], updates, None)
    return found


class Wrapper(Transformation):
    """Base of the transformations around another one."""

    has_own_state: ClassVar[bool] = True  # whether its state has that of `inner` in a field; else it is that of `inner`

    inner: Any

    def _wrap(self, name: str) -> None:
        """For `__post_init__` only: put `inner` in place as a transformation; `name` is the public function's."""
        self._replace_field("inner", as_transformation(self.inner, f"argument opt of {name}"))

    def _delivered_by(self) -> tuple[Transformation, ...]:
        return (self.inner,)

    def _learning_rate(self, state: PyTree) -> Any:
        return self.inner._learning_rate(checks.inner_state(state, self) if self.has_own_state else state)


class RoundsParams(Wrapper):
    """Base of the wrappers that round parameters: their updates are exact, and nothing may change them afterwards."""

    leads_to_params: ClassVar[bool] = True


class StepsParts(Wrapper):
    """Base of the wrappers by which each device steps a part of the parameters.

    A wrapper around them that rounds parameters keeps its own state whole, and delivers outside of them.
    """

    def _run_parts(
        self, parts: tuple[Leaves, Leaves], state: PyTree, context: StepContext, gather: Callable[[Leaves], Leaves]
    ) -> Result:
        """Run a step on the parts of updates and parameters; `gather` makes its results whole."""
        delivery, (updates, params) = context.delivery, parts
        rounds = delivery is not None and delivery.leaf_states is not None
        inside = context._replace(params=params, delivery=None if rounds else delivery)
        found, delivered, state = self.inner._run(updates, state, inside)
        found = gather(found)
        if rounds:
            found, delivered = deliver(found, context.params, delivery)
        return found, delivered, state


class AveragesParams(Wrapper):
    """Base of the wrappers that keep an average of the parameters that the result leads to."""

    leads_to_params: ClassVar[bool] = True


class MaySkip(Wrapper):
    """Base of the wrappers that may skip a step as a whole: a wrapper that counts steps must not go around them."""


def delivering(opt: Transformation) -> Iterator[Transformation]:
    """Yield `opt` and all transformations inside it that deliver its result: of a chain, the last."""
    yield opt
    for inner in opt._delivered_by():
        yield from delivering(inner)


def rounds_params(opt: Transformation) -> bool:
    """Return whether `opt` rounds parameters: whether its result is delivered by a wrapper that does."""
    return any(isinstance(t, RoundsParams) for t in delivering(opt))


def averages_params(opt: Transformation) -> bool:
    """Return whether `opt` averages parameters: whether its result is delivered by a wrapper that does."""
    return any(isinstance(t, AveragesParams) for t in delivering(opt))


def must_be_last(opt: Transformation) -> bool:
    """Return whether nothing may change the result of `opt` afterwards, because of the parameters it leads to."""
    return any(t.leads_to_params for t in delivering(opt))


def may_skip(opt: Transformation) -> bool:
    """Return whether `opt`, or a transformation that it wraps, may skip a step as a whole."""
    return isinstance(opt, MaySkip) or (isinstance(opt, Wrapper) and may_skip(opt.inner))


def contains_foreign(opt: Transformation) -> bool:
    """Return whether `opt` is a transformation from outside of this package, or has one anywhere inside."""
    if issubclass(type(opt), Foreign) or not type(opt).__module__.startswith("adamjax."):
        return True
    for field in vars(opt).values():
        for x in field if isinstance(field, tuple) else (field,):
            if isinstance(x, Transformation) and contains_foreign(x):
                return True
    return False


@value
class Foreign(Transformation):
    """A transformation from elsewhere (any pair of `init` and `update`), as a member of a chain.

    Its hyperparameters live in closures, so all of it is static.
    """

    transform: GradientTransformation = static_field()

    def _init(self, params: PyTree) -> PyTree:
        if trees.any_abstract(params):
            return with_param_shardings(jax.eval_shape(self.transform.init, params), params)
        return self.transform.init(params)

    @cached_property
    def _accepted(self) -> set[str] | None:
        """The keyword arguments that `update` takes; None for all."""
        found = inspect.signature(self.transform.update).parameters
        return None if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in found.values()) else set(found)

    def _update(self, updates: PyTree, state: PyTree, params: PyTree | None, extra: Extra) -> tuple[PyTree, PyTree]:
        accepted = self._accepted
        taken = {name: x for name, x in extra.items() if accepted is None or name in accepted}
        # Ours take NumPy's arrays; others would compute with them in another way than with JAX's.
        updates, params = checks.as_arrays(updates), checks.as_arrays(params)
        return self.transform.update(updates, state, params, **taken)

    def __repr__(self) -> str:
        return f"Foreign({name_of(self.transform.update)})"


def as_transformation(x: object, where: str) -> Transformation:
    """Return `x` as one of ours; the message of an error says that it stands at `where`."""
    if isinstance(x, Transformation):
        return x
    if isinstance(x, type) or not (callable(getattr(x, "init", None)) and callable(getattr(x, "update", None))):
        hint = f": call it, {name_of(x)}(...)" if callable(x) else ""
        raise TypeError(f"{where} is {checks.shown(x)}, expected a transformation with init and update{hint}")
    return Foreign(x)  # type: ignore[arg-type]


def _minus_zeros(p: Any, wide: bool) -> Any:
    """The update of a frozen parameter. Adding 0 would turn a parameter that is -0 into 0; adding -0 does not.

    A Python number stays one. Functions, strings and others that are no numbers have no update.
    """

    def of_leaf(x: Any) -> Any:
        if isinstance(x, float | complex) and not isinstance(x, np.generic):
            return -0.0 if isinstance(x, float) else complex(-0.0, -0.0)
        if not (hasattr(x, "dtype") and checks.is_number_dtype(x.dtype)):
            return None
        dtype: np.dtype = trees.dtype_of(x)
        return -trees.zeros_like(x, trees.compute_dtype(dtype) if wide and checks.is_param(x) else dtype)

    return jax.tree.map(of_leaf, p)


def _params_only(grads: Leaves, params: Leaves) -> Leaves:
    """Return `params` with None in place of all that has no gradient and is no array that could have one.

    Models hold functions, strings and numbers, too.
    """
    if not grads.has_none:
        return params

    def of_leaf(x: Any) -> Any:
        return x if hasattr(x, "dtype") and checks.is_param(x) else None

    pairs = zip(grads.leaves, params.leaves, strict=True)
    return params.like([jax.tree.map(of_leaf, p) if g is None else p for g, p in pairs])


def _abstract(p: Any) -> jax.ShapeDtypeStruct:
    """Return the type of a parameter, with its sharding as far as it is known."""
    sharding = None if isinstance(p, jax.core.Tracer) else getattr(p, "sharding", None)
    return jax.ShapeDtypeStruct(np.shape(p), trees.dtype_of(p), sharding=sharding)
