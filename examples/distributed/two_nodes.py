"""Two nodes on this machine train one network; one node is killed in the middle, and the training goes on.

Each node is a torchrun agent in a network namespace of its own, joined by a virtual cable (needs root and `ip`); where
that is not allowed, two agents on loopback. Printed: the same training by one process for comparison.

    python examples/distributed/two_nodes.py [--steps 240] [--kill-at 100]
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch

WIRE = "10.231.7"  # exists inside the two namespaces only
TRAIN = Path(__file__).with_name("train.py")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True, timeout=20)


@contextmanager
def namespaces() -> Iterator[list[str]]:
    """Two namespaces with an interface `bn0` each, at WIRE.1 and WIRE.2; gone afterwards.

    Raises:
        RuntimeError: this machine does not allow them.
    """
    names = [f"bn-{os.getpid()}-{side}" for side in (1, 2)]
    with ExitStack() as cleanup:
        try:
            for name in names:
                ip("netns", "add", name)
                cleanup.callback(subprocess.run, ["ip", "netns", "del", name], check=False, timeout=20)
            peer = ["peer", "name", "bn0", "netns", names[1]]
            ip("link", "add", "bn0", "netns", names[0], "type", "veth", *peer)
            for side, name in enumerate(names, 1):
                ip("-n", name, "address", "add", f"{WIRE}.{side}/24", "dev", "bn0")
                for device in ("lo", "bn0"):
                    ip("-n", name, "link", "set", device, "up")
        except FileNotFoundError as error:
            raise RuntimeError("no `ip` command: install iproute2") from error
        except subprocess.CalledProcessError as error:
            raise RuntimeError(f"this machine allows no network namespaces: {error.stderr.strip()}") from error
        yield names


@contextmanager
def nodes() -> Iterator[tuple[str, list[list[str]], dict[str, str]]]:
    """What they are, the words that put a command on each node, and the environment: interface, address, port."""
    with ExitStack() as stack:
        try:
            names = stack.enter_context(namespaces())
        except RuntimeError as reason:
            with socket.create_server(("127.0.0.1", 0)) as free:
                port = str(free.getsockname()[1])
            where = {"GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            yield f"two agents on loopback ({reason})", [[], []], where
        else:
            where = {"GLOO_SOCKET_IFNAME": "bn0", "MASTER_ADDR": f"{WIRE}.1", "MASTER_PORT": "29517"}
            yield "two network namespaces", [["ip", "netns", "exec", name] for name in names], where


def start(
    prefixes: list[list[str]], where: dict[str, str], words: list[str], processes: int = 1
) -> list[subprocess.Popen[str]]:
    """Starts one agent a node, which runs the words as so many processes."""
    # gloo asks for the names of addresses that have none, and remarks on it
    environment = os.environ | where | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    started = []
    for rank, prefix in enumerate(prefixes):
        # torch's launcher warns of its own affairs
        command = [*prefix, sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nnodes", "2"]
        command += ["--nproc-per-node", str(processes), "--node-rank", str(rank)]
        command += ["--master-addr", where["MASTER_ADDR"], "--master-port", where["MASTER_PORT"], *words]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": environment}
        started.append(subprocess.Popen(command, **pipes))
    return started


def kill(node: subprocess.Popen[str]) -> None:
    """Kills an agent and its workers, which lead sessions of their own, as a power failure would."""
    children = Path(f"/proc/{node.pid}/task/{node.pid}/children")
    for pid in [str(node.pid), *children.read_text().split()]:
        os.kill(int(pid), signal.SIGKILL)


def step_of(checkpoint: Path) -> int:
    return torch.load(checkpoint, weights_only=True)["step"] if checkpoint.exists() else 0


def run(prefixes: list[list[str]], where: dict[str, str], words: list[str], kill_at: int, checkpoint: Path) -> str:
    """Trains on both nodes and returns what the first printed; kills the second at the step `kill_at`, 0 for never."""
    started = start(prefixes, where, [str(TRAIN), *words])
    try:
        while kill_at and step_of(checkpoint) < kill_at and started[1].poll() is None:
            time.sleep(0.02)
        if kill_at:
            kill(started[1])
        outputs = [node.communicate(timeout=300)[0] for node in started]
    finally:
        for node in started:
            with suppress(OSError):
                kill(node)
            node.wait()
    failed = [node.returncode != 0 for node in started]
    if any(failed) != bool(kill_at):
        raise SystemExit("\n".join(output[-4000:] for output in outputs))
    return outputs[0].strip()


def apart(one: Path, other: Path) -> float:
    """The largest difference between two checkpoints' weights and statistics."""
    nets = [torch.load(path, weights_only=True)["net"] for path in (one, other)]
    return max(float((nets[0][name].double() - nets[1][name].double()).abs().max()) for name in nets[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--kill-at", type=int, default=100)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, nodes() as (what, prefixes, where):
        print(f"nodes: {what}")
        files = {name: Path(folder, f"{name}.pt") for name in ("killed", "whole", "own", "one")}

        def words(name: str, *more: str) -> list[str]:
            return ["--steps", str(given.steps), "--checkpoint", str(files[name]), *more]

        run(prefixes, where, words("killed"), given.kill_at, files["killed"])
        print(f"node 2 killed; the checkpoint is of step {step_of(files['killed'])}")
        print(run(prefixes, where, words("killed"), 0, files["killed"]))
        print("never killed:")
        print(run(prefixes, where, words("whole"), 0, files["whole"]))
        print("each node by its own statistics:")
        print(run(prefixes, where, words("own", "--own-statistics"), 0, files["own"]))
        subprocess.run(
            [sys.executable, str(TRAIN), *words("one")], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        print(f"largest difference from never killed: {apart(files['killed'], files['whole']):.1e}")
        print(f"largest difference from one process: {apart(files['killed'], files['one']):.1e}")
        print(f"by own statistics: {apart(files['own'], files['one']):.1e}")


if __name__ == "__main__":
    main()
