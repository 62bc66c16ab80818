"""`fold` on programs that `run_decompositions` has rewritten."""

import torch
from torch import nn

from batchnorm import fold
from tests.model_tools.test_fold import trained


def test_a_decomposed_program_folds_too():
    """`run_decompositions` leaves `convolution` and a normalization that gives its statistics beside its result."""
    model = trained(
        nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
            nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, output_padding=1), nn.BatchNorm2d(6), nn.Flatten(),
            nn.BatchNorm1d(6 * 18 * 18), nn.Linear(6 * 18 * 18, 2),
        )
    )  # fmt: skip
    x, other = torch.randn(2, 3, 8, 8).double(), torch.randn(2, 3, 8, 8).double()
    program = torch.export.export(model, (x,)).run_decompositions()
    folded, report = fold(program, (x,))
    assert {entry.norm: entry.into for entry in report.folded} == {"1": "0", "4": "3"}
    torch.testing.assert_close(folded(other), model(other))
