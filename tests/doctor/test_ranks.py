"""Comparing the buffers of two processes."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from batchnorm import diagnose
from batchnorm.errors import UserError
from tests.doctor.test_pages import examples


def test_the_page_s_example_finds_the_divergence_on_both_ranks(tmp_path):
    script = tmp_path / "example.py"
    script.write_text(examples("BN304")[0])
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("BN304 ") == 2


def test_equal_buffers_are_no_finding(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        diagnosis = diagnose(nn.BatchNorm1d(4), process_group="world")
        asked = diagnose(nn.BatchNorm1d(4))
    finally:
        torch.distributed.destroy_process_group()
    assert "BN304" in diagnosis.examined
    assert "process_group" in asked.not_examined["BN304"]


def test_a_group_without_distributed():
    with pytest.raises(UserError, match="init_process_group"):
        diagnose(nn.BatchNorm1d(4), process_group="world")
