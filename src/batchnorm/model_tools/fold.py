"""Batch normalization folded into the layer beside it, for deployment, with the proof that the answer is the same."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from ..errors import UserError, quote_error
from ..inspect.example import copied, run_example
from ..inspect.folding import fold_target, scale_and_shift, why_not_into, why_stays
from ..inspect.from_export import Unreadable, graph_of_export
from ..inspect.from_run import graph_of_run, tensors_in
from ..inspect.graph import ModelGraph
from ..inspect.modules import is_norm, names_of
from ..inspect.untouched import untouched
from .fold_graph import lift
from .fold_rules import fold_after, fold_before
from .replace import replace_all
from .rest import rest_of

__all__ = ["Fold", "FoldReport", "Folded", "fold"]

# Of the largest output: what rounding in the other order of operations amounts to in deep networks.
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class Fold:
    """One batch normalization: the layer it went `into`, or None and the `reason` why it stayed."""

    norm: str
    into: str | None
    reason: str


@dataclass
class FoldReport:
    """What `fold` did with each batch normalization, the largest difference of an output on the examples, relative to
    the largest output, and why, if so, the pairs were not read from the program but seen while the example ran."""

    entries: list[Fold] = field(default_factory=list)
    difference: float = 0.0
    no_program: str = ""

    @property
    def folded(self) -> list[Fold]:
        return [entry for entry in self.entries if entry.into is not None]

    @property
    def stayed(self) -> list[Fold]:
        return [entry for entry in self.entries if entry.into is None]

    def __str__(self) -> str:
        lines = [f"{len(self.folded)} of {len(self.entries)} folded, outputs differ by {self.difference:.1e}"]
        if self.no_program:
            lines.append(f"pairs as seen while the example ran: {self.no_program}")
        for entry in self.entries:
            where = f"into {entry.into}, {entry.reason}" if entry.into is not None else f"stayed: {entry.reason}"
            lines.append(f"{entry.norm or 'the model'}: {where}")
        return "\n".join(lines)


class Folded(NamedTuple):
    model: nn.Module
    report: FoldReport


def fold(
    model: nn.Module | torch.export.ExportedProgram, example_inputs: Any, *, tolerance: float | None = None
) -> Folded:
    """Fold every batch normalization that can be into the Conv, ConvTranspose or Linear before or after it.

    With s = γ/√(σ²+ε) and t = β − μ·s, a layer before becomes W[o]·s_o, s·b + t; a layer after becomes W[o, i]·s_i,
    b + Σ W[o, i]·t_i, and where it pads with zeros, it pads with −t/s instead. An activation or a residual of our
    layers stays where it is. The pairs come from the program, as `torch.export` writes it down, and where it cannot,
    from what running the example shows: the normalization reads the very result of the layer, along the same channels,
    and nothing else reads it; layers that are called several times, share their weight, compute it, or are not the
    plain classes of torch stay, and the report says so.

    The result is verified: both models run on the examples, and a fold after which an output differs by more
    than the tolerance is taken back.

    Args:
        model: any module, in eval; it is not touched. Or an exported program, whose operators on parameters are made
            modules first; the result is then its module.
        example_inputs: a tuple of positional arguments, as `torch.export` takes them; also a single tensor, or a
            dict of keyword arguments.
        tolerance: largest |difference| of an output over the largest |output|; None: 1e-10, 1e-4, 1e-2 and
            5e-2 for float64, float32, float16 and bfloat16.

    Returns:
        `Folded(model, report)`: a copy of the model, and a `FoldReport` that names each batch normalization,
        where it went, or why it stayed.

    Raises:
        UserError: the model does not run on the examples, cannot be copied, or is scripted.

    Source: Jacob et al. 2018, https://arxiv.org/abs/1712.05877, section 3.2.
    """
    if isinstance(model, torch.export.ExportedProgram):
        model = model.module()
    if isinstance(model, torch.jit.ScriptModule):
        raise UserError("fold: a scripted model has no layers to fold into; fold the module and script the result")
    reference = _outputs(model, example_inputs)
    folder = _Folder(model, example_inputs)
    folder.run()
    difference = folder.difference(reference)
    if difference > _limit(reference, tolerance):
        folder = _Folder(model, example_inputs)
        difference = folder.run_checked(reference, tolerance)
    return Folded(folder.model, FoldReport(list(folder.entries.values()), difference, folder.no_program))


def _outputs(model: nn.Module, example: Any) -> list[Tensor]:
    with untouched(model):
        return [tensor.clone() for tensor in tensors_in(run_example(model, copied(example), "fold"))]


def _limit(reference: list[Tensor], tolerance: float | None) -> float:
    if tolerance is not None:
        return tolerance
    return max((_TOLERANCE.get(tensor.dtype, 0.0) for tensor in reference), default=0.0)


def _difference(ours: list[Tensor], reference: list[Tensor]) -> float:
    """The largest |difference| relative to the tensor's largest |value|; infinite where NaN or shapes differ."""
    if [t.shape for t in ours] != [t.shape for t in reference]:
        return float("inf")
    worst = 0.0
    for a, b in zip(ours, reference, strict=True):
        if a.is_complex():
            a, b = torch.view_as_real(a), torch.view_as_real(b)
        a, b = a.double(), b.double()
        finite = b.isfinite()
        if not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()) or not a[finite].isfinite().all():
            return float("inf")
        if finite.any():
            scale = b[finite].abs().max().item() or 1.0
            worst = max(worst, (a[finite] - b[finite]).abs().max().item() / scale)
    return worst


