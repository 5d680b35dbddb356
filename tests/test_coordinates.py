"""The coordinate check: activations that change alike at every width."""

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
