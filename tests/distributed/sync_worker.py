"""What every rank checks: its part of the joined batch is treated as one process would treat the whole.

Run by torchrun (test_synchronized.py). Each check builds the joined batch from the same seed on every rank.
"""

import copy
import itertools
import pickle
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from batchnorm import BatchNorm1d, BatchNorm2d, BatchNormAct1d, BatchNormAct2d, Renorm
from batchnorm.functional import Buffers, batch_norm_pure

SIZES = {2: [[5, 3], [4, 0]], 3: [[4, 1, 6], [0, 5, 2]], 4: [[2, 3, 1, 4], [3, 0, 0, 2]]}


def pieces(total, sizes, rank):
    start = sum(sizes[:rank])
    return total[start : start + sizes[rank]]


def close(a, b, what, tolerance=2e-5):
    torch.testing.assert_close(
        a, b, rtol=tolerance, atol=tolerance, msg=lambda m: f"rank {dist.get_rank()}, {what}: {m}"
    )


def joined_against_parts(sizes, keywords, masked, dtype=torch.float32, channels_last=False, group="world"):
    """Forward, gradients and buffers of the synchronized layer against the plain one on the joined batch."""
    rank = dist.get_rank()
    torch.manual_seed(sum(sizes) + masked)
    x = (torch.randn(sum(sizes), 3, 4, 2) * 2 + torch.randn(3, 1, 1)).to(dtype)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    g, residual = torch.randn(x.shape).to(dtype), torch.randn(x.shape).to(dtype)
    mask = torch.rand(len(x), 4, 2) < 0.6 if masked else None
    whole = BatchNormAct2d(3, "silu", **keywords)
    nn.init.normal_(whole.norm.weight)
    part = copy.deepcopy(whole)
    part.norm.configure(process_group=group)
    for _ in range(2):
        whole.zero_grad()
        part.zero_grad()
        leaf = x.clone().requires_grad_()
        want = whole(leaf, residual, mask)
        want.backward(g)
        mine = pieces(x, sizes, rank).clone().requires_grad_()
        my_mask = None if mask is None else pieces(mask, sizes, rank)
        out = part(mine, pieces(residual, sizes, rank), my_mask)
        out.backward(pieces(g, sizes, rank))
        tolerance = 2e-5 if dtype == torch.float32 else 2e-2
        what = f"{sizes} {keywords} masked={masked} {dtype}"
        close(out, pieces(want, sizes, rank), what, tolerance)
        close(mine.grad, pieces(leaf.grad, sizes, rank), what, tolerance)
    for ours, theirs in zip(part.buffers(), whole.buffers(), strict=True):
        close(ours, theirs, what)
    for ours, theirs in zip(part.parameters(), whole.parameters(), strict=True):
        total = ours.grad.clone()  # each rank's share; DDP averages what is summed here
        dist.all_reduce(total)
        close(total, theirs.grad, what, 1e-4)


def check_joined(world):
    variants = [{}, {"renorm": Renorm(1.3, 0.2)}, {"momentum": None}, {"nonfinite": "skip"}]
    for sizes, keywords, masked in itertools.product(SIZES[world], variants, (False, True)):
        joined_against_parts(sizes, keywords, masked)
    joined_against_parts(SIZES[world][0], {}, False, torch.bfloat16)
    joined_against_parts(SIZES[world][0], {}, True, channels_last=True)


def check_large_mean(world):
    """A sum of squares over ranks would have lost everything here."""
    torch.manual_seed(3)
    x = (torch.randn(8 * world, 3, dtype=torch.float64) + 1e6).float()
    layer, whole = BatchNorm1d(3, process_group="world"), BatchNorm1d(3)
    close(layer(x.chunk(world)[dist.get_rank()]), whole(x).chunk(world)[dist.get_rank()], "mean 1e6")


