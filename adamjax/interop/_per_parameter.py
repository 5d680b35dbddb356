"""Transformations that treat each parameter as if there were no other."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from adamjax._core import checks, trees
from adamjax._core.trees import PyTree
from adamjax._core.value import value
from adamjax._transforms.base import Chain, Extra, Transformation
from adamjax.kernels import Fused


@value
class PerParameter(Transformation):
    """`inner` on each parameter by itself, as torch.optim does it.

    The state is a tree like the parameters, with a state of `inner` in place of each: each has its own
    step count, and a parameter whose gradient is None falls behind. A complex parameter is an array
    of real and imaginary parts, along a last axis of 2.
    """

    inner: Transformation

    def _init(self, params: PyTree) -> PyTree:
        return trees.map_leaves(lambda p: self.inner._init(_parts(p)), params)

    def _update(self, updates: PyTree, state: PyTree, params: PyTree | None, extra: Extra) -> tuple[PyTree, PyTree]:
        checks.states(state, updates)
        structure, rows = trees.flatten(updates, state, params)
        results = [(None, s) if g is None else self._step(g, self._revived(s, g), p, extra) for g, s, p in rows]
        direction, state = trees.unflatten(structure, results, 2)
        return direction, state

    def _revived(self, state: PyTree, g: Any) -> PyTree:
        """`state` itself, where there is a mapping of its fields: flax's nnx.Optimizer takes apart what is in place
        of a parameter.
        """
        if not isinstance(state, Mapping):
            return state
        found = trees.put_together(state, self.inner._init(_parts(trees.shapes_of(g))))
        return state if found is None else found

    def _step(self, g: Any, state: PyTree, p: Any, extra: Extra) -> tuple[Array, PyTree]:
        whole = g if p is None else p
        if not jnp.iscomplexobj(whole):
            return self.inner._update(g, state, p, extra)
        g = trees.cast(g, trees.dtype_of(whole))
        direction, state = self.inner._update(_parts(g), state, None if p is None else _parts(p), extra)
        return jax.lax.complex(direction[..., 0], direction[..., 1]), state


@value
class FusedPerParameter(Fused):
    """A chain that begins with a `PerParameter`, whose `step` is one pass over memory; see `kernels.Fused`."""

    fuses_narrow = False

    def step(self, grads: PyTree, state: PyTree, params: PyTree, **extra: Any) -> tuple[PyTree, PyTree]:
        """One whole step; see `Transformation.step`."""
        checks.given(params, grads, "step", "step(grads, state, params)")
        checks.updates(grads, params)
        checks.members(state, len(self.transforms), "a chain")
        own, *shared = state
        checks.states(own, grads)
        first: Any
        first, *others = self.transforms
        of_one = Fused((first.inner, *others), self.mode)
        structure, rows = trees.flatten(grads, own, params)
        paths = [path for path, _ in jax.tree.leaves_with_path(grads, is_leaf=trees.is_none)]
        taken = [
            g is not None and of_one.takes(path, g, (p, s.mu, s.nu, s.nu_max, None))
            for path, (g, s, p) in zip(paths, rows, strict=True)
        ]
        left = [None if takes else g for (g, *_), takes in zip(rows, taken, strict=True)]
        new_params, new_state = Chain.step(self, jax.tree.unflatten(structure, left), state, params, **extra)
        new_own, *new_shared = new_state
        _, stepped = trees.flatten(grads, new_params, new_own)
        for i, (g, s, p) in enumerate(rows):
            if taken[i]:
                p, (s, *_) = of_one.step(g, (s, *shared), p)
                stepped[i] = (g, p, s)
        _, new_params, new_own = trees.unflatten(structure, stepped, 3)
        return new_params, (new_own, *new_shared)


def _parts(x: Any) -> Any:
    """A complex array as a real one of its parts; a real one as it is."""
    if not jnp.iscomplexobj(x):
        return x
    if trees.is_abstract(x):
        return jax.ShapeDtypeStruct((*x.shape, 2), trees.real_dtype(x.dtype))
    x = jnp.asarray(x)
    return jnp.stack([x.real, x.imag], axis=-1)
