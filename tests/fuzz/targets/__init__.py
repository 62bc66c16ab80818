"""One file a tool: `CASES`, what is tried, and `check`, which raises where the tool is wrong."""

from . import convert_revert, fold, fold_onnx, freeze, fuse, insert_strip, layers, recalibrate, save_memory, triton

__all__ = ["TARGETS"]

TARGETS = {
    module.__name__.rpartition(".")[2]: module
    for module in (
        layers,
        convert_revert,
        fold,
        fuse,
        recalibrate,
        freeze,
        insert_strip,
        fold_onnx,
        save_memory,
        triton,
    )
}
