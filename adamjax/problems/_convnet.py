"""A small convolutional network for handwritten digits."""

import dataclasses
import itertools

import jax

from adamjax._core.trees import compute_dtype
from adamjax._core.typing import PyTree
from adamjax.problems import _model_parts
from adamjax.problems._digits import DigitImages

_SIDE = 8
_AXES = ("NHWC", "HWIO", "NHWC")


@dataclasses.dataclass(frozen=True)
class DigitsConvnet(DigitImages):
    """A convolutional network on 8 x 8 images of handwritten digits, as a `Problem`.

    The convolutions are 3 x 3 with stride 2, and a linear layer follows them; see `digits_convnet`.
    """

    channels: tuple[int, ...] = (16, 32)
    batch_size: int = 128

    def __post_init__(self) -> None:
        object.__setattr__(self, "channels", _model_parts.check_sizes("channels", self.channels))
        if not self.channels:
            raise ValueError("Invalid channels value: (); channels must hold a positive int for each convolution")
        self._load()

    def init(self, key: jax.Array) -> PyTree:
        """Return float32 kernels, uniform with variance 2 / fan-in (He et al., 2015), and biases of 0."""
        convolutions = [(3, 3, m, n) for m, n in itertools.pairwise((1, *self.channels))]
        side = -(-_SIDE // 2 ** len(convolutions))
        return _model_parts.init_layers(key, [*convolutions, (side**2 * self.channels[-1], 10)])

    def _logits(self, params: PyTree, images: jax.Array) -> jax.Array:
        *convolutions, head = _model_parts.in_order(params)
        x = images.reshape(-1, _SIDE, _SIDE, 1).astype(head["kernel"].dtype)
        for layer in convolutions:
            x = jax.lax.conv_general_dilated(x, layer["kernel"], (2, 2), "SAME", dimension_numbers=_AXES)
            x = jax.nn.relu(x + layer["bias"][None, None, None])
        x = x.reshape(len(x), -1) @ head["kernel"] + head["bias"][None]
        return x.astype(compute_dtype(x.dtype))


def digits_convnet(*, channels: tuple[int, ...] = (16, 32), batch_size: int = 128) -> DigitsConvnet:
    """Return a small convolutional network on the images of `digits`.

    Args:
      channels: Output channels of each convolution; each halves the resolution.
      batch_size: Images per update, drawn with replacement from the 1437 training images.

    Returns:
      A `Problem` with float32 parameters.

    Raises:
      ImportError: scikit-learn, which contains the images, is not installed.
      ValueError: A number of channels or the batch size is not a positive int, or there is no convolution.

    >>> import adamjax
    >>> problem = adamjax.problems.digits_convnet(channels=(8, 16))
    >>> adamjax.problems.check(problem)
    """
    return DigitsConvnet(channels, batch_size)
