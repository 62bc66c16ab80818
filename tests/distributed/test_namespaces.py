"""Two nodes in two network namespaces, joined by a virtual cable: addresses and interfaces as between two machines."""

import os
import subprocess
import sys
from contextlib import ExitStack, contextmanager

import pytest

WIRE = "10.231.7"  # exists inside the two namespaces only


def ip(*arguments):
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True, timeout=20)


@contextmanager
def namespaces():
    """Two namespaces with an interface `bn0` each, at WIRE.1 and WIRE.2; gone afterwards, with all that is in them."""
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
        except FileNotFoundError:
            pytest.skip("no `ip` command: install iproute2")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"this machine allows no network namespaces: {error.stderr.strip()}")
        yield names


def start(name, rank):
    command = ["ip", "netns", "exec", name, sys.executable, "-W", "ignore", "-m", "torch.distributed.run"]
    command += ["--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(rank)]
    command += ["--master-addr", f"{WIRE}.1", "--master-port", "29517", "-m", "tests.distributed.sync_worker"]
    command += ["check_joined", "check_domains", "check_ddp"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "bn0", "TOKENIZERS_PARALLELISM": "false"}
    # one pipe for both streams: two would have to be read at once
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


@pytest.mark.skipif(sys.platform != "linux", reason="network namespaces are Linux's")
def test_two_nodes_are_one_process():
    with namespaces() as names:
        nodes = [start(name, rank) for rank, name in enumerate(names)]
        try:
            # the second node's little output fits its pipe while the first is read
            outputs = [node.communicate(timeout=150)[0] for node in nodes]
        finally:
            for node in nodes:
                node.kill()
                node.wait()
        assert [node.returncode for node in nodes] == [0, 0], "\n".join(output[-4000:] for output in outputs)
        assert "3 checks on 2 ranks" in outputs[0]
