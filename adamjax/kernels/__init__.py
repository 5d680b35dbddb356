"""Steps in one pass over memory, by kernels: on a CPU a prebuilt one, or one that is compiled on first use."""

from adamjax.kernels._fused import Fused as Fused
from adamjax.kernels._library import Kernel as Kernel
from adamjax.kernels._library import build as build
from adamjax.kernels._library import clear as clear
from adamjax.kernels._library import status as status
