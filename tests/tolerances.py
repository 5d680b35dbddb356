"""All tolerances, by what is compared. Relative to the size of a step (the learning rate) throughout."""

from typing import NamedTuple

# Ours in a dtype against the oracle in long double, 60 steps. Half precision parameters see their
# own rounding of each update: half a unit in the last place, 2**-9 and 2**-12.
ORACLE = {"float32": 3e-6, "float64": 1e-13, "complex64": 3e-6, "bfloat16": 2**-8, "float16": 2**-11}

# One step against long double, relative to the exact update.
ONE_STEP = 2e-6

# optax forms 1 - b**t in the precision of the run, which costs up to 1e-5 in float32 for b2 = 0.999.
OPTAX = {"float32": 3e-5, "complex64": 3e-5, "float64": 1e-12}
TORCH = {"float32": 5e-6, "float64": 1e-12}

# Sixty steps of adamjax.interop.torch against torch, relative to the parameters.
TORCH_COURSE = {"float32": 2e-5, "float64": 1e-12}

# The same computation, compiled differently (vmap, scan, eager): a few units in the last place.
RECOMPILED = 1e-6

# A fused step against the plain one, in units in the last place of the terms that are added; and the part of stored
# numbers that may be rounded the other way, since what is rounded differs in its last digit.
FUSED, FUSED_ROUNDED = 2, 1e-3

# A run on many devices against one on one, over a hundred steps: gradients are summed in another order.
PROCESSES = 1e-6

# A member of a sweep against a run of its own, relative, over tens of steps: traced leaves, another
# order of operations, and what the training itself makes of such differences.
SWEEP = 1e-3


class Direction(NamedTuple):
    """Errors of Adam's direction when both moments are stored and loaded once."""

    median: float  # of the relative errors
    p99: float  # of the errors, over the root mean square of the directions: those close to 0 have no digits
    norm: float  # of all errors over that of all directions
    outlier: float  # no element is both three times what it should be and larger than this
    bias: float  # of the length along the exact direction


# (bits of the first moment, bits of the second)
DIRECTION = {
    "int8": ((8, 8), Direction(0.007, 0.016, 0.0065, 0.01, 0.0005)),
    "int4 and int8": ((4, 8), Direction(0.14, 0.34, 0.13, 0.15, 0.003)),
    "int4": ((4, 4), Direction(0.14, 0.34, 0.13, 0.15, 0.003)),
}

# The mean direction after 1500 equal gradients, against 1.
CONSTANT_GRADIENT = {"bfloat16": 0.03, "int8": 0.1, "int4 and int8": 0.15, "int4": 0.5}

# The largest step in any format, where gradients of a block are of very different sizes, against that in float32.
LARGEST_STEP = 4

# The final loss of noisy least squares, relative to that with moments in float32.
LEAST_SQUARES = {"int8": 0.01, "int4 and int8": 0.15, "int4": 0.25}

# The validation loss of the digits (mean of three seeds), relative to that in float32.
DIGITS = 0.03

# The estimate of what storing does to the next direction, against what it did, relative.
STORAGE_ERROR = 0.3


class LongRun(NamedTuple):
    """A million steps against float64: the largest error of 800, and their mean, which rounding should not move."""

    worst: float
    bias: float


# First moments by the root of the second, second moments relative, parameters of size 1.
_EXACT = {"mu": LongRun(1e-6, 1e-7), "nu": LongRun(1e-5, 1e-6)}
_BFLOAT16 = {"mu": LongRun(0.03, 1e-3), "nu": LongRun(0.2, 5e-3)}
LONG_RUN = {
    "float32": _EXACT | {"params": LongRun(2e-5, 1e-6)},
    "bfloat16": _BFLOAT16 | {"params": LongRun(0.03, 1e-3)},
    "int8": {"mu": LongRun(0.03, 2e-3), "nu": LongRun(0.5, 0.03), "params": LongRun(0.1, 2e-3)},
    "kahan": _EXACT | {"params": LongRun(2**-8, 2**-12)},
    "low_bits": _EXACT | {"params": LongRun(2**-8, 2**-12)},
    "low_bits=8": _EXACT | {"params": LongRun(2**-8, 2**-12)},
    "stochastic bfloat16": _BFLOAT16 | {"params": LongRun(0.15, 5e-3)},
}

# An average of a thousand steps towards parameters that stand still: the largest error of its elements, and their mean,
# in bfloat16 four spacings and a quarter of one.
AVERAGE = {"float32": LongRun(1e-5, 1e-5), "bfloat16": LongRun(2**-5, 2**-9)}

# A step of any program against the oracle: in parts of the largest step that gradients of these sizes can make. Codes
# may make one that is that many times larger, and of gradients of one size, one whose norm is off by these parts.
ADVERSARY = {"float32": 5e-6, "bound": 1.001, "bound of halves": 1.25, "codes": 4.0, "int8": 0.3, "int4": 2.0}
