"""The order of donated arguments, and `step_fn`:  python -m benchmarks.bench_donation [--quick]

JAX gives the memory of a donated argument to the first result of the same shape and dtype. `jax.jit(opt.step,
donate_argnums=(1, 2))` takes gradients, state and parameters and returns parameters and state, so the memory of the
first moments goes to the parameters, and all arrays are copied. Ratios are taken round by round to the step with the
right order: the median and, in brackets, the quartiles. Temporary arrays are what XLA says of the compiled program, in
percent of the bytes of the parameters.

The loss of a training step has the given gradients for its own, so hardly more than the optimizer is timed.
Micro-batches are those of a multilayer perceptron. Of gradients they need at least the sum over micro-batches (100 %)
and the gradient of one leaf, which is added to the sum at once; of activations, those of one micro-batch.

The last table has the training steps of a deep perceptron: how much of its gradients exists at a time, and what XLA
copies. Rows "update" add updates to the parameters, as frameworks do. Rows "stacked" have the layers in one array:
`scan` is `step_fn` with a loss that scans over them, and `loop` a step whose backward pass steps each layer in its
turn, as the guide on speed describes.
"""

from collections.abc import Callable, Iterator
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp

import adamjax
from adamjax.training import step_fn
from benchmarks._measure import Run, interleaved, ratio, triads
from benchmarks._report import Table, command, show
from benchmarks._steps import INT8, OPTAX, ByUpdate, adamw, advance, gradients, nbytes, parameters

Tree = Any
Arrange = Callable[[Tree, Tree, Tree], tuple[Tree, ...]]  # from (grads, params, state) to the arguments of a step
# As `step_fn` has it: XLA orders the step of a parameter after its last use, where it would copy it.
IN_PLACE = {"xla_cpu_copy_insertion_use_region_analysis": True}
OPTIMIZERS = {"adamjax": adamw, "adamjax fused": lambda: adamw(fused=True)} | OPTAX


def loss(params: Tree, grads: Tree) -> jax.Array:
    """A loss with the gradients `grads`."""
    return sum(map(jnp.vdot, params, grads), jnp.zeros(()))


def steps(opt: Any) -> dict[str, tuple[Any, Arrange]]:
    """Jitted steps by name, each with its order of arguments."""
    alone = advance(opt)

    def naive(grads: Tree, state: Tree, params: Tree) -> tuple[Tree, Tree]:
        return alone(grads, params, state)

    def training(params: Tree, state: Tree, grads: Tree) -> tuple[Tree, ...]:
        value, found = jax.value_and_grad(loss)(params, grads)
        return *alone(found, params, state), value

    def naive_training(grads: Tree, state: Tree, params: Tree) -> tuple[Tree, ...]:
        return training(params, state, grads)

    in_order, reversed_ = (lambda g, p, s: (p, s, g)), (lambda g, p, s: (g, s, p))
    return {
        "step, right order": (jax.jit(alone, donate_argnums=(1, 2)), lambda g, p, s: (g, p, s)),
        "step, jit(opt.step, donate_argnums=(1, 2))": (jax.jit(naive, donate_argnums=(1, 2)), reversed_),
        "step, not donated": (jax.jit(alone), lambda g, p, s: (g, p, s)),
        "training, by hand, right order": (jax.jit(training, donate_argnums=(0, 1)), in_order),
        "training, by hand, the order of opt.step": (jax.jit(naive_training, donate_argnums=(1, 2)), reversed_),
        "training, step_fn": (step_fn(loss, opt), in_order),
    }


def tables(quick: bool) -> Iterator[Table]:
    rounds = 0 if quick else 9
    millions = 1 if quick else 16
    yield orders([(millions * 256, 1024)] * 4, f"{millions} M float32 parameters in 4 leaves", rounds)
    yield micro_batches(64 if quick else 1024, rounds)
    yield deep(3 if quick else 24, 128 if quick else 1024, rounds)


def orders(shapes: list[tuple[int, int]], title: str, rounds: int) -> Table:
    """The time of each step over that of the same step with the right order."""
    grads = gradients(shapes)
    runs: dict[str, Run] = {}
    temporaries: dict[str, float] = {}
    for kind, make in OPTIMIZERS.items():
        for name, (step, arguments) in steps(make()).items():
            params = parameters(grads)
            held = [params, make().init(params)]
            compiled: Any = step.lower(*arguments(grads, *held)).compile()
            temporaries[f"{kind}: {name}"] = percent(compiled, params)
            runs[f"{kind}: {name}"] = runner(compiled, arguments, grads, held)
    seconds = interleaved(runs | triads(sum(g.size for g in grads)), rounds)
    rows = []
    for name in runs:
        kind, what = name.split(": ")
        right = f"{kind}: {'step' if what.startswith('step') else 'training, by hand'}, right order"
        to_triad = ratio(seconds[name], seconds["triad"]).median if "triad" in seconds else None
        rows.append([name, ratio(seconds[name], seconds[right]), to_triad, temporaries[name]])
    return Table("donation", title, ["", "time / right order", "time / triad", "temporaries, %"], rows, seconds)


def runner(compiled: Any, arguments: Arrange, grads: Tree, held: list[Tree]) -> Run:
    def run() -> None:
        held[:] = jax.block_until_ready(compiled(*arguments(grads, *held)))[:2]

    return run


