"""Steps of AdamW in each library and each format, to time or to inspect."""

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
Make = Callable[[], Any]  # makes an optimizer


class Step(NamedTuple):
    """A step that can be run repeatedly.

    Fields:
      run: Makes the step.
      limit: The bytes that a step must read (parameters, gradients, state) and write (parameters, state), divided by
        those of the triad.
    """

    run: Run
    limit: float


def adamw(mu: Any = None, nu: Any = None, fused: bool = False) -> Any:
    return adamjax.adamw(LR, weight_decay=DECAY, mu_dtype=mu, nu_dtype=nu, fused=fused)


# Storage formats of the moments of float32 parameters.
FORMATS = {
    "": (None, None),
    ", bfloat16 moments": (jnp.bfloat16, jnp.bfloat16),
    ", float16 moments": (jnp.float16, jnp.bfloat16),
    ", int8 moments": (INT8, INT8),
    ", int4 moments": (INT4, INT4),
}
PLAIN: dict[str, Make] = {f"adamjax{name}": partial(adamw, mu, nu) for name, (mu, nu) in FORMATS.items()}
FUSED: dict[str, Make] = {f"adamjax fused{name}": partial(adamw, mu, nu, True) for name, (mu, nu) in FORMATS.items()}
OPTAX: dict[str, Make] = {"optax": lambda: optax.adamw(LR, weight_decay=DECAY)}
# Each format, plain and fused side by side.
EVERY = {name: make for pair in zip(PLAIN.items(), FUSED.items(), strict=True) for name, make in pair} | OPTAX
# What came after Adam.
RULES: dict[str, Callable[[bool], Any]] = {
    "adamw": lambda fused: adamw(fused=fused),
    "adamw, cautious": lambda fused: adamjax.adamw(LR, weight_decay=DECAY, cautious=True, fused=fused),
    "adamw, cautious decay": lambda fused: adamjax.adamw(LR, weight_decay=DECAY, cautious_decay=True, fused=fused),
    "stable_adamw": lambda fused: adamjax.stable_adamw(LR, weight_decay=DECAY, fused=fused),
    "ademamix": lambda fused: adamjax.ademamix(LR, weight_decay=DECAY, fused=fused),
    "ademamix, int8 moments": lambda fused: adamjax.ademamix(
        LR, weight_decay=DECAY, mu_dtype=INT8, nu_dtype=INT8, fused=fused
    ),
    "adopt": lambda fused: adamjax.adopt(LR, weight_decay=DECAY, fused=fused),
    "adam_atan2": lambda fused: adamjax.adam_atan2(LR, weight_decay=DECAY, fused=fused),
    "schedule_free_adamw": lambda fused: adamjax.schedule_free_adamw(LR, weight_decay=DECAY, fused=fused),
}
FAMILY: dict[str, Make] = {
    f"{name}{', fused' if fused else ''}": partial(make, fused)
    for name, make in RULES.items()
    for fused in (False, True)
}
# For many leaves. Rounded moments are left out: XLA would compile their kernels anew for each leaf, for minutes.
PACKED: dict[str, Make] = {
    "adamjax packed": lambda: adamjax.packed(adamw()),
    "adamjax packed, fused": lambda: adamjax.packed(adamw(fused=True)),
}
MANY = {"adamjax": PLAIN["adamjax"]} | PACKED | OPTAX

# Rounding of bfloat16 parameters.
ROUNDED: dict[str, Callable[[Any], Any]] = {
    "to nearest": lambda opt: opt,
    "stochastic_rounding": adamjax.stochastic_rounding,
    "kahan": adamjax.kahan,
    "master_weights": adamjax.master_weights,
    "master_weights, low_bits": partial(adamjax.master_weights, low_bits=True),
    "master_weights, low_bits=8": partial(adamjax.master_weights, low_bits=8),
}


def rounded(name: str, fused: bool) -> Any:
    return ROUNDED[name](adamw(fused=fused))


