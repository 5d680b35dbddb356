"""Problems whose batches come from the host, and what a loader can do to them."""

import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np


class Fed:
    """A noisy quadratic whose data come from a generator, and whose model has a running mean, a key and a count.

    `draws` counts the batches that were drawn, by seed; `rows` can change the batches, from (seed, number, rows).
    """

    stateful = True

    def __init__(self, rows=lambda seed, i, x: x):
        self.draws, self._rows = {}, rows

    def init(self, key):
        state = {"mean": jnp.zeros(4, jnp.float32), "key": jax.random.key(1), "count": jnp.int32(0)}
        return {"x": jax.random.normal(key, (4,), jnp.float32)}, state

    def batches(self, seed):
        rng = np.random.default_rng(seed)
        self.draws[seed] = 0
        while True:
            x = self._rows(seed, self.draws[seed], rng.normal(size=(8, 4)))  # float64, as NumPy makes it
            self.draws[seed] += 1
            yield {"rows": x}

    def loss(self, params, state, batch, key):
        mean = batch["rows"].mean(0)
        state = {
            "mean": 0.9 * state["mean"] + 0.1 * mean,
            "key": jax.random.split(state["key"])[0],
            "count": state["count"] + 1,
        }
        return jnp.mean((params["x"].astype(mean.dtype) - 3 - 0.3 * mean) ** 2), state

    def evaluate(self, params, state):
        loss = jnp.mean((params["x"].astype(jnp.float32) - 3) ** 2)
        return {"loss": loss, "mean": state["mean"].sum(), "count": state["count"].astype(jnp.float32)}


class HangsInTheSecondProcess(Fed):
    """The same, whose data do not go on in one process."""

    def batches(self, seed):
        for i, batch in enumerate(super().batches(seed)):
            if i == 20 and jax.process_index() == 1:
                time.sleep(1000)
            yield batch


class FedOnHost(Fed):
    """The same, evaluated on the host in NumPy, which cannot be traced."""

    on_host = True

    def evaluate(self, params, state):
        x = params["x"]
        assert isinstance(x, np.ndarray)
        assert isinstance(state["count"], np.ndarray)
        with np.errstate(over="ignore"):  # of a setting that diverges
            loss = float(((x - 3) ** 2).mean())
        return {"loss": loss, "mean": state["mean"].sum(), "count": int(state["count"])}


class FedUntil12(Fed):
    """The same, whose loader fails at step 13."""

    def batches(self, seed):
        yield from itertools.islice(super().batches(seed), 12)
        raise OSError("no more data")
