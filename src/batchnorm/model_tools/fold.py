"""Batch normalization folded into the layer beside it, for deployment, with the proof that the answer is the same."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from ..errors import UserError, quote_error
from .fold_graph import lift
from .fold_rules import fold_after, fold_before, scale_and_shift
from .kinds import LAYERS, is_layer, is_norm
from .program import Unreadable, read_program
from .replace import names_of, replace_all
from .rest import rest_of
from .trace import Call, Trace, tensors_in, trace
from .untouched import run_example, untouched

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
    """Folds every batch normalization that can be into the Conv, ConvTranspose or Linear before or after it.

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
        return [tensor.clone() for tensor in tensors_in(run_example(model, example, "fold"))]


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
        """Folds all pairs there are now, or the first; returns the name of the last one folded, or ''."""
        seen = self._read()
        holders = Counter(p for m in self.model.modules() for p in m._parameters.values() if p is not None)
        for call in seen.calls:
            call.parameters_shared |= any(holders[p] > 1 for p in call.module.parameters(False))
        folded = ""
        used: set[nn.Module] = set()
        for name, norm in [(n, m) for n, m in self.model.named_modules() if is_norm(m)]:
            reason = self.refused.get(name) or _why_not(norm, seen)
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

    def _read(self) -> Trace:
        """What calls what: by the program itself, and where there is none, by what running the example shows."""
        if not self.no_program:
            try:
                return read_program(self.model, self.example)
            except Unreadable as error:
                self.no_program = str(error)
        return trace(self.model, self.example, "fold")

    def _try(self, name: str, norm: nn.Module, seen: Trace, used: set[nn.Module]) -> str:
        """Folds the pair, or says why there is none. A layer takes part in one fold a round: its trace is old then."""
        call = seen.calls_of(norm)[0]
        names = names_of(self.model)
        before, why_not_before = _layer_before(call, seen)
        if before is not None and before.module not in used:
            fold_before(before.module, *scale_and_shift(norm))
            used.add(before.module)
            return self._fold(name, norm, Fold(name, names[before.module], "the layer before"))
        after, why_not_after = _layer_after(call, seen)
        if after is None or after.module in used:
            return f"{why_not_before}; {why_not_after}" if before is None else "its layer was changed in this round"
        result = fold_after(after.module, *scale_and_shift(norm))
        if isinstance(result, str):
            return f"{why_not_before}; {result}"
        used.add(after.module)
        into = names[after.module]
        padded = result is not after.module
        if padded:
            replace_all(self.model, {after.module: result})
        how = "the layer after, padded with what the zeros were" if padded else "the layer after"
        return self._fold(name, norm, Fold(name, into, how))

    def _fold(self, name: str, norm: nn.Module, entry: Fold) -> str:
        rest = rest_of(norm)
        assert rest is not None  # _why_not saw to it
        self.model = replace_all(self.model, {norm: rest}).root
        self.entries[name] = entry
        return ""


def _why_not(norm: Any, seen: Trace) -> str:
    """Why a batch normalization cannot be taken out at all."""
    calls = seen.calls_of(norm)
    if norm.training:
        return "in training mode; call model.eval() first"
    if norm.running_mean is None:
        return "keeps no running statistics"
    if rest_of(norm) is None:
        return f"{type(norm).__module__}.{type(norm).__qualname__} may do more than normalize"
    if getattr(norm, "domains", None) is not None:
        return "its statistics depend on the domain"
    if parametrize.is_parametrized(norm):
        return "its γ or β is parametrized"
    if norm._forward_hooks or norm._forward_pre_hooks:
        return "it has forward hooks"
    if not calls:
        return "the example does not reach it"
    return "called more than once" if len(calls) > 1 else ""


def _unfit(call: Call, seen: Trace) -> str:
    """Why a layer's weight cannot be changed, or ''."""
    layer: Any = call.module
    if type(layer).forward not in {kind.forward for kind in LAYERS}:
        return f"{call.name} is a {type(layer).__qualname__} with a forward of its own"
    if len(seen.calls_of(layer)) > 1:
        return f"{call.name} is called more than once"
    if parametrize.is_parametrized(layer) or "weight" not in layer._parameters:
        return f"{call.name} computes its weight"
    if layer._forward_hooks or layer._forward_pre_hooks:
        return f"{call.name} has forward hooks"
    return f"{call.name} shares its weight" if call.parameters_shared else ""


def _layer_before(call: Call, seen: Trace) -> tuple[Call | None, str]:
    source = call.source
    if source is None or not is_layer(source.module):
        return None, "it does not read a layer's result"
    if not call.aligned:
        return None, f"it normalizes another axis than the channels of {source.name}"
    return _only(source, call.name, seen, source)


def _layer_after(call: Call, seen: Trace) -> tuple[Call | None, str]:
    reader = next((c for c in seen.calls if c.source is call), None)
    if reader is None or not is_layer(reader.module):
        return None, "no layer reads its result"
    if call.inputs > 1 or getattr(call.module, "activation", None) is not None:
        return None, "an activation or a residual comes before the next layer"
    if not reader.aligned:
        return None, f"its channels are not those of {reader.name}'s input"
    return _only(call, reader.name, seen, reader)


def _only(read: Call, reader: str, seen: Trace, layer: Call) -> tuple[Call | None, str]:
    others = [name for name in dict.fromkeys(read.readers) if name != reader]
    if others:
        return None, f"the result of {read.name} is also read by {others[0] or 'the model'}"
    why_not = _unfit(layer, seen)
    return (None, why_not) if why_not else (layer, "")
