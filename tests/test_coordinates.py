"""The coordinate check: activations that change alike at every width."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adamjax
from adamjax.diagnostics import CoordinateCheck, coordinate_check

X = jnp.linspace(-1, 1, 16 * 6).reshape(16, 6) ** 3
LAYERS = ["embed", "hidden", "head"]


def perceptron(width, seed):
    """Initialized as usual: variances 1 / fan-in."""
    shapes = zip(LAYERS, [(6, width), (width, width), (width, 2)], strict=True)
    key = jax.random.key(seed)
    return {name: jax.random.normal(key, shape) * shape[0] ** -0.5 for name, shape in shapes}


def loss(params):
    found = {}
    found["embed"] = X @ params["embed"]
    found["hidden"] = jnp.tanh(found["embed"]) @ params["hidden"]
    found["head"] = jnp.tanh(found["hidden"]) @ params["head"]
    return jnp.mean((found["head"] - jnp.float32(1)) ** 2), found


def plain(width, seed):
    return perceptron(width, seed), loss, adamjax.adam(3e-2)


def transferred(width, seed):
    small, large = perceptron(32, seed), perceptron(width, seed)
    opt = adamjax.transfer(adamjax.adam(3e-2), small, large)
    return opt.rescale(small, large), loss, opt


@pytest.mark.slow
def test_passes_with_transfer_and_fails_without(tmp_path):
    widths = [32, 128, 512]
    found, without = (coordinate_check(make, widths=widths) for make in (transferred, plain))
    assert found.passed
    assert not without.passed
    assert without.slopes["head"] > found.tolerance
    assert found.changes.shape == (3, 3, 4)
    assert str(found).count("passes") == 3
    assert "grows" in str(without)
    found.plot(tmp_path / "coordinates.png")
    assert (tmp_path / "coordinates.png").read_bytes().startswith(b"\x89PNG")


def residual(depth, seed, width=32):
    """A residual stream, with `depth` perceptrons that add to it."""
    keys = iter(jax.random.split(jax.random.key(seed), 2 * depth + 2))

    def kernel(fan_in, fan_out):
        return jax.random.normal(next(keys), (fan_in, fan_out)) * fan_in**-0.5

    blocks = {f"block_{i}": {"up": kernel(width, width), "down": kernel(width, width)} for i in range(depth)}
    return {"embed": kernel(6, width), "blocks": blocks, "head": kernel(width, 2)}


def normalize(x):
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + jnp.float32(1e-5))


def loss_of_residual(params, factor):
    x = X @ params["embed"]
    for block in params["blocks"].values():
        x = x + jnp.float32(factor) * (jax.nn.relu(normalize(x) @ block["up"]) @ block["down"])
    out = normalize(x) @ params["head"]
    return jnp.mean((out - jnp.float32(1)) ** 2), {"stream": x, "out": out}


def deep(depth, seed):
    return residual(depth, seed), partial(loss_of_residual, factor=1.0), adamjax.adam(1e-2)


def transferred_deep(depth, seed):
    small, large = residual(2, seed), residual(depth, seed)
    opt = adamjax.transfer(adamjax.adam(1e-2), small, large, blocks="block_[0-9]+")
    (factor,) = {x.factors.residual for x in opt.parameters if "block_" in x.path}
    return large, partial(loss_of_residual, factor=factor), opt


@pytest.mark.slow
def test_passes_in_depth_and_fails_without():
    found, without = (coordinate_check(make, widths=[2, 8, 16], seeds=2) for make in (transferred_deep, deep))
    assert found.passed, str(found)
    assert without.slopes["stream"] > 2 * found.tolerance, str(without)


@pytest.mark.numbers
def test_slopes_are_powers_of_the_width():
    widths = np.array([16, 64, 256])
    powers = {"alike": 0.1, "grows": 0.5, "vanishes": -0.5}
    changes = np.stack([3 * widths[:, None] ** power * np.ones(2) for power in powers.values()])
    found = CoordinateCheck(widths, list(powers), changes, 0.25)
    assert found.slopes == pytest.approx(powers)
    assert not found.passed
    verdicts = [line.split()[-1] for line in str(found).splitlines()[1:]]
    assert verdicts == ["passes", "grows", "vanishes"]
    dead = CoordinateCheck(widths, ["dead"], np.zeros((1, 3, 2)), 0.25)
    assert not dead.passed
    assert "does not change" in str(dead)


def only_ones(width, seed):
    return {"w": jnp.ones(width)}, lambda params: jnp.sum(params["w"]), adamjax.adam()


def of_no_optimizer(width, seed):
    return {"w": jnp.ones(width)}, loss, "adam"


def of_other_layers(width, seed):
    params = {"w": jnp.ones(width)}
    return params, lambda params: (jnp.sum(params["w"]), {f"layer_{width}": params["w"]}), adamjax.adam()


@pytest.mark.parametrize(
    ("make", "changes", "error", "message"),
    [
        (plain, {"widths": [8]}, ValueError, r"^Invalid widths value: \[8\]; widths must have at least two numbers"),
        (plain, {"widths": [8, 0]}, ValueError, r"^Invalid widths value: 0"),
        (plain, {"widths": 8}, ValueError, r"^Invalid widths value: 8"),
        (plain, {"steps": 0}, ValueError, r"^Invalid steps value"),
        ("model", {}, TypeError, r"^Invalid make value: 'model'"),
        (lambda width, seed: None, {}, TypeError, r"^make returned None, expected \(params, loss, opt\)"),
        (only_ones, {}, TypeError, r"^the loss that make returns gave .*expected \(loss, activations\)"),
        (of_no_optimizer, {}, TypeError, r"^the optimizer that make returns is 'adam'"),
        (of_other_layers, {}, ValueError, r"^the activations at width 4 are layer_4, and at width 2 layer_2"),
    ],
)
def test_bad_input(make, changes, error, message):
    with pytest.raises(error, match=message):
        coordinate_check(make, **({"widths": [2, 4], "seeds": 1, "steps": 1} | changes))