class _Folder:
    """Folds in a copy of the model, in rounds: what one round takes out brings other pairs together."""

    def __init__(self, model: nn.Module, example: Any) -> None:
        self.example = example
        try:
            self.model = copy.deepcopy(model)
        except Exception as error:
            raise UserError(
                f"fold: {type(model).__name__} cannot be copied: {quote_error(error)}; fold works on a copy, so make "
                "the model one that copy.deepcopy takes"
            ) from error
        if isinstance(self.model, fx.GraphModule):
            lift(self.model)
        names = [name for name, module in self.model.named_modules() if is_norm(module)]
        self.entries = {name: Fold(name, None, "") for name in names}
        self.refused: dict[str, str] = {}  # folds that did not hold the tolerance
        self.no_program = ""  # why the pairs come from the example's run

    def run(self) -> None:
        while self.one_round(all_at_once=True) and not all(entry.into is not None for entry in self.entries.values()):
            pass

    def run_checked(self, reference: list[Tensor], tolerance: float | None) -> float:
        """One fold at a time, each verified; one that breaks the tolerance is taken back and refused."""
        before = copy.deepcopy(self.model)
        difference = 0.0
        while name := self.one_round(all_at_once=False):
            now = self.difference(reference)
            if now <= _limit(reference, tolerance):
                before, difference = copy.deepcopy(self.model), now
            else:
                self.model = copy.deepcopy(before)
                self.refused[name] = f"folding it changed an output by {now:.1e}, more than the tolerance"
        return difference

    def difference(self, reference: list[Tensor]) -> float:
        return _difference(_outputs(self.model, self.example), reference)

    def one_round(self, all_at_once: bool) -> str:
        """Fold all pairs there are now, or the first; return the name of the last one folded, or ''."""
        seen = self._read()
        holders = Counter(p for m in self.model.modules() for p in m._parameters.values() if p is not None)
        for call in seen.calls:
            if call.module is not None:
                call.parameters_shared |= any(holders[p] > 1 for p in call.module.parameters(False))
        folded = ""
        used: set[nn.Module] = set()
        for name, norm in [(n, m) for n, m in self.model.named_modules() if is_norm(m)]:
            reason = self.refused.get(name) or why_stays(norm, seen)
            if not reason:
                if folded and not all_at_once:
                    break
                reason = self._try(name, norm, seen, used)
            if reason:
                self.entries[name] = Fold(name, None, reason)
            else:
                folded = name or "the model"
        for name in seen.functional_norms:
            function = f"F.batch_norm in {name or 'the model'}"
            self.entries[function] = Fold(function, None, "called as a function")
        return folded

    def _read(self) -> ModelGraph:
        """What calls what: by the program itself, and where there is none, by what running the example shows."""
        if not self.no_program:
            try:
                return graph_of_export(self.model, self.example)
            except Unreadable as error:
                self.no_program = str(error)
        return graph_of_run(self.model, self.example, "fold")

    def _try(self, name: str, norm: nn.Module, graph: ModelGraph, changed: set[nn.Module]) -> str:
        """Fold the pair, or say why there is none. A layer takes part in one fold a round: its graph is old then."""
        s, t = scale_and_shift(norm)
        target = fold_target(graph.calls_of(norm)[0], graph, changed, lambda layer: why_not_into(layer.module, s, t))
        if target.layer is None:
            return target.reason
        layer: Any = target.layer.module
        into = names_of(self.model)[layer]
        changed.add(layer)
        if target.before:
            fold_before(layer, s, t)
            return self._fold(name, norm, Fold(name, into, "the layer before"))
        result = fold_after(layer, s, t)
        padded = result is not layer
        if padded:
            replace_all(self.model, {layer: result})
        how = "the layer after, padded with what the zeros were" if padded else "the layer after"
        return self._fold(name, norm, Fold(name, into, how))

    def _fold(self, name: str, norm: nn.Module, entry: Fold) -> str:
        rest = rest_of(norm)
        assert rest is not None  # why_stays saw to it
        self.model = replace_all(self.model, {norm: rest}).root
        self.entries[name] = entry
        return ""
