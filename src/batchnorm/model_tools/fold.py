"""Batch normalization folded into the layer beside it, for deployment, with the proof that the answer is the same."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from ..errors import UserError, quote_error
from ..inspect.example import run_example, still
from ..inspect.folding import fold_target, per_channel_read, scale_and_shift, why_not_into, why_stays
from ..inspect.from_run import graph_of_run
from ..inspect.graph import GraphNode, ModelGraph
from ..inspect.modules import is_norm, names_of, norms_out_of_reach
from ..inspect.nests import copied, tensors_in
from ..inspect.reading import decided
from ..inspect.untouched import untouched
from .comparison import TOLERANCES, Comparison, compare
from .fold_graph import lift
from .fold_rules import fold_after, fold_before
from .replace import replace_all
from .rest import rest_of

__all__ = ["Fold", "FoldReport", "Folded", "fold"]

_OUTSIDE = "a function that copying leaves as it is (a closure, say) goes on calling the original's layer from the copy"


@dataclass(frozen=True)
class Fold:
    """One batch normalization: the layer it went `into`, or None and the `reason` why it stayed."""

    norm: str
    into: str | None
    reason: str


@dataclass
class FoldReport:
    """What `fold` did with each batch normalization, and how the result was verified: the largest `difference` of an
    output on the examples, relative to the largest value of that output, over `compared` floating-point numbers in
    `outputs` tensors. Where there was none to compare, the result is not `verified` and the difference is NaN."""

    entries: list[Fold] = field(default_factory=list)
    difference: float = math.nan
    compared: int = 0
    outputs: int = 0
    not_verified: str = ""  # why there was nothing to compare, where more is known

    @property
    def folded(self) -> list[Fold]:
        return [entry for entry in self.entries if entry.into is not None]

    @property
    def stayed(self) -> list[Fold]:
        return [entry for entry in self.entries if entry.into is None]

    @property
    def verified(self) -> bool:
        return self.compared > 0

    def __str__(self) -> str:
        found = f"not verified: {self.not_verified or 'the outputs hold no floating-point number to compare'}"
        if self.verified:
            outputs = "one output" if self.outputs == 1 else f"{self.outputs} outputs"
            found = f"{self.compared:,} numbers in {outputs} differ by {self.difference:.1e} at most"
        lines = [f"{len(self.folded)} of {len(self.entries)} folded, {found}"]
        for entry in self.entries:
            where = f"into {entry.into}, {entry.reason}" if entry.into is not None else f"stayed: {entry.reason}"
            lines.append(f"{entry.norm or 'the model'}: {where}")
        return "\n".join(lines)


class Folded(NamedTuple):
    model: nn.Module
    report: FoldReport


def fold(
    model: nn.Module | torch.export.ExportedProgram,
    example_inputs: Any,
    *,
    tolerance: float | None = None,
    trust_example: bool = False,
) -> Folded:
    """Fold every batch normalization that can be into the Conv, ConvTranspose or Linear before or after it.

    With s = γ/√(σ²+ε) and t = β − μ·s, a layer before becomes W[o]·s_o, s·b + t; a layer after becomes W[o, i]·s_i,
    b + Σ W[o, i]·t_i, and where it pads with zeros, it pads with −t/s instead; a Linear that reads flattened channels
    has s and t of its channel at each feature. An activation or a residual of our layers stays where it is.

    The pairs are those that running the example shows: the normalization reads the very result of the layer, along
    the same channels, and nothing else reads it. Layers that are called for something else too, share their weight,
    compute it, or are not the plain classes of torch stay, and so do those whose result is still held when the forward
    is over, by whatever holds it; the report says so. Not seen is what another thread reads, and what compiled code
    reads by an address.

    One run stands for all inputs of its shapes where Python read no value in it that depends on the input, or where
    `torch.export` takes the model; else control flow may depend on the data, and everything stays. A forward that goes
    another way for other *shapes*, or other arguments that are no tensors, is folded for those of the example.

    The result is verified: both models run on the examples, and a fold after which an output differs by more
    than the tolerance is taken back. Where the outputs hold no floating-point number, the report says "not verified".

    Args:
        model: any module, in eval; it is not touched. Or an exported program, whose operators on parameters are made
            modules first; the result is then its module.
        example_inputs: a tuple of positional arguments, as `torch.export` takes them; also a single tensor, or a
            dict of keyword arguments.
        tolerance: largest |difference| of an output over the largest |output|; None: 1e-10, 1e-4, 1e-2 and
            5e-2 for float64, float32, float16 and bfloat16.
        trust_example: True takes the example's way through the model for every input, also where control flow
            depends on the data.

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
    folder = _Folder(model, example_inputs, trust_example)
    with _still(model):
        folder.run()
        compared = folder.compare(reference)
    if compared.difference > _limit(reference, tolerance):
        folder = _Folder(model, example_inputs, trust_example)
        with _still(model):
            folder.run_checked(reference, tolerance)
            compared = folder.compare(reference)
    return Folded(folder.model, FoldReport(list(folder.entries.values()), *compared))


