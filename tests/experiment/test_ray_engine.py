"""Studies on a real Ray: the files of the local engine, whatever is lost on the way; and what cannot be reached."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import ray

from batchnorm import study
from batchnorm.cli import main
from batchnorm.errors import UserError
from batchnorm.experiment.engines import ray as ray_engine
from tests.experiment.conftest import write_small_npz

# Two loopback addresses, so that Ray takes them for two machines.
HEAD, OTHER = "127.0.0.2", "127.0.0.3"
STORE = 100 * 2**20  # bytes of object store a node
# The network of a user, in a folder that no node knows of. It writes down which process builds which run.
NETWORK = """
import os
from torch import nn
LOG = os.path.join(os.path.dirname(__file__), "built.txt")
def net(arm, seed):
    with open(LOG, "a") as log:
        log.write(f"{arm} {seed} {os.getpid()}\\n")
    norm = nn.BatchNorm1d(9) if arm == "batch" else nn.Identity()
    return nn.Sequential(nn.Linear(4, 9), norm, nn.Tanh(), nn.Linear(9, 3))
def failing(arm, seed):
    if seed == 2002:
        raise RuntimeError("late\\nboom")
    return net(arm, seed)
def deadly(arm, seed):
    if seed == 2002:
        os.kill(os.getpid(), 9)
    return net(arm, seed)
"""


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The options of a small study of a user's network, in whose folder the test stands."""
    (tmp_path / "ray_nets.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "ray_nets", raising=False)
    data = write_small_npz(tmp_path / "small.npz")
    return {"data": str(data), "model": "ray_nets:net", "quick": True, "lrs": "0.1,1", "steps": 8}


@pytest.fixture
def cluster() -> Iterator[Any]:
    """Two nodes of one CPU each."""
    from ray.cluster_utils import Cluster

    both = {"num_cpus": 1, "object_store_memory": STORE, "include_dashboard": False}
    nodes = Cluster(initialize_head=True, head_node_args={**both, "node_ip_address": HEAD})
    nodes.other = nodes.add_node(node_ip_address=OTHER, num_cpus=1, object_store_memory=STORE)
    yield nodes
    nodes.shutdown()


def same_files(one: Path, other: Path) -> None:
    """Holds two studies' rows and traces against each other, to the last digit."""
    tables = [pd.read_csv(out / "runs.csv").drop(columns="seconds") for out in (one, other)]
    pd.testing.assert_frame_equal(*tables, check_exact=True)
    for trace in (one / "traces").iterdir():
        assert trace.read_bytes() == (other / "traces" / trace.name).read_bytes()
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in other.iterdir())


def local(small: dict[str, Any]) -> Path:
    study(**small, out="local", workers=1)
    return Path("local")


def busy_workers() -> list[int]:
    """The processes that are training a run for Ray now."""
    busy = []
    for status in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if status.read_bytes().startswith(b"ray::_train"):
                busy.append(int(status.parent.name))
        except OSError:  # gone in between
            continue
    return busy


def rows(out: Path) -> int:
    path = out / "runs.csv"
    return path.read_bytes().count(b"\n") - 1 if path.exists() else 0


