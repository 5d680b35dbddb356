"""A problem that compiles in no time, whose best learning rate is known."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Bowl:
    """A noisy quadratic; from `wall` on, the loss is not finite."""

    dtype: str = "float32"
    wall: float = float("inf")

    def init(self, key):
        return {"x": jax.random.normal(key, (4,), self.dtype)}

    def batch(self, step, key):
        return jax.random.normal(jax.random.fold_in(key, step), (4,), self.dtype)

    def loss(self, params, batch, key):
        x = params["x"].astype(jnp.float32)
        loss = jnp.mean((x - 3 - 0.3 * batch.astype(jnp.float32)) ** 2)
        return jnp.where(jnp.max(jnp.abs(x)) < self.wall, loss, jnp.nan)

    def evaluate(self, params):
        apart = params["x"].astype(jnp.float32) - 3
        loss = jnp.where(jnp.max(jnp.abs(apart + 3)) < self.wall, jnp.mean(apart**2), jnp.inf)
        return {"loss": loss, "score": 1 - loss}


BOWL = Bowl()
CLOSED = Bowl(wall=1e-3)
