"""The words of the adversary's programs: its printed programs begin with this file."""

import pickle
import tempfile
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import adamjax
from adamjax import interop

__all__ = ["NamedSharding", "OrderedDict", "P", "interop", "optax", "pickle", "tempfile"]  # for the programs


class Pair(NamedTuple):
    first: Any
    second: Any


@jax.tree_util.register_dataclass
@dataclass
class Model:
    kernel: Any
    bias: Any


def array(kind, seed, scale, shape, dtype):
    """Normal numbers times a scale; or ones, spread over eight decades, one a million times larger, one NaN."""
    rng = np.random.default_rng(seed)
    x = np.asarray(rng.normal(size=shape) + (1j * rng.normal(size=shape) if dtype == "complex64" else 0))
    first = np.arange(x.size).reshape(shape) == 0
    if kind == "ones":
        x = np.ones(shape)
    if kind == "spread":
        x = x * 10.0 ** rng.uniform(-4, 4, shape)
    if kind == "spike":
        x = np.where(first, 1e6, x)
    if kind == "nan":
        x = np.where(first, np.nan, x)
    x = x * scale
    return jnp.asarray(np.clip(x, -6e4, 6e4) if dtype == "float16" else x, dtype)


def step(opt, grads, state, params):
    return opt.step(grads, state, params)


static_step = jax.jit(step, static_argnums=0)
traced_step = jax.jit(step)
donated_step = jax.jit(
    lambda opt, params, state, grads: opt.step(grads, state, params), static_argnums=0, donate_argnums=(1, 2)
)


@jax.jit
def update(opt, grads, state, params):
    updates, state = opt.update(grads, state, params)
    return adamjax.apply_updates(params, updates), state


def optax_update(opt, grads, state, params):
    updates, state = opt.update(grads, state, params)
    with jax.numpy_dtype_promotion("standard"):  # as optax needs it
        return optax.apply_updates(params, updates), state


def scan(opt, grads, state, params):
    """One step for each tree of gradients."""

    def body(carry, grads):
        return opt.step(grads, carry[1], carry[0]), None

    many = jax.tree.map(lambda *x: jnp.stack(x), *grads)
    return jax.jit(lambda carry, many: jax.lax.scan(body, carry, many)[0])((params, state), many)


def vmap(make, rates, grads, state, params):
    """A step for each learning rate; the last one counts."""
    found = jax.vmap(lambda rate: make(rate).step(grads, state, params))(jnp.asarray(rates))
    return jax.tree.map(lambda x: x[-1], found)


def mesh_of(count):
    return jax.make_mesh((count,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


def placed(params, mesh):
    """The parameters on a mesh: by rows where they have enough of them."""

    def of_leaf(p):
        rows = p.shape[0] if p.ndim and p.size else 1
        return jax.device_put(p, NamedSharding(mesh, P("data") if rows % mesh.size == 0 else P()))

    return jax.tree.map(of_leaf, params)
