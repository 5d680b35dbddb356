"""Transformations that treat each parameter as if there were no other."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from adamjax._core import checks, trees
from adamjax._core.trees import Leaves
from adamjax._core.typing import PyTree
from adamjax._core.value import value
from adamjax._transforms.base import Leafwise
from adamjax._transforms.leafwise import LeafFunction, LeafOp, LeafTransform


@value
class PerParameter(Leafwise):
    """`inner` on each parameter by itself, as torch.optim does it.

    The state is a tree like the parameters, with a state of `inner` in place of each. A parameter whose gradient is
    None falls behind. A complex parameter is an array of real and imaginary parts, along a last axis of 2.
    """

    inner: Leafwise

    def _init(self, params: PyTree) -> PyTree:
        return trees.map_leaves(lambda p: self.inner._init(_real_and_imag(p)), params)

    def _leaf_transforms(self, updates: Leaves, state: PyTree, params: Leaves | None) -> list[LeafTransform]:
        column = checks.nodes_at(updates, state)
        ps = [None] * len(column) if params is None else params.leaves
        rows = zip(updates.leaves, column, ps, strict=True)
        steps = [None if g is None else self._transforms_of_one(g, s, p) for g, s, p in rows]
        # The last transform of a parameter makes its new state; the others have none.
        leaf_states = [() if step is None else (step[-1].leaf_states or ((),))[0] for step in steps]
        return [StepPerParameter(steps, updates, column, leaf_states)]

    def _transforms_of_one(self, g: Any, state: PyTree, p: Any) -> list[LeafTransform]:
        if isinstance(state, Mapping):
            # flax's nnx.Optimizer takes apart what stands in place of a parameter.
            found = trees.unflatten_by_path(state, self.inner._init(_real_and_imag(trees.abstract_like(g))))
            state = state if found is None else found
        if jnp.iscomplexobj(whole := g if p is None else p):
            g = _real_and_imag(trees.abstract_like(whole))
            p = None if p is None else g
        return self.inner._leaf_transforms(Leaves.of(g), state, None if p is None else Leaves.of(p))


@dataclass(frozen=True)
class StepPerParameter(LeafTransform):
    """The steps of all parameters, each with the transforms of one."""

    steps: list[list[LeafTransform] | None]  # None where a parameter is frozen
    updates: Leaves  # for their structure
    states: list[Any]  # before the step
    leaf_states: Sequence[Any]

    def ops_for(self, index: int, dtype: np.dtype, p: Any) -> Sequence[LeafOp]:
        """The operations of one parameter; on real and imaginary parts, where it is complex."""
        whole = dtype if p is None else trees.dtype_of(p)
        if is_complex := jnp.issubdtype(whole, np.complexfloating):
            dtype = trees.real_dtype(whole)
            p = None if p is None else _real_and_imag(trees.abstract_like(p))
        ops: list[LeafOp] = []
        for transform in self.steps[index] or ():
            for op in transform.ops_for(0, dtype, p):
                ops.append(op)
                dtype = op.dtype
        if not is_complex:
            return ops
        together = OnRealAndImag(tuple([op.function for op in ops]))
        return [LeafOp(together, [op.operands for op in ops], trees.compute_dtype(dtype, jnp.dtype(jnp.complex64)))]

    def new_state(self, leaf_states: list[Any]) -> PyTree:
        rows = zip(self.steps, self.states, leaf_states, strict=True)
        return self.updates.like([s if step is None else step[-1].new_state([new]) for step, s, new in rows]).tree


@dataclass(frozen=True)
class OnRealAndImag:
    """A `LeafFunction`: other ones, on the real and imaginary parts of a complex update and parameter."""

    functions: tuple[LeafFunction, ...]

    def __call__(self, u: Array, p: Any, state: Any, operands: list[Any]) -> tuple[Array, Any]:
        u = _real_and_imag(u if p is None else trees.cast(u, p.dtype))
        p = None if p is None else _real_and_imag(p)
        for function, operand in zip(self.functions, operands, strict=True):
            u, state = function(u, p, state, operand)
        return jax.lax.complex(u[..., 0], u[..., 1]), state


def _real_and_imag(x: Any) -> Any:
    """A complex array as a real one of its parts; a real one as it is."""
    if not jnp.iscomplexobj(x):
        return x
    if trees.is_abstract(x):
        return jax.ShapeDtypeStruct((*x.shape, 2), trees.real_dtype(x.dtype))
    x = jnp.asarray(x)
    return jnp.stack([x.real, x.imag], axis=-1)
