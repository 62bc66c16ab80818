"""`fold` on programs that `run_decompositions` has rewritten."""

import pytest
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
    assert {entry.norm: entry.into for entry in report.folded} == {"1": "0", "4": "3", "6": "7"}
    torch.testing.assert_close(folded(other), model(other))


@pytest.mark.parametrize("bias", [True, False])
def test_linear_maps_become_layers_again(bias):
    """They are left as a product with the weight turned over."""
    layers = [nn.Linear(4, 5, bias=bias), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3, bias=bias), nn.BatchNorm1d(3)]
    model, x = trained(nn.Sequential(*layers)), torch.randn(3, 4).double()
    program = torch.export.export(model, (x,)).run_decompositions()
    folded, report = fold(program, (x,))
    assert {entry.norm: entry.into for entry in report.entries} == {"1": "0", "4": "3"}
    torch.testing.assert_close(folded(-x), model(-x))


def test_products_that_are_no_layers_stay():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(3, 4))
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x):
            return self.norm(torch.addmm(self.bias, x, self.weight.T)) + self.norm(x @ self.weight)

    model, x = trained(Net()), torch.randn(3, 4).double()
    folded, report = fold(torch.export.export(model, (x,)).run_decompositions(), (x,))
    assert not report.folded
    torch.testing.assert_close(folded(-x), model(-x))
