"""Fourteen small problems to judge searches by, none of which the list of `tune` was learned on.

Their models and data are others, too; only the convolutional network sees digits, as some of the list's problems do.

`HELD_OUT` maps the name of each to the problem and its number of steps. The losses are positive, so they can be
compared on a logarithmic scale. Validation data are rows left out of training, fresh draws, or the exact solution.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from sklearn.datasets import load_iris

from adamjax._core.typing import PyTree
from adamjax.problems import Problem, digits_convnet
from benchmarks._list_problems import Made, apply_dense, cross_entropy, dense, squares

Init = Callable[[Array], PyTree]
Batch = Callable[[Array, Array], Any]
Apply = Callable[[PyTree, Any], Array]
Distance = Callable[[Array, Array], Array]


def supervised(init: Init, apply: Apply, distance: Distance, batch: Batch, valid: Batch) -> Made:
    """Return a problem to predict targets; batches are (inputs, targets), and `valid` gives the one to validate by."""

    def loss(params: PyTree, batch: tuple[Array, Array], key: Array) -> Array:
        return distance(apply(params, batch[0]), batch[1])

    return Made(init, batch, loss, lambda params: {"loss": loss(params, one(valid), jax.random.key(0))})


def rows(x: np.ndarray, y: np.ndarray, size: int) -> Batch:
    """Return batches of random rows of arrays."""

    def batch(step: Array, key: Array) -> tuple[Array, Array]:
        chosen = jax.random.randint(jax.random.fold_in(key, step), (size,), 0, len(y))
        return jnp.asarray(x)[chosen], jnp.asarray(y)[chosen]

    return batch


def whole(x: np.ndarray, y: np.ndarray) -> Batch:
    """Return batches of all rows of arrays."""
    return lambda step, key: (jnp.asarray(x), jnp.asarray(y))


def draws(draw: Callable[[Array], Any], size: int) -> Batch:
    """Return batches of new examples; `draw` makes one."""
    return lambda step, key: jax.vmap(draw)(jax.random.split(jax.random.fold_in(key, step), size))


def one(batch: Batch) -> Any:
    """Return one batch, always the same."""
    return batch(jnp.int32(0), jax.random.key(12345))


def layers(*sizes: int, gain: float = 1.0) -> Init:
    """Return the initialization of a perceptron."""
    pairs = list(itertools.pairwise(sizes))
    return lambda key: [dense(k, *pair, gain) for k, pair in zip(jax.random.split(key, len(pairs)), pairs, strict=True)]


def perceptron(act: Callable[[Array], Array] = jax.nn.relu) -> Apply:
    def apply(params: PyTree, x: Array) -> Array:
        for p in params[:-1]:
            x = act(apply_dense(p, x))
        return apply_dense(params[-1], x)

    return apply


def normalized(x: Array) -> Array:
    """Return a layer normalization without parameters."""
    return jax.nn.standardize(x, epsilon=1e-5)


def modular_addition(n: int = 12, width: int = 24) -> Made:
    """A transformer of one block adds two numbers modulo n."""
    x = np.array(list(itertools.product(range(n), repeat=2)), np.int32)
    y = x.sum(1, dtype=np.int32) % n

    def init(key: Array) -> PyTree:
        keys = jax.random.split(key, 7)
        sizes = {"qkv": (width, 3 * width), "mix": (width, width), "up": (width, 2 * width), "down": (2 * width, width)}
        blocks = {name: dense(k, *size) for k, (name, size) in zip(keys[3:], sizes.items(), strict=True)}
        tokens, places = (jax.random.normal(k, (m, width)) for k, m in zip(keys, (n, 2), strict=False))
        return blocks | {"tokens": tokens, "places": places, "head": dense(keys[2], width, n)}

    def apply(p: PyTree, x: Array) -> Array:
        h = jax.nn.one_hot(x, n) @ p["tokens"] + p["places"]
        q, k, v = jnp.split(apply_dense(p["qkv"], normalized(h)), 3, -1)
        scores = jax.nn.softmax(jnp.einsum("bid,bjd->bij", q, k) / width**0.5)
        h = h + apply_dense(p["mix"], scores @ v)
        h = h + apply_dense(p["down"], jax.nn.gelu(apply_dense(p["up"], normalized(h))))
        return apply_dense(p["head"], normalized(h[:, -1]))

    def smoothed(logits: Array, labels: Array) -> Array:  # so that what is learned does not go on to infinity
        uniform = -jax.nn.log_softmax(logits).mean()
        return 0.95 * cross_entropy(logits, labels) + 0.05 * uniform

    return supervised(init, apply, smoothed, rows(x, y, 64), whole(x, y))


def sines(length: int = 20, width: int = 16) -> Made:
    """An LSTM forecasts sums of two sines, observed with noise."""

    def draw(key: Array) -> tuple[Array, Array]:
        a, b, c = jax.random.split(key, 3)
        frequencies = jax.random.uniform(a, (2, 1), minval=0.2, maxval=1.2)
        phases = jax.random.uniform(b, (2, 1), maxval=2 * math.pi)
        wave = jnp.sin(frequencies * jnp.arange(length + 1) + phases).sum(0)
        return wave[:-1] + 0.05 * jax.random.normal(c, (length,)), wave[length // 2 + 1 :]

    def init(key: Array) -> PyTree:
        a, b = jax.random.split(key)
        return {"cell": dense(a, 1 + width, 4 * width), "head": dense(b, width, 1)}

    def apply(p: PyTree, x: Array) -> Array:
        def step(carry: tuple[Array, Array], x: Array) -> tuple[tuple[Array, Array], Array]:
            h, c = carry
            i, f, g, o = jnp.split(apply_dense(p["cell"], jnp.concatenate([x[:, None], h], 1)), 4, -1)
            c = jax.nn.sigmoid(f + 1) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), apply_dense(p["head"], h)[:, 0]

        zeros = jnp.zeros((len(x), width))
        return jax.lax.scan(step, (zeros, zeros), x.T)[1].T[:, length // 2 :]

    return supervised(init, apply, squares, draws(draw, 32), draws(draw, 256))


def heat() -> Made:
    """A network solves u_t = u_xx / 10 on [0, 1] with u = 0 at the ends; judged by the exact solution."""
    points = np.random.default_rng(0).uniform(size=(256, 2)).astype(np.float32)
    network = perceptron(jnp.tanh)

    def exact(x: Array, t: Array) -> Array:
        slow, fast = (jnp.sin(k * math.pi * x) * jnp.exp(-0.1 * (k * math.pi) ** 2 * t) for k in (1, 3))
        return slow + 0.5 * fast

    def loss(params: PyTree, points: Array, key: Array) -> Array:
        def u(x: Array, t: Array) -> Array:
            return network(params, jnp.stack([x, t]))[0]

        x, t = points.T
        left = jax.vmap(jax.grad(u, 1))(x, t) - 0.1 * jax.vmap(jax.grad(jax.grad(u)))(x, t)
        ends = [jax.vmap(u)(jnp.full_like(t, end), t) for end in (0, 1)]
        start = jax.vmap(u)(x, jnp.zeros_like(x)) - exact(x, jnp.zeros_like(x))
        return jnp.mean(left**2) + 10 * jnp.mean(start**2) + 10 * sum(jnp.mean(end**2) for end in ends)

    def evaluate(params: PyTree) -> dict[str, Array]:
        return {"loss": squares(network(params, jnp.asarray(points))[:, 0], exact(*jnp.asarray(points).T)) + 1e-3}

    return Made(layers(2, 20, 20, 1), draws(lambda key: jax.random.uniform(key, (2,)), 64), loss, evaluate)


def ratings(users: int = 300, items: int = 200, rank: int = 3) -> Made:
    """A recommender with biases and factors; most users and items are rare, so gradients are sparse."""
    rng = np.random.default_rng(2)
    pairs = np.stack([(n * rng.uniform(size=5000) ** 2).astype(np.int32) for n in (users, items)], 1)
    (i, j), (p, q) = pairs.T, (rng.normal(size=(n, rank)) for n in (users, items))
    clean = 3.5 + 0.5 * rng.normal(size=users)[i] + 0.5 * rng.normal(size=items)[j] + 0.5 * (p[i] * q[j]).sum(1)
    clean, seen = clean.astype(np.float32), (clean + 0.3 * rng.normal(size=len(i))).astype(np.float32)

    def init(key: Array) -> PyTree:
        a, b = jax.random.split(key)
        factors = 0.3 * jax.random.normal(a, (users, rank)), 0.3 * jax.random.normal(b, (items, rank))
        return {"factors": factors, "biases": (jnp.zeros(users), jnp.zeros(items)), "mean": jnp.zeros(())}

    def apply(params: PyTree, x: Array) -> Array:
        (p, q), (b, c) = params["factors"], params["biases"]
        i, j = x.T
        return params["mean"] + b[i] + c[j] + (p[i] * q[j]).sum(-1)

    return supervised(init, apply, squares, rows(pairs[:4000], seen[:4000], 64), whole(pairs[4000:], clean[4000:]))


def iris() -> Made:
    """A perceptron of raw measurements."""
    x, y = load_iris(return_X_y=True)
    order = np.random.default_rng(3).permutation(len(y))
    x, y = x[order].astype(np.float32), y[order].astype(np.int32)
    return supervised(
        layers(4, 16, 3), perceptron(), cross_entropy, rows(x[:100], y[:100], 32), whole(x[100:], y[100:])
    )


def deep(depth: int = 20, width: int = 12) -> Made:
    """Twenty narrow layers of leaky ReLUs classify by two curves."""
    x = np.random.default_rng(4).normal(size=(2000, 4)).astype(np.float32)
    y = ((x[:, 0] > np.abs(x[:, 1]) - 0.8) + 2 * (x[:, 2] > x[:, 3])).astype(np.int32)
    init = layers(4, *[width] * depth, 4, gain=1.4)
    batch = rows(x[:1500], y[:1500], 64)
    return supervised(init, perceptron(jax.nn.leaky_relu), cross_entropy, batch, whole(x[1500:], y[1500:]))


def chain(states: int = 10, horizon: int = 20, slip: float = 0.1, start: int = 4) -> Made:
    """An actor and a critic on a chain: a small reward at its near end, a large one at its far end.

    Each state has three actions in an order of its own, of which one leads towards the far end, and the others to
    either side.
    The loss is that of REINFORCE with a baseline; the evaluation computes the expected return exactly.
    """
    forth = np.random.default_rng(9).integers(0, 3, states)  # the action that leads to the far end
    far = np.where(forth[:, None] == np.arange(3), 1 - slip, 0.4).astype(np.float32)  # its probability
    gains = np.zeros(states, np.float32)
    gains[0], gains[-1] = 0.1, 1.0
    back, ahead = np.maximum(np.arange(states) - 1, 0), np.minimum(np.arange(states) + 1, states - 1)
    network, one_hot = perceptron(jnp.tanh), np.eye(states, dtype=np.float32)

    def expected(chances: Any) -> Any:
        """Return the expected sum of rewards, by the probabilities to go ahead in each state."""
        value = gains * 0
        for _ in range(horizon):
            value = (gains + value)[ahead] * chances + (gains + value)[back] * (1 - chances)
        return value[start]

    def init(key: Array) -> PyTree:
        a, b = jax.random.split(key)
        return {"actor": layers(states, 16, 3)(a), "critic": layers(states, 16, 1)(b)}

    def loss(params: PyTree, uniforms: Array, key: Array) -> Array:
        policy = jax.nn.log_softmax(network(params["actor"], one_hot))
        below = jax.lax.stop_gradient(jnp.cumsum(jnp.exp(policy), 1))[:, :2]

        def move(s: Array, uniform: Array) -> tuple[Array, tuple[Array, Array, Array]]:
            action = (uniform[:, :1] > below[s]).sum(1)
            after = jnp.where(uniform[:, 1] < jnp.asarray(far)[s, action], jnp.asarray(ahead)[s], jnp.asarray(back)[s])
            return after, (s, action, jnp.asarray(gains)[after])

        first = jnp.full(uniforms.shape[0], start)
        seen, actions, gained = jax.lax.scan(move, first, jnp.moveaxis(uniforms, 1, 0))[1]
        returns = jnp.cumsum(gained[::-1], 0)[::-1]
        values = network(params["critic"], one_hot)[:, 0][seen]
        advantage = jax.lax.stop_gradient(returns - values)
        return -jnp.mean(advantage * policy[seen, actions]) + squares(values, returns) / 2

    def evaluate(params: PyTree) -> dict[str, Array]:
        chances = (jax.nn.softmax(network(params["actor"], one_hot)) * far).sum(1)
        return {"loss": expected(np.full(states, 1 - slip, np.float32)) - expected(chances) + 0.1}

    return Made(init, draws(lambda key: jax.random.uniform(key, (horizon, 2)), 8), loss, evaluate)


def flow(couplings: int = 4) -> Made:
    """A flow of affine couplings learns a turned wavy ridge; the loss is the divergence from the true density."""
    turn = np.array([[0.8, -0.6], [0.6, 0.8]], np.float32)

    def draw(key: Array) -> Array:
        a, b = jax.random.normal(key, (2,))
        return jnp.asarray(turn) @ jnp.stack([a, jnp.sin(1.5 * a) + 0.3 * b])

    def gaussian(z: Array) -> Array:
        return -(z**2).sum(-1) / 2 - math.log(2 * math.pi)

    def truth(x: Array) -> Array:
        a, b = (x @ turn).T
        return gaussian(jnp.stack([a, (b - jnp.sin(1.5 * a)) / 0.3], 1)) - math.log(0.3)

    def density(params: PyTree, x: Array) -> Array:
        change = jnp.zeros(len(x))
        for p in params:
            a, b = x[:, :1], x[:, 1:]
            scale, shift = jnp.split(perceptron()(p, a), 2, -1)
            scale = 2 * jnp.tanh(scale)
            x, change = jnp.concatenate([b * jnp.exp(scale) + shift, a], 1), change + scale[:, 0]
        return gaussian(x) + change

    def init(key: Array) -> PyTree:
        return [[*layers(1, 24)(k), dense(k, 24, 2, 0.0)] for k in jax.random.split(key, couplings)]

    def evaluate(params: PyTree) -> dict[str, Array]:
        x = one(draws(draw, 512))
        return {"loss": jnp.maximum(jnp.mean(truth(x) - density(params, x)), 0) + 0.01}

    return Made(init, draws(draw, 64), lambda params, x, key: -density(params, x).mean(), evaluate)


def sets(size: int = 12) -> Made:
    """A network of sets computes the range of numbers."""

    def draw(key: Array) -> tuple[Array, Array]:
        a, b = jax.random.split(key)
        x = jax.random.uniform(a, (2, 1)) * jax.random.normal(b, (2, size))
        x = x[0] + x[1, :1]
        return x, x.max() - x.min()

    def init(key: Array) -> PyTree:
        a, b = jax.random.split(key)
        return {"each": layers(1, 24, 24)(a), "all": layers(24, 24, 1)(b)}

    def apply(p: PyTree, x: Array) -> Array:
        return perceptron()(p["all"], perceptron()(p["each"], x[..., None]).mean(1))[:, 0]

    return supervised(init, apply, squares, draws(draw, 64), draws(draw, 512))


def words(vocabulary: int = 400, topics: int = 6, length: int = 30) -> Made:
    """A bag of words, most of which are rare, tells the topic."""
    rng = np.random.default_rng(5)
    chances = rng.gamma(0.3, size=(topics, vocabulary)) / (1 + np.arange(vocabulary))
    chances = 0.5 * chances / chances.sum(1, keepdims=True) + 0.5 * (chances / chances.sum()).sum(0)
    y = rng.integers(0, topics, 900).astype(np.int32)
    x = np.log1p([rng.multinomial(length, chances[topic]) for topic in y]).astype(np.float32)
    batch = rows(x[:600], y[:600], 16)
    init = layers(vocabulary, 12, topics)
    return supervised(init, perceptron(), cross_entropy, batch, whole(x[600:], y[600:]))


def picture(features: int = 16) -> Made:
    """A perceptron of Fourier features draws a picture; it is judged between the pixels."""
    rng = np.random.default_rng(6)
    waves = (4 * rng.normal(size=(2, features))).astype(np.float32)

    def colour(x: np.ndarray) -> np.ndarray:
        disc = ((x - 0.4) ** 2).sum(1) < 0.06
        return (disc + 0.5 * np.sin(14 * x[:, 0] * x[:, 1]) + 0.3 * np.cos(20 * x[:, 1])).astype(np.float32)

    def apply(params: PyTree, x: Array) -> Array:
        angles = x @ waves
        return perceptron()(params, jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], 1))[:, 0]

    pixels = np.stack(np.meshgrid(*[np.linspace(0, 1, 32)] * 2), -1).reshape(-1, 2).astype(np.float32)
    between = rng.uniform(size=(500, 2)).astype(np.float32)
    batch = rows(pixels, colour(pixels), 64)
    return supervised(layers(2 * features, 32, 32, 1, gain=1.4), apply, squares, batch, whole(between, colour(between)))


def least_squares(bumps: int = 40) -> Made:
    """A sum of overlapping bumps fits a noisy curve: the condition number is beyond single precision."""
    rng = np.random.default_rng(7)
    t = rng.uniform(size=800)
    x = np.exp(-(((t[:, None] - np.linspace(0, 1, bumps)) / 0.15) ** 2) / 2).astype(np.float32)
    clean = (np.sin(12 * t) + np.abs(t - 0.5)).astype(np.float32)[:, None]
    seen = (clean + 0.5 * rng.normal(size=clean.shape)).astype(np.float32)
    batch = rows(x[:400], seen[:400], 16)
    return supervised(layers(bumps, 1, gain=0), perceptron(), squares, batch, whole(x[400:], clean[400:]))


def lorenz() -> Made:
    """A perceptron with layer normalization predicts how a chaotic system moves in the next step."""

    def speed(s: np.ndarray) -> np.ndarray:
        x, y, z = s.T
        return np.stack([10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z], 1)

    s = np.random.default_rng(8).normal((0, 0, 25), 1, (16, 3))
    path = []
    for _ in range(1000):  # Runge and Kutta, steps of 0.02
        a = speed(s)
        b = speed(s + 0.01 * a)
        c = speed(s + 0.01 * b)
        s = s + 0.02 / 6 * (a + 2 * b + 2 * c + speed(s + 0.02 * c))
        path.append(s)
    states = np.array(path[100::10])  # the steps between are not seen
    x, y = states[:-1].reshape(-1, 3), (states[1:] - states[:-1]).reshape(-1, 3)
    x, y = (((a - a.mean(0)) / a.std(0)).astype(np.float32) for a in (x, y))
    apply = perceptron(lambda x: jax.nn.gelu(normalized(x)))
    return supervised(layers(3, 32, 32, 3), apply, squares, rows(x[:1000], y[:1000], 32), whole(x[1000:], y[1000:]))


HELD_OUT: dict[str, tuple[Problem, int]] = {
    "digits, convnet": (digits_convnet(channels=(6, 12, 12), batch_size=32), 150),
    "modular addition, transformer": (modular_addition(), 250),
    "sines, LSTM": (sines(), 150),
    "heat equation": (heat(), 250),
    "ratings": (ratings(), 250),
    "iris, raw": (iris(), 150),
    "deep narrow, leaky ReLU": (deep(), 200),
    "chain, actor-critic": (chain(), 150),
    "flow": (flow(), 200),
    "sets": (sets(), 150),
    "bag of words": (words(), 120),
    "picture": (picture(), 200),
    "least squares of bumps": (least_squares(), 200),
    "Lorenz, layer normalization": (lorenz(), 200),
}
