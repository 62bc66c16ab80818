"""Strategies for whole programs. Each step is drawn for the shape of a value that is there, newest first, so that what
hypothesis deletes leaves a program that runs."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

from hypothesis import assume
from hypothesis import strategies as st

from .layers import Scope, draw_layer, draw_norm, draw_unary
from .program import Made, Program, Step, Touch

__all__ = ["programs"]

Shape = tuple[int, ...]
_NAMES = ["a", "b", "conv", "bn", "norm", "act", "layer", "options", "relu", "head", "domain", "_c", "memory", "block"]
_INNER = ["0", "1", "2", "3", "norm", "act", "conv", "bn", "weight_", "layer", "running_stats", "forward_"]
_CALL = "{m}({0})"


class _Draft:
    """A program while it is drawn: the values so far with their shapes, the modules with those they are for."""

    def __init__(self, draw: Any, scope: Scope, shape: Shape, training: bool) -> None:
        self.draw, self.scope, self.training = draw, scope, training
        self.shapes = [shape]
        self.modules: dict[str, tuple[Made, Shape, Shape]] = {}
        self.steps: list[Step] = []

    def add(self, expression: str, reads: tuple[int, ...], shape: Shape, module: str = "") -> None:
        kept = self.draw(st.integers(0, 9)) == 9
        self.steps.append(Step(expression, reads, module, kept))
        self.shapes.append(shape)

    def place(self, made: Made, read: int, shape: Shape, call: str = _CALL) -> None:
        name = self.draw(st.sampled_from([n for n in _NAMES if n not in self.modules]))
        self.modules[name] = (made, self.shapes[read], shape)
        if call == _CALL and made.kind.startswith("batchnorm.") and self.draw(st.integers(0, 4)) == 4:
            call = "{m}({0}, mask=parts.mask_of({0}))"
        self.add(call, (read,), shape, name)

    def pick(self) -> int:
        """A value to read, mostly the newest."""
        newest = len(self.shapes) - 1
        return newest - self.draw(st.sampled_from([0, 0, 0, 0, 1, 2])) % (newest + 1)

    def varied(self, shape: Shape) -> bool:
        return prod(shape) // shape[1] > 1

    # --- one step each ---------------------------------------------------------------------------------
    def pair(self) -> None:
        """A layer and a normalization of its result: what every tool looks for."""
        self.layer()
        self.norm()

    def layer(self) -> None:
        read = self.pick()
        made, shape = draw_layer(self.draw, self.shapes[read])
        self.place(made, read, shape)

    def norm(self) -> None:
        read = len(self.shapes) - 1
        if self.varied(self.shapes[read]):
            made = draw_norm(self.draw, self.shapes[read], self.scope, self.training)
            self.place(made, read, self.shapes[read])

    def unary(self) -> None:
        read = self.pick()
        made, shape = draw_unary(self.draw, self.shapes[read], self.scope, self.training)
        self.place(made, read, shape)

    def sequential(self, depth: int = 0) -> None:
        read = self.pick()
        made, shape = self._sequential(self.shapes[read], depth)
        self.place(made, read, shape)

    def _sequential(self, shape: Shape, depth: int) -> tuple[Made, Shape]:
        children: list[tuple[str, Made]] = []
        for _ in range(self.draw(st.integers(1, 4))):
            if depth < 2 and self.draw(st.integers(0, 6)) == 6:
                made, shape = self._sequential(shape, depth + 1)
            else:
                made, shape = draw_unary(self.draw, shape, self.scope, self.training)
            taken = [name for name, _ in children]
            children.append((self.draw(st.sampled_from([n for n in _INNER if n not in taken])), made))
        return Made("nn.Sequential", children=tuple(children)), shape

    def again(self) -> None:
        """A module that stands there already, called once more."""
        read = self.pick()
        fits = [name for name, (_, shape, _) in self.modules.items() if shape == self.shapes[read]]
        if fits:
            name = self.draw(st.sampled_from(fits))
            self.add(_CALL, (read,), self.modules[name][2], name)

    def function(self) -> None:
        read = self.pick()
        expression = self.draw(st.sampled_from(self.scope.functions))
        self.add(expression, (read,), self.shapes[read])

    def binary(self) -> None:
        newest = len(self.shapes) - 1
        shape = self.shapes[newest]
        alike = [i for i, other in enumerate(self.shapes) if other == shape]
        beside = [i for i, o in enumerate(self.shapes) if o[:1] == shape[:1] and o[2:] == shape[2:]]
        if self.draw(st.integers(0, 3)) == 3:
            other = self.draw(st.sampled_from(beside))
            joined = (shape[0], shape[1] + self.shapes[other][1], *shape[2:])
            self.add("torch.cat([{0}, {1}], 1)", (newest, other), joined)
            return
        other = self.draw(st.sampled_from(alike))
        forms = ["{0} + {1}", "{1} + {0}", "{0} * {1}", "torch.add({0}, {1}, alpha=2)", "{0} - {1}", "{0}.add_({1})"]
        self.add(self.draw(st.sampled_from(forms)), (newest, other), shape)

    def reshape(self) -> None:
        read = self.pick()
        forms = _reshapings(self.shapes[read])
        expression, shape = self.draw(st.sampled_from(forms))
        self.add(expression, (read,), shape)

    def elsewhere(self) -> None:
        """A module's tensors read by something else than its call."""
        read = self.pick()
        shape = self.shapes[read]
        norms = [
            n for n, (m, own, _) in self.modules.items() if m.kind.startswith("nn.BatchNorm") and own[1] == shape[1]
        ]
        layers = [n for n, (m, _, _) in self.modules.items() if m.kind.startswith(("nn.Conv", "nn.Linear"))]
        if norms and self.draw(st.booleans()):
            name = self.draw(st.sampled_from(norms))
            stats = "{m}.running_mean, {m}.running_var, {m}.weight, {m}.bias, {m}.running_mean is None"
            self.add(f"F.batch_norm({{0}}, {stats})", (read,), shape, name)
        elif layers:
            name = self.draw(st.sampled_from(layers))
            self.add("{0} * {m}.weight.mean()", (read,), shape, name)


