"""What `save_memory=True` saves: `python benchmarks/memory.py` (five minutes; its tables stand in docs/memory.md).

    python benchmarks/memory.py            # bytes kept, the process's peak, the largest batch
    python benchmarks/memory.py --times    # times of a step as well; they need a quiet machine

Bytes that are kept after the forward are counted by unique storage (`batchnorm.bench.StorageCount`). Peaks are those of
processes of their own: each makes one step, and the same step on a tiny batch before it, which torch sets up once.
There freed memory goes back to the system at once (`ALLOCATOR`): glibc keeps blocks below a threshold that grows with
what is freed, and our kernels keep blocks for the next output.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from batchnorm import convert
from batchnorm.bench import StorageCount, interleaved, process_peak, training_step

sys.path.insert(0, str(Path(__file__).parent.parent))  # for the tests' stand-in for torchvision, which timm imports
from model_tools_networks import cifar_resnet18

from tests.interplay.stubs import import_timm

ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "BATCHNORM_CACHE_MIB": "0"}
CONTENDERS = ("torch", "ours", "ours, save_memory")


def timm_model(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model: nn.Module = import_timm().create_model(name)
        return model

    return make


# name: (network, batch, size, least share of torch's that is asked)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, int, float]] = {
    "MobileNetV2": (timm_model("mobilenetv2_100"), 16, 160, 0.45),
    "EfficientNet-B0": (timm_model("efficientnet_b0"), 8, 128, 0.55),
    "DenseNet-121": (timm_model("densenet121"), 8, 96, 0.65),
    "VGG-BN": (timm_model("vgg16_bn"), 16, 64, 0.68),
    "ResNet-18 CIFAR": (cifar_resnet18, 32, 32, 0.82),
    "ResNet-50": (timm_model("resnet50"), 8, 128, 0.88),
}


def make(network: str, contender: str) -> nn.Module:
    torch.manual_seed(0)
    model = NETWORKS[network][0]().train()
    return model if contender == "torch" else convert(model, save_memory="save_memory" in contender)


def batch_of(network: str, batch: int | None = None, device: str = "cpu") -> Tensor:
    _, usual, size, _ = NETWORKS[network]
    return torch.randn(batch or usual, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)


def step_counted(network: str, contender: str, device: str) -> dict[str, float]:
    model, x = make(network, contender).to(device), batch_of(network, device=device)
    with StorageCount() as count:
        out = model(x)
        kept = count.memory(out)
        out.square().mean().backward()
    grads = sum(float(p.grad.double().abs().sum()) for p in model.parameters() if p.grad is not None)
    return {"normalizations": kept.normalizations, "others": kept.others, "peak": count.peak, "gradients": grads}


def process_step(network: str, contender: str, batch: int, device: str) -> dict[str, float]:
    """Run in a process of its own: what one step adds to the process's peak."""
    model = make(network, contender).to(device)
    for size in (2, batch):  # what torch and the convolutions set up once is in the first
        before = process_peak(torch.device(device)) or 0
        model(batch_of(network, size, device)).square().mean().backward()
    return {"peak": (process_peak(torch.device(device)) or 0) - before}


def in_process(*arguments: object) -> dict[str, float]:
    command = [sys.executable, __file__, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=os.environ | ALLOCATOR)
    result: dict[str, float] = json.loads(done.stdout)
    return result


def largest_batch(network: str, contender: str, limit: float, device: str) -> int:
    """The largest batch, in eights, whose step adds no more than `limit` bytes to the process: found by trying."""

    def fits(eights: int) -> bool:
        return in_process("step", network, contender, 8 * eights, device)["peak"] <= limit

    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return 8 * low


def show_bytes(names: list[str], device: str) -> None:
    print("| network | torch MB | ours | save_memory | share | asked | peak of tensors | of the process |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for name in names:
        _, batch, size, asked = NETWORKS[name]
        counts = {c: step_counted(name, c, device) for c in CONTENDERS}
        assert counts["ours"]["gradients"] == counts["ours, save_memory"]["gradients"], name
        kept = {c: counts[c]["normalizations"] + counts[c]["others"] for c in CONTENDERS}
        peaks = [in_process("step", name, c, batch, device)["peak"] for c in CONTENDERS]
        print(
            f"| {name} {batch}×{size}² | " + " | ".join(f"{kept[c] / 1e6:.0f}" for c in CONTENDERS)
            + f" | {kept[CONTENDERS[2]] / kept['torch']:.2f} | {asked:.2f} | "
            + " → ".join(f"{counts[c]['peak'] / 1e6:.0f}" for c in CONTENDERS) + " | "
            + " → ".join(f"{peak / 1e6:.0f}" for peak in peaks) + " |", flush=True
        )  # fmt: skip


def show_batches(network: str, device: str) -> None:
    limit = in_process("step", network, "torch", NETWORKS[network][1] * 2, device)["peak"]
    found = {c: largest_batch(network, c, limit, device) for c in CONTENDERS}
    print(f"\nLargest batch of {network} whose step takes at most {limit / 1e6:.0f} MB: ", end="")
    print(", ".join(f"{c} {size} ({size / found['torch']:.2f}×)" for c, size in found.items()))


def show_times(names: list[str], device: str, seconds: float) -> None:
    print("\n| network | torch ms | ours | save_memory | save_memory over ours | over torch |")
    print("|---|---|---|---|---|---|", flush=True)
    for name in names:
        steps = {c: training_step(make(name, c).to(device), batch_of(name, device=device)) for c in CONTENDERS}
        times = {c: t.p50 * 1e3 for c, t in interleaved(steps, seconds).items()}
        saving = times[CONTENDERS[2]]
        print(
            f"| {name} | " + " | ".join(f"{times[c]:.0f}" for c in CONTENDERS)
            + f" | {saving / times['ours']:.3f} | {saving / times['torch']:.3f} |", flush=True
        )  # fmt: skip


def main() -> None:
    if sys.argv[1:2] == ["step"]:
        network, contender, batch, device = sys.argv[2:]
        print(json.dumps(process_step(network, contender, int(batch), device)))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--times", action="store_true")
    parser.add_argument("--seconds", type=float, default=60.0, help="of timing, a network")
    parser.add_argument("--no-batches", action="store_true", help="do not look for the largest batch")
    options = parser.parse_args()
    names = options.networks.split(",")
    show_bytes(names, options.device)
    if not options.no_batches:
        show_batches(names[0], options.device)
    if options.times:
        show_times(names, options.device, options.seconds)


if __name__ == "__main__":
    main()
