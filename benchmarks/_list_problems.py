"""Small problems of many kinds, from which the list of settings that `tune` begins with was learned.

`PROBLEMS` maps the name of each to the problem and its number of steps. The losses are positive, so they can be
compared on a logarithmic scale. Searches are not judged on them, but on those of `_held_out.py`.
"""

import codecs
import contextlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from sklearn import datasets

from adamjax._core.typing import PyTree
from adamjax.problems import Problem

Array = jax.Array
Params = Any
Loss = Callable[[Params, PyTree, Array], Array]


@dataclass(frozen=True, eq=False)
class Made:
    """A problem made of functions."""

    init: Callable[[Array], Params]
    batch: Callable[[Array, Array], PyTree]
    loss: Loss
    evaluate: Callable[[Params], dict[str, Array]]


def supervised(
    init: Callable[[Array], Params],
    apply: Callable[[Params, Array], Array],
    x: np.ndarray,
    y: np.ndarray,
    loss: Callable[[Array, Array], Array],
    *,
    size: int = 32,
    clean: np.ndarray | None = None,
) -> Made:
    """Return a problem whose last quarter of the rows validates; `clean` are targets without noise to validate by."""
    order = np.random.default_rng(0).permutation(len(x))
    train, valid = np.split(order, [len(x) * 3 // 4])
    x_valid, y_valid = jnp.asarray(x[valid]), jnp.asarray((y if clean is None else clean)[valid])
    x_train, y_train = jnp.asarray(x[train]), jnp.asarray(y[train])

    def batch(step: Array, key: Array) -> PyTree:
        rows = jax.random.randint(jax.random.fold_in(key, step), (size,), 0, len(train))
        return x_train[rows], y_train[rows]

    return Made(
        init,
        batch,
        lambda params, batch, key: loss(apply(params, batch[0]), batch[1]),
        lambda params: {"loss": loss(apply(params, x_valid), y_valid)},
    )


def sampled(init: Callable[[Array], Params], draw: Callable[[Array], PyTree], loss: Loss, *, size: int = 256) -> Made:
    """Return a problem with new data at every step; `draw` makes one example."""
    seen = jax.vmap(draw)(jax.random.split(jax.random.key(12345), size))
    return Made(
        init,
        lambda step, key: jax.vmap(draw)(jax.random.split(jax.random.fold_in(key, step), 32)),
        loss,
        lambda params: {"loss": loss(params, seen, jax.random.key(54321))},
    )


# Losses.


def squares(outputs: Array, targets: Array) -> Array:
    return jnp.mean((outputs - targets) ** 2)


def huber(outputs: Array, targets: Array) -> Array:
    e = jnp.abs(outputs - targets)
    return jnp.mean(jnp.where(e < 1, e**2 / 2, e - 0.5))


def pinball(outputs: Array, targets: Array) -> Array:
    return jnp.mean(jnp.maximum(0.9 * (targets - outputs), 0.1 * (outputs - targets)))


def cross_entropy(logits: Array, labels: Array) -> Array:
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1))


# Layers.


def dense(key: Array, inputs: int, outputs: int, scale: float = 1.0) -> Params:
    return {
        "w": jax.random.normal(key, (inputs, outputs)) * scale / inputs**0.5,
        "b": jnp.zeros(outputs),
    }


def apply_dense(p: Params, x: Array) -> Array:
    return x @ p["w"] + p["b"]


def mlp(sizes: list[int], scale: float = 1.4) -> Callable[[Array], Params]:
    def init(key: Array) -> Params:
        keys = jax.random.split(key, len(sizes))
        return [dense(k, a, b, scale) for k, (a, b) in zip(keys, itertools.pairwise(sizes), strict=False)]

    return init


def apply_mlp(params: Params, x: Array, *, act: Callable[[Array], Array] = jax.nn.relu) -> Array:
    for p in params[:-1]:
        x = act(apply_dense(p, x))
    return apply_dense(params[-1], x)


def norm(x: Array) -> Array:
    return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)


