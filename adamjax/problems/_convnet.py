"""A small convolutional network on the handwritten digits."""

import dataclasses
import itertools
from typing import Any

import jax

from adamjax._core.trees import compute_dtype
from adamjax.problems._digits import DigitImages
from adamjax.problems._parts import check_sizes, in_order, init_layers

_SIDE = 8


@dataclasses.dataclass(frozen=True)
class DigitsConvnet(DigitImages):
    """A convolutional network on 8 x 8 images of handwritten digits, as a `Problem`.

    Each convolution is 3 x 3 with stride 2, and a linear layer stands at the end.

    Fields:
      channels: Channels that the convolutions put out.
      batch_size: Images per update, drawn with replacement from the 1437 training images.
    """

    channels: tuple[int, ...] = (16, 32)
    batch_size: int = 128

    def __post_init__(self) -> None:
        object.__setattr__(self, "channels", check_sizes("channels", self.channels))
        if not self.channels:
            raise ValueError("Invalid channels value: (); channels must hold a positive int for each convolution")
        self._load()

    def init(self, key: jax.Array) -> Any:
        """Kernels uniform with variance 2 / fan-in (He et al., 2015), biases of 0; float32."""
        convolutions = [(3, 3, m, n) for m, n in itertools.pairwise((1, *self.channels))]
        side = _SIDE
        for _ in convolutions:
            side = -(-side // 2)
        return init_layers(key, [*convolutions, (side**2 * self.channels[-1], 10)])

    def _logits(self, params: Any, images: jax.Array) -> jax.Array:
        *convolutions, head = in_order(params)
        x = images.reshape(-1, _SIDE, _SIDE, 1).astype(head["kernel"].dtype)
        for layer in convolutions:
            x = jax.lax.conv_general_dilated(
                x, layer["kernel"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x = jax.nn.relu(x + layer["bias"][None, None, None])
        x = x.reshape(len(x), -1) @ head["kernel"] + head["bias"][None]
        return x.astype(compute_dtype(x.dtype))


def digits_convnet(*, channels: tuple[int, ...] = (16, 32), batch_size: int = 128) -> DigitsConvnet:
    """A small convolutional network on the images of `digits`.

    Args:
      channels: Channels that the convolutions put out, each at half the resolution of the one before.
      batch_size: Images per update.

    Returns:
      A `Problem`, whose parameters are float32.

    Raises:
      ImportError: scikit-learn, which carries the images, is not installed.
      ValueError: A number of channels or the batch size is not a positive int, or there is no convolution.

    >>> import adamjax
    >>> problem = adamjax.problems.digits_convnet(channels=(8, 16))
    >>> adamjax.problems.check(problem)
    """
    return DigitsConvnet(channels, batch_size)
