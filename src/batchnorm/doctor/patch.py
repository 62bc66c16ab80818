"""What a state_dict cannot hold, as code: a unified diff of the function that makes the model, or lines to paste."""

from __future__ import annotations

import ast
import difflib
import inspect
import os
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .change import Change

__all__ = ["lines_to_paste", "patch_of"]

_UNSAFE = "  # unsafe: changes how the model trains"


def lines_to_paste(changes: Iterable[Change], model: str = "model") -> list[str]:
    """Return the code that makes the changes that no state_dict holds, one loop for each kind of change."""
    names: dict[tuple[str, bool], list[str]] = {}
    for change in changes:
        if change.statement:
            names.setdefault((change.statement, change.safe), []).append(change.module)
    lines = []
    for (statement, safe), modules in names.items():
        note = "" if safe else _UNSAFE
        if len(modules) == 1:
            lines.append(statement.format(f"{model}.get_submodule({modules[0]!r})") + note)
        else:
            lines += [f"for name in {modules!r}:{note}", "    " + statement.format(f"{model}.get_submodule(name)")]
    if any("batchnorm." in line for line in lines):
        lines.insert(0, "import batchnorm")
    return lines


def patch_of(changes: Iterable[Change], factory: Callable[..., Any] | None) -> str:
    """Return a unified diff of the function that makes the model, with the changes before each of its returns.

    Where its source is not found, or it returns nothing that is written down, the lines to paste are returned. The text
    is empty where a state_dict holds every change.
    """
    changes = list(changes)
    pasted = lines_to_paste(changes)
    if not pasted:
        return ""
    found = _source(factory) if factory is not None else None
    patched = None if found is None else _with_lines(found[1], found[2], changes)
    if found is None or patched is None:
        return "\n".join(["# paste where the model is made:", *pasted]) + "\n"
    name = os.path.relpath(found[0]) if found[0].is_relative_to(Path.cwd()) else str(found[0])
    before, after = found[1].splitlines(keepends=True), patched.splitlines(keepends=True)
    return "".join(difflib.unified_diff(before, after, f"a/{name}", f"b/{name}"))


def _source(factory: Callable[..., Any]) -> tuple[Path, str, ast.FunctionDef] | None:
    """Return the file, its text and the definition of the function in it."""
    try:
        function = inspect.unwrap(factory)
        path = Path(inspect.getsourcefile(function) or "")
        _, first = inspect.getsourcelines(function)
        text = path.read_text(encoding="utf-8")
    except (OSError, TypeError):
        return None
    for node in ast.walk(ast.parse(text)):
        top = min([node.lineno, *(d.lineno for d in node.decorator_list)]) if isinstance(node, ast.FunctionDef) else 0
        if isinstance(node, ast.FunctionDef) and top == first:
            return path, text, node
    return None


def _with_lines(text: str, function: ast.FunctionDef, changes: list[Change]) -> str | None:
    returns = [node for node in _own_statements(function) if isinstance(node, ast.Return) and node.value is not None]
    lines = text.splitlines()
    for node in sorted(returns, key=lambda node: node.lineno, reverse=True):
        assert node.value is not None
        pair = isinstance(node.value, ast.Tuple) and len(node.value.elts) == 2
        model = node.value.elts[0] if isinstance(node.value, ast.Tuple) and pair else node.value
        code = ast.get_source_segment(text, model)
        whole = ast.get_source_segment(text, node.value)
        if code is None or whole is None:
            return None
        new = [f"model = {code}", *lines_to_paste(changes), f"return {whole.replace(code, 'model', 1)}"]
        if code == "model":
            new = [*lines_to_paste(changes), f"return {whole}"]
        line = lines[node.lineno - 1]
        head, indent = line[: node.col_offset], len(line) - len(line.lstrip())
        if head.strip():  # def f(): return …
            new = ["\n".join([head.rstrip()]), *textwrap.indent("\n".join(new), " " * (indent + 4)).splitlines()]
        else:
            new = textwrap.indent("\n".join(new), head).splitlines()
        lines[node.lineno - 1 : node.end_lineno] = new
    patched = "\n".join(lines) + ("\n" if text.endswith("\n") else "")
    try:
        ast.parse(patched)
    except SyntaxError:
        return None
    return patched if returns else None


def _own_statements(function: ast.FunctionDef) -> Iterable[ast.AST]:
    """Every node of the function, without those of functions inside it."""
    waiting: list[ast.AST] = list(function.body)
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
            waiting += ast.iter_child_nodes(node)
