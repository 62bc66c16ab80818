"""Each example runs as a user would run it, and its numbers show its point."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def numbers(name):
    """The numbers of each line printed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", str(EXAMPLES / f"{name}.py")]
    if name == "two_processes":
        command[1:3] = []  # torch's launcher warns of its own affairs
    done = subprocess.run(command, capture_output=True, text=True, timeout=170, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return [
        [float(n) for n in re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?:e[-+]\d+)?", line)]
        for line in done.stdout.splitlines()
    ]


def test_padded_sequences():
    (without, moved), (masked, moved_masked) = numbers("padded_sequences")
    assert masked > without + 10
    assert moved > 0.5
    assert moved_masked == 0


def test_gan_domains():
    together, apart = numbers("gan_domains")
    assert apart[0] < together[0] / 3


def test_fine_tune_frozen():
    (moved, accuracy), (moved_frozen, accuracy_frozen) = numbers("fine_tune_frozen")
    assert moved > 0.5
    assert moved_frozen == 0
    assert accuracy_frozen > accuracy + 3


def test_model_tools():
    rows = numbers("model_tools")
    *_, accuracy, _channels, folded, _, _, _, exported = rows
    assert accuracy[0] > 0.8
    assert folded[:2] == [3, 3]
    assert exported[0] < 1e-4


@pytest.mark.slow
def test_two_processes():
    (alone,), (together,) = (row[:1] for row in numbers("two_processes"))
    assert alone > 1e-3
    assert together < 1e-6


def test_every_example_is_in_the_readme():
    listed = set(re.findall(r"\]\((\w+\.py)\)", (EXAMPLES / "README.md").read_text()))
    assert listed == {path.name for path in EXAMPLES.glob("*.py")} - {"__init__.py"}
