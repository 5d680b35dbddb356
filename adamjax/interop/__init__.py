"""Conversions to and from other libraries, which need not be installed."""

from adamjax.interop import optax as optax
from adamjax.interop import torch as torch
