"""Imports run one way: no module imports one of a higher floor."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import adamjax

# From the ground up. Modules of one line do not import each other.
FLOORS = [
    ["_trees", "_extras", "_stochastic"],
    ["_checks"],
    ["_value", "_numerics", "_codes", "_leafwise", "_landing"],
    ["_across", "_owners", "_packing"],
    ["_base"],
    ["storage"],
    ["_plateau", "_moments", "_groups", "rounding"],
    ["safety"],
    ["schedules"],
    ["_adam"],
    ["_variants", "_transforms", "kernels._build"],
    ["_packed"],
    ["kernels._leaf"],
    ["kernels._cpu", "kernels._gpu"],
    ["kernels._group"],
    ["kernels._fused"],
    ["kernels"],
    ["_optimizers"],
    ["interop._per_parameter", "interop._torch_variants"],
    ["interop._torch_state"],
    ["interop.torch", "interop.optax"],
    ["interop"],
    ["sharding._layout"],
    ["sharding._offload", "sharding._zero1", "sharding._zero1_mapped"],
    ["sharding"],
    ["problems._problem", "problems._parts"],
    ["problems._digits", "problems._text"],
    ["problems._convnet"],
    ["problems"],
    ["diagnostics._measure"],
    ["diagnostics._explain"],
    ["diagnostics._history"],
    ["diagnostics"],
    ["_description"],
    ["training", "run_folder", "checkpoint", "tuning._space", "tuning._batch"],
    ["tuning._population", "tuning._trial", "tuning._strategy", "tuning._page"],
    ["tuning._sweep", "tuning._plots", "tuning._optuna", "tuning._question"],
    ["tuning._range_test", "tuning._runs"],
    ["tuning._report"],
    ["tuning._tune"],
    ["tuning"],
    ["cli._flags"],
    ["cli._checkpoints", "cli._diagnosis", "cli._distributed"],
    ["cli._train", "cli._tune", "cli._kernels"],
    ["cli"],
    ["__main__"],
]
ROOT = Path(adamjax.__file__).parent
FLOOR = {name: i for i, floor in enumerate(FLOORS) for name in floor}
CORE = {name for floor in FLOORS[:18] for name in floor}


def modules():
    for path in ROOT.rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        yield name, ast.parse(path.read_text())


def imports(tree):
    """(module, name) of each import, wherever it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module, alias.name) for alias in node.names)


def test_every_module_has_its_floor():
    assert {name for name, _ in modules()} == {"__init__", *FLOOR}


def test_imports_run_downwards():
    for name, tree in modules():
        if name == "__init__":
            continue
        for module, imported in imports(tree):
            if module.split(".")[0] != "adamjax":
                continue
            # `from adamjax.a import b` imports the module a.b, if there is one, else the module a.
            below = next((m for m in (f"{module}.{imported}", module) if m.removeprefix("adamjax.") in FLOOR), None)
            if below is None:
                assert name not in CORE, f"{name} imports the package itself"
            else:
                assert FLOOR[below.removeprefix("adamjax.")] < FLOOR[name], f"{name} imports {below}"


def test_the_core_needs_jax_and_chex_alone():
    allowed = {"adamjax", "jax", "jaxlib", "chex", "numpy"}
    standard = set(sys.stdlib_module_names)
    for name, tree in modules():
        if name in CORE:
            found = {module.split(".")[0] for module, _ in imports(tree)} - standard
            assert found <= allowed, name


def test_the_public_module_only_re_exports():
    tree = ast.parse((ROOT / "__init__.py").read_text())
    docstring, *rest = tree.body
    assert isinstance(docstring, ast.Expr)
    for node in rest:
        assert isinstance(node, ast.ImportFrom)
        assert all(alias.asname == alias.name for alias in node.names)


def test_one_import_brings_all_names_and_nothing_optional():
    program = """
import adamjax, sys
adamjax.problems.digits, adamjax.schedules.cosine, adamjax.training.train, adamjax.tuning.sweep
print(*{"flax", "matplotlib", "optax", "optuna", "orbax", "sklearn", "torch", "tqdm"} & set(sys.modules))
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT.parent)}
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment, cwd=ROOT.root
    )
    assert found.stdout == "\n"