def check_ghost(world):
    """Slices never cross ranks; the buffers get the slices of all."""
    sizes = SIZES[world][0]
    torch.manual_seed(4)
    x = torch.randn(sum(sizes), 3, 2, 2)
    layer = BatchNorm2d(3, ghost_batch_size=2, process_group="world", momentum=1.0)
    mine = pieces(x, sizes, dist.get_rank())
    close(layer(mine), BatchNorm2d(3, ghost_batch_size=2)(mine), "ghost forward")
    slices = [s for rank in range(world) for s in pieces(x, sizes, rank).split(2)]
    within = sum((s - s.mean((0, 2, 3), keepdim=True)).square().sum((0, 2, 3)) for s in slices)
    close(layer.running_mean, x.mean((0, 2, 3)), "ghost mean")
    close(layer.running_var, within / sum(s[:, 0].numel() - 1 for s in slices), "ghost var")


def check_domains(world):
    """A domain that a rank does not hold is visited by it all the same: no rank waits for ever."""
    torch.manual_seed(5)
    x = torch.randn(6 * world, 3)
    domain = torch.arange(6 * world) // 6 % 2  # each rank holds one domain only
    layer, whole = BatchNorm1d(3, domains=2, process_group="world"), BatchNorm1d(3, domains=2)
    rank = dist.get_rank()
    out, want = layer(x.chunk(world)[rank], domain=domain.chunk(world)[rank]), whole(x, domain=domain)
    close(out, want.chunk(world)[rank], "domains")
    for ours, theirs in zip(layer.buffers(), whole.buffers(), strict=True):
        close(ours, theirs, "domain buffers")


def check_one_collective_each_way(world):
    from torch.distributed.tensor.debug import CommDebugMode

    layer, x = BatchNorm1d(3, process_group="world"), torch.randn(4, 3, requires_grad=True)
    with CommDebugMode() as forward:
        out = layer(x)
    with CommDebugMode() as backward:
        out.backward(torch.randn_like(out))
    assert (forward.get_total_counts(), backward.get_total_counts()) == (1, 1)
    with CommDebugMode() as evaluation:
        layer.eval()(x)
    assert evaluation.get_total_counts() == 0


def check_ddp(world):
    """DDP's averaged gradients are those of the mean over the joined batch; two forwards a step are no error."""
    torch.manual_seed(6)
    net = nn.Sequential(nn.Linear(4, 5), BatchNormAct1d(5, "relu"), nn.Linear(5, 1))
    whole = copy.deepcopy(net)
    net[1].norm.configure(process_group="world")
    model = DistributedDataParallel(net)
    x = torch.randn(6 * world, 4)
    mine = x.chunk(world)[dist.get_rank()]
    (model(mine).square().mean() + model(mine * 2).square().mean()).backward()
    (whole(x).square().mean() + whole(x * 2).square().mean()).backward()
    for ours, theirs in zip(net.parameters(), whole.parameters(), strict=True):
        close(ours.grad, theirs.grad, "DDP")


def check_fsdp2(world):
    torch.manual_seed(7)
    net = nn.Sequential(nn.Linear(4, 8), BatchNormAct1d(8, "relu"), nn.Linear(8, 1))
    whole = copy.deepcopy(net)
    net[1].norm.configure(process_group="world")
    mesh = dist.init_device_mesh("cpu", (world,))
    fully_shard(net, mesh=mesh)
    x = torch.randn(6 * world, 4)
    net(x.chunk(world)[dist.get_rank()]).square().mean().backward()
    whole(x).square().mean().backward()
    for ours, theirs in zip(net.parameters(), whole.parameters(), strict=True):
        close(ours.grad.full_tensor(), theirs.grad, "FSDP2")


def check_compile(world):
    eager = BatchNormAct1d(3, "relu", process_group="world")
    layer = copy.deepcopy(eager)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.manual_seed(8 + dist.get_rank())
    for _ in range(2):
        x, g = torch.randn(4, 3), torch.randn(4, 3)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        compiled(a).backward(g)
        eager(b).backward(g)
        close(a.grad, b.grad, "compiled")
    for ours, theirs in zip(layer.buffers(), eager.buffers(), strict=True):
        close(ours, theirs, "compiled buffers")


def check_checkpointing(world):
    layer = BatchNorm1d(3, process_group="world")
    x = torch.randn(4, 3, requires_grad=True)
    checkpoint(layer, x, use_reentrant=False).square().sum().backward()
    assert layer.num_batches_tracked == 1


