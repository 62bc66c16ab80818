"""Two nodes in two network namespaces, joined by a virtual cable: addresses and interfaces as between two machines."""

import os
import subprocess
import sys
from contextlib import ExitStack, contextmanager

import pytest

from examples.distributed.two_nodes import WIRE, namespaces


@contextmanager
def two_namespaces():
    with ExitStack() as stack:
        try:
            names = stack.enter_context(namespaces())
        except RuntimeError as error:
            pytest.skip(str(error))
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
    with two_namespaces() as names:
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