def micro_batches(width: int, rounds: int) -> Table:
    """Training steps of a multilayer perceptron with a batch as large as a layer is wide."""
    layers, opt = 8, adamjax.adamw(1e-3)

    def perceptron(params: Tree, batch: jax.Array) -> jax.Array:
        return jnp.mean(reduce(lambda x, w: jnp.tanh(x @ w), params, batch) ** 2)

    batch = jnp.ones((width, width))
    runs: dict[str, Run] = {}
    temporaries = {}
    for count in (1, 4, 16):
        params = [jnp.full((width, width), 1 / width) for _ in range(layers)]
        held = [params, opt.init(params)]
        compiled = step_fn(perceptron, opt, accumulate=count).lower(held[0], held[1], batch).compile()
        temporaries[f"accumulate={count}"] = percent(compiled, params)
        runs[f"accumulate={count}"] = runner(compiled, lambda g, p, s: (p, s, g), batch, held)
    seconds = interleaved(runs, rounds)
    rows = [[name, ratio(seconds[name], seconds["accumulate=1"]), temporaries[name]] for name in runs]
    title = f"Training steps of {layers} layers of {width} x {width}, batches of {width} rows"
    return Table("micro-batches", title, ["", "time / accumulate=1", "temporaries, %"], rows, seconds)


def layer(w: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ w)


def end(x: jax.Array) -> jax.Array:
    return jnp.mean(x**2)


def listed(params: list[jax.Array], x: jax.Array) -> jax.Array:
    """The loss of layers in a list."""
    return end(reduce(lambda x, w: layer(w, x), params, x))


def stacked(params: jax.Array, x: jax.Array) -> jax.Array:
    """The loss of layers in one array."""
    return end(jax.lax.scan(lambda x, w: (layer(w, x), None), x, params)[0])


def by_hand(opt: Any) -> Callable[[Tree, Tree, jax.Array], tuple[Tree, ...]]:
    step = advance(opt)

    def training(params: Tree, state: Tree, x: jax.Array) -> tuple[Tree, ...]:
        value, grads = jax.value_and_grad(listed)(params, x)
        return *step(grads, params, state), value

    return training


def layer_by_layer(opt: Any) -> Callable[[jax.Array, Tree, jax.Array], tuple[Tree, ...]]:
    """A step of layers in one array, which steps each as soon as the backward pass has its gradient."""

    def training(params: jax.Array, state: Tree, x: jax.Array) -> tuple[Tree, ...]:
        x, inputs = jax.lax.scan(lambda x, w: (layer(w, x), x), x, params)
        value, cotangent = jax.value_and_grad(end)(x)

        def back(count: jax.Array, carry: tuple[Tree, ...]) -> tuple[Tree, ...]:
            held, cotangent = carry
            i = len(inputs) - 1 - count
            w, state = jax.tree.map(lambda x: x[i], held)
            grad, cotangent = jax.vjp(layer, w, inputs[i])[1](cotangent)
            held = jax.tree.map(lambda x, new: x.at[i].set(new), held, opt.step(grad, state, w))
            return held, cotangent

        (params, state), _ = jax.lax.fori_loop(0, len(inputs), back, ((params, state), cotangent))
        return params, state, value

    return training


STACKED = ("adamjax", "adamjax fused", "adamjax fused, int8 moments")


def deep(count: int, width: int, rounds: int) -> Table:
    """Training steps of many equal layers."""
    runs: dict[str, Run] = {}
    temporaries = {}
    batch = jnp.ones((32, width))
    optimizers = {
        "adamjax": adamw(),
        "adamjax fused": adamw(fused=True),
        "adamjax fused, int8 moments": adamw(INT8, INT8, True),
        "adamjax fused, clip_by_global_norm": adamjax.chain(adamjax.clip_by_global_norm(1.0), adamw(fused=True)),
        "optax": OPTAX["optax"](),
    }
    for kind, opt in optimizers.items():
        made: dict[str, Any] = {
            "by hand": jax.jit(by_hand(opt), donate_argnums=(0, 1)),
            "update": jax.jit(by_hand(ByUpdate(opt)), donate_argnums=(0, 1)),
        }
        made |= {"step_fn": step_fn(listed, opt)} if isinstance(opt, adamjax.Transformation) else {}
        if kind in STACKED:
            made["stacked, scan"] = step_fn(stacked, opt)
            made["stacked, loop"] = jax.jit(layer_by_layer(opt), donate_argnums=(0, 1), compiler_options=IN_PLACE)
        for name, step in made.items():
            params: Tree = [jnp.full((width, width), 1 / width) for _ in range(count)]
            params = jnp.stack(params) if "stacked" in name else params
            state = jax.vmap(opt.init)(params) if "loop" in name else opt.init(params)
            compiled: Any = step.lower(params, state, batch).compile()
            temporaries[f"{kind}: {name}"] = percent(compiled, params)
            runs[f"{kind}: {name}"] = runner(compiled, lambda g, p, s: (p, s, g), batch, [params, state])
    seconds = interleaved(runs, rounds)
    rows = [[name, ratio(seconds[name], seconds["adamjax: by hand"]), temporaries[name]] for name in runs]
    title = f"Training steps of {count} layers of {width} x {width}, batches of 32 rows"
    return Table("layers", title, ["", "time / by hand", "temporaries, %"], rows, seconds)


def percent(compiled: Any, params: Tree) -> float:
    """The temporary arrays of a compiled step, in percent of the bytes of the parameters."""
    return 100 * compiled.memory_analysis().temp_size_in_bytes / nbytes(params)


if __name__ == "__main__":
    show(tables(command(__doc__).parse_args().quick))
