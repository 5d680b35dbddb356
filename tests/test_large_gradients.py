"""One large finite gradient among others: parameters stay finite, and learn on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import gradients
from tolerances import TORCH

import adamjax
from adamjax import interop

pytestmark = pytest.mark.numbers

INT8, INT4 = (adamjax.quantized(name, min_size=1) for name in ("int8", "int4"))
FORMATS = {
    "float32": {},
    "bfloat16": {"mu_dtype": "bfloat16", "nu_dtype": "bfloat16"},
    "float16": {"mu_dtype": "float16"},
    "int8": {"mu_dtype": INT8, "nu_dtype": INT8},
    "int4": {"mu_dtype": INT4, "nu_dtype": INT4},
    "int4 and int8": {"mu_dtype": INT4, "nu_dtype": INT8},
}
VARIANTS = {
    "adam": adamjax.adam,
    "adamw": adamjax.adamw,
    "nadam": adamjax.nadam,
    "amsgrad": adamjax.amsgrad,
    "corrected": lambda *a, **kw: adamjax.adam(*a, amsgrad="corrected", **kw),
    "adamax": adamjax.adamax,
}
LARGEST = float(np.finfo(np.float32).max)


def course(opt, first, steps=4, others=1.0):
    """The parameters after each step; the first gradient of the first one is large."""
    params = jnp.zeros(64)
    state, step, found = opt.init(params), jax.jit(opt.step), []
    for t in range(steps):
        g = jnp.full(64, others)
        params, state = step(g.at[0].set(first) if t == 0 else g, state, params)
        found.append(params)
    assert all(np.all(np.isfinite(np.asarray(x, np.float32))) for x in jax.tree.leaves(state))
    return np.asarray(found)


@pytest.mark.parametrize("first", [1e19, 1e20, -1e30, LARGEST])
@pytest.mark.parametrize("name", ["adam", "adamw", "amsgrad"])
def test_as_torch_with_a_gradient_that_it_can_square(name, first):
    """A step is the same for all gradients that are far larger than the rest."""
    torch = pytest.importorskip("torch")
    tensor = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    kind = {"amsgrad": True} if name == "amsgrad" else {}
    theirs = (torch.optim.AdamW if name == "adamw" else torch.optim.Adam)([tensor], lr=0.1, weight_decay=0.0, **kind)
    make = {"adam": adamjax.adam, "adamw": adamjax.adamw, "amsgrad": adamjax.amsgrad}[name]
    found = course(make(0.1, weight_decay=0.0), first)[:, 0]
    for t, p in enumerate(found):
        tensor.grad = torch.tensor([np.copysign(1e17, first) if t == 0 else 1.0], dtype=torch.float64)
        theirs.step()
        np.testing.assert_allclose(p, tensor.item(), rtol=100 * TORCH["float32"])


@pytest.mark.parametrize(
    ("variant", "format"),
    [
        *(("nadam", format) for format in FORMATS),
        *((variant, "float32") for variant in VARIANTS),
        *((variant, "int8") for variant in ("amsgrad", "adamax")),
    ],
)
def test_finite_in_every_format_and_variant(variant, format):
    found = course(VARIANTS[variant](0.1, **FORMATS[format]), LARGEST)
    assert np.all(np.abs(found) < 1)
    if "int4" not in format:  # its second moments have not the range for the others of the block
        assert np.all(found[-1, 1:] < -0.3)


@pytest.mark.parametrize("make", [adamjax.radam, interop.torch.radam])
def test_rectified_steps_are_finite(make):
    """The first ones are not divided by anything."""
    assert np.all(np.isfinite(course(make(0.1), LARGEST)))


@pytest.mark.parametrize("sign", [1, -1])
def test_large_gradients_of_either_sign_in_turn(sign):
    for make in (adamjax.adam, adamjax.adamax):
        params, opt = jnp.zeros(2), make(0.1)
        state = opt.init(params)
        for t in range(6):
            params, state = opt.step(jnp.array([LARGEST, 1.0]) * sign * (-1) ** t, state, params)
            assert np.all(np.abs(params) <= 0.2)
            # Adam's steps do not depend on the size of gradients.
            np.testing.assert_allclose(params[0], params[1], rtol=1e-4)


def test_complex_parameters():
    opt, params = adamjax.adam(0.1), jnp.zeros(2, jnp.complex64)
    state = opt.init(params)
    for g in (LARGEST * (1 + 1j), 1 + 1j, 1 + 1j):
        params, state = opt.step(jnp.array([g, 1 + 1j], jnp.complex64), state, params)
        assert np.all(np.isfinite(params))
    np.testing.assert_allclose(np.abs(params[1]), 0.3, rtol=1e-4)


def test_one_pass_does_the_same():
    shape = (16, 1040)
    g = jnp.asarray(gradients(shape, 1)[0]).at[0, :3].set(jnp.array([1e20, -LARGEST, 1e30]))
    for kind in ({}, {"nesterov": True}, {"amsgrad": True}):
        plain, fused = (adamjax.adam(0.1, fused=fused, **kind) for fused in (False, "auto"))
        params, ends = jnp.zeros(shape), []
        for opt in (plain, fused):
            p, state, step = params, opt.init(params), jax.jit(opt.step)
            for grads in (g, jnp.ones(shape), -jnp.ones(shape)):
                p, state = step(grads, state, p)
            ends.append(np.asarray(p))
        np.testing.assert_allclose(ends[1], ends[0], rtol=1e-5, atol=1e-7)
        assert np.all(np.isfinite(ends[0]))


def test_infinity_still_shows():
    opt, params = adamjax.adam(0.1), jnp.zeros(2)
    _, state = opt.step(jnp.array([jnp.inf, 1.0]), opt.init(params), params)
    assert not np.isfinite(state[0].nu[0])
    assert np.isfinite(state[0].nu[1])


def test_clipping_by_the_global_norm_survives_it():
    opt = adamjax.chain(adamjax.clip_by_global_norm(1.0), adamjax.adam(0.1))
    params = {"a": jnp.zeros(3), "b": jnp.zeros(1, jnp.bfloat16)}
    grads = {"a": jnp.array([1e20, 1.0, -LARGEST]), "b": jnp.ones(1, jnp.bfloat16)}
    new, _ = opt.step(grads, opt.init(params), params)
    np.testing.assert_allclose(new["a"][::2], [-0.1, 0.1], rtol=1e-5)
    clipped, _ = adamjax.clip_by_global_norm(1.0).update(grads, ())
    np.testing.assert_allclose(
        np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in clipped.values())), 1, rtol=1e-5
    )


def test_gradients_whose_squares_underflow():
    """The second moment is 0 then; eps keeps the step from being more than one."""
    for make in (adamjax.adam, adamjax.nadam, adamjax.amsgrad):
        for b2 in (0.9, 0.999, 0.99999):
            opt, params = make(1.0, b2=b2, eps=0.0), jnp.zeros(9)
            new, _ = opt.step(jnp.logspace(-22, -14, 9), opt.init(params), params)
            assert np.all(np.abs(new) < 2)
            np.testing.assert_allclose(new[-1], new[-2], rtol=0.05)
