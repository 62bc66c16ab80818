"""Recall on seeded faults and false alarms on healthy networks; writes the table of docs/doctor-corpus.md.

    python -m benchmarks.doctor_corpus

The corpus is that of the tests (tests/doctor): every fault and every healthy network, those of transformers too.
"""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path

import torch

from batchnorm import diagnose
from tests.doctor import pretrained
from tests.doctor.faults import faults
from tests.doctor.healthy import healthy

PAGE = Path(__file__).parents[1] / "docs" / "doctor-corpus.md"


def recall() -> tuple[Counter[str], Counter[str], list[str]]:
    """Return the seeded and the found faults by code, and the names of those that were missed."""
    seeded: Counter[str] = Counter()
    found: Counter[str] = Counter()
    missed = []
    for name, code, call in (*faults(), *pretrained.faults()):
        torch.manual_seed(0)
        seeded[code] += 1
        if code in diagnose(**call()).codes:
            found[code] += 1
        else:
            missed.append(f"{code}: {name}")
    return seeded, found, missed


def alarms() -> tuple[int, list[str]]:
    """Return the number of healthy networks, and the warnings and errors found in them."""
    count, raised = 0, []
    for name, call in (*healthy(), *pretrained.healthy()):
        torch.manual_seed(0)
        count += 1
        codes = {finding.code for finding in diagnose(**call()).findings if finding.severity != "info"}
        raised += [f"{code}: {name}" for code in sorted(codes)]
    return count, raised


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # torch warns about seeded faults too; only findings count here
    seeded, found, missed = recall()
    count, raised = alarms()
    by_code = Counter(alarm[:5] for alarm in raised)
    lines = [
        "# What the doctor finds",
        "",
        "Made by `python -m benchmarks.doctor_corpus` from the corpus of the tests: faults seeded into MLPs, CNNs, "
        "residual, depthwise, 1-D, 3-D, adversarial, attention and functional-style networks and into those of "
        "transformers; and healthy networks of the same kinds, new, trained a little and trained out, in training "
        "and evaluation mode, frozen, converted, recalibrated. A false alarm is a finding of warning or worse.",
        "",
        "| code | faults | found | recall | false alarms |",
        "|---|---|---|---|---|",
    ]
    for code in sorted(seeded):
        share = found[code] / seeded[code]
        lines.append(f"| {code} | {seeded[code]} | {found[code]} | {share:.1%} | {by_code[code]} of {count} |")
    total, hits = sum(seeded.values()), sum(found.values())
    nets = len({alarm.split(": ", 1)[1] for alarm in raised})
    lines.append(f"| all | {total} | {hits} | {hits / total:.1%} | {nets} of {count} networks ({nets / count:.1%}) |")
    lines += ["", *(f"- missed: {name}" for name in missed), *(f"- false alarm: {name}" for name in raised)]
    lines += ["", "BN304 takes several processes; `tests/doctor/test_ranks.py` holds it, `test_files.py` BN401."]
    PAGE.write_text("\n".join(lines).replace("\n\n\n", "\n\n") + "\n", encoding="utf-8")
    print(PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
