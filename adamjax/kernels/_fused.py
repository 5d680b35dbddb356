"""A chain that is Adam, stepped in one pass over memory."""

import warnings
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from adamjax import storage
from adamjax._core import checks, low_precision, trees
from adamjax._core.packing import PackedTree, replaced, rest_of
from adamjax._core.trees import PyTree
from adamjax._core.value import static_field, value
from adamjax._transforms.base import Chain, Extra, Transformation
from adamjax._transforms.moments import AdamState, dithers_of
from adamjax._transforms.packed import Packed
from adamjax._transforms.param_rounding import Narrow
from adamjax._transforms.weight_decay import Objective, ScaleByLearningRate, mask_tree
from adamjax.kernels import _backend, _cpu, _packed_call
from adamjax.kernels._backend import Form, Numbers

# Of arrays with fewer elements, XLA's step is as fast: a call has its price.
CROSSOVER = 16384


@value
class Fused(Chain):
    """The chain of `adam` or one of its kin, with a `step` that is one pass over memory, on a CPU or a GPU.

    `init`, `update` and the state are those of the chain; the numbers of `step`, too, but for the last digits.
    The steps of what is around it are made of it: of a chain that ends with it, `groups`, `skip_nonfinite`,
    `dynamic_loss_scale`, `zero1`, `offload`; on a CPU, also that of `stochastic_rounding`, `kahan` and
    `master_weights` around it, around a chain that ends with it, or around `groups`. What calls `update` and applies
    it, as optax's wrappers do, makes no such step.

    It goes wherever a step does: under `jax.jit` (donate parameters and state, and nothing is copied),
    `jax.lax.scan`, `jax.vmap` over states or hyperparameters, with arrays on many devices, each of which steps its
    part, and inside `jax.shard_map`; all axes of a mesh have to be in one mode. Derivatives are those of XLA's
    step. What a kernel steps are parameters of 16384 elements and more; XLA steps smaller ones as fast. Which
    kernel it is, `jax.default_backend()` says.

    On a CPU it is C++, compiled for this machine when it is first needed, which takes a few seconds and a C++
    compiler, and kept (`adamjax kernels status`). Parameters, gradients and moments may be float32, bfloat16 or
    float16, and moments quantised. Groups of `adamjax.packed` it steps as well, if there is one device, and no wrapper
    that rounds.

    On a GPU it is Pallas, for quantised moments: where they are floats, XLA's step is one pass as it is, and is taken.
    It needs jax 0.11 and a Hopper or later. Parameters and gradients may be float32 or bfloat16; a moment beside a
    quantised one is quantised or float32; blocks have a multiple of 64 numbers, and the last axis a multiple of
    those. Inside `jax.shard_map`, it needs ``check_vma=False``.

    A function with such a step in it can be exported by `jax.export` only if its check for custom calls is
    disabled, and then runs only where the same kernel is loaded.

    Fields:
      transforms: The members of the chain.
      mode: True: what cannot be stepped so is refused. "auto": it is left to XLA, after a warning.

    Raises:
      ValueError: Inside of another transformation, at its construction: that has no such step, and `mode` is True.
    """

    mode: Any = static_field(default=True, described=False)

    fuses_narrow = True
    # To a checkpoint: the state is the same.
    described_as = "Chain"

    @property
    def fused(self) -> bool | str:  # type: ignore[override]
        return self.mode

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, fused={self.mode!r})"

    def step(self, grads: PyTree, state: PyTree, params: PyTree, **extra: Any) -> tuple[PyTree, PyTree]:
        """One whole step; see `Transformation.step`."""
        checks.given(params, grads, "step", "step(grads, state, params)")
        checks.updates(grads, params)

        def plain(grads: PyTree) -> tuple[PyTree, PyTree, PyTree]:
            new_params, new_state = Chain.step(self, grads, state, params, **extra)
            return new_params, None, new_state

        new_params, _, new_state = self._step(grads, state, params, None, plain)
        return new_params, new_state

    def _step_narrow(
        self, grads: PyTree, state: PyTree, params: PyTree, narrow: Narrow, extra: Extra
    ) -> tuple[PyTree, PyTree, PyTree]:
        """One whole step, for a wrapper that lands parameters; see `Transformation._step_narrow`."""

        def plain(grads: PyTree) -> tuple[PyTree, PyTree, PyTree]:
            return Transformation._step_narrow(self, grads, state, params, narrow, extra)

        return self._step(grads, state, params, narrow, plain)

    def _step(
        self, grads: PyTree, state: PyTree, params: PyTree, narrow: Narrow | None, plain: Callable[[PyTree], Any]
    ) -> tuple[PyTree, PyTree, PyTree]:
        """The new parameters, what they cannot hold, and the new state; `plain` steps what no kernel does."""
        checks.members(state, len(self.transforms), "a chain")
        moments = self._moments.checked(grads, state[0])
        rests = map(rest_of, (moments.mu, moments.nu, moments.nu_max))
        own, kept = (params, None) if narrow is None else (narrow.params, narrow.kept)
        structure, rows = trees.flatten(grads, own, *rests, kept, *self._masks(params))
        paths = [path for path, _ in jax.tree.leaves_with_path(grads, is_leaf=trees.is_none)]
        leaves = [i for i, row in enumerate(rows) if self.takes(paths[i], row[0], row[1:6], narrow is not None)]
        groups = self._groups(moments, rows, paths) if narrow is None else {}
        taken = {*leaves, *(i for members in groups.values() for i in members)}
        # XLA steps the others, for which these are frozen, and all counts.
        others = [None if i in taken else row[0] for i, row in enumerate(rows)]
        new_params, new_kept, new_state = plain(jax.tree.unflatten(structure, others))
        if not taken:
            return new_params, new_kept, new_state
        count, *new = new_state[0]
        numbers_of = cache(partial(self._numbers, state, count))
        _, stepped = trees.flatten(grads, new_params, *map(rest_of, new), new_kept)
        for i in leaves:
            g, p, m, v, v_max, lacks, *masks = rows[i]
            storage.check(m, v, v_max)
            form, numbers = numbers_of(_takers(masks))
            dithers: _backend.Dithers = dithers_of(count, i, m, v)
            if narrow is not None and _is_narrow(p):
                form, dithers = form._replace(landing=narrow.landing), (*dithers, narrow.dither(i))
            stepped[i] = (g, *_backend.step(_engine().KERNEL, form, (p, m, v, v_max, lacks), g, numbers, dithers))
        of_groups: dict[int, _packed_call.Moments] = {}
        for k, members in groups.items():
            form, numbers = numbers_of(_takers(rows[members[0]][6:]))
            m, v, v_max = (None if tree is None else tree.groups[k] for tree in new)
            dithers = dithers_of(count, len(rows) + k, m, v)
            arrays = [rows[i][1] for i in members], (m, v, v_max), [rows[i][0] for i in members]
            group, of_groups[k] = _packed_call.step(form, *arrays, numbers, dithers)
            for i, p in zip(members, group, strict=True):
                stepped[i] = (rows[i][0], p, None, None, None, None)
        _, new_params, *columns, new_kept = trees.unflatten(structure, stepped, 6)
        packed_again = [
            replaced(tree, rest, {k: moments[j] for k, moments in of_groups.items()})
            for j, (tree, rest) in enumerate(zip(new, columns, strict=True))
        ]
        return new_params, None if kept is None else new_kept, (AdamState(count, *packed_again), *new_state[1:])

    def _groups(self, moments: AdamState, rows: list[tuple[Any, ...]], paths: list[Any]) -> dict[int, list[int]]:
        """The groups of small parameters that the kernel steps, with the numbers of those."""
        found: dict[int, list[int]] = {}
        grads = [g for g, *_ in rows if g is not None]
        if _engine() is not _cpu or not _backend.is_on_one_device(
            grads
        ):  # where a parameter is, XLA sees, and not this
            return found
        for k, places in enumerate(moments.mu.layout if isinstance(moments.mu, PackedTree) else ()):
            members = [number for number, _ in places]
            alike = len({_takers(rows[i][6:]) for i in members}) == 1
            if alike and all(rows[i][0] is not None for i in members):
                kept = moments.mu.groups[k], moments.nu.groups[k], None, None
                if all(self._can(paths[i], _cpu.why_not((rows[i][1], *kept), rows[i][0])) for i in members):
                    found[k] = members
        return found

    @property
    def _moments(self) -> Any:
        """What keeps the moments, without the objective that it may be given."""
        first = self.transforms[0]
        return first.inner if isinstance(first, Objective) else first

    @property
    def _adam(self) -> Any:
        """The same, not packed."""
        return self._moments.inner if isinstance(self._moments, Packed) else self._moments

    def _masks(self, params: PyTree) -> list[PyTree]:
        """For each member, which parameters it takes; None for all."""
        masks = [getattr(transform, "mask", None) for transform in self.transforms]
        return [None if mask is None else mask_tree(mask, params) for mask in masks]

    def _numbers(self, state: PyTree, count: Array, takes: tuple[bool, ...]) -> tuple[Form, Numbers]:
        """The form and the numbers of this step, for the parameters that these members take."""
        scalar = partial(checks.scalar, dtype=jnp.dtype(jnp.float32))
        first = self.transforms[0]
        sign, coupled, is_coupled = 1.0, jnp.float32(0), False
        if isinstance(first, Objective):
            sign, weight_decay, is_coupled = -1.0 if first.maximize else 1.0, first.weight_decay, takes[0]
            if callable(weight_decay):
                weight_decay = weight_decay(state[0].count)
            coupled = scalar("weight_decay", weight_decay)
        rate, decay, decays = jnp.float32(1), jnp.float32(0), False
        transform: Any
        for transform, part, takes_it in zip(self.transforms[1:], state[1:], takes[1:], strict=True):
            number, _ = transform._advance(part)
            factor = -1 if transform.flip_sign else 1
            if isinstance(transform, ScaleByLearningRate):
                by = factor * scalar("learning_rate", number)
                rate, decay = rate * by, decay * by
            elif takes_it:
                decay, decays = decay + factor * scalar("weight_decay", number), True
        form = Form(self._adam.nesterov, self._adam.amsgrad, is_coupled, decays)
        numbers = (self._adam._scalars(count.astype(jnp.float32)), jnp.float32(sign), coupled, rate, decay)
        return form, Numbers(*numbers)

    def takes(self, path: Any, g: Any, leaf: Any, lands: bool = False) -> bool:
        """Whether the kernel steps a parameter by itself, or XLA does.

        Args:
          path: Where it is.
          g: Its gradient, or None.
          leaf: The parameter, its moments (mu, nu, nu_max) and what it cannot hold.
          lands: Whether a wrapper says how a half precision parameter lands.

        Raises:
          ValueError: The kernel cannot, and `mode` is True.
        """
        p, m, *_ = leaf
        if g is None or m is None or np.size(p) < CROSSOVER:
            return False
        if (engine := _engine()) is None:
            return self._can(path, f"on {jax.default_backend()} there is no kernel")
        if not engine.gains(leaf):
            return False
        if lands and _is_narrow(p) and engine is not _cpu:
            return self._can(path, "the kernel of this platform does not round as the wrapper around it does")
        return self._can(path, _backend.why_not_here(g) or engine.why_not(leaf, g))

    def _can(self, path: Any, why: str | None) -> bool:
        """Whether the kernel can step a parameter, by the reason `why` it cannot; an error where it has to."""
        if why is None:
            return True
        if self.mode is True:
            raise ValueError(
                f"fused=True cannot step params{jax.tree_util.keystr(path)}: {why}. Take fused=False, or "
                "fused='auto', which leaves to XLA what it has to"
            )
        _say_once(f"fused='auto' leaves params{jax.tree_util.keystr(path)} to XLA: {why}")
        return False


def _is_narrow(p: Any) -> bool:
    return low_precision.is_narrow(trees.dtype_of(p))


def _takers(masks: list[Any] | tuple[Any, ...]) -> tuple[bool, ...]:
    """Which members of the chain take a parameter."""
    return tuple(mask is not False for mask in masks)


def _engine() -> Any:
    """The module that has the kernel of this platform, if one has."""
    if (backend := jax.default_backend()) == "gpu":
        from adamjax.kernels import _pallas  # and with it Pallas, which takes its time to import

        return _pallas
    return _cpu if backend == "cpu" else None


@cache
def _say_once(what: str) -> None:
    warnings.warn(what, stacklevel=2)
