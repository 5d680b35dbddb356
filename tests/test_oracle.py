"""Every optimizer and option against long double, step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers import gradients
from specs import LR, SPECS
from tolerances import ORACLE

import adamjax

pytestmark = pytest.mark.numbers

STEPS = 60
SHAPE = (6, 7)


def follow(opt, p, grads):
    """Parameters as they were before each step, and the updates."""
    step = jax.jit(opt.update)
    state = opt.init(p)
    for g in grads:
        updates, state = step(g, state, p)
        new = adamjax.apply_updates(p, updates)
        yield p, updates
        p = new


def compare(spec, dtype, tolerance):
    rng = np.random.default_rng(1)
    p0 = jnp.asarray(
        rng.normal(size=SHAPE) + (1j * rng.normal(size=SHAPE) if dtype.startswith("complex") else 0), dtype
    )
    # The oracle sees what we see: gradients rounded to the dtype of the run.
    grads = [
        jnp.asarray(g, dtype)
        for g in gradients(SHAPE, STEPS, dtype=dtype if dtype.startswith("complex") else np.float64)
    ]
    exact = oracle.run(np.asarray(p0), [np.asarray(g) for g in grads], **spec.oracle)
    for (p, u), after in zip(follow(spec.make(), p0, grads), exact, strict=True):
        error = np.abs(oracle.long(p) + oracle.long(u) - after)
        assert np.max(error) <= tolerance * LR * STEPS, f"{np.max(error) / LR:.2g} learning rates away"


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("dtype", ["float32", "complex64"])
def test_follows_the_oracle(name, dtype):
    compare(SPECS[name], dtype, ORACLE[dtype])


@pytest.mark.parametrize("name", SPECS)
def test_follows_the_oracle_in_double(name):
    with jax.enable_x64(True):
        compare(SPECS[name], "float64", ORACLE["float64"])
