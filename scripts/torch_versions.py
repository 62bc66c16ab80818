"""Read what pip and pytest wrote for scripts/torch_versions.sh, and write its table."""

from __future__ import annotations

import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from itertools import groupby
from pathlib import Path

BEGIN, END = "<!-- versions:begin -->", "<!-- versions:end -->"
HEAD = ["torch", "Python", "date", "passed · failed · skipped", "what ran", "commit"]
NOT_RUN = "not run"


def number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0]))


def newest(listing: str, oldest: str) -> list[str]:
    """The newest release of each minor version from ``oldest`` on, of what ``pip index versions`` prints."""
    found = re.search(r"Available versions: (.*)", listing)
    names = {v.split("+")[0] for v in found[1].split(", ")} if found else set()
    kept = sorted((name for name in names if number(name) >= number(oldest)), key=number)
    return [list(group)[-1] for _, group in groupby(kept, key=lambda name: number(name)[:2])]


def cuda_needed(report: Path) -> str:
    """The first CUDA package that the wheel of a ``pip install --report`` needs here; empty for a CPU build."""
    from packaging.requirements import Requirement

    wheel = json.loads(report.read_text())["install"][0]
    for line in wheel["metadata"].get("requires_dist", []):
        needed = Requirement(line)
        if re.match("nvidia-|cuda-", needed.name) and (needed.marker is None or needed.marker.evaluate({"extra": ""})):
            return needed.name
    return ""


def results(junit: Path) -> str:
    """Counts of passed, failed and skipped tests; an error counts as a failure."""
    if not junit.exists():
        return "pytest did not end: see tests.log"
    suites = list(ElementTree.parse(junit).getroot().iter("testsuite"))
    total, failed, skipped = (
        sum(int(suite.get(name, 0)) for suite in suites for name in names)
        for names in (("tests",), ("failures", "errors"), ("skipped",))
    )
    return f"{total - failed - skipped} · {failed} · {skipped}"


def built() -> str:
    """The torch that was imported, and which of the two extensions serve it."""
    import torch

    from batchnorm.ops import extension

    autograd = extension.autograd_module(torch.__version__) is not None
    return f"{torch.__version__}, kernels {extension.LOADED}, C++ autograd {autograd}"


def table(folder: Path) -> str:
    """One row for each pair that ran, oldest first, and one line for each reason why others did not."""
    # A row file begins with the commit that was tested; the rows of one table may be of several.
    rows = [path.read_text().strip().split("\t") for path in folder.glob("*/row")]
    rows.sort(key=lambda row: (number(row[2]), number(row[1])))
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    lines += ["| " + " | ".join([*row[1:], row[0]]) + " |" for row in rows if row[4] != NOT_RUN]
    left = [row for row in rows if row[4] == NOT_RUN]
    lines += ["", "Not run:", ""] if left else []
    for (python, date, why), group in groupby(left, key=lambda row: (row[2], row[3], row[5])):
        lines.append(f"* Python {python}, torch {', '.join(row[1] for row in group)}: {why} ({date}).")
    return "\n".join(lines)


def write_table(folder: Path, page: Path) -> None:
    before, _, rest = page.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    page.write_text(f"{before}{BEGIN}\n\n{table(folder)}\n\n{END}{after}")


def main(what: str, *arguments: str) -> None:
    if what == "newest":
        print(*newest(sys.stdin.read(), arguments[0]))
    elif what == "cuda":
        print(cuda_needed(Path(arguments[0])))
    elif what == "results":
        print(results(Path(arguments[0])))
    elif what == "built":
        print(built())
    else:
        write_table(Path(arguments[0]), Path(arguments[1]))


if __name__ == "__main__":
    main(*sys.argv[1:])
