"""What is fixed before the first run of a study: the data, the network, and which runs there will be."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..data.dataset import Dataset
from ..training.networks import BUILT_IN, Architecture, model_digest
from ..training.probe import layer_table
from ..training.train import has_dropout
from .factors import Factors, design, fit_batch_sizes
from .plan import StudyPlan


@dataclass(frozen=True)
class Prepared:
    """A study that is ready to begin: its runs, its data and network, and each arm's layers and tree of modules."""

    plan: StudyPlan
    factors: Factors
    data: Dataset
    model: str
    architecture: Architecture
    layers: dict[str, list[dict[str, Any]]]
    trees: dict[str, str]

    def held(self) -> dict[str, str]:
        """Return the factors that are not varied, each with a clause that says why."""
        why = "the network keeps its own dropout in every run, and the rule `replace` for dropout would vary it"
        return {} if len(self.plan.dropouts) > 1 else {"dropout": why}

    def options(self) -> dict[str, Any]:
        """Return all that decides what the runs are and what comes out of them, as JSON types."""
        return {
            "data": self.data.name,
            "data_digest": self.data.fingerprint(),
            "model": self.model,
            "model_digest": model_digest(self.model),
            # Built-in networks have neither normalizations nor dropout of their own: no rule changes a run of theirs.
            **(
                {}
                if self.model in BUILT_IN
                else {"where": self.architecture.where, "own_dropout": self.architecture.dropout}
            ),
            **self.plan.to_json(),
            **self.factors.to_json(),
        }


def prepare(
    plan: StudyPlan,
    data: Dataset,
    model: str,
    batch_sizes: Sequence[int] | None,
    optimizers: Sequence[str] | None,
    *,
    quick: bool,
    own_lrs: bool,
    where: str = "same",
    dropout: str = "keep",
) -> Prepared:
    """Return the study of a plan on these data, once every arm could be built and fits them.

    Raises:
        UserError: a batch size that the data have not, or a network that cannot be built or does not fit the data.
    """
    fitted, plan = fit_batch_sizes(batch_sizes, plan, data.size("train"))
    architecture = Architecture(model, data.shape, data.classes, plan.batch_size, where, dropout)
    built = _build_arms(plan, architecture, data.example)
    if dropout == "keep" and any(has_dropout(network) for network in built.values()):
        # A dropout of zero stands for the network as it is. Other levels would take the place of its own.
        plan = replace(plan, dropouts=(0.0,))
    batch = min(plan.batch_size, data.size("train"))
    layers = {arm: layer_table(network, data.example, batch) for arm, network in built.items()}
    trees = {arm: str(network) for arm, network in built.items()}
    factors = design(
        plan, fitted, optimizers or (), model, quick=quick, own_lrs=own_lrs, architecture=architecture, data=data
    )
    return Prepared(plan, factors, data, model, architecture, layers, trees)


def _build_arms(plan: StudyPlan, architecture: Architecture, example: torch.Tensor) -> dict[str, nn.Module]:
    """Return the network of each arm after making sure that it fits the data."""
    with torch.random.fork_rng(devices=[]):
        return {arm: architecture.check(arm, plan.measure_seeds[0], example) for arm in plan.arms}


def tree_lines(trees: Mapping[str, str]) -> list[str]:
    """Return what was built: the first arm's tree of modules, and of every other arm the lines that differ from it."""
    first = next(iter(trees))
    lines = [f"{first}:", *(f"  {line}" for line in trees[first].splitlines())]
    for arm, tree in list(trees.items())[1:]:
        found = difflib.unified_diff(trees[first].splitlines(), tree.splitlines(), lineterm="", n=0)
        changed = [line for line in found if not line.startswith(("---", "+++", "@@"))]
        lines += [f"{arm}, against {first}:", *(f"  {line}" for line in changed or ["no difference"])]
    return lines
