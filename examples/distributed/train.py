"""One network trained by any number of processes: DistributedDataParallel, synchronized statistics, checkpoints.

    torchrun --nnodes 2 --node-rank 0 --nproc-per-node 1 --master-addr HOST --master-port 29517 \
        examples/distributed/train.py --checkpoint digits.pt
    python examples/distributed/train.py      # one process, the same batches

Every process draws the same order of samples from the step's number and takes its share of each batch, so the joined
batch is the same for any number of processes. Started again, the training goes on from its last checkpoint.
"""

import argparse
import copy
import io
import os
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from batchnorm import BatchNorm2d, BatchNormAct2d

TRAIN = 1440  # samples; the other 357 are for testing


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--batch", type=int, default=32, help="samples a step, of all processes together")
    parser.add_argument("--checkpoint", type=Path, help="read where it exists, written by the first process")
    parser.add_argument("--every", type=int, default=20, help="steps between checkpoints")
    parser.add_argument("--own-statistics", action="store_true", help="each process normalizes by its share alone")
    return parser.parse_args()


def network(process_group: str | None) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, bias=False),
        BatchNormAct2d(16, "relu", process_group=process_group),
        nn.Conv2d(16, 32, 3, stride=2, bias=False),
        BatchNormAct2d(32, "relu", process_group=process_group),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def batch_of(step: int, size: int) -> torch.Tensor:
    """The sample numbers of a step's joined batch: a function of the step alone, so that resuming needs no more."""
    a_pass = TRAIN // size
    generator = torch.Generator().manual_seed(step // a_pass)
    first = step % a_pass * size
    return torch.randperm(TRAIN, generator=generator)[first : first + size]


def save(path: Path, step: int, net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Replaces the checkpoint in one step: whoever is killed here leaves the old one or the new one."""
    partial = path.with_suffix(".partial")
    torch.save({"step": step, "net": net.state_dict(), "optimizer": optimizer.state_dict()}, partial)
    partial.replace(path)


def resume(path: Path | None, net: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Loads the first process's checkpoint into all of them and returns its step: no common disk is needed."""
    mine = path.read_bytes() if path and path.exists() and rank() == 0 else b""
    size = torch.tensor(len(mine))
    if dist.is_initialized():
        dist.broadcast(size, 0)
    if size == 0:
        return 0
    content = torch.frombuffer(bytearray(mine or int(size)), dtype=torch.uint8)
    if dist.is_initialized():
        dist.broadcast(content, 0)
    state = torch.load(io.BytesIO(content.numpy().tobytes()), weights_only=True)
    net.load_state_dict(state["net"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def communication_share(model: nn.Module, alone: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[float, float]:
    """Median milliseconds of forward and backward: with every collective, and of the same network without any."""
    times: dict[nn.Module, list[float]] = {model: [], alone: []}
    for _ in range(40):
        for net, taken in times.items():
            dist.barrier()
            started = time.perf_counter()
            F.cross_entropy(net(x), y).backward()
            taken.append(1000 * (time.perf_counter() - started))
    return statistics.median(times[model]), statistics.median(times[alone])


def main() -> None:
    given = options()
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    if given.batch % world():
        raise SystemExit(
            f"--batch {given.batch} does not part evenly among {world()} processes: the means would differ"
        )
    digits = load_digits()
    x, y = torch.tensor(digits.images / 16.0, dtype=torch.float32).unsqueeze(1), torch.tensor(digits.target)
    net = network(None if given.own_statistics else "world")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    first = resume(given.checkpoint, net, optimizer)
    model: nn.Module = DistributedDataParallel(net) if dist.is_initialized() else net
    if rank() == 0 and first:
        print(f"resumed at step {first}", flush=True)
    for step in range(first, given.steps):
        share = batch_of(step, given.batch)[rank() :: world()]
        optimizer.zero_grad()
        F.cross_entropy(model(x[share]), y[share]).backward()
        optimizer.step()
        done = step + 1
        if given.checkpoint and rank() == 0 and (done % given.every == 0 or done == given.steps):
            save(given.checkpoint, done, net, optimizer)
    report(net, model, x, y, given)
    if dist.is_initialized():
        dist.destroy_process_group()


def report(net: nn.Module, model: nn.Module, x: torch.Tensor, y: torch.Tensor, given: argparse.Namespace) -> None:
    net.eval()
    with torch.no_grad():
        right = int((net(x[TRAIN:]).argmax(1) == y[TRAIN:]).sum())
    net.train()
    said = f"{world()} process(es), {given.steps} steps: {right} of {len(y) - TRAIN} test samples right"
    if world() > 1:
        alone = copy.deepcopy(net)
        for layer in alone.modules():
            if isinstance(layer, BatchNorm2d):
                layer.configure(process_group=None)
        share = batch_of(0, given.batch)[rank() :: world()]
        together, apart = communication_share(model, alone, x[share], y[share])
        said += f"\ncommunication: {1 - apart / together:.0%} of a step ({together:.2f} ms, {apart:.2f} ms without)"
    if rank() == 0:
        print(said, flush=True)


if __name__ == "__main__":
    main()
