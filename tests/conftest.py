"""One thread a test process (tests run side by side), and the same random numbers in every order of tests."""

import os

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
if not torch.cuda.is_available():  # the Triton kernels then run interpreted; read when Triton is first imported
    os.environ["TRITON_INTERPRET"] = "1"
# A shared machine stalls: a deadline would measure it, not us.
settings.register_profile("default", deadline=None, max_examples=30, derandomize=True)
settings.load_profile("default")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
