"""Effects of low precision on training:  python -m benchmarks.bench_low_precision [--quick] [--help]

Each row trains with another storage format of the moments or of the parameters, from the same seeds and on the same
data as the first row, plain float32. The figures are changes of the mean validation loss in percent, ± the standard
error of that mean over the seeds. The last column counts the runs that ended no better than they began.

The problems are the transformer of `adamjax.problems.characters`, in batches of 16, for 400 steps at its best learning
rate, for 400 at three times that, and for 2000; and the digits classifier with a tenth of its training labels wrong,
for 600. The learning rate falls to 0 by a cosine, since the noise of the last steps would hide the differences.
Parameters are evaluated in float32. The benchmark takes about 45 minutes on two cores.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import adamjax
from adamjax import problems
from adamjax.training import keys_of, train_step
from benchmarks._reference_codes import REFERENCES, FlashWeights, Stored
from benchmarks._report import Table, command, show

INT8, INT4 = adamjax.quantized("int8"), adamjax.quantized("int4")


@dataclasses.dataclass(frozen=True)
class MislabelledDigits(problems.Digits):
    """The digits classifier with a tenth of the training labels wrong."""

    def _load(self) -> None:
        super()._load()
        images, labels = self._train
        rng = np.random.default_rng(1)
        wrong = rng.random(len(labels)) < 0.1
        shifted = (labels + rng.integers(1, 10, len(labels))) % 10
        object.__setattr__(self, "_train", (images, np.where(wrong, shifted, labels).astype(np.int32)))


def adam(mu: Any = None, nu: Any = None) -> Callable[[Any], Any]:
    return lambda lr: adamjax.adam(lr, mu_dtype=mu, nu_dtype=nu)


def stored(codes: Any) -> Callable[[Any], Any]:
    return lambda lr: Stored(adamjax.adam(lr), codes)


def master_of_24_bits(mu: Any = None, nu: Any = None) -> Callable[[Any], Any]:
    return lambda lr: adamjax.master_weights(adam(mu, nu)(lr), low_bits=8)


# For each row, a function from the learning rate to the optimizer, and the dtype of the parameters.
ROWS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "float32": (adam(), "float32"),
    "moments bfloat16": (adam(jnp.bfloat16, jnp.bfloat16), "float32"),
    "moments bfloat16, optax": (lambda lr: optax.adam(lr, mu_dtype=jnp.bfloat16), "float32"),
    "moments int8": (adam(INT8, INT8), "float32"),
    "mu int4, nu int8": (adam(INT4, INT8), "float32"),
    "moments int4": (adam(INT4, INT4), "float32"),
    **{name: (stored(codes), "float32") for name, codes in REFERENCES.items()},
    "parameters bfloat16": (adam(), "bfloat16"),
    "all bfloat16, optax": (optax.adam, "bfloat16"),
    "stochastic_rounding": (lambda lr: adamjax.stochastic_rounding(adamjax.adam(lr)), "bfloat16"),
    "kahan": (lambda lr: adamjax.kahan(adamjax.adam(lr)), "bfloat16"),
    "master_weights": (lambda lr: adamjax.master_weights(adamjax.adam(lr)), "bfloat16"),
    "master_weights, low_bits": (lambda lr: adamjax.master_weights(adamjax.adam(lr), low_bits=True), "bfloat16"),
    "master_weights, low_bits=8": (master_of_24_bits(), "bfloat16"),
    "low_bits=8, moments int8": (master_of_24_bits(INT8, INT8), "bfloat16"),
    "low_bits=8, moments int4": (master_of_24_bits(INT4, INT4), "bfloat16"),
    "FlashOptim's parameters": (lambda lr: FlashWeights(adamjax.adam(lr)), "bfloat16"),
    "FlashOptim": (lambda lr: FlashWeights(Stored(adamjax.adam(lr), REFERENCES["FlashOptim's 8 bits"])), "bfloat16"),
}


def losses(problem: Any, opt: Any, dtype: str, steps: int, seeds: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the validation losses before and after training, float64[seeds]."""
    opt = adamjax.chain(opt)  # gives optax's optimizers a `step`

    def run(seed: jax.Array) -> tuple[jax.Array, jax.Array]:
        keys = keys_of(seed)
        params = jax.tree.map(lambda p: p.astype(dtype), problem.init(keys.init))

        def body(carry: Any, step: jax.Array) -> tuple[Any, None]:
            params, state = carry
            return train_step(problem, opt, keys, params, state, step)[:2], None

        (trained, _), _ = jax.lax.scan(body, (params, opt.init(params)), jnp.arange(steps))
        wide = jax.tree.map(lambda p: p.astype(jnp.float32), (params, trained))
        return problem.evaluate(wide[0])["loss"], problem.evaluate(wide[1])["loss"]

    before, after = jax.jit(lambda: jax.lax.map(run, jnp.arange(seeds)))()
    return np.asarray(before, np.float64), np.asarray(after, np.float64)


def tables(quick: bool, only: str = "", case: str = "", seeds: int | None = None) -> Iterator[Table]:
    """Yield the first row and those whose names contain `only`, for the cases whose names contain `case`."""
    text, digits = problems.characters(batch_size=16), MislabelledDigits()
    cases = {
        "transformer, 400 steps": (text, 1e-2, 400, 5),
        "at 3x learning rate": (text, 3e-2, 400, 5),
        "2000 steps": (text, 1e-2, 2000, 3),
        "digits, 600 steps": (digits, 1e-2, 600, 20),
    }
    if quick:
        cases = {"digits, 100 steps": (digits, 1e-2, 100, 3)}
    cases = {name: how for name, how in cases.items() if case in name}
    baseline: dict[str, np.ndarray] = {}
    rows: list[list[Any]] = []
    for row, (make, dtype) in ROWS.items():
        if baseline and only not in row:
            continue
        cells, diverged = [], 0
        for name, (problem, lr, steps, seeds_of_case) in cases.items():
            schedule = adamjax.schedules.warmup_cosine(lr, warmup_steps=20, total_steps=steps)
            before, after = losses(problem, make(schedule), dtype, steps, seeds or seeds_of_case)
            diverged += int(np.sum(~(after < before)))
            reference = baseline.setdefault(name, after)
            change = 100 * (after - reference) / reference.mean()
            error = change.std(ddof=1) / np.sqrt(len(change))
            cells.append(f"{reference.mean():.4f} nats" if row == "float32" else f"{change.mean():+.2f} ± {error:.2f}")
        rows.append([row, *cells, diverged])
        print(*rows[-1], sep=" | ", file=sys.stderr, flush=True)
    yield Table("low-precision", "Change of the validation loss, %", ["", *cases, "diverged"], rows)


if __name__ == "__main__":
    parser = command(__doc__)
    parser.add_argument("--only", default="", help="run only the first row and those whose names contain this")
    parser.add_argument("--case", default="", help="run only the columns whose names contain this")
    parser.add_argument("--seeds", type=int, help="number of seeds for all columns")
    given = parser.parse_args()
    show(tables(given.quick, given.only, given.case, given.seeds))