@contextmanager
def _still(model: nn.Module) -> Iterator[None]:
    """The user's model is left as it was: a function that holds on to it goes on calling it from the copy."""
    with untouched(model):
        still(model)
        yield


def _outputs(model: nn.Module, example: Any) -> list[Tensor]:
    with untouched(model):
        return [tensor.clone() for tensor in tensors_in(run_example(model, copied(example), "fold"))]


def _limit(reference: list[Tensor], tolerance: float | None) -> float:
    if tolerance is not None:
        return tolerance
    return max((TOLERANCES.get(tensor.dtype, 0.0) for tensor in reference), default=0.0)


def _copy_of(model: nn.Module) -> nn.Module:
    """A copy of the model; a tensor that an earlier forward left on it, which deepcopy would refuse, is detached, and
    the parameters of TorchScript modules too, which autograd would follow into the copy."""
    left = [t for module in model.modules() for t in tensors_in(vars(module)) if t.grad_fn is not None]
    try:
        with torch.no_grad():
            return copy.deepcopy(model, {id(tensor): tensor.detach() for tensor in left})
    except Exception as error:
        raise UserError(
            f"fold: {type(model).__name__} cannot be copied: {quote_error(error)}; fold works on a copy, so make "
            "the model one that copy.deepcopy takes"
        ) from error


@contextmanager
def _calls_noted(model: nn.Module) -> Iterator[list[str]]:
    """The names of the normalizations that something calls meanwhile."""
    called: list[str] = []
    norms = [(name, module) for module, name in names_of(model).items() if is_norm(module)]
    handles = [norm.register_forward_pre_hook(lambda *_, name=name: called.append(name)) for name, norm in norms]
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()


class _Folder:
    """Folds in a copy of the model, in rounds: what one round takes out brings other pairs together."""

    def __init__(self, model: nn.Module, example: Any, trust_example: bool) -> None:
        self.example = example
        self.model = _copy_of(model)
        if isinstance(self.model, fx.GraphModule):
            lift(self.model)
        names = [name for name, module in self.model.named_modules() if is_norm(module)]
        self.entries = {name: Fold(name, None, "") for name in names}
        self.entries |= {name: Fold(name, None, f"it is {why}") for name, why in norms_out_of_reach(self.model).items()}
        with _still(model), _calls_noted(model) as called:
            seen = graph_of_run(self.model, example, "fold")
        self.refused = dict.fromkeys(called, _OUTSIDE)  # and folds that did not hold the tolerance
        # Folding changes no control flow, so this is asked once.
        self.undecided = "" if trust_example else decided(seen, self.model, example).undecided

    def run(self) -> None:
        while self.one_round(all_at_once=True) and not all(entry.into is not None for entry in self.entries.values()):
            pass

    def run_checked(self, reference: list[Tensor], tolerance: float | None) -> None:
        """One fold at a time, each verified; one that breaks the tolerance is taken back and refused."""
        before = copy.deepcopy(self.model)
        while name := self.one_round(all_at_once=False):
            now = self.compare(reference).difference
            if not now > _limit(reference, tolerance):
                before = copy.deepcopy(self.model)
            else:
                self.model = copy.deepcopy(before)
                self.refused[name] = f"folding it changed an output by {now:.1e}, more than the tolerance"

    def compare(self, reference: list[Tensor]) -> Comparison:
        return compare(_outputs(self.model, self.example), reference)

    def one_round(self, all_at_once: bool) -> str:
        """Fold all pairs there are now, or the first; return the name of the last one folded, or ''."""
        seen = replace(graph_of_run(self.model, self.example, "fold"), undecided=self.undecided)
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

    def _try(self, name: str, norm: nn.Module, graph: ModelGraph, changed: set[nn.Module]) -> str:
        """Fold the pair, or say why there is none. A layer takes part in one fold a round: its graph is old then."""
        s, t = scale_and_shift(norm)

        def why_not_after(call: GraphNode) -> str:
            return why_not_into(call.module, *per_channel_read(call, s, t))

        target = fold_target(graph.calls_of(norm)[0], graph, changed, why_not_after)
        if not target.layers:
            return target.reason
        layers: dict[Any, GraphNode] = {call.module: call for call in target.layers}
        changed |= layers.keys()
        how = "the layer before" if target.before else "the layer after"
        if target.before:
            for layer in layers:
                fold_before(layer, s, t)
        else:
            results = {layer: fold_after(layer, *per_channel_read(call, s, t)) for layer, call in layers.items()}
            padded = {layer: result for layer, result in results.items() if result is not layer}
            replace_all(self.model, padded)
            how += ", padded with what the zeros were" if padded else ""
        rest = rest_of(norm)
        assert rest is not None  # why_stays saw to it
        self.model = replace_all(self.model, {norm: rest}).root
        self.entries[name] = Fold(name, target.name, how)
        return ""
