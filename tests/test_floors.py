"""Imports go down only, nothing imports in a circle, and nobody reaches into another module's private parts."""

import ast
from functools import cache
from pathlib import Path

import pytest

import batchnorm

ROOT = Path(batchnorm.__file__).parent
# Each package and each module beside them has a floor of its own; an import goes to a lower number.
ORDER = [
    "_version", "errors", "module_names", "opacus_tables", "domains", "factories", "csrc", "ops", "moments", "options",
    "validation", "running_stats", "execution", "functional", "rebuild", "layer_call", "layers", "pairs", "twins",
    "norm_act",
    "registrations", "statistics", "inspect", "model_tools", "experiment", "doctor", "bench", "monitor", "callbacks",
    "cli", "__init__", "__main__",
]  # fmt: skip
FLOORS = {name: number for number, name in enumerate(ORDER)}
FILES = sorted(ROOT.rglob("*.py"))
# Names of torch's own modules that begin with an underscore and that every tool on modules has to use.
TORCHS = {
    "_modules", "_parameters", "_buffers", "_non_persistent_buffers_set", "_forward_hooks", "_forward_pre_hooks",
    "_backward_hooks", "_backward_pre_hooks", "_compiled_call_impl", "_reversed_padding_repeated_twice", "_version",
    "_fields", "_replace", "_asdict",
}  # fmt: skip


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts


MODULES = {module_of(path) for path in FILES}


@cache
def tree_of(path):
    return ast.parse(path.read_text())


def skipped(tree):
    """What stands under TYPE_CHECKING does not run."""
    return {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for child in ast.walk(node)
    }


def imported(path):
    """(module, names) of everything of the package that a file imports, in any form, also inside functions."""
    tree = tree_of(path)
    ignored = skipped(tree)
    here = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(tree):
        if id(node) in ignored:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "batchnorm":
                    yield tuple(alias.name.split(".")[1:]), []
        elif isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
            if node.level:
                base = (*here[: len(here) - node.level + 1], *(node.module.split(".") if node.module else ()))
            elif (node.module or "").split(".")[0] == "batchnorm":
                base = tuple(node.module.split(".")[1:])
            else:
                continue
            inner = [name for name in names if (*base, name) in MODULES]
            yield from (((*base, name), []) for name in inner)
            rest = [name for name in names if name not in inner]
            if rest or not names:
                yield base, rest


def floor_of(module):
    return FLOORS[module[0] if module else "__init__"]


def test_every_file_has_a_floor():
    assert {(module or ("__init__",))[0] for module in MODULES} <= set(FLOORS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down_only(path):
    module = module_of(path)
    for target, names in imported(path):
        same = bool(target) and bool(module) and target[0] == module[0]
        assert same or floor_of(target) < floor_of(module), f"imports {'.'.join(target) or 'the package root'}"
        private = [name for name in names if name.startswith("_") and not name.startswith("__")]
        assert not private, f"imports {', '.join(private)} of {'.'.join(target)}"


def test_no_module_imports_in_a_circle():
    edges = {module_of(path): {t for t, _ in imported(path) if t in MODULES and t != module_of(path)} for path in FILES}
    done, circles = set(), []

    def visit(module, way):
        if module in way:
            circles.append(" → ".join(".".join(m) for m in (*way[way.index(module) :], module)))
        elif module not in done:
            for target in edges.get(module, ()):
                visit(target, (*way, module))
            done.add(module)

    for module in edges:
        visit(module, ())
    assert not circles


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nobody_writes_to_another_object_s_private_fields(path):
    written = [
        ast.unparse(node)
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store | ast.Del)
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
        and node.attr not in TORCHS
        and ast.unparse(node.value) not in ("self", "cls")
    ]
    assert not written
