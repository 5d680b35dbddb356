"""To and from other libraries, without needing them."""

from adamjax.interop import optax as optax
from adamjax.interop import torch as torch
