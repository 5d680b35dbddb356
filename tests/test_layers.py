"""Imports run one way: no module imports one of a higher floor."""

import ast
import os
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import adamjax

# From the ground up. A folder is one floor; rooms of one line do not import each other.
FLOORS = [
    ["_core"],
    ["_transforms"],
    ["schedules", "rounding", "storage", "safety", "sharding"],
    ["kernels"],
    ["optimizers"],
    ["interop", "problems", "diagnostics", "scaling"],
    ["training", "checkpoint", "run_folder"],
    ["tuning"],
    ["cli"],
    ["__main__"],
]
ROOT = Path(adamjax.__file__).parent
FLOOR = {room: i for i, floor in enumerate(FLOORS) for room in floor}
CORE = [*FLOORS[0], *FLOORS[1], *FLOORS[2], *FLOORS[3], *FLOORS[4]]


def modules():
    for path in ROOT.rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if name != "__init__":
            yield name, ast.parse(path.read_text())


MODULES = {name for name, _ in modules()}


def imports(tree):
    """(module, name) of each import, wherever it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module, alias.name) for alias in node.names)


def imported_modules(tree):
    """The modules of the package that a module imports, by their names in it."""
    for module, name in imports(tree):
        if module.split(".")[0] == "adamjax":
            # `from adamjax.a import b` imports the module a.b, if there is one, else the module a.
            found = [m.removeprefix("adamjax.") for m in (f"{module}.{name}", module)]
            yield next((m for m in found if m in MODULES), "adamjax")


def test_every_room_has_its_floor():
    assert {name.split(".")[0] for name in MODULES} == set(FLOOR)


def test_imports_run_downwards():
    for name, tree in modules():
        room = name.split(".")[0]
        for imported in imported_modules(tree):
            if imported == "adamjax":
                assert room not in CORE, f"{name} imports the package itself"
                continue
            below = imported.split(".")[0]
            assert below == room or FLOOR[below] < FLOOR[room], f"{name} imports {imported}"


def test_no_modules_import_each_other_in_a_circle():
    graph = {name: set(imported_modules(tree)) - {name} for name, tree in modules()}
    assert set(TopologicalSorter(graph).static_order()) >= MODULES


def test_the_core_needs_jax_and_chex_alone():
    allowed = {"adamjax", "jax", "jaxlib", "chex", "numpy"}
    standard = set(sys.stdlib_module_names)
    for name, tree in modules():
        if name.split(".")[0] in CORE:
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
