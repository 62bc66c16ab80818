"""examples/distributed: a node is killed, the training goes on, and ends where one process ends."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "distributed"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(sys.platform != "linux", reason="finds the workers to kill in /proc")
def test_two_nodes_one_killed_and_resumed():
    command = [sys.executable, "-u", str(FOLDER / "two_nodes.py"), "--steps", "60", "--kill-at", "20"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=580, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout[-4000:] + done.stderr[-4000:]
    text = done.stdout
    killed_at, resumed_at = (
        int(re.search(pattern, text)[1]) for pattern in (r"is of step (\d+)", r"resumed at step (\d+)")
    )
    assert 20 <= killed_at == resumed_at < 60
    resumed, whole, _, one = (int(n) for n in re.findall(r"60 steps: (\d+) of 357", text))
    assert resumed == whole
    assert abs(resumed - one) <= 1
    shares = [int(n) for n in re.findall(r"communication: (\d+)%", text)]
    assert len(shares) == 3
    assert all(0 < share < 100 for share in shares)
    differences = re.findall(r"(?:process|killed|statistics): (\d\.\de[-+]\d+)$", text, re.MULTILINE)
    from_whole, from_one, own_from_one = map(float, differences)
    assert from_whole == 0
    assert from_one < 1e-4
    assert own_from_one > 1e-3
