"""Problems to train on: the protocol, and one with its data embedded."""

from adamjax.problems._digits import Digits as Digits
from adamjax.problems._digits import digits as digits
from adamjax.problems._problem import Problem as Problem
from adamjax.problems._problem import check as check
