"""A program as data, and the Python text that it stands for. What is run is the text, so that what is printed runs."""

from __future__ import annotations

import linecache
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

__all__ = ["HEADER", "TOUCHES", "Case", "Made", "Program", "Step", "Touch", "load"]

HEADER = '''"""Found by `python -m tests.fuzz --targets {target}`."""

from collections import OrderedDict

import torch
from torch import nn
from torch.nn import functional as F

import batchnorm
from tests.fuzz import parts
from tests.fuzz.targets import {target}
'''

# What may be done to a module once it stands in the network; {m} is the module, {n} the network.
TOUCHES = {
    "eval": "{m}.eval()",
    "train": "{m}.train()",
    "hook": "{m}.register_forward_hook(parts.halve_output)",
    "looking hook": "{m}.register_forward_hook(parts.look)",
    "pre-hook": "{m}.register_forward_pre_hook(parts.halve_input)",
    "backward hook": "{m}.register_full_backward_hook(parts.halve_gradient)",
    "wrapped": "parts.wrap_forward({m})",
    "parametrized": "parts.parametrize_weight({m})",
    "no grad": "{m}.requires_grad_(False)",
    "weight without grad": "parts.no_weight_grad({m})",
    "alias": "{n}.alias = {m}",
    "in a list": "{n}.aside = [{m}]",
    "zero weight": "parts.zero_weight({m})",
    "user attribute": "{m}._c = 1",
    "float counter": "parts.float_counter({m})",
}


@dataclass(frozen=True)
class Made:
    """A module: the call of a constructor. A Sequential has named children in place of arguments."""

    kind: str
    arguments: tuple[Any, ...] = ()
    keywords: tuple[tuple[str, Any], ...] = ()
    children: tuple[tuple[str, Made], ...] = ()

    def __str__(self) -> str:
        if self.kind == "nn.Sequential":
            inside = ", ".join(f"({name!r}, {child})" for name, child in self.children)
            return f"nn.Sequential(OrderedDict([{inside}]))"
        keywords = [f"{name}={value}" for name, value in self.keywords]
        return f"{self.kind}({', '.join([*map(repr, self.arguments), *keywords])})"

    def paths(self, prefix: str) -> Iterator[tuple[str, Made]]:
        yield prefix, self
        for name, child in self.children:
            yield from child.paths(f"{prefix}.{name}")


@dataclass(frozen=True)
class Step:
    """Value i + 1 of a program: an expression in which {0} and {1} are values read before and {m} is a module."""

    expression: str
    reads: tuple[int, ...]
    module: str = ""
    kept: bool = False  # also stored as an attribute of the network

    def text(self, number: int) -> str:
        values = [f"x{i}" for i in self.reads]
        line = f"x{number} = {self.expression.format(*values, m=f'self.{self.module}')}"
        return f"{line}\n        self.kept{number} = x{number}" if self.kept else line


@dataclass(frozen=True)
class Touch:
    """A change to one module before the network is handed over."""

    kind: str
    path: str

    def __str__(self) -> str:
        return TOUCHES[self.kind].format(m=f"net.get_submodule({self.path!r})", n="net")


@dataclass(frozen=True)
class Program:
    """A network, what is done to it, and the input it is called with."""

    modules: tuple[tuple[str, Made], ...]
    steps: tuple[Step, ...]
    outputs: tuple[int, ...]
    shape: tuple[int, ...]
    touches: tuple[Touch, ...] = ()
    training: bool = False
    layout: str = "contiguous"
    dtype: str = "float64"
    seed: int = 0
    root: str = ""  # this module is the model, and the network around it is not

    def text(self) -> str:
        lines = ["class Net(nn.Module):", "    def __init__(self):", "        super().__init__()"]
        lines += [f"        self.{name} = {made}" for name, made in self.modules]
        lines += ["", "    def forward(self, x0):"]
        lines += [f"        {step.text(i + 1)}" for i, step in enumerate(self.steps)]
        results = ", ".join(f"x{i}" for i in self.outputs)
        lines += [f"        return {results}", "", "", "def make():"]
        lines += [f"    net = parts.settled(Net, {self.seed}).to(torch.{self.dtype})"]
        lines += [f"    net.train({self.training})", *(f"    {touch}" for touch in self.touches)]
        model = f"net.{self.root}" if self.root else "net"
        x = f"parts.drawn({self.shape}, {self.layout!r}, torch.{self.dtype}, {self.seed})"
        return "\n".join([*lines, f"    return {model}, {x}", ""])

    def paths(self) -> list[tuple[str, Made]]:
        return [pair for name, made in self.modules for pair in made.paths(name)]

    def features(self) -> set[str]:
        found = {made.kind for _, made in self.paths()}
        found |= {keyword for _, made in self.paths() for keyword, _ in made.keywords if made.kind.startswith("batch")}
        found |= {step.expression for step in self.steps if step.expression != "{m}({0})"}
        found |= {f"touch: {touch.kind}" for touch in self.touches}
        called = [step.module for step in self.steps if step.module]
        found |= {"several calls"} if len(set(called)) < len(called) else set()
        found |= {"kept"} if any(step.kept for step in self.steps) else set()
        found |= {"several outputs"} if len(self.outputs) > 1 else set()
        found |= {"root"} if self.root else set()
        return found | {"train" if self.training else "eval", self.layout, self.dtype}


@dataclass(frozen=True)
class Case:
    """What one run of a target's `check` is given: a program, or a `problem` that its own repr describes."""

    target: str
    program: Program | None = None
    problem: Any = None
    arguments: tuple[tuple[str, Any], ...] = ()

    def text(self) -> str:
        given = ["make"] if self.program is not None else [f"{self.target}.{self.problem!r}"]
        call = ", ".join([*given, *(f"{name}={value!r}" for name, value in self.arguments)])
        body = f"{self.program.text()}\n\n" if self.program is not None else ""
        header = HEADER.format(target=self.target)
        return f"{header}\n\n{body}def test_found():\n    {self.target}.check({call})\n"

    def features(self) -> set[str]:
        own = self.program.features() if self.program is not None else self.problem.features()
        return own | {f"{name}={value}" for name, value in self.arguments}


def load(text: str) -> SimpleNamespace:
    """Run a case's text as a module. Its lines are where tracebacks and `torch.compile` look for them."""
    name = f"<fuzz {hash(text):x}>"
    linecache.cache[name] = (len(text), None, text.splitlines(True), name)
    space: dict[str, Any] = {"__name__": "tests.fuzz.found.case"}
    exec(compile(text, name, "exec"), space)
    return SimpleNamespace(**space)
