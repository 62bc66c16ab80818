"""Parts of a page that commands write, between <!-- NAME:begin --> and <!-- NAME:end -->; by hand the rest."""

import platform
from pathlib import Path

import torch

from batchnorm.experiment.output.provenance import library_commit


def write_part(page: Path, name: str, text: str) -> None:
    """Replaces the part of that name."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    _, _, after = rest.partition(end)
    page.write_text(f"{before}{begin}\n{text.strip()}\n{end}{after}", encoding="utf-8")


def made_by(command: str, cores: int) -> str:
    """Returns the line that says how a part was made, and on what."""
    what = f"{platform.system()} {platform.machine()}, {cores} cores, Python {platform.python_version()}, "
    return f"Made by `{command}`: {what}torch {torch.__version__}, commit {library_commit() or 'unknown'}."