OF_BFLOAT16: dict[str, Make] = {
    f"adamjax{' fused' if fused else ''}, {name}": partial(rounded, name, fused)
    for name in ROUNDED
    for fused in (False, True)
}


class ByUpdate(NamedTuple):
    """An optimizer that steps as frameworks do it: by `update`, and then `optax.apply_updates`."""

    opt: Any

    def init(self, params: Any) -> Any:
        return self.opt.init(params)

    def update(self, grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        return self.opt.update(grads, state, params)


class ByTrainState(NamedTuple):
    """An optimizer in Flax's `TrainState`."""

    opt: Any

    def init(self, params: Any) -> Any:
        return self.opt.init(params)

    def step(self, grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        from flax.training.train_state import TrainState

        made = TrainState(step=0, apply_fn=None, params=params, tx=self.opt, opt_state=state)  # type: ignore[arg-type]
        made = made.apply_gradients(grads=grads)
        return made.params, made.opt_state


class ByNnx(NamedTuple):
    """An optimizer in Flax's `nnx.Optimizer`."""

    opt: Any

    def init(self, params: Any) -> Any:
        from flax import nnx

        model = nnx.List([nnx.Param(p) for p in params])
        return nnx.split(nnx.Optimizer(model, self.opt, wrt=nnx.Param))[1]

    def step(self, grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        from flax import nnx

        model = nnx.List([nnx.Param(p) for p in params])
        optimizer = nnx.merge(nnx.graphdef(nnx.Optimizer(model, self.opt, wrt=nnx.Param)), state)
        given = nnx.state(model)
        optimizer.update(model, jax.tree.unflatten(jax.tree.structure(given), grads))
        return jax.tree.leaves(nnx.state(model)), nnx.split(optimizer)[1]


# The paths on which frameworks step, and wrappers that read the gradients first, of float32 parameters.
WRAPPED: dict[str, Callable[[Any], Any]] = {
    "update": ByUpdate,
    "TrainState": ByTrainState,
    "nnx.Optimizer": ByNnx,
    "optax.chain": lambda opt: ByUpdate(optax.chain(optax.clip_by_global_norm(1.0), opt)),
    "clipped": lambda opt: adamjax.chain(adamjax.clip_by_global_norm(1.0), opt),
    "skip_nonfinite": adamjax.skip_nonfinite,
}


def wrapped(path: str, format: str) -> Any:
    return WRAPPED[path](FUSED[f"adamjax fused{format}"]())


PATHS: dict[str, Make] = {
    f"adamjax fused{format}, {path}": partial(wrapped, path, format)
    for path in WRAPPED
    for format in ("", ", int8 moments")
}
CLIPPED: dict[str, Make] = {"optax, clipped": lambda: optax.chain(optax.clip_by_global_norm(1.0), OPTAX["optax"]())}
PATHS |= OPTAX | CLIPPED


def flash_adamw() -> Any:
    """Return FlashOptim's AdamW, with a master of 24 bits and moments in 8 bits; None where it does not run.

    Its kernel is for GPUs and TPUs, and it has no other jitted step.
    """
    if jax.default_backend() == "cpu":
        return None
    try:
        from flashoptim_jax import flash_adamw as make
    except ImportError:
        return None
    return Flash(make(learning_rate=LR, weight_decay=DECAY, master_weight_bits=24))


class Flash(NamedTuple):
    """FlashOptim's optimizer, with arguments in our order."""

    opt: Any

    def init(self, params: Any) -> Any:
        return self.opt.init(params)

    def step(self, grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        return self.opt.step(params, state, grads)


def advance(opt: Any) -> Callable[[Any, Any, Any], tuple[Any, Any]]:
    """Return a function of gradients, parameters and state that makes a step: by `step`, or by optax's two calls.

    The arguments have the order of the results, since JAX gives the buffers of donated arguments to results of the same
    shape in order: if a parameter got the buffer of a moment, XLA would have to copy.
    """

    def step(grads: Any, params: Any, state: Any) -> tuple[Any, Any]:
        if hasattr(opt, "step"):
            return opt.step(grads, state, params)
        updates, state = opt.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def is_refused(opt: Any, params: Any) -> bool:
    """Return whether the optimizer is fused, but cannot be for these parameters."""
    try:
        jax.eval_shape(advance(opt), params, params, jax.eval_shape(opt.init, params))
    except ValueError as error:
        if str(error).startswith("fused=True cannot step"):
            return True
        raise
    return False


def gradients(shapes: Shapes, dtype: str = "float32") -> list[jax.Array]:
    of_shape = {s: jax.random.normal(jax.random.key(i), s, dtype) for i, s in enumerate(dict.fromkeys(shapes))}
    # Each leaf gets its own buffer: a buffer that is read twice would come from the cache.
    return [jnp.copy(of_shape[s]) for s in shapes]


def parameters(grads: list[jax.Array]) -> list[jax.Array]:
    return [jnp.ones_like(g) for g in grads]


def nbytes(tree: Any) -> int:
    """Return the bytes of all arrays, concrete or abstract, in a tree."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def limit(grads: Any, state_bytes: int) -> float:
    """Return the limit of a `Step` whose parameters have the shapes and dtypes of the gradients."""
    elements = sum(g.size for g in grads)
    return (3 * nbytes(grads) + 2 * state_bytes) / (TRIAD_BYTES * elements)


def of_jax(make: Make, grads: list[jax.Array]) -> Step | None:
    """Return a jitted and donated step; None if fusing it is refused, or its library is not installed."""
    opt = make()
    if opt is None or is_refused(opt, grads):
        return None
    step = jax.jit(advance(opt), donate_argnums=(1, 2))
    params = parameters(grads)
    held = [params, opt.init(params)]

    def run() -> None:
        held[:] = jax.block_until_ready(step(grads, *held))

    return Step(run, limit(grads, nbytes(held[1])))


# Optimizers in torch: the module, the class, its arguments, and the bytes of its moments for each parameter, or None if
# both moments have the parameter's dtype.
IN_TORCH: dict[str, tuple[str, str, dict[str, bool], float | None]] = {
    "torch fused": ("torch.optim", "AdamW", {"fused": True}, None),
    "torch foreach": ("torch.optim", "AdamW", {"foreach": True}, None),
}
# Quantized in blocks of 256 (4 bits: 128), each with a float32 scale.
CODES_IN_TORCH: dict[str, tuple[str, str, dict[str, bool], float | None]] = {
    "torchao, 8 bits": ("torchao.optim", "AdamW8bit", {}, 2 + 8 / 256),
    "torchao, 4 bits": ("torchao.optim", "AdamW4bit", {}, 1 + 8 / 128),
    "bitsandbytes, 8 bits": ("bitsandbytes.optim", "AdamW8bit", {}, 2 + 8 / 256),
}


def of_torch(label: str, grads: list[jax.Array]) -> Step | None:
    """Return a step of an optimizer above, with a thread for each core; None if its library is not installed."""
    module, name, how, state_bytes = (IN_TORCH | CODES_IN_TORCH)[label]
    try:
        import torch

        make = getattr(importlib.import_module(module), name)
    except ImportError:
        return None
    torch.set_num_threads(cores())
    params = []
    for g in grads:
        # torch shares the memory of JAX's gradients, and only reads it.
        grad = torch.from_dlpack(g)
        params.append(torch.nn.Parameter(torch.ones_like(grad)))
        params[-1].grad = grad
    opt = make(params, LR, weight_decay=DECAY, **how)
    elements = sum(g.size for g in grads)
    return Step(opt.step, limit(grads, 2 * nbytes(grads) if state_bytes is None else round(state_bytes * elements)))
