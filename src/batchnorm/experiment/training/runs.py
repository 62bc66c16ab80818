"""One training run by its settings."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Run:
    """One training: everything that its result depends on besides the data and the network."""

    arm: str
    purpose: str
    seed: int
    lr: float
    weight_decay: float
    dropout: float
    batch_size: int
    optimizer: str
    steps: int

    @property
    def run_id(self) -> str:
        """Return the run's name: readable, unique, safe as a file name."""
        return (
            f"{self.purpose}-{self.arm}-lr{self.lr:g}-wd{self.weight_decay:g}-drop{self.dropout:g}"
            f"-batch{self.batch_size}-{self.optimizer}-steps{self.steps}-seed{self.seed}"
        )
