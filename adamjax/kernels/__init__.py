"""Steps in one pass over memory, by kernels: on a CPU one that is compiled for it when it is first needed."""

from adamjax.kernels._compile import Kernel as Kernel
from adamjax.kernels._compile import build as build
from adamjax.kernels._compile import clear as clear
from adamjax.kernels._compile import status as status
from adamjax.kernels._fused import Fused as Fused
