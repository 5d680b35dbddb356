"""Libraries without tests of optax's optimizers on PyPI: their numbers with our optimizers are those with optax's.

`tests/client_suites.py` runs these beside the libraries' own tests.
"""

import sys
from types import ModuleType, SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close
from tolerances import OPTAX

import adamjax

pytestmark = pytest.mark.usefixtures("lenient")

X = np.random.default_rng(0).normal(size=(32, 4)).astype(np.float32)
Y = np.sin(X.sum(axis=1, keepdims=True))


def assert_same(run):
    """`run(library)` trains with the optimizers of a library and returns its numbers."""
    found = run(adamjax)
    assert np.all(np.isfinite(np.concatenate([np.ravel(x) for x in jax.tree.leaves(found)])))
    assert_close(found, run(optax), OPTAX["float32"])


def test_numpyro_svi():
    import numpyro
    from numpyro.infer import SVI, Trace_ELBO
    from numpyro.infer.autoguide import AutoNormal

    def model(x, y):
        weights = numpyro.sample("weights", numpyro.distributions.Normal(jnp.zeros(4), 1.0).to_event(1))
        numpyro.sample("y", numpyro.distributions.Normal(x @ weights, 0.5), obs=y)

    def run(library):
        for optimizer in (library.adam(1e-2), numpyro.optim.optax_to_numpyro(library.adamw(1e-2))):
            svi = SVI(model, AutoNormal(model), optimizer, Trace_ELBO())
            result = svi.run(jax.random.key(0), 50, X, Y[:, 0], progress_bar=False)
            yield result.params, result.losses

    assert_same(lambda library: list(run(library)))
    _, losses = next(run(adamjax))
    assert losses[-10:].mean() < losses[:10].mean()


def test_optimistix_minimise():
    import optimistix

    traces = []

    def rosenbrock(y, args):
        traces.append(y)
        return jnp.sum(100 * (y[1:] - y[:-1] ** 2) ** 2 + (1 - y[:-1]) ** 2)

    def run(opt, tolerance=1e-3):
        solver = optimistix.OptaxMinimiser(opt, tolerance, tolerance)
        start = jnp.array([-1.0, 1.5, 0.5])
        return optimistix.minimise(rosenbrock, solver, start, max_steps=100, throw=False)

    assert_same(lambda library: run(library.adam(1e-2)).value)
    ours, other = (run(library.adam(1e-2), 0.05) for library in (adamjax, optax))
    assert ours.result == optimistix.RESULTS.successful
    assert ours.stats["num_steps"] == other.stats["num_steps"]

    clip = optax.clip(1.0)
    chains = [adamjax.chain(clip, adamjax.adam(jnp.asarray(rate))) for rate in (1e-2, 1e-3)]
    first = run(chains[0]).value
    traces.clear()
    assert not np.array_equal(run(chains[1]).value, first)
    assert not traces  # another learning rate compiles nothing


def test_keras_stateless_call():
    import keras

    def run(library):
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [
                keras.Input((4,)),
                keras.layers.Dense(8, activation="tanh"),
                keras.layers.Dropout(0.1),
                keras.layers.Dense(1),
            ]
        )
        params = [variable.value for variable in model.trainable_variables]
        rest = [variable.value for variable in model.non_trainable_variables]
        opt = library.adamw(1e-2, weight_decay=0.1)

        def loss(params, rest):
            found, rest = model.stateless_call(params, rest, X, training=True)
            return jnp.mean((found - Y) ** 2), rest

        @jax.jit
        def step(params, rest, state):
            (value, rest), grads = jax.value_and_grad(loss, has_aux=True)(params, rest)
            updates, state = opt.update(grads, state, params)
            return optax.apply_updates(params, updates), rest, state, value

        state, losses = opt.init(params), []
        for _ in range(30):
            params, rest, state, value = step(params, rest, state)
            losses.append(value)
        assert losses[-1] < losses[0]
        return params, losses

    assert_same(run)


def test_maxtext_factory(monkeypatch):
    # The factory imports MaxText's models for the shapes that Muon needs, and they import TensorFlow and more.
    for name in ("muon_utils", "maxtext_muon_utils"):
        module = ModuleType(f"maxtext.utils.{name}")
        module.get_muon_weight_dimension_numbers = module.get_maxtext_muon_weight_dimension_numbers = None
        monkeypatch.setitem(sys.modules, module.__name__, module)
    from maxtext.optimizers import optimizers

    config = {"opt_type": "adamw", "adam_b1": 0.9, "adam_b2": 0.95, "adam_eps": 1e-8, "adam_eps_root": 0.0}
    config |= {"adam_weight_decay": 0.1, "mu_dtype": jnp.dtype("float32")}
    config |= {"skip_step_interval": 4, "skip_step_scaling_factor": 1.0}
    variants = {
        "plain": {},
        "masked": {"adamw_mask": ["bias", "norm"]},
        "frozen": {"trainable_parameters_mask": ["kernel"]},
        "spikes": {"skip_step_on_spikes": True},
    }
    params = {"layer": {"kernel": jnp.asarray(X), "bias": jnp.ones(4)}, "norm": {"scale": jnp.ones(8)}}
    original = optax.adamw

    def run(library):
        monkeypatch.setattr(optax, "adamw", original if library is optax else library.adamw)
        for options in variants.values():
            opt = optimizers.get_optimizer(SimpleNamespace(**config | options), optax.linear_schedule(1e-2, 0.0, 10))
            new, state = params, opt.init(params)
            for loss in (1.0, 1.0, 1.0, 100.0, 1.0):
                grads = jax.tree.map(jnp.sin, new)
                updates, state = opt.update(grads, state, new, loss=loss)
                new = optax.apply_updates(new, updates)
            yield new

    assert_same(lambda library: dict(zip(variants, run(library), strict=True)))
    plain, masked, frozen, spikes = run(adamjax)
    assert not np.array_equal(masked["norm"]["scale"], plain["norm"]["scale"])
    assert np.array_equal(frozen["layer"]["bias"], params["layer"]["bias"])
    assert not np.array_equal(spikes["layer"]["kernel"], plain["layer"]["kernel"])
