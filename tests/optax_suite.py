"""optax's own tests of its Adam family, with ours in its place:  python tests/optax_suite.py

The tests are those in the installed optax wheel. `--all` runs every test of optax, most of which use
our scale_by_learning_rate too (about half an hour).
"""

import re
import sys
from pathlib import Path

import optax
import optax.transforms
import pytest
from optax._src import alias, transform
from optax.transforms import _adding

import adamjax

NAMES = [
    *("adam", "adamw", "amsgrad", "nadam", "nadamw", "radam", "adamax", "adamaxw"),
    *("scale_by_adam", "scale_by_radam", "scale_by_adamax", "add_decayed_weights", "scale_by_learning_rate"),
]
MODULES = [
    *("_src/alias_test.py", "_src/float64_test.py", "_src/sharding_test.py", "_src/transform_test.py"),
    *("contrib/_complex_valued_test.py", "contrib/_galore_test.py", "contrib/_schedule_free_test.py"),
    *("schedules/_inject_test.py", "tree_utils/_state_utils_test.py"),
    *("transforms/_accumulation_test.py", "transforms/_adding_test.py", "transforms/_combining_test.py"),
]

# Where we differ from optax on purpose. Each must go on differing, or the reason is gone.
DELIBERATE = {
    "moments of half precision parameters are float32": [
        "AliasTest::test_explicit_dtype10",
        "AliasTest::test_explicit_dtype11",
        "GaLoreTest::test_mu_dtype_controls_moment_dtype",
    ],
    "compared at 1e-6 with optax's scale_by_rms, whose bias correction is off by 1e-5": [
        "TransformTest::test_rms_match_adam",
        "ScheduleFreeTest::test_schedule_free_adamw",
    ],
    "the state is AdamState, which has nu_max": [
        "StateUtilsTest::test_adam",
        "StateUtilsTest::test_map_non_params_to_none",
        "StateUtilsTest::test_tree_get",
        "StateUtilsTest::test_tree_get_all_with_path",
        "StateUtilsTest::test_tree_set",
    ],
    "parameters that are Python ints are refused": [
        "ExtraArgsTest::test_extra_args",
    ],
}
# Tests that fail with the newest JAX whoever's optimizer is used.
BROKEN = {
    "ClippingTest::test_clip_by_block_rms",
    "FreezeTest::test_bad_structure_raises",
    "SelectiveTransformTest::test_selective_bad_structure",
}


def patch():
    for module in (optax, optax.transforms, alias, transform, _adding):
        for name in NAMES:
            if hasattr(module, name):
                setattr(module, name, getattr(adamjax, name))


class Plugin:
    """Keeps the tests that concern us, and the names of those that fail, in part or whole."""

    def __init__(self, everything):
        self.everything, self.ran, self.failed = everything, set(), set()

    def pytest_collection_modifyitems(self, items):
        items[:] = [item for item in items if self.everything or self.concerns_us(item)]

    def concerns_us(self, item):
        """A test that optax makes for many optimizers concerns us if it is for one of ours."""
        if item.cls.__name__ == "LBFGSTest":
            return False
        parameters = getattr(getattr(item.cls, item.name, None), "__x_params_repr__", "")
        label = f"{item.name} {parameters}"
        named = re.findall(r"'?opt_name'?[:=] ?'(\w+)'|test_(?:init_with|state_sharding|mixed)\w*?_(\w+)$", label)
        return not named or any(name in NAMES for pair in named for name in pair if name)

    def pytest_runtest_logreport(self, report):
        name = "::".join(report.nodeid.split("::")[-2:])
        self.ran.add(name)
        if report.failed:
            self.failed.add(name)


def main(everything):
    patch()
    folder = Path(optax.__file__).parent
    targets = [str(folder)] if everything else [str(folder / module) for module in MODULES]
    options = ["-q", "--tb=no", "-W", "ignore", "-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir", str(folder)]
    plugin = Plugin(everything)
    pytest.main([*options, *targets], plugins=[plugin])
    for reason, names in DELIBERATE.items():
        print(f"{len(names)} differ on purpose, for {reason}")
    deliberate = {name for names in DELIBERATE.values() for name in names}
    surprises = plugin.failed - deliberate - BROKEN
    print(
        f"{len(plugin.ran)} tests of optax ran with our optimizers, {len(surprises)} failed unexpectedly",
        *sorted(surprises),
    )
    outdated = deliberate & plugin.ran - plugin.failed
    if outdated:
        print("no longer different, take off the list:", *sorted(outdated))
    return 1 if surprises or outdated or not plugin.ran else 0


if __name__ == "__main__":
    sys.exit(main("--all" in sys.argv[1:]))
