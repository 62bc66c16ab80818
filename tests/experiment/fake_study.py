"""A made-up study of the shape a real one has, for tests of what reads studies: no network is trained.

Accuracy rises as a logistic curve of log-steps whose midpoint depends on the learning rate, so that each arm has a
best rate, a region that works and a region that diverges.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

Trace = dict[str, Any]
Study = tuple[dict[str, Any], pd.DataFrame, Callable[[str], Trace]]

STEPS = [0, 1, 2, 3, 5, 8, 13, 20, 32, 50, 80, 130, 200, 320, 500, 800]
RATES = [0.001, 0.0031623, 0.01, 0.031623, 0.1, 0.31623, 1.0, 3.1623, 10.0]
DECAYS = [0.0, 1e-5, 1e-4, 1e-3, 1e-2]
DROPOUTS = [0.0, 0.1, 0.25, 0.5]
CHANCE = 0.1
LAYERS = ["hidden1", "hidden2", "hidden3"]


def _claims() -> dict[str, dict[str, Any]]:
    def claim(
        estimate: float, null: float, low: float, high: float, unit: str, verdict: str, text: str
    ) -> dict[str, Any]:
        values = {"estimate": estimate, "null": null, "ci_low": low, "ci_high": high}
        return {**values, "unit": unit, "verdict": verdict, "n": 8, "censored": 0, "text": text}

    return {
        "convergence": claim(
            5.2,
            1,
            4.1,
            6.6,
            "times",
            "better",
            "reaches 96.4 % in 5.2 times fewer steps, 95 % interval 4.1–6.6",
        ),
        "learning_rate": claim(
            1.4, 0, 0.9, 1.9, "decades", "better", "tolerates 1.4 more decades of rate, 95 % interval 0.9–1.9"
        ),
        "weight_decay": claim(
            -3.0,
            0,
            -7.5,
            1.5,
            "points",
            "no difference",
            "spread 3.0 points smaller, 95 % interval −7.5 to 1.5",
        ),
        "dropout": claim(2.5, 0, 0.4, 4.6, "points", "worse", "spread 2.5 points larger, 95 % interval 0.4 to 4.6"),
        "generalization": claim(
            0.6, 0, -0.3, 1.5, "points", "no difference", "0.6 points more, 95 % interval −0.3 to 1.5"
        ),
        "drift": claim(0.31, 1, 0.2, 0.5, "ratio", "better", "drifts 0.31 times as far, 95 % interval 0.2–0.5"),
    }


def _settings_of(arm_index: int) -> list[tuple[float, float, float]]:
    best = RATES[5] if arm_index else RATES[6]
    grid = [(lr, 0.0, 0.0) for lr in RATES]
    grid += [(best, decay, 0.0) for decay in DECAYS[1:]]
    return grid + [(best, 0.0, dropout) for dropout in DROPOUTS[1:]]


def _curve(rng: np.random.Generator, arm_index: int, lr: float, loss_of_accuracy: float) -> np.ndarray:
    midpoint = (3.2 if arm_index == 0 else 1.9) - 1.1 * np.log10(lr + 1e-9) * (0.9 if arm_index else 1.2)
    steps = np.log(np.array(STEPS) + 1.0)
    rise = 1 / (1 + np.exp(-1.6 * (steps - midpoint - rng.normal(0, 0.12))))
    ceiling = 0.965 - loss_of_accuracy + rng.normal(0, 0.004)
    return np.clip(CHANCE + (ceiling - CHANCE) * rise + rng.normal(0, 0.004, len(STEPS)), 0, 1)


def _percentiles(rng: np.random.Generator, arm_index: int) -> dict[str, Any]:
    time = np.linspace(0, 1, len(STEPS))[:, None]
    units = rng.normal(0, 1, (1, 6))
    wander = (2.4 if arm_index == 0 else 0.4) * units * np.sin(2.5 * time + units)
    middle = wander + rng.normal(0, 0.05, (len(STEPS), 6))
    width = (0.4 + 2.2 * time if arm_index == 0 else 1.0 + 0.1 * time) * np.ones((1, 6))
    values = np.stack([middle - width, middle, middle + width], axis=-1).round(5)
    return {"layer": "hidden3", "units": list(range(6)), "levels": [15, 50, 85], "values": values.tolist()}


def _affine(rng: np.random.Generator, arm: str) -> list[dict[str, Any]]:
    if arm == "none":
        return []
    if arm == "batch_no_affine":
        return [{"layer": name, "weight": None, "bias": None} for name in LAYERS]
    return [
        {
            "layer": name,
            "weight": rng.normal(1.0 + 0.1 * i, 0.15, 100).round(4).tolist(),
            "bias": rng.normal(-0.1 * i, 0.2, 100).round(4).tolist(),
        }
        for i, name in enumerate(LAYERS)
    ]


def _run(
    rng: np.random.Generator,
    index: int,
    arm: str,
    purpose: str,
    seed: int,
    setting: tuple[float, float, float],
) -> tuple[dict[str, Any], Trace]:
    lr, decay, dropout = setting
    run_id = f"{purpose}-{index}-s{seed}-lr{lr:g}-wd{decay:g}-do{dropout:g}"
    limit = 1.0 if index == 0 else 3.1623
    diverged = bool(lr > limit and rng.random() < 0.75)
    values = _curve(rng, index, lr, 6 * decay * (2 - bool(index)) + 0.1 * dropout**2)
    kept = 4 if diverged else len(STEPS)
    best = CHANCE if diverged else float(values.max())
    hit = np.flatnonzero(values >= 0.93)
    row = {
        "run_id": run_id, "purpose": purpose, "arm": arm, "seed": seed, "lr": lr, "weight_decay": decay,
        "dropout": dropout, "batch_size": 60, "optimizer": "sgd", "steps": STEPS[-1],
        "steps_to_target": float(STEPS[hit[0]]) if len(hit) and not diverged else np.nan,
        "val_accuracy": best, "test_accuracy": max(best - 0.01, 0.0), "final_val_accuracy": float(values[kept - 1]),
        "train_loss": 0.1, "drift": 2.0 if index == 0 else 0.5, "diverged": diverged, "seconds": 0.4,
    }  # fmt: skip
    percentiles = _percentiles(rng, index)
    percentiles["values"] = percentiles["values"][:kept]
    trace = {
        "run_id": run_id,
        "steps": STEPS[:kept],
        "val_accuracy": values[:kept].round(4).tolist(),
        "train_loss": [None] + [0.5] * (kept - 1),
        "percentiles": percentiles,
        "affine": _affine(rng, arm),
    }
    return row, trace


def fake_study(arms: tuple[str, ...] = ("none", "batch"), seeds: int = 4) -> Study:
    """`(summary, runs, traces)` as `write_report` takes them, the same for the same arguments."""
    rng = np.random.default_rng(0)
    rows, traces = [], {}
    plan = {"choose": [100, 101], "measure": list(range(seeds))}
    for index, arm in enumerate(arms):
        for purpose, numbers in plan.items():
            for setting in _settings_of(index):
                for seed in numbers:
                    row, trace = _run(rng, index, arm, purpose, seed, setting)
                    rows.append(row)
                    traces[row["run_id"]] = trace
    return _summary(arms, plan, len(rows)), pd.DataFrame(rows), traces.__getitem__


def _summary(arms: tuple[str, ...], plan: dict[str, list[int]], runs: int) -> dict[str, Any]:
    def settings(index: int) -> dict[str, float]:
        best = RATES[5] if index else RATES[6]
        return {"best_lr": best, "lr": best, "weight_decay": 1e-5, "dropout": 0.0}

    def layers(arm: str) -> list[dict[str, Any]]:
        kind = {"none": "Linear", "layer": "LayerNorm"}.get(arm, "BatchNorm1d")
        return [{"name": n, "kind": kind, "features": 100, "positions": 1, "m": 60} for n in LAYERS]

    return {
        "schema": 1, "batchnorm": "0.1.0", "torch": "2.13.0+cpu", "python": "3.11.2", "platform": "Linux-x86_64",
        "commit": "0123456789abcdef0123456789abcdef01234567", "created": "2026-01-02T03:04:05+00:00",
        "command": "batchnorm study --out study",
        "data": {
            "name": "digits", "samples": 1797, "train": 1077, "validation": 360, "test": 360, "shape": [1, 8, 8],
            "classes": 10, "labels": [str(i) for i in range(10)],
        },
        "model": "mlp", "arms": list(arms), "baseline": arms[0], "compared": arms[-1], "target_accuracy": 0.93,
        "settings": {arm: settings(i) for i, arm in enumerate(arms)},
        "grids": {"lr": RATES, "weight_decay": DECAYS, "dropout": DROPOUTS},
        "seeds": plan, "layers": {arm: layers(arm) for arm in arms}, "runs": runs, "seconds": 96.0,
        "claims": _claims(),
    }  # fmt: skip
