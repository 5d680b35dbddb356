"""A generated text, and a small transformer that predicts its characters."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from adamjax._core.trees import compute_dtype
from adamjax._core.typing import PyTree
from adamjax.problems import _model_parts

_SENTENCES = 700  # in the training text, and as many in the validation text
_WINDOWS = 128  # in an evaluation
_ONES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_TEENS = ("ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen")
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def words(n: int) -> str:
    """Return a number below 1000 in words."""
    if n < 20:
        return (_ONES + _TEENS)[n]
    if n < 100:
        return _TENS[n // 10 - 2] + (f"-{_ONES[n % 10]}" if n % 10 else "")
    return f"{_ONES[n // 100]} hundred" + (f" and {words(n % 100)}" if n % 100 else "")


def sentence(a: int, b: int) -> str:
    """Return a true statement about two numbers below 1000, a different one for every pair."""
    first, name, second, result = (a, "minus", b, a - b) if a >= b else (a, "plus", b - a, b)
    return f"{words(first)} {name} {words(second)} is {words(result)}.\n"


def texts() -> tuple[str, str]:
    """Return the training and the validation text, which have no sentence in common."""
    pairs = np.random.default_rng(0).choice(10**6, 2 * _SENTENCES, replace=False)
    sentences = [sentence(*divmod(int(pair), 1000)) for pair in pairs]
    return "".join(sentences[:_SENTENCES]), "".join(sentences[_SENTENCES:])


@dataclasses.dataclass(frozen=True)
class Characters:
    """A transformer that predicts the next character of number words, as a `Problem`.

    The blocks are those of GPT-2, with layer normalization before attention and before the perceptron, but
    without biases in the linear layers. The embedding is also the last layer. For the fields, see `characters`.
    """

    width: int = 64
    depth: int = 2
    heads: int = 4
    context: int = 32
    batch_size: int = 32

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _model_parts.check_size(field.name, getattr(self, field.name))
        if self.width % self.heads:
            raise ValueError(f"Invalid width value: {self.width}; width must be a multiple of heads ({self.heads})")
        train, validation = texts()
        if self.context >= len(validation):
            raise ValueError(f"Invalid context value: {self.context}; context must be below {len(validation)}")
        alphabet, codes = np.unique(np.frombuffer((train + validation).encode(), np.uint8), return_inverse=True)
        starts = np.linspace(0, len(validation) - self.context - 1, _WINDOWS).astype(int)
        object.__setattr__(self, "_alphabet", len(alphabet))
        object.__setattr__(self, "_train", codes[: len(train)].astype(np.int32))
        object.__setattr__(self, "_validation", codes[len(train) :].astype(np.int32)[self._windows(starts)])

    def _windows(self, starts: np.ndarray | jax.Array) -> np.ndarray | jax.Array:
        return starts[:, None] + np.arange(self.context + 1, dtype=np.int32)[None]

    def init(self, key: jax.Array) -> PyTree:
        """Return float32 matrices, uniform with variance 1 / width, and normalizations with scale 1 and bias 0."""
        n, alphabet = self.width, self._alphabet  # type: ignore[attr-defined]
        block = {"qkv": (n, 3 * n), "out": (n, n), "up": (n, 4 * n), "down": (4 * n, n)}
        blocks = {f"block_{i}": block for i in range(self.depth)}
        shapes = {"embedding": (alphabet, n), "positions": (self.context, n), "blocks": blocks}
        leaves, structure = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
        scale = np.float32(np.sqrt(3 / n))
        params = jax.tree.unflatten(structure, [x * scale for x in _model_parts.draw_uniform(key, leaves)])
        for name in blocks:
            params["blocks"][name] |= {"before_attention": self._norm(), "before_perceptron": self._norm()}
        return params | {"norm": self._norm()}

    def _norm(self) -> dict[str, jax.Array]:
        return {"scale": jnp.ones(self.width, jnp.float32), "bias": jnp.zeros(self.width, jnp.float32)}

    def batch(self, step: jax.Array, key: jax.Array) -> jax.Array:
        """Return `batch_size` random windows of the training text: int32[., context + 1], codes of characters."""
        text = self._train  # type: ignore[attr-defined]
        starts = _model_parts.random_indices(step, key, self.batch_size, len(text) - self.context)
        return jnp.asarray(text)[self._windows(starts)]

    def loss(self, params: PyTree, batch: jax.Array, key: jax.Array) -> jax.Array:
        """Return the mean cross-entropy, in nats per character."""
        return _model_parts.cross_entropy(self._logits(params, batch[:, :-1]), batch[:, 1:])

    def evaluate(self, params: PyTree) -> dict[str, jax.Array]:
        """Return the cross-entropy and the accuracy on windows spread over the validation text."""
        windows = jnp.asarray(self._validation)  # type: ignore[attr-defined]
        return _model_parts.classification_metrics(self._logits(params, windows[:, :-1]), windows[:, 1:])

    def _logits(self, params: PyTree, characters: jax.Array) -> jax.Array:
        """Compute logits in the precision of the parameters; normalizations and the result are float32 or wider."""
        embedding = params["embedding"]
        # The gradient of a look-up is a scatter, which is slow, and on GPUs not deterministic.
        x = jax.nn.one_hot(characters, len(embedding), dtype=embedding.dtype) @ embedding + params["positions"][None]
        for block in _model_parts.in_order(params["blocks"]):
            x = x + self._attention(block, _normalize(x, block["before_attention"]))
            hidden = jax.nn.gelu(_normalize(x, block["before_perceptron"]) @ block["up"])
            x = x + hidden @ block["down"]
        x = _normalize(x, params["norm"]) @ embedding.T
        return x.astype(compute_dtype(x.dtype))

    def _attention(self, block: PyTree, x: jax.Array) -> jax.Array:
        batch, length, width = x.shape
        q, k, v = jnp.moveaxis((x @ block["qkv"]).reshape(batch, length, 3, self.heads, -1), 2, 0)
        scores = jnp.einsum("bthd,bshd->bhts", q, k)
        scores = scores.astype(compute_dtype(x.dtype)) * (self.heads / width) ** 0.5
        causal = jnp.tril(jnp.ones((length, length), bool))[None, None]
        weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf)).astype(x.dtype)
        return jnp.einsum("bhts,bshd->bthd", weights, v).reshape(x.shape) @ block["out"]


def characters(
    *, width: int = 64, depth: int = 2, heads: int = 4, context: int = 32, batch_size: int = 32
) -> Characters:
    """Return a small transformer on sums and differences in words, such as "ninety-one plus four is ninety-five.".

    Args:
      width: Width of the residual stream.
      depth: Number of blocks.
      heads: Number of attention heads, which must divide `width`.
      context: Maximum number of characters that a prediction sees.
      batch_size: Windows of the text per update, drawn with replacement.

    Returns:
      A `Problem` with float32 parameters.

    Raises:
      ValueError: An argument is not a positive int, `heads` does not divide `width`, or `context` exceeds the text.

    >>> import adamjax
    >>> problem = adamjax.problems.characters(width=32, depth=1)
    >>> adamjax.problems.check(problem)
    """
    return Characters(width, depth, heads, context, batch_size)


def _normalize(x: jax.Array, norm: PyTree) -> jax.Array:
    """Return the layer normalization (Ba et al., 2016) of `x` over the last axis."""
    wide = x.astype(compute_dtype(x.dtype))
    wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + 1e-5)
    scale, bias = (norm[name].astype(wide.dtype)[None, None] for name in ("scale", "bias"))
    return (wide * scale + bias).astype(x.dtype)
