"""One rank's batch is broken, so it never reaches the collective: the others must hear which layer waits."""

import datetime
import sys

import torch
import torch.distributed as dist
from torch import nn

from batchnorm import BatchNorm1d


def main() -> None:
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=4))
    net = nn.Sequential(nn.Linear(3, 3), BatchNorm1d(3, process_group="world"))
    try:
        if dist.get_rank() == 0:
            net(torch.randn(4, 3))
        else:
            sys.stdout.write("rank 1 left\n")
    except RuntimeError as error:
        sys.stdout.write(f"rank 0: {str(error).splitlines()[0]}\n")


if __name__ == "__main__":
    main()
