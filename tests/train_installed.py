"""Train by plain and fused steps of the installed package:  python -I tests/train_installed.py [--prebuilt]

Without `--prebuilt`, fused steps are left out where there is no compiler.
"""

import sys

import jax
import numpy as np

import adamjax

assert adamjax.__file__.startswith(sys.prefix), f"what is imported is {adamjax.__file__}"
problem = adamjax.problems.characters()


def trained(**options):
    *_, report = adamjax.training.train(problem, adamjax.adamw(1e-3, **options), steps=2)
    return jax.tree.leaves(report.params)


plain = trained()
try:
    path = adamjax.kernels.build()
except RuntimeError as error:
    print(error)
else:
    assert (path.parent.name == "prebuilt") is ("--prebuilt" in sys.argv), path
    for x, y in zip(plain, trained(fused=True), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
    print(f"trained with jax {jax.__version__} and {path.name}")
