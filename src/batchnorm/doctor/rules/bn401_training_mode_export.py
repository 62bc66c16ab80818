from __future__ import annotations

from collections.abc import Iterator

from ..evidence.needs import Evidence
from ..rule import Found, NotExamined, rule

_KEEP = "give the layer running statistics (track_running_stats=True), recalibrate the model, and export it again"


@rule(
    "BN401",
    "training-mode-export",
    summary="An exported program normalizes by the batch it is given, not by the running statistics.",
    order=30,
    needs=("file",),
    fix="call model.eval() before torch.export.export or torch.onnx.export",
    false_alarm="the program is exported to be trained further",
)
def training_mode_export(evidence: Evidence) -> Iterator[Found]:
    assert evidence.file is not None
    if evidence.file.origin == "checkpoint":
        raise NotExamined("needs an exported program or an ONNX file, and a checkpoint holds none")
    found = [n for n in evidence.file.normalizations if n.training]
    for normalization in found:
        cause = "" if normalization.tracks else "it keeps no running statistics, in evaluation neither: "
        yield Found(
            normalization.name,
            f"{cause}batch statistics are built into this {evidence.file.origin}: answers depend on the batch",
            {
                "operator": normalization.operator,
                "in_training_mode": len(found),
                "of": len(evidence.file.normalizations),
            },
            severity="error",
            fix=None if normalization.tracks else _KEEP,
        )
