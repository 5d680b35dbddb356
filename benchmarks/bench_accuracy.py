"""The error of one Adam step against long double:  python -m benchmarks.bench_accuracy

The figures are the largest relative errors of the direction in float32, over b1 in {0.9, 0.99} and steps 1 to 10**7.
Moments and gradients are random and positive, so that avoidable cancellation does not hide the errors.
"""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import adamjax
from benchmarks._report import Curves, Table, command, show

B1 = (0.9, 0.99)
B2 = (0.95, 0.999, 0.9999, 0.999999)
STEPS = (1, 2, 3, 10, 30, 100, 300, 10**3, 10**4, 10**5, 10**6, 10**7)
LONG = np.longdouble

Direction = Callable[[np.ndarray, np.ndarray, np.ndarray, int, float, float], Any]


def exact(g: np.ndarray, m: np.ndarray, v: np.ndarray, t: int, b1: float, b2: float) -> np.ndarray:
    g, m, v = (x.astype(LONG) for x in (g, m, v))
    b1_, b2_ = LONG(b1), LONG(b2)
    m_hat = (b1_ * m + (1 - b1_) * g) / -np.expm1(t * np.log(b1_))
    v_hat = (b2_ * v + (1 - b2_) * g * g) / -np.expm1(t * np.log(b2_))
    return m_hat / (np.sqrt(v_hat) + LONG(1e-8))


def of_jax(make: Callable[..., Any], traced: bool = False) -> Direction:
    @jax.jit
    def step(opt: Any, g: Any, state: Any) -> Any:
        return opt.update(g, state)[0]

    def direction(g: np.ndarray, m: np.ndarray, v: np.ndarray, t: int, b1: float, b2: float) -> Any:
        opt = make(b1, b2)
        state = opt.init(jnp.asarray(g))._replace(count=jnp.int32(t - 1), mu=jnp.asarray(m), nu=jnp.asarray(v))
        return step(opt, jnp.asarray(g), state) if traced else opt.update(jnp.asarray(g), state)[0]

    return direction


def of_torch(g: np.ndarray, m: np.ndarray, v: np.ndarray, t: int, b1: float, b2: float) -> Any:
    import torch

    p = torch.nn.Parameter(torch.zeros(len(g)))
    opt = torch.optim.Adam([p], lr=1.0, betas=(b1, b2))
    p.grad = torch.tensor(g)
    state = {"step": torch.tensor(float(t - 1)), "exp_avg": torch.tensor(m), "exp_avg_sq": torch.tensor(v)}
    opt.state[p] = state
    opt.step()
    return -p.detach().numpy()


def worst(direction: Direction, b2: float, steps: Sequence[int]) -> float:
    rng = np.random.default_rng(0)
    error = 0.0
    for b1 in B1:
        for t in steps:
            g, m, v = (np.exp(rng.normal(size=2000)).astype(np.float32) for _ in range(3))
            m *= np.float32(-np.expm1((t - 1) * np.log(b1)))
            v *= np.float32(-np.expm1((t - 1) * np.log(b2)))
            expected = exact(g, m, v, t, b1, b2)
            found = np.asarray(direction(g, m, v, t, b1, b2)).astype(LONG)
            error = max(error, float(np.max(np.abs(found - expected) / expected)))
    return error


def tables(quick: bool) -> Iterator[Table]:
    directions: dict[str, Direction] = {
        "adamjax": of_jax(adamjax.scale_by_adam),
        "adamjax: traced": of_jax(adamjax.scale_by_adam, traced=True),
        "optax": of_jax(optax.scale_by_adam),
    }
    if importlib.util.find_spec("torch"):
        directions["torch"] = of_torch
    errors = {
        name: {b2: worst(direction, b2, STEPS[::4] if quick else STEPS) for b2 in B2}
        for name, direction in directions.items()
    }
    yield Table(
        "accuracy",
        "Largest relative error of a step, by b2",
        ["b2", *map(str, B2)],
        [[name, *(f"{error:.1e}" for error in of.values())] for name, of in errors.items()],
        picture=Curves(
            "1 - b2", "error of a step", {name: {1 - b2: x for b2, x in of.items()} for name, of in errors.items()}
        ),
    )


if __name__ == "__main__":
    show(tables(command(__doc__).parse_args().quick))
