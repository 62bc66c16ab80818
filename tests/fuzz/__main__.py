"""`python -m tests.fuzz --seconds 600 --targets layers,fold`: exit 1 where a tool is wrong, with the smallest case."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="for all targets together (default 60)")
    parser.add_argument("--targets", default="", help="a comma-separated list (default: all)")
    parser.add_argument("--seed", type=int, help="the first seed of each target (default: drawn)")
    parser.add_argument("--found", type=Path, default=Path(__file__).parent / "found", help="folder for failing cases")
    parser.add_argument("--limit", type=int, default=20, help="findings after which a target ends (default 20)")
    parser.add_argument("--kinds", action="store_true", help="also list how many cases held what")
    given = parser.parse_args(arguments)
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is first imported
    import torch

    from .runner import fuzz
    from .targets import TARGETS

    torch.set_num_threads(1)
    names = given.targets.split(",") if given.targets else list(TARGETS)
    if unknown := sorted(set(names) - set(TARGETS)):
        parser.error(f"no target {unknown[0]!r}; there are {', '.join(TARGETS)}")
    logs = []
    for name in names:
        log = fuzz(
            name, given.seconds / len(names), start=given.seed, limit=given.limit,
            database=Path(".hypothesis/fuzz"), say=lambda line: print(line, flush=True),
        )  # fmt: skip
        logs.append(log)
        for number, finding in enumerate(log.findings):
            path = given.found / f"test_{name}_{finding.seed}_{number}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(finding.text())
            print(f"\n{path}\n{finding.text()}", flush=True)
    print("\n".join(map(str, logs)))
    if given.kinds:
        for log in logs:
            print(f"{log.target}: " + ", ".join(f"{kind} {count}" for kind, count in log.kinds.most_common()))
    return 1 if any(log.findings for log in logs) else 0


if __name__ == "__main__":
    sys.exit(main())
