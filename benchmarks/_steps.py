"""AdamW of each library, and in each format, as steps that can be timed or looked at."""

import importlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import adamjax
from benchmarks._measure import TRIAD_BYTES, Run, cores

LR, DECAY = 1e-3, 1e-2
INT8, INT4 = adamjax.quantized("int8"), adamjax.quantized("int4")

Shapes = Sequence[tuple[int, ...]]
Make = Callable[[], Any]  # of an optimizer


class Step(NamedTuple):
    """A step that can be run again and again.

    Fields:
      run: It.
      limit: The bytes that it must read (parameters, gradients, state) and write (parameters, state), over those
        of the triad.
    """

    run: Run
    limit: float


def adamw(mu: Any = None, nu: Any = None, fused: bool = False) -> Any:
    return adamjax.adamw(LR, weight_decay=DECAY, mu_dtype=mu, nu_dtype=nu, fused=fused)


# What there is for float32 parameters.
FORMATS = {
    "": (None, None),
    ", bfloat16 moments": (jnp.bfloat16, jnp.bfloat16),
    ", float16 moments": (jnp.float16, jnp.float16),
    ", int8 moments": (INT8, INT8),
    ", int4 moments": (INT4, INT4),
}
PLAIN: dict[str, Make] = {f"adamjax{name}": partial(adamw, mu, nu) for name, (mu, nu) in FORMATS.items()}
FUSED: dict[str, Make] = {f"adamjax fused{name}": partial(adamw, mu, nu, True) for name, (mu, nu) in FORMATS.items()}
OPTAX: dict[str, Make] = {"optax": lambda: optax.adamw(LR, weight_decay=DECAY)}
# Each format beside itself, fused.
EVERY = {name: make for pair in zip(PLAIN.items(), FUSED.items(), strict=True) for name, make in pair} | OPTAX
# For many leaves. Not moments that are rounded: XLA would compile their kernels for each leaf anew, for minutes.
PACKED: dict[str, Make] = {
    "adamjax packed": lambda: adamjax.packed(adamw()),
    "adamjax packed, fused": lambda: adamjax.packed(adamw(fused=True)),
}
MANY = {"adamjax": PLAIN["adamjax"]} | PACKED | OPTAX

# And for bfloat16 parameters.
ROUNDED: dict[str, Callable[[Any], Any]] = {
    "to nearest": lambda opt: opt,
    "stochastic_rounding": adamjax.stochastic_rounding,
    "kahan": adamjax.kahan,
    "master_weights": adamjax.master_weights,
    "master_weights, low_bits": partial(adamjax.master_weights, low_bits=True),
}


def rounded(name: str, fused: bool) -> Any:
    return ROUNDED[name](adamw(fused=fused))


OF_BFLOAT16: dict[str, Make] = {
    f"adamjax{' fused' if fused else ''}, {name}": partial(rounded, name, fused)
    for name in ROUNDED
    for fused in (False, True)
}


def advance(opt: Any) -> Callable[[Any, Any, Any], tuple[Any, Any]]:
    """Of gradients, parameters and state: new parameters and state, by our step or optax's two calls.

    Donated arguments stand as the results do: JAX gives their buffers to results of the same shape in order, and where
    a moment's became the parameter's, XLA would have to copy.
    """

    def step(grads: Any, params: Any, state: Any) -> tuple[Any, Any]:
        if isinstance(opt, adamjax.Transformation):
            return opt.step(grads, state, params)
        updates, state = opt.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def is_refused(opt: Any, params: Any) -> bool:
    """Whether it is fused, and cannot be for these parameters."""
    try:
        jax.eval_shape(advance(opt), params, params, jax.eval_shape(opt.init, params))
    except ValueError as error:
        if str(error).startswith("fused=True cannot step"):
            return True
        raise
    return False


def gradients(shapes: Shapes, dtype: str = "float32") -> list[jax.Array]:
    of_shape = {s: jax.random.normal(jax.random.key(i), s, dtype) for i, s in enumerate(dict.fromkeys(shapes))}
    # A buffer of its own for each: what is read twice comes from the cache.
    return [jnp.copy(of_shape[s]) for s in shapes]


def parameters(grads: list[jax.Array]) -> list[jax.Array]:
    return [jnp.ones_like(g) for g in grads]


def nbytes(tree: Any) -> int:
    """Of arrays, or what has their shape and dtype."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def limit(grads: Any, state_bytes: int) -> float:
    """See `Step`; the parameters have the shape and dtype of the gradients."""
    elements = sum(g.size for g in grads)
    return (3 * nbytes(grads) + 2 * state_bytes) / (TRIAD_BYTES * elements)


def of_jax(make: Make, grads: list[jax.Array]) -> Step | None:
    """Jitted and donated; None where it is refused."""
    opt = make()
    if is_refused(opt, grads):
        return None
    step = jax.jit(advance(opt), donate_argnums=(1, 2))
    params = parameters(grads)
    held = [params, opt.init(params)]

    def run() -> None:
        held[:] = jax.block_until_ready(step(grads, *held))

    return Step(run, limit(grads, nbytes(held[1])))


# In torch: the module of the optimizer, its class, arguments, and the bytes of its moments, a parameter; None: as the
# parameter itself, twice.
IN_TORCH: dict[str, tuple[str, str, dict[str, bool], float | None]] = {
    "torch fused": ("torch.optim", "AdamW", {"fused": True}, None),
    "torch foreach": ("torch.optim", "AdamW", {"foreach": True}, None),
}
# Codes in blocks of 256 (4 bits: 128), each with a float32.
CODES_IN_TORCH: dict[str, tuple[str, str, dict[str, bool], float | None]] = {
    "torchao, 8 bits": ("torchao.optim", "AdamW8bit", {}, 2 + 8 / 256),
    "torchao, 4 bits": ("torchao.optim", "AdamW4bit", {}, 1 + 8 / 128),
    "bitsandbytes, 8 bits": ("bitsandbytes.optim", "AdamW8bit", {}, 2 + 8 / 256),
}


def of_torch(label: str, grads: list[jax.Array]) -> Step | None:
    """One of the two tables above, with as many threads as there are cores; None where it is not installed."""
    module, name, how, state_bytes = (IN_TORCH | CODES_IN_TORCH)[label]
    try:
        import torch

        make = getattr(importlib.import_module(module), name)
    except ImportError:
        return None
    torch.set_num_threads(cores())
    params = []
    for g in grads:
        # The gradients are JAX's own memory: torch only reads them.
        grad = torch.from_dlpack(g)
        params.append(torch.nn.Parameter(torch.ones_like(grad)))
        params[-1].grad = grad
    opt = make(params, LR, weight_decay=DECAY, **how)
    elements = sum(g.size for g in grads)
    return Step(opt.step, limit(grads, 2 * nbytes(grads) if state_bytes is None else round(state_bytes * elements)))
