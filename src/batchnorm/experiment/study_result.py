"""What `study` and `analyze` return."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from .analysis.claims import Claim


@dataclass(frozen=True)
class StudyResult:
    """What `study` and `analyze` return.

    Attributes:
        claims: the six claims by name.
        runs: runs.csv as a table, a row a training run, in the plan's order.
        summary: summary.json as a dictionary.
        report, runs_csv, summary_json: the three files.
    """

    claims: dict[str, Claim]
    runs: pd.DataFrame
    summary: dict[str, Any]
    report: Path
    runs_csv: Path
    summary_json: Path