def apply_residual(params: Params, x: Array) -> Array:
    x = apply_dense(params[0], x)
    for p in params[1:-1]:
        x = x + jax.nn.relu(apply_dense(p, norm(x)))
    return apply_dense(params[-1], norm(x))


def apply_normed(params: Params, x: Array) -> Array:
    for p in params[:-1]:
        x = jax.nn.gelu(norm(apply_dense(p, x)))
    return apply_dense(params[-1], x)


def conv(x: Array, w: Array) -> Array:
    return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


# Data.


def standardised(x: np.ndarray) -> np.ndarray:
    return np.asarray((x - x.mean(0)) / (x.std(0) + 1e-9), np.float32)


def bundled(load: Callable[..., Any], *, raw: bool = False, scale_y: bool = False) -> tuple[np.ndarray, np.ndarray]:
    x, y = load(return_X_y=True)
    x = np.asarray(x, np.float32) if raw else standardised(x)
    return (x, standardised(y)[:, None]) if scale_y else (x, y.astype(np.int32))


def regression(seed: int, rows: int, inputs: int, decay: float, noise: float) -> tuple[np.ndarray, np.ndarray]:
    """Return linear data whose features shrink from 1 to `decay`."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, inputs)) * np.geomspace(1, decay, inputs)
    y = x @ (rng.normal(size=inputs) / np.geomspace(1, decay, inputs)) / inputs**0.5 + noise * rng.normal(size=rows)
    return x.astype(np.float32), y[:, None].astype(np.float32)


def spirals() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    t, label = rng.uniform(0.5, 3.0, 800), rng.integers(0, 2, 800)
    angle = 2.5 * t + np.pi * label
    x = np.stack([t * np.cos(angle), t * np.sin(angle)], 1) / 2 + 0.03 * rng.normal(size=(800, 2))
    return x.astype(np.float32), label.astype(np.int32)


def parity() -> tuple[np.ndarray, np.ndarray]:
    x = np.array(list(itertools.product([-1, 1], repeat=10)), np.float32)
    return x, (np.prod(x[:, :3], axis=1) > 0).astype(np.int32)


def blobs_images() -> tuple[np.ndarray, np.ndarray]:
    """Return images of 8 by 8 of bars and crosses in noise, of 4 classes."""
    rng = np.random.default_rng(2)
    x, y = 0.3 * rng.normal(size=(1200, 8, 8, 1)), rng.integers(0, 4, 1200)
    for image, label in zip(x, y, strict=True):
        i, j = rng.integers(1, 7, 2)
        if label in (0, 2):
            image[i, j - 1 : j + 2] += 1
        if label in (1, 2):
            image[i - 1 : i + 2, j] += 1
        if label == 3:
            image[i - 1 : i + 2, j - 1 : j + 2, 0] += np.eye(3)
    return x.astype(np.float32), y.astype(np.int32)


def noisy_labels(y: np.ndarray, classes: int, share: float) -> np.ndarray:
    rng = np.random.default_rng(3)
    return np.where(rng.random(len(y)) < share, rng.integers(0, classes, len(y)), y).astype(np.int32)


def text_windows(length: int) -> tuple[np.ndarray, int]:
    """Return windows of a short English text as numbers of its letters, and how many there are."""
    with contextlib.redirect_stdout(None):
        import this  # the Zen of Python, which it prints at the first import
    text = codecs.decode(this.s, "rot13").lower() + "\n"
    letters = sorted(set(text))
    codes = np.array([letters.index(c) for c in text], np.int32)
    return np.stack([codes[i : i + length + 1] for i in range(len(codes) - length)]), len(letters)


# Problems.


def regressions() -> dict[str, tuple[Problem, int]]:
    diabetes = bundled(datasets.load_diabetes, scale_y=True)
    x, y = regression(4, 1200, 20, 1e-2, 0.1)
    heavy = (y[:, 0] + 0.3 * np.random.default_rng(5).standard_t(1.5, len(y)))[:, None].astype(np.float32)
    line = np.linspace(-1, 1, 800, dtype=np.float32)[:, None]
    wave = np.sin(9 * line) + 0.3 * np.sin(25 * line)
    powers = np.concatenate([line**k for k in range(1, 10)], 1)
    rng = np.random.default_rng(6)
    inputs = rng.normal(size=(1500, 10)).astype(np.float32)
    teacher = (np.maximum(inputs @ rng.normal(size=(10, 6)) / 3, 0) @ rng.normal(size=(6, 1))).astype(np.float32)
    digits = np.asarray(datasets.load_digits().data / 16, np.float32)
    linear, zero = partial(mlp, scale=0.0), apply_mlp
    tanh = partial(apply_mlp, act=jnp.tanh)
    return {
        "linear, small features": (supervised(linear([20, 1]), zero, x, y, squares), 200),
        "linear, raw diabetes": (
            supervised(
                linear([10, 1]), zero, bundled(datasets.load_diabetes, raw=True)[0] * 5, diabetes[1], squares, size=64
            ),
            150,
        ),
        "linear, heavy tails": (supervised(linear([20, 1]), zero, x, heavy, huber, clean=y), 150),
        "polynomial": (supervised(linear([9, 1]), zero, powers, wave, squares, size=64), 250),
        "wave, tanh": (
            supervised(mlp([1, 32, 32, 1], 2.0), partial(apply_mlp, act=jnp.tanh), line, wave, squares),
            250,
        ),
        "diabetes, MLP": (supervised(mlp([10, 24, 1]), apply_mlp, *diabetes, squares), 150),
        "diabetes, quantile": (supervised(mlp([10, 16, 1]), apply_mlp, *diabetes, pinball), 120),
        "teacher": (supervised(mlp([10, 32, 1]), apply_mlp, inputs, teacher, squares), 200),
        "teacher, noisy": (
            supervised(
                mlp([10, 32, 1]),
                apply_mlp,
                inputs,
                (teacher + rng.normal(size=teacher.shape)).astype(np.float32),
                squares,
                clean=teacher,
                size=8,
            ),
            200,
        ),
        "deep narrow, tanh": (
            supervised(mlp([10] + [8] * 10 + [1], 1.0), tanh, inputs, teacher, squares),
            150,
        ),
        "deep residual": (supervised(mlp([10] + [12] * 8 + [1]), apply_residual, inputs, teacher, squares), 150),
        "autoencoder": (supervised(mlp([64, 24, 6, 24, 64]), apply_mlp, digits, digits, squares, size=64), 150),
        "deep linear": (
            supervised(
                mlp([10, 10, 10, 10, 10], 1.0),
                partial(apply_mlp, act=lambda x: x),
                inputs,
                (inputs @ rng.normal(size=(10, 10)) * np.geomspace(1, 0.05, 10)).astype(np.float32),
                squares,
            ),
            200,
        ),
    }


def classifications() -> dict[str, tuple[Problem, int]]:
    wine, cancer, digits = map(bundled, (datasets.load_wine, datasets.load_breast_cancer, datasets.load_digits))
    rng = np.random.default_rng(7)
    rare = (rng.random(1500) < 0.04).astype(np.int32)
    scores = (rng.normal(size=(1500, 8)) + 1.0 * rare[:, None]).astype(np.float32)
    images, kinds = blobs_images()

    def init_conv(key: Array) -> Params:
        a, b, c = jax.random.split(key, 3)
        return {
            "a": jax.random.normal(a, (3, 3, 1, 6)) / 3,
            "b": jax.random.normal(b, (3, 3, 6, 6)) / 7,
            "c": dense(c, 6, 4),
        }

    def apply_conv(p: Params, x: Array) -> Array:
        x = jax.nn.relu(conv(jax.nn.relu(conv(x, p["a"])), p["b"]))
        return apply_dense(p["c"], x.max((1, 2)))

    def apply_conv_normed(p: Params, x: Array) -> Array:
        x = jax.nn.gelu(norm(conv(jax.nn.gelu(norm(conv(x, p["a"]))), p["b"])))
        return apply_dense(p["c"], x.max((1, 2)))

    return {
        "cancer, logistic": (supervised(mlp([30, 2], 0.0), apply_mlp, *cancer, cross_entropy), 150),
        "wine, raw logistic": (
            supervised(mlp([13, 3], 0.0), apply_mlp, *bundled(datasets.load_wine, raw=True), cross_entropy),
            200,
        ),
        "wine, MLP": (supervised(mlp([13, 16, 3]), apply_mlp, *wine, cross_entropy, size=16), 120),
        "digits, softmax": (supervised(mlp([64, 10], 0.0), apply_mlp, *digits, cross_entropy), 150),
        "digits, MLP": (supervised(mlp([64, 32, 10]), apply_mlp, *digits, cross_entropy), 200),
        "digits, noisy labels": (
            supervised(
                mlp([64, 32, 10]),
                apply_mlp,
                digits[0],
                noisy_labels(digits[1], 10, 0.3),
                cross_entropy,
                clean=digits[1],
            ),
            200,
        ),
        "digits, normed MLP": (supervised(mlp([64, 24, 24, 24, 10]), apply_normed, *digits, cross_entropy), 120),
        "spirals": (supervised(mlp([2, 32, 32, 2]), apply_mlp, *spirals(), cross_entropy), 250),
        "parity": (supervised(mlp([10, 48, 2]), apply_mlp, *parity(), cross_entropy, size=64), 200),
        "rare class": (supervised(mlp([8, 16, 2]), apply_mlp, scores, rare, cross_entropy, size=16), 150),
        "images, conv": (supervised(init_conv, apply_conv, images, kinds, cross_entropy, size=16), 120),
        "images, normed conv": (supervised(init_conv, apply_conv_normed, images, kinds, cross_entropy, size=16), 120),
    }


def sequences() -> dict[str, tuple[Problem, int]]:
    windows, letters = text_windows(12)
    width = 16

    def init_gru(inputs: int, outputs: int, embeds: bool) -> Callable[[Array], Params]:
        def init(key: Array) -> Params:
            e, x, h, o = jax.random.split(key, 4)
            size = width if embeds else inputs
            embed = {"embed": jax.random.normal(e, (inputs, width))} if embeds else {}
            return embed | {
                "x": dense(x, size, 3 * width),
                "h": dense(h, width, 3 * width),
                "o": dense(o, width, outputs),
            }

        return init

    def states(p: Params, x: Array) -> Array:
        """Return the states of a GRU over the second axis."""

        def step(h: Array, x: Array) -> tuple[Array, Array]:
            a, b = apply_dense(p["x"], x), apply_dense(p["h"], h)
            z, r = (
                jax.nn.sigmoid(a[:, i * width : (i + 1) * width] + b[:, i * width : (i + 1) * width]) for i in (0, 1)
            )
            h = (1 - z) * jnp.tanh(a[:, 2 * width :] + r * b[:, 2 * width :]) + z * h
            return h, h

        first = jnp.zeros((x.shape[0], width))
        return jax.lax.scan(step, first, jnp.moveaxis(x, 1, 0))[1]

    def adding(key: Array) -> PyTree:
        a, b = jax.random.split(key)
        marks = jax.nn.one_hot(jax.random.choice(b, 10, (2,), replace=False), 10).sum(0)
        x = jax.random.uniform(a, (10,))
        return jnp.stack([x, marks], 1), (x * marks).sum()[None]

    def char_gru(p: Params, x: Array) -> Array:
        return apply_dense(p["o"], jnp.moveaxis(states(p, p["embed"][x]), 0, 1))

    def init_attention(tokens: int, length: int) -> Callable[[Array], Params]:
        def init(key: Array) -> Params:
            e, s, q, o, a, b, u = jax.random.split(key, 7)
            return {
                "embed": jax.random.normal(e, (tokens, width)) * 0.5,
                "place": jax.random.normal(s, (length, width)) * 0.5,
                "qkv": dense(q, width, 3 * width),
                "o": dense(o, width, width),
                "a": dense(a, width, 2 * width),
                "b": dense(b, 2 * width, width),
                "u": dense(u, width, tokens),
            }

        return init

    def attention(p: Params, x: Array, *, causal: bool) -> Array:
        h = p["embed"][x] + p["place"]
        q, k, v = jnp.split(apply_dense(p["qkv"], norm(h)), 3, -1)
        q, k, v = (y.reshape(*y.shape[:-1], 2, width // 2) for y in (q, k, v))
        scores = jnp.einsum("bihd,bjhd->bhij", q, k) / (width // 2) ** 0.5
        if causal:
            scores = jnp.where(jnp.tri(x.shape[1], dtype=bool), scores, -1e9)
        mixed = jnp.einsum("bhij,bjhd->bihd", jax.nn.softmax(scores), v).reshape(h.shape)
        h = h + apply_dense(p["o"], mixed)
        h = h + apply_dense(p["b"], jax.nn.relu(apply_dense(p["a"], norm(h))))
        return apply_dense(p["u"], norm(h))

    def reversing(key: Array) -> PyTree:
        x = jax.random.randint(key, (8,), 0, 6)
        return x, x[::-1]

    def of(apply: Callable[[Params, Array], Array], loss: Callable[[Array, Array], Array]) -> Loss:
        return lambda p, batch, key: loss(apply(p, batch[0]), batch[1])

    bigram = {"init": lambda key: {"w": jax.random.normal(key, (letters, letters)) * 0.1}}
    x, y = windows[:, :-1], windows[:, 1:]
    return {
        "adding, GRU": (
            sampled(
                init_gru(2, 1, False),
                adding,
                of(lambda p, x: apply_dense(p["o"], states(p, x)[-1]), squares),
            ),
            200,
        ),
        "letters, GRU": (supervised(init_gru(letters, letters, True), char_gru, x, y, cross_entropy, size=16), 150),
        "letters, attention": (
            supervised(init_attention(letters, 12), partial(attention, causal=True), x, y, cross_entropy, size=16),
            150,
        ),
        "reversing, attention": (
            sampled(init_attention(6, 8), reversing, of(partial(attention, causal=False), cross_entropy)),
            150,
        ),
        "letters, bigram": (
            supervised(bigram["init"], lambda p, x: p["w"][x], x, y, cross_entropy, size=8),
            120,
        ),
    }


def others() -> dict[str, tuple[Problem, int]]:
    rng = np.random.default_rng(8)
    left, right = rng.normal(size=(60, 4)), rng.normal(size=(40, 4))
    table = jnp.asarray(left @ right.T / 2 + 0.1 * rng.normal(size=(60, 40)), jnp.float32)
    curvature = jnp.asarray(np.geomspace(1, 1e-4, 40), jnp.float32)
    rotation = jnp.asarray(np.linalg.qr(rng.normal(size=(40, 40)))[0], jnp.float32)
    digits = jnp.asarray(datasets.load_digits().data / 16, jnp.float32)
    rewards = jnp.asarray(rng.normal(size=(6, 4)), jnp.float32)
    groups = jnp.asarray(rng.integers(0, 30, 200))

    def entry(key: Array) -> PyTree:
        i, j = jax.random.randint(key, (2,), 0, jnp.array([60, 40]))
        return i, j, table[i, j]

    def init_factors(key: Array) -> Params:
        a, b = jax.random.split(key)
        return {"a": jax.random.normal(a, (60, 4)) * 0.3, "b": jax.random.normal(b, (40, 4)) * 0.3}

    def factors_loss(p: Params, batch: PyTree, key: Array) -> Array:
        i, j, y = batch
        return jnp.mean(((p["a"][i] * p["b"][j]).sum(-1) - y) ** 2)

    def quadratic(noise: float, turned: bool) -> Made:
        turn = rotation if turned else jnp.eye(40)

        def height(x: Array) -> Array:
            return 0.5 * jnp.sum(curvature * (turn @ (x - 1)) ** 2)

        return Made(
            lambda key: jax.random.normal(key, (40,)),
            lambda step, key: jax.random.normal(jax.random.fold_in(key, step), (40,)),
            lambda x, batch, key: height(x) + noise * jnp.vdot(batch * jnp.sqrt(curvature), turn @ x),
            lambda x: {"loss": height(x) + 1e-5},
        )

    def rosenbrock(x: Array, batch: PyTree, key: Array) -> Array:
        a, b = x[:-1], x[1:]
        return jnp.mean(10 * (b - a**2) ** 2 + (1 - a) ** 2) + 0.1 * jnp.vdot(batch, x)

    def bandit(p: Params, batch: PyTree, key: Array) -> Array:
        """Return the loss of REINFORCE: its gradient is a noisy one of the regret."""
        context, uniform = batch
        logits = apply_mlp(p, jax.nn.one_hot(context, 6))
        action = jax.random.categorical(key, logits)
        gained = jax.lax.stop_gradient(rewards[context, action] + uniform)
        taken = jnp.take_along_axis(jax.nn.log_softmax(logits), action[:, None], 1)[:, 0]
        return -jnp.mean(gained * taken)

    def regret(p: Params) -> dict[str, Array]:
        chances = jax.nn.softmax(apply_mlp(p, jnp.eye(6)))
        return {"loss": jnp.mean(rewards.max(1) - (chances * rewards).sum(1)) + 1e-3}

    def bandit_batch(step: Array, key: Array) -> PyTree:
        a, b = jax.random.split(jax.random.fold_in(key, step))
        return jax.random.randint(a, (16,), 0, 6), 0.5 * jax.random.normal(b, (16,))

    def vae(p: Params, x: Array, key: Array) -> Array:
        mean, log_scale = jnp.split(apply_mlp(p["encode"], x), 2, -1)
        z = mean + jnp.exp(log_scale) * jax.random.normal(key, mean.shape)
        error = jnp.sum((apply_mlp(p["decode"], z) - x) ** 2, -1) / 0.1
        return jnp.mean(error + 0.5 * jnp.sum(mean**2 + jnp.exp(2 * log_scale) - 2 * log_scale - 1, -1))

    def pictures(step: Array, key: Array) -> Array:
        return digits[jax.random.randint(jax.random.fold_in(key, step), (32,), 0, 1400)]

    def oscillator(p: Params, t: Array, key: Array) -> Array:
        """Return the residual of u'' = -9 u, u(0) = 1, u'(0) = 0."""

        def u(t: Array) -> Array:
            return apply_mlp(p, t[None], act=jnp.tanh)[0]

        residual = jax.vmap(jax.grad(jax.grad(u)))(t) + 9 * jax.vmap(u)(t)
        return jnp.mean(residual**2) / 20 + (u(jnp.zeros(())) - 1) ** 2 + jax.grad(u)(jnp.zeros(())) ** 2

    def poisson(p: Params, points: Array, key: Array) -> Array:
        """Return the residual of Laplace(u) = f in a square, u = 0 on its border."""

        def u(x: Array) -> Array:
            return jnp.prod(x * (1 - x)) * 16 * apply_mlp(p, 2 * x - 1, act=jnp.tanh)[0]

        laplace = jax.vmap(lambda x: jnp.trace(jax.hessian(u)(x)))(points)
        return jnp.mean((laplace + 8 * jnp.sin(5 * points[:, 0])) ** 2) / 20

    def denoising(p: Params, x: Array, key: Array) -> Array:
        a, b = jax.random.split(key)
        level = jax.random.uniform(a, (len(x), 1))
        noise = jax.random.normal(b, x.shape)
        seen = jnp.sqrt(1 - level) * x + jnp.sqrt(level) * noise
        return jnp.mean((apply_mlp(p, jnp.concatenate([seen, level], 1), act=jax.nn.silu) - noise) ** 2)

    def moon(key: Array) -> Array:
        a, b = jax.random.split(key)
        angle, side = jnp.pi * jax.random.uniform(a), jnp.where(jax.random.bernoulli(b), 1.0, -1.0)
        return side * jnp.array([jnp.cos(angle) - 0.5, jnp.sin(angle) - 0.25])

    def word(key: Array) -> PyTree:
        a, b, c = jax.random.split(key, 3)
        i = (200 * jax.random.uniform(a) ** 3).astype(int)
        same = jnp.argsort(jnp.where(groups == groups[i], jax.random.uniform(b, (200,)), 2.0))[0]
        return i, same, jax.random.randint(c, (4,), 0, 200)

    def skipgram(p: Params, batch: PyTree, key: Array) -> Array:
        i, same, others = batch
        near = (p["in"][i] * p["out"][same]).sum(-1)
        far = jnp.einsum("bd,bkd->bk", p["in"][i], p["out"][others])
        return -jnp.mean(jax.nn.log_sigmoid(near) + jax.nn.log_sigmoid(-far).sum(-1))

    def init_words(key: Array) -> Params:
        return {"in": jax.random.normal(key, (200, 8)) * 0.3, "out": jnp.zeros((200, 8))}

    def uniform(key: Array) -> Array:
        return jax.random.uniform(key)

    def init_vae(key: Array) -> Params:
        a, b = jax.random.split(key)
        return {"encode": mlp([64, 24, 8], 1.0)(a), "decode": mlp([4, 24, 64], 1.0)(b)}

    x, y = map(jnp.asarray, regression(9, 300, 10, 0.1, 0.3))

    def variational(p: Params, rows: Array, key: Array) -> Array:
        """Return the negative evidence bound of Bayesian linear regression."""
        w = p["mean"] + jnp.exp(p["log_scale"]) * jax.random.normal(key, (10,))
        likelihood = jnp.mean((x[rows] @ w - y[rows, 0]) ** 2) * 300 / 0.18
        prior = 0.5 * jnp.sum(p["mean"] ** 2 + jnp.exp(2 * p["log_scale"]) - 2 * p["log_scale"] - 1)
        return (likelihood + prior) / 300

    def contrast(p: Params, x: Array, key: Array) -> Array:
        """Return the loss of matching two noisy views of the same digits."""
        a, b = (apply_mlp(p, x + 0.3 * jax.random.normal(k, x.shape)) for k in jax.random.split(key))
        a, b = (z / jnp.sqrt((z**2).sum(-1, keepdims=True) + 1e-6) for z in (a, b))
        return cross_entropy(10 * a @ b.T, jnp.arange(len(x)))

    key = jax.random.key(99)
    return {
        "factorisation": (sampled(init_factors, entry, factors_loss, size=1000), 250),
        "skipgram": (sampled(init_words, word, skipgram, size=500), 150),
        "quadratic": (quadratic(0.0, False), 200),
        "quadratic, turned and noisy": (quadratic(0.3, True), 200),
        "rosenbrock": (
            Made(
                lambda key: jax.random.normal(key, (10,)) * 0.5,
                lambda step, key: jax.random.normal(jax.random.fold_in(key, step), (10,)),
                rosenbrock,
                lambda x: {"loss": rosenbrock(x, jnp.zeros(10), key) + 1e-3},
            ),
            250,
        ),
        "bandit": (Made(mlp([6, 12, 4], 0.5), bandit_batch, bandit, regret), 200),
        "digits, VAE": (
            Made(init_vae, pictures, vae, lambda p: {"loss": vae(p, digits[1400:], key)}),
            150,
        ),
        "digits, contrast": (
            Made(mlp([64, 24, 8]), pictures, contrast, lambda p: {"loss": contrast(p, digits[1400:1500], key)}),
            120,
        ),
        "variational regression": (
            Made(
                lambda key: {"mean": jnp.zeros(10), "log_scale": jnp.full(10, -2.0)},
                lambda step, key: jax.random.randint(jax.random.fold_in(key, step), (32,), 0, 225),
                variational,
                lambda p: {"loss": variational(p, jnp.arange(225, 300), key)},
            ),
            200,
        ),
        "oscillator": (sampled(mlp([1, 16, 16, 1], 1.5), uniform, oscillator), 200),
        "poisson": (
            sampled(mlp([2, 16, 16, 1]), lambda key: jax.random.uniform(key, (2,)), poisson, size=128),
            150,
        ),
        "denoising": (sampled(mlp([3, 32, 32, 2]), moon, denoising), 200),
    }


def problems() -> dict[str, tuple[Problem, int]]:
    """Return each problem by name, with its number of steps."""
    return regressions() | classifications() | sequences() | others()
