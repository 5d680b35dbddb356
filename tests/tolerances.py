"""All tolerances, by what is compared. Relative to the size of a step (the learning rate) throughout."""

# Ours in a dtype against the oracle in long double, 60 steps. Half precision parameters see their
# own rounding of each update: half a unit in the last place, 2**-9 and 2**-12.
ORACLE = {"float32": 3e-6, "float64": 1e-13, "complex64": 3e-6, "bfloat16": 2**-8, "float16": 2**-11}

# One step against long double, relative to the exact update: numbers, and traced leaves (b2 <= 0.999).
ONE_STEP = {"numbers": 2e-6, "traced": 2e-5}

# optax forms 1 - b**t in the precision of the run, which costs up to 1e-5 in float32 for b2 = 0.999.
OPTAX = {"float32": 3e-5, "complex64": 3e-5, "float64": 1e-12}
TORCH = {"float32": 5e-6, "float64": 1e-12}

# The same computation, compiled differently (vmap, scan, eager): a few units in the last place.
RECOMPILED = 1e-6

# A member of a sweep against a run of its own, relative, over tens of steps: traced leaves, another
# order of operations, and what the training itself makes of such differences.
SWEEP = 1e-3
