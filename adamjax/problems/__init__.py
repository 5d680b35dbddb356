"""Problems to train on: the protocol, and three with their data embedded."""

from adamjax.problems._check import check as check
from adamjax.problems._convnet import DigitsConvnet as DigitsConvnet
from adamjax.problems._convnet import digits_convnet as digits_convnet
from adamjax.problems._digits import Digits as Digits
from adamjax.problems._digits import digits as digits
from adamjax.problems._problem import Problem as Problem
from adamjax.problems._supervised import supervised as supervised
from adamjax.problems._text import Characters as Characters
from adamjax.problems._text import characters as characters
