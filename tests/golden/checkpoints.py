"""A checkpoint of an earlier version, which is to be restored for ever: what is in it, and how it was made.

`python tests/golden/checkpoints.py` writes it to the folder checkpoint; the one committed is of adamjax 0.1.0,
orbax-checkpoint 0.12.8 and JAX 0.10.2. The folder old_codes has the same with moments in the codes before these.
"""

from pathlib import Path

import jax
import jax.numpy as jnp

import adamjax

FOLDER, OLD_CODES = (Path(__file__).parent / name for name in ("checkpoint", "old_codes"))
STEP = 7


def optimizer():
    schedule = adamjax.schedules.warmup_cosine(0.1, warmup_steps=10, total_steps=100)
    inner = adamjax.adamw(schedule, mu_dtype=adamjax.quantized("int8"), nu_dtype=adamjax.quantized("int4"))
    return adamjax.stochastic_rounding(adamjax.groups({"bias": {"weight_decay": 0.0}}, default=inner), seed=3)


def content():
    """The parameters and the state: numbers that no later version computes differently."""

    def ramp(x):
        return (jnp.arange(x.size) % 100).reshape(x.shape).astype(x.dtype)

    params = {"kernel": jnp.zeros((16, 256), jnp.bfloat16), "bias": jnp.zeros(3), "absent": None}
    return jax.tree.map(ramp, params), jax.tree.map(ramp, optimizer().init(params))


if __name__ == "__main__":
    adamjax.checkpoint.save(FOLDER, optimizer(), *content(), step=STEP, key=jax.random.key(5))
