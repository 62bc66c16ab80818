"""Imports go down only: the floors of CONTRIBUTING.md, held against the imports themselves."""

import ast
from pathlib import Path

import batchnorm

ROOT = Path(batchnorm.__file__).parent
FLOORS = {
    "errors": 0, "factories": 0.1, "_version": 0, "module_names": 0, "opacus_tables": 0, "domains": 0, "csrc": 0,
    "ops": 1,
    "moments": 2,
    "options": 2.1, "validation": 2.2, "running_stats": 2.2, "execution": 2.5, "functional": 3,
    "layer_call": 3.5, "layers": 4, "pairs": 4.1, "twins": 4.1, "norm_act": 4.2, "registrations": 4.3,
    "statistics": 4.5, "model_tools": 5,
    "experiment": 6, "doctor": 6, "bench": 6, "monitor": 6, "callbacks": 6.2,
    "commands": 6.5, "commands_doctor": 6.5, "cli": 7, "__init__": 8, "__main__": 8,
}  # fmt: skip


def place(parts):
    return parts[0].removesuffix(".py")


def imported(path):
    """The package's own modules that a file imports, as paths inside the package; TYPE_CHECKING's do not run."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for child in ast.walk(node)
    }
    here = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and node.level:
            base = here[: len(here) - node.level + 1]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            yield from ((*base, *name.split(".")) for name in names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("batchnorm."):
            yield tuple(node.module.split(".")[1:])


def test_imports_go_down_only():
    wrong = []
    for path in ROOT.rglob("*.py"):
        floor = FLOORS[place(path.relative_to(ROOT).parts)]
        above = [".".join(target) for target in imported(path) if FLOORS.get(place(target), 0) > floor]
        wrong += [f"{path.relative_to(ROOT)} imports {target}" for target in above]
    assert not wrong


def test_every_file_has_a_floor():
    assert {place(p.relative_to(ROOT).parts) for p in ROOT.rglob("*.py")} <= set(FLOORS)
