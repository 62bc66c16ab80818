"""``[tool.batchnorm]`` of a project's pyproject.toml: which rules to leave out, everywhere or for some layers."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError, quote_error

__all__ = ["Config", "read_config"]


@dataclass(frozen=True)
class Config:
    """Settings of a project.

    Attributes:
        select, ignore: codes, prefixes of codes or names of rules.
        per_layer_ignores: the same by patterns of layer names: {"backbone.*": ["momentum-convention"]}.
    """

    select: list[str] | None = None
    ignore: list[str] = field(default_factory=list)
    per_layer_ignores: dict[str, list[str]] = field(default_factory=dict)


def read_config(folder: Path) -> Config:
    """Return the settings of the first pyproject.toml in the folder and those above it.

    Raises:
        UserError: a file that is no TOML, an unknown key, or a value of another form.
    """
    path = next((f / "pyproject.toml" for f in (folder, *folder.parents) if (f / "pyproject.toml").is_file()), None)
    if path is None:
        return Config()
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8")).get("tool", {}).get("batchnorm", {})
    except (OSError, ValueError) as error:
        raise UserError(f"cannot be read ({quote_error(error, 120)}), {path}, correct the file") from error
    known = {"select", "ignore", "per-layer-ignores"}
    for key in table:
        if key not in known:
            raise UserError(f"unknown key {key!r}, [tool.batchnorm] of {path}, use {', '.join(sorted(known))}")
    layers = table.get("per-layer-ignores", {})
    if not isinstance(layers, dict):
        raise UserError(f"per-layer-ignores is no table, [tool.batchnorm] of {path}, write 'backbone.*' = [CODES]")
    return Config(
        None if "select" not in table else _codes(table["select"], path),
        _codes(table.get("ignore", []), path),
        {pattern: _codes(codes, path) for pattern, codes in layers.items()},
    )


def _codes(value: Any, path: Path) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(code, str) for code in value):
        raise UserError(f"{value!r} is no list of codes, [tool.batchnorm] of {path}, write a list of text")
    return value