@pytest.mark.timeout(300)
def test_ray_gives_the_files_of_the_local_engine(small: dict[str, Any]) -> None:
    study(**small, out="ray", workers=1, engine="ray")
    same_files(local(small), Path("ray"))
    assert not ray.is_initialized()
    builders = {line.split()[2] for line in Path("built.txt").read_text().splitlines()}
    assert len(builders) == 2, "this process for the check and the local study, and one worker"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_worker_and_a_node_are_lost_in_the_middle(small: dict[str, Any], cluster: Any) -> None:
    small |= {"steps": 300}
    killed: list[int] = []

    def lose() -> None:
        while rows(Path("ray")) < 3:
            time.sleep(0.01)
        while not (busy := busy_workers()):
            time.sleep(0.001)
        os.kill(busy[0], signal.SIGKILL)
        killed.extend(busy[:1])
        before = rows(Path("ray"))
        while rows(Path("ray")) < before + 3:
            time.sleep(0.01)
        cluster.remove_node(cluster.other, allow_graceful=False)

    losing = threading.Thread(target=lose)
    losing.start()
    study(**small, out="ray", engine="ray", address=cluster.address)
    losing.join(60)
    assert not losing.is_alive()
    built = [line.split() for line in Path("built.txt").read_text().splitlines()]
    *_, (arm, seed, _) = (line for line in built if line[2] == str(killed[0]))
    assert {line[2] for line in built if line[:2] == [arm, seed]} > {str(killed[0])}, "another process did it again"
    same_files(local(small), Path("ray"))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_that_kills_every_worker_is_one_sentence(
    small: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"lost a run for good .*study\(engine=ray\).*study\(resume=True\)"):
        study(**{**small, "model": "ray_nets:deadly"}, out="ray", workers=1, engine="ray")
    assert rows(Path("ray")) > 0, "finished runs stay"
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_network_that_fails_is_one_sentence_at_once(small: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> None:
    command = ["study", "--data", "small.npz", "--model", "ray_nets:failing", "--quick", "--lrs", "0.1,1"]
    assert main([*command, "--steps", "8", "--workers", "1", "--engine", "ray", "--out", "ray"]) == 2
    out, err = capfd.readouterr()
    assert re.fullmatch(r"batchnorm: the factory raises \(RuntimeError: late boom\), .*ray_nets:failing.*\n", err)
    assert "runs" in out
    assert rows(Path("ray")) > 0


COMMAND = [
    *(sys.executable, "-m", "batchnorm", "study", "--engine", "ray", "--out", "ray", "--workers", "2"),
    *("--data", "small.npz", "--model", "ray_nets:net", "--quick", "--lrs", "0.1,1", "--steps", "100"),
]


def a_study_with_rows(count: int, stderr: int) -> subprocess.Popen[bytes]:
    """A study that runs in a process of its own and has written so many rows."""
    process = subprocess.Popen(COMMAND, stdout=subprocess.DEVNULL, stderr=stderr, start_new_session=True)
    while process.poll() is None and rows(Path("ray")) < count:
        time.sleep(0.01)
    return process


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ctrl_c_says_how_to_go_on(small: dict[str, Any]) -> None:
    started = a_study_with_rows(3, stderr=subprocess.PIPE)
    os.killpg(started.pid, signal.SIGINT)  # as a terminal does: to the whole process group
    _, said = started.communicate(timeout=120)
    assert (started.returncode, said.decode().count("\n")) == (130, 1)
    assert "--resume" in said.decode()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_lost_driver_is_resumed(small: dict[str, Any]) -> None:
    driver = a_study_with_rows(5, stderr=subprocess.DEVNULL)
    driver.kill()
    driver.wait()
    done = {path.name: path.stat().st_mtime_ns for path in Path("ray/traces").iterdir()}
    ended = time.monotonic() + 60
    while busy_workers() and time.monotonic() < ended:
        time.sleep(0.1)
    assert not busy_workers(), "the workers of a lost driver end"
    finished = subprocess.run([*COMMAND, "--resume"], capture_output=True, text=True, timeout=300, check=False)
    assert (finished.returncode, finished.stderr) == (0, "")
    kept = {name for name, age in done.items() if Path("ray/traces", name).stat().st_mtime_ns == age}
    assert len(kept) >= len(done) - 1, "a trace whose row was not there yet may be written again"
    same_files(local(small | {"steps": 100}), Path("ray"))


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["study", "--out", "out", *arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert not Path("out").exists()
    return err


@pytest.mark.parametrize("address", ["garbage", ":1", "127.0.0.1:", "127.0.0.1:0", "127.0.0.1:x"])
def test_an_address_that_is_none(address: str, capsys: pytest.CaptureFixture[str], small: object) -> None:
    assert "HOST:PORT" in refused(capsys, "--engine", "ray", "--address", address)


def test_nobody_at_the_address(
    listener: socket.socket, capsys: pytest.CaptureFixture[str], small: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_engine, "ANSWER_WITHIN", 0.2)
    address = f"127.0.0.1:{listener.getsockname()[1]}"
    assert "no Ray to run on" in refused(
        capsys, "--engine", "ray", "--address", address
    )  # it listens, and says nothing
    listener.close()
    assert "no Ray to run on" in refused(capsys, "--engine", "ray", "--address", address)


def test_somebody_else_at_the_address(
    listener: socket.socket, capsys: pytest.CaptureFixture[str], small: object
) -> None:
    def answer() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(100)
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    web = threading.Thread(target=answer)
    web.start()
    address = f"127.0.0.1:{listener.getsockname()[1]}"
    assert "is not Ray" in refused(capsys, "--engine", "ray", "--address", address)
    web.join(10)


def test_an_address_needs_the_engine(capsys: pytest.CaptureFixture[str], small: object) -> None:
    assert "--engine ray" in refused(capsys, "--address", "127.0.0.1:6379")


def test_without_ray_the_line_names_the_extra(
    capsys: pytest.CaptureFixture[str], small: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "batchnorm.experiment.engines.ray")
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "batchnorm[ray]" in refused(capsys, "--engine", "ray")
