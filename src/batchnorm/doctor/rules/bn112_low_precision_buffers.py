from __future__ import annotations

from collections.abc import Iterator

import torch

from ..evidence.needs import Evidence
from ..rule import Found, rule

_LOW = {torch.float16: 11, torch.bfloat16: 8}  # bits of a significand


@rule(
    "BN112",
    "low-precision-buffers",
    summary="Running statistics are kept in fp16 or bf16, where a small update is rounded away.",
    order=210,
    needs=("model or file",),
    fix="keep the buffers, γ and β in float32: module.float(); the input may stay half",
    false_alarm="the model only evaluates, and its statistics were learned in float32",
)
def low_precision_buffers(evidence: Evidence) -> Iterator[Found]:
    held = evidence.layers if evidence.file is None else evidence.file.normalizations
    for layer in held:
        if evidence.file is not None and evidence.file.origin != "checkpoint":
            return  # a program only evaluates
        buffers = [b for b in (layer.running_mean, layer.running_var) if b is not None and b.dtype in _LOW]
        if buffers:
            dtype = buffers[0].dtype
            yield Found(
                layer.name,
                f"updates smaller than 2⁻{_LOW[dtype]} of a running statistic are lost in {str(dtype)[6:]}",
                {"dtype": str(dtype)[6:], "bits": _LOW[dtype]},
            )
