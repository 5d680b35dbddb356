"""Effects of half precision on Adam, by library and by eps:  python -m benchmarks.bench_half_precision

1. The second moment of bfloat16 parameters after 1000 gradients of 1: the mean of a thousand parameters. The exact
   value is 1 - 0.999**1000.
2. The first step of a float16 parameter, divided by the learning rate, by the size of its gradient. The exact value is
   |g| / (|g| + eps).
3. The validation loss of the digits classifier after 200 steps in float16, by eps, or the step at which a parameter was
   no longer finite. All runs have the same initial parameters and data.
"""

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import adamjax
from adamjax import problems
from adamjax.training import keys_of
from benchmarks._report import Table, command, show

STEPS = 1000
GRADIENTS = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1.0, 300.0)
EPSILONS = (1e-8, 1e-6, 1e-4, 1e-3)
PROBLEM = problems.digits()

Stepper = Callable[[Any], Any]


def steps_of_jax(opt: Any, params: Any) -> Stepper:
    """Return a function of gradients that makes a step and returns the parameters."""
    state = jax.jit(opt.init)(params)

    @jax.jit
    def step(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        updates, state = opt.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def advance(grads: Any) -> Any:
        nonlocal params, state
        params, state = step(grads, state, params)
        return params

    return advance


def steps_of_torch(params: Any, lr: float, eps: float) -> Stepper:
    import torch

    leaves, structure = jax.tree.flatten(params)
    tensors = [torch.nn.Parameter(torch.tensor(np.asarray(x))) for x in leaves]
    opt = torch.optim.Adam(tensors, lr=lr, eps=eps)

    def advance(grads: Any) -> Any:
        for p, g in zip(tensors, jax.tree.leaves(grads), strict=True):
            p.grad = torch.tensor(np.asarray(g))
        opt.step()
        return jax.tree.unflatten(structure, [jnp.asarray(p.detach().numpy()) for p in tensors])

    return advance


# Functions of learning rate, eps and parameters.
LIBRARIES: dict[str, Callable[[float, float, Any], Stepper]] = {
    "adamjax": lambda lr, eps, params: steps_of_jax(adamjax.adam(lr, eps=eps), params),
    "adamjax, master_weights": lambda lr, eps, params: steps_of_jax(
        adamjax.master_weights(adamjax.adam(lr, eps=eps)), params
    ),
    "optax": lambda lr, eps, params: steps_of_jax(optax.adam(lr, eps=eps), params),
    "torch": lambda lr, eps, params: steps_of_torch(params, lr, eps),
}


def second_moments() -> dict[str, float]:
    def of_jax(opt: Any) -> float:
        ones = jnp.ones(1000, jnp.bfloat16)

        def body(state: Any, _: None) -> tuple[Any, None]:
            return opt.update(ones, state, ones)[1], None

        return float(jax.lax.scan(body, opt.init(ones), length=STEPS)[0][0].nu.astype(jnp.float32).mean())

    def of_torch(fused: bool) -> float:
        import torch

        p = torch.nn.Parameter(torch.zeros((), dtype=torch.bfloat16))
        opt = torch.optim.Adam([p], fused=fused)
        for _ in range(STEPS):
            p.grad = torch.ones_like(p)
            opt.step()
        return float(opt.state[p]["exp_avg_sq"].item())

    found = {
        "exactly": 1 - 0.999**STEPS,
        "adamjax": of_jax(adamjax.adam()),
        "adamjax, nu_dtype=bfloat16": of_jax(adamjax.adam(nu_dtype=jnp.bfloat16)),
        "optax": of_jax(optax.adam(1e-3)),
    }
    with contextlib.suppress(ImportError):
        found |= {"torch": of_torch(fused=False), "torch, fused": of_torch(fused=True)}
    return found


def first_steps(library: str, eps: float) -> list[float]:
    """Return the size of the first step of a float16 parameter at 0, with learning rate 1, for each gradient."""
    zero = jnp.zeros(len(GRADIENTS), jnp.float16)
    stepped = LIBRARIES[library](1.0, eps, zero)(jnp.array(GRADIENTS, jnp.float16))
    return [float(x) for x in np.abs(np.asarray(stepped, np.float64))]


@jax.jit
def gradient(params: Any, step: Any) -> Any:
    keys = keys_of(0)
    return jax.grad(PROBLEM.loss)(params, PROBLEM.batch(step, keys.data), keys.loss)


def trained(library: str, eps: float, steps: int) -> str:
    """Return the validation loss after training in float16, or the step at which it failed."""
    params = jax.tree.map(lambda p: p.astype(jnp.float16), PROBLEM.init(keys_of(0).init))
    advance = LIBRARIES[library](3e-3, eps, params)
    for t in range(steps):
        params = advance(gradient(params, np.int32(t)))
        if not all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(params)):
            return f"step {t + 1}"
    wide = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    return f"{float(PROBLEM.evaluate(wide)['loss']):.3f}"


def tables(quick: bool) -> Iterator[Table]:
    moments = [[name, f"{moment:.3f}"] for name, moment in second_moments().items()]
    yield Table("nu", "`nu` of bfloat16 parameters after 1000 gradients of 1", ["", "nu"], moments)
    libraries = [name for name in LIBRARIES if name != "torch" or importlib.util.find_spec("torch")]
    yield Table(
        "first-step",
        "First step of a float16 parameter over the learning rate, by gradient",
        ["gradient", *(f"{g:g}" for g in GRADIENTS)],
        [
            [f"{library}, eps={eps:g}", *(f"{x:.3g}" for x in first_steps(library, eps))]
            for eps in EPSILONS[::2]
            for library in libraries
        ],
    )
    steps, epsilons = (20, EPSILONS[:1]) if quick else (200, EPSILONS)
    yield Table(
        "float16",
        f"Validation loss after {steps} steps in float16, or the step that ended it, by eps",
        ["eps", *(f"{eps:g}" for eps in epsilons)],
        [[library, *(trained(library, eps, steps) for eps in epsilons)] for library in libraries],
    )


if __name__ == "__main__":
    show(tables(command(__doc__).parse_args().quick))
