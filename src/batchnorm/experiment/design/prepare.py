"""What is fixed before the first run of a study: the data, the network, and which runs there will be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..data.dataset import Dataset
from ..training.networks import Architecture, model_digest
from ..training.probe import layer_table
from .factors import Factors, design, fit_batch_sizes
from .plan import StudyPlan


@dataclass(frozen=True)
class Prepared:
    """A study that is ready to begin: its runs, its data and network, and the layer table of each arm."""

    plan: StudyPlan
    factors: Factors
    data: Dataset
    model: str
    architecture: Architecture
    layers: dict[str, list[dict[str, Any]]]

    def options(self) -> dict[str, Any]:
        """Return all that decides what the runs are and what comes out of them, as JSON types."""
        return {
            "data": self.data.name,
            "data_digest": self.data.fingerprint(),
            "model": self.model,
            "model_digest": model_digest(self.model),
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
) -> Prepared:
    """Return the study of a plan on these data, once every arm could be built and fits them.

    Raises:
        UserError: a batch size that the data have not, or a network that cannot be built or does not fit the data.
    """
    fitted, plan = fit_batch_sizes(batch_sizes, plan, data.size("train"))
    architecture = Architecture(model, data.shape, data.classes, plan.batch_size)
    layers = _check_arms(plan, architecture, data)
    factors = design(
        plan, fitted, optimizers or (), model, quick=quick, own_lrs=own_lrs, architecture=architecture, data=data
    )
    return Prepared(plan, factors, data, model, architecture, layers)


def _check_arms(plan: StudyPlan, architecture: Architecture, data: Dataset) -> dict[str, list[dict[str, Any]]]:
    """Return the layer table of each arm after making sure that every arm can be built and fits the data."""
    example = data.example
    batch = min(plan.batch_size, data.size("train"))
    with torch.random.fork_rng(devices=[]):
        built = {arm: architecture.check(arm, plan.measure_seeds[0], example) for arm in plan.arms}
    return {arm: layer_table(model, example, batch) for arm, model in built.items()}