def check_accumulation_of_sequences(world):
    """k micro-batches of every rank are one batch; the channels lie last."""
    sizes, rank = SIZES[world][0], dist.get_rank()
    torch.manual_seed(11)
    micro = [torch.randn(sum(sizes), 5, 3) * 2 + k for k in range(2)]
    layer = BatchNorm1d(3, process_group="world", accumulation_steps=2, feature_axis=-1)
    whole = BatchNorm1d(3, feature_axis=-1)
    for x in micro:
        close(layer(pieces(x, sizes, rank)), pieces(BatchNorm1d(3, feature_axis=-1)(x), sizes, rank), "micro-batch")
    whole(torch.cat(micro))
    for ours, theirs in zip(layer.buffers(), whole.buffers(), strict=True):
        close(ours, theirs, "accumulated")


def check_frozen_meets_no_one(world):
    from torch.distributed.tensor.debug import CommDebugMode

    layer = BatchNorm1d(3, process_group="world")
    layer.frozen = True
    with CommDebugMode() as calls:
        layer(torch.randn(4, 3, requires_grad=True)).square().sum().backward()
    assert calls.get_total_counts() == 0


def check_pure(world):
    torch.manual_seed(12)
    x = torch.randn(4 * world, 3)
    given = Buffers(torch.zeros(3), torch.ones(3), torch.tensor(0))
    out, new = batch_norm_pure(x.chunk(world)[dist.get_rank()], given, process_group="world")
    want, wanted = batch_norm_pure(x, given)
    close(out, want.chunk(world)[dist.get_rank()], "pure")
    close(tuple(new), tuple(wanted), "pure buffers")
    with pytest.raises(NotImplementedError, match="under vmap"):
        torch.vmap(lambda x: batch_norm_pure(x, given, process_group="world")[0])(torch.randn(2, 4, 3))


def check_subgroups(world):
    groups = [dist.new_group([rank for rank in range(world) if rank % 2 == parity]) for parity in (0, 1)]
    rank = dist.get_rank()
    mine = groups[rank % 2]
    layer = BatchNorm1d(3, process_group=mine)
    again = pickle.loads(pickle.dumps(layer))  # a group travels by its name
    torch.manual_seed(9)
    x = torch.randn(4 * world, 3)
    joined = torch.cat([x.chunk(world)[r] for r in range(world) if r % 2 == rank % 2])
    whole = BatchNorm1d(3)
    want = whole(joined).chunk(len(joined) // 4)[rank // 2]
    for module in (layer, again):
        close(module(x.chunk(world)[rank]), want, "subgroup")
        close(module.running_var, whole.running_var, "subgroup")
    other = groups[1 - rank % 2]
    with pytest.raises(ValueError, match="not a member"):
        BatchNorm1d(3, process_group=other)


def check_one_value_in_all(world):
    """All ranks see the same total, so all refuse, and none waits for another."""
    sizes = [1] + [0] * (world - 1)
    layer = BatchNorm1d(3, process_group="world")
    with pytest.raises(ValueError, match="one in all ranks together"):
        layer(torch.randn(sizes[dist.get_rank()], 3))
    assert layer.num_batches_tracked == 0
    layer(torch.randn(sizes[dist.get_rank()], 3, 2))


def check_same_bits_on_all_ranks(world):
    layer = BatchNorm1d(3, process_group="world")
    torch.manual_seed(10 + dist.get_rank())
    layer(torch.randn(5, 3))
    gathered = [torch.empty(3) for _ in range(world)]
    dist.all_gather(gathered, layer.running_var)
    assert all(torch.equal(gathered[0], other) for other in gathered)


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    world = dist.get_world_size()
    chosen = sys.argv[1:]
    checks = [v for name, v in globals().items() if name.startswith("check_") and (not chosen or name in chosen)]
    for check in checks:
        check(world)
        dist.barrier()
    if dist.get_rank() == 0:
        sys.stdout.write(f"{len(checks)} checks on {world} ranks\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
