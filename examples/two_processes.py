"""Two processes on CPU, one batch: synchronized statistics under DistributedDataParallel.

Each process holds 4 samples of a batch of 8. The parent starts two workers by torchrun's machinery (gloo, no GPU) and
prints how far the joined outputs and the gradients are from one process with all 8: without and with `process_group`.

    python examples/two_processes.py
    torchrun --nproc-per-node 2 examples/two_processes.py      # the same, on processes of your own
"""

import os
import sys

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from batchnorm import BatchNormAct2d


def network(process_group: str | None) -> nn.Sequential:
    torch.manual_seed(0)
    norm = BatchNormAct2d(8, "relu", process_group=process_group)
    return nn.Sequential(nn.Conv2d(1, 8, 3), norm, nn.Flatten(), nn.Linear(288, 10))


def gradient(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    F.cross_entropy(net(x), y).backward()
    return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])


def worker() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    digits = load_digits()
    x, y = torch.tensor(digits.images[:8] / 16.0, dtype=torch.float32).unsqueeze(1), torch.tensor(digits.target[:8])
    mine = slice(dist.get_rank(), None, dist.get_world_size())
    want = gradient(network(None), x, y)
    for group in (None, "world"):
        found = gradient(DistributedDataParallel(network(group)), x[mine], y[mine])
        if dist.get_rank() == 0:
            error = ((found - want).norm() / want.norm()).item()
            print(
                f"process_group={group!r}: gradient off by {error:.1e} from one process with the whole batch",
                flush=True,
            )
    dist.destroy_process_group()


def main() -> None:
    if "RANK" in os.environ:
        worker()
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    config = LaunchConfig(1, 1, 2, rdzv_backend="c10d", rdzv_endpoint="localhost:0", run_id="two", max_restarts=0)
    elastic_launch(config, sys.executable)("-u", __file__)


if __name__ == "__main__":
    main()
