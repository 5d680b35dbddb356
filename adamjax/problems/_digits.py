"""Handwritten digits, from the data in scikit-learn's wheel, and a small classifier."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from adamjax._core.optional import require
from adamjax._core.trees import compute_dtype
from adamjax._core.typing import PyTree
from adamjax.problems import _model_parts

_VALIDATION = 360  # of 1797 images


class DigitImages:
    """The base of the digit classifiers: the images, the loss and the evaluation."""

    batch_size: int
    _train: tuple[np.ndarray, np.ndarray]
    _validation: tuple[np.ndarray, np.ndarray]

    def _load(self) -> None:
        _model_parts.check_size("batch_size", self.batch_size)
        images, labels = require("sklearn.datasets", "demo", "the digits problem").load_digits(return_X_y=True)
        order = np.random.default_rng(0).permutation(len(images))
        images, labels = (images[order] / 16).astype(np.float32), labels[order].astype(np.int32)
        object.__setattr__(self, "_train", (images[:-_VALIDATION], labels[:-_VALIDATION]))
        object.__setattr__(self, "_validation", (images[-_VALIDATION:], labels[-_VALIDATION:]))

    def _logits(self, params: PyTree, images: jax.Array) -> jax.Array:
        """Compute logits in the precision of the parameters; return them in float32 or wider."""
        raise NotImplementedError

    def batch(self, step: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return `batch_size` random training images (float32[., 64]) and labels (int32[.])."""
        images, labels = self._train
        chosen = _model_parts.random_indices(step, key, self.batch_size, len(labels))
        return jnp.asarray(images)[chosen], jnp.asarray(labels)[chosen]

    def loss(self, params: PyTree, batch: tuple[jax.Array, jax.Array], key: jax.Array) -> jax.Array:
        """Return the mean cross-entropy, in nats."""
        images, labels = batch
        return _model_parts.cross_entropy(self._logits(params, images), labels)

    def evaluate(self, params: PyTree) -> dict[str, jax.Array]:
        """Return the cross-entropy and the accuracy on the validation images."""
        images, labels = self._validation
        return _model_parts.classification_metrics(self._logits(params, jnp.asarray(images)), jnp.asarray(labels))


@dataclasses.dataclass(frozen=True)
class Digits(DigitImages):
    """A multilayer perceptron on 8 x 8 images of handwritten digits, as a `Problem`; see `digits`."""

    hidden: tuple[int, ...] = (128,)
    batch_size: int = 128

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", _model_parts.check_sizes("hidden", self.hidden))
        self._load()

    def init(self, key: jax.Array) -> PyTree:
        """Return float32 kernels, uniform with variance 2 / fan-in (He et al., 2015), and biases of 0."""
        return _model_parts.init_layers(key, list(itertools.pairwise((64, *self.hidden, 10))))

    def _logits(self, params: PyTree, images: jax.Array) -> jax.Array:
        *layers, head = _model_parts.in_order(params)
        x = images.astype(head["kernel"].dtype)
        for layer in layers:
            x = jax.nn.relu(x @ layer["kernel"] + layer["bias"][None])
        x = x @ head["kernel"] + head["bias"][None]
        return x.astype(compute_dtype(x.dtype))


def digits(*, hidden: tuple[int, ...] = (128,), batch_size: int = 128) -> Digits:
    """Return the default problem: a small classifier of handwritten digits.

    Args:
      hidden: Widths of the hidden layers; () for a linear classifier.
      batch_size: Images per update, drawn with replacement from the 1437 training images.

    Returns:
      A `Problem` with float32 parameters.

    Raises:
      ImportError: scikit-learn, which contains the images, is not installed.
      ValueError: A width or the batch size is not a positive int.

    >>> import adamjax
    >>> problem = adamjax.problems.digits(hidden=(32, 32))
    >>> adamjax.problems.check(problem)
    """
    return Digits(hidden, batch_size)