def _reshapings(shape: Shape) -> list[tuple[str, Shape]]:
    forms: list[tuple[str, Shape]] = [
        ("{0}.flatten(1)", (shape[0], prod(shape[1:]))),
        ("{0}.unsqueeze(-1)", (*shape, 1)) if len(shape) < 5 else ("{0}.flatten(1)", (shape[0], prod(shape[1:]))),
        (f"{{0}}.reshape(-1, {shape[-1]})", (prod(shape[:-1]), shape[-1])),
        ("{0}.view_as({0})", shape),
    ]
    if shape[1] > 1:
        forms += [("{0}[:, 1:]", (shape[0], shape[1] - 1, *shape[2:])), ("{0}.flip(1)", shape)]
        forms += [("torch.chunk({0}, 2, 1)[0]", (shape[0], (shape[1] + 1) // 2, *shape[2:]))]
    if len(shape) > 2:
        order = [0, *range(2, len(shape)), 1]
        forms += [("{0}.transpose(1, 2)", (shape[0], shape[2], shape[1], *shape[3:]))]
        forms += [(f"{{0}}.permute({', '.join(map(str, order))})", tuple(shape[i] for i in order))]
        forms += [("{0}.mean(-1)", shape[:-1]), ("{0}[..., ::2]", (*shape[:-1], (shape[-1] + 1) // 2))]
        forms += [("{0}.flatten(2)", (*shape[:2], prod(shape[2:]))), ("{0}.transpose(1, 2).transpose(1, 2)", shape)]
    return forms


@st.composite
def programs(draw: Any, scope: Scope) -> Program:
    """A program within the scope."""
    training = scope.training and draw(st.booleans())
    dims = draw(st.integers(0, 3))
    shape = (draw(st.integers(2, 4)), draw(st.integers(1, 4)), *(draw(st.integers(1, 6 - dims)) for _ in range(dims)))
    draft = _Draft(draw, scope, shape, training)
    sorts = ["pair", "pair", "sequential", "unary", "function", "binary", "reshape", "again", "norm", "layer"]
    sorts += ["elsewhere"] if scope.elsewhere else []
    for _ in range(draw(st.integers(1, scope.longest))):
        getattr(draft, draw(st.sampled_from(sorts)))()
        if max(prod(s) for s in draft.shapes) > 2000 or len(draft.modules) > 9:
            break
    assume(draft.steps)
    last = len(draft.steps)
    outputs = tuple(
        sorted({last, *([draw(st.integers(0, last))] if draw(st.integers(0, 4)) == 4 else [])}, reverse=True)
    )
    modules = tuple((name, made) for name, (made, _, _) in draft.modules.items())
    layouts = ["contiguous", "contiguous", "channels_last", "sliced", "transposed", "expanded"]
    program = Program(
        modules, tuple(draft.steps), outputs, shape, (), training, draw(st.sampled_from(layouts)),
        draw(st.sampled_from(scope.dtypes)), draw(st.integers(0, 99)),
    )  # fmt: skip
    paths = program.paths()
    assume(not scope.needs_norm or any("BatchNorm" in made.kind for _, made in paths))
    return _touched(draw, program, scope)


def _touched(draw: Any, program: Program, scope: Scope) -> Program:
    paths = [path for path, made in program.paths() if scope.touch_norms or "Norm" not in made.kind]
    touches = ()
    if scope.touches and paths and draw(st.integers(0, 1)):
        one = st.builds(Touch, st.sampled_from(scope.touches), st.sampled_from(paths))
        touches = tuple(draw(st.lists(one, min_size=1, max_size=2)))
    root = ""
    if len(program.steps) == 1 and program.steps[0].expression == _CALL and draw(st.integers(0, 1)):
        root = program.steps[0].module
    return replace(program, touches=touches, root=root)
