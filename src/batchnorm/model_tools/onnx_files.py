"""ONNX files in and out: a file is written beside its target first, and moved there when it is right."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import UserError, quote_error

__all__ = ["Draft", "load"]

_PROTOBUF_LIMIT = 2**31 - 1


def load(onnx: Any, source: str | Path) -> tuple[Any, bool]:
    """The model with all weights, and whether any of them came from another file."""
    try:
        model = onnx.load(str(source), load_external_data=False)
        external = any(onnx.external_data_helper.uses_external_data(tensor) for tensor in _tensors(onnx, model))
        if external:
            onnx.external_data_helper.load_external_data_for_model(model, str(Path(source).parent))
    except FileNotFoundError as error:
        missing = "" if str(source) in str(error) else f": {quote_error(error)}"
        raise UserError(f"fold_onnx: {source} does not exist{missing}; give the path of an ONNX file") from None
    except Exception as error:  # protobuf, and the file system have their own
        raise UserError(f"fold_onnx: {source} is no ONNX model: {quote_error(error)}; export it again") from error
    return model, external


def _tensors(onnx: Any, model: Any) -> Any:
    return onnx.external_data_helper._get_all_tensors(model)


class Draft:
    """The file that will be the target; as a context, it leaves nothing behind.

    Args:
        target: where the file goes.
        external: whether large weights go into a file of their own, `<target>.data`.
    """

    def __init__(self, onnx: Any, target: str | Path, external: bool) -> None:
        self.onnx, self.external = onnx, external
        self.target = Path(os.path.realpath(target))  # a link stays one
        self.folder: Path | None = None

    def __enter__(self) -> Draft:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def write(self, model: Any) -> Path:
        """Write the model, which stays as it is, and return where."""
        try:
            if self.folder is None:
                self.folder = Path(tempfile.mkdtemp(prefix=".fold_onnx_", dir=self.target.parent))
            path = self.folder / self.target.name
            if not self.external and model.ByteSize() < _PROTOBUF_LIMIT:
                self.onnx.save(model, str(path))
                return path
            self._data(path).unlink(missing_ok=True)  # onnx would append to it
            copied = type(model)()
            copied.CopyFrom(model)  # onnx takes the weights out of what it saves
            self.onnx.save(copied, str(path), save_as_external_data=True, location=self._data(path).name)
            return path
        except Exception as error:  # the file system's, and protobuf's
            raise self._refused(error) from error

    def publish(self) -> None:
        """Move what was written last to the target."""
        assert self.folder is not None  # write came first
        path = self.folder / self.target.name
        try:
            for made, place in ((self._data(path), self._data(self.target)), (path, self.target)):
                if made.exists():
                    os.replace(made, place)
        except OSError as error:
            raise self._refused(error) from error

    def _data(self, path: Path) -> Path:
        return path.with_name(f"{path.name}.data")

    def _refused(self, error: Exception) -> UserError:
        return UserError(
            f"fold_onnx: {self.target} cannot be written: {quote_error(error)}; give the path of a file in a folder "
            "that exists"
        )
