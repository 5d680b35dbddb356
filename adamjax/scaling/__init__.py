"""Hyperparameters for a large model, from those of a small one."""

from adamjax.scaling._rules import Factors as Factors
from adamjax.scaling._transfer import ParameterScaling as ParameterScaling
from adamjax.scaling._transfer import Transferred as Transferred
from adamjax.scaling._transfer import transfer as transfer
