"""Seeded faults: each has the code that must be found, and the arguments of `diagnose`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import batchnorm
from tests.doctor.nets import CLASSES, NETS, Functional, Net, batches_for, train

Call = dict[str, Any]
Fault = tuple[str, str, Callable[[], Call]]

# Networks whose layers all take batch statistics and are modules, so that a fault can be set in them.
_MODULAR = [name for name in NETS if name not in ("functional", "frozen backbone")]
_IMAGES = ("cnn", "residual", "depthwise", "norm after activation")


def norms(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def trained(net: Net, steps: int = 120) -> nn.Module:
    torch.manual_seed(1)
    return train(net.make(), batches_for(net, 36, 32, seed=1), steps)


def data(net: Net, count: int = 36, size: int = 32) -> list[tuple[Tensor, Tensor]]:
    return batches_for(net, count, size, seed=2)


def faults() -> Iterator[Fault]:
    """Yield (name, code, call). Each call makes a new model."""
    yield from _of_the_model()
    yield from _of_the_statistics()
    yield from _of_the_data()
    yield from _of_the_steps()
    yield from _of_the_graph()
    yield from _of_frozen_layers()
    yield from _of_evaluation()
    yield from _of_teachers()


# --- the model alone ---------------------------------------------------------------------------------------
def _changed(net: Net, change: Callable[[Any], None], which: slice = slice(None), **call: Any) -> Call:
    model = net.make()
    for layer in norms(model)[which]:
        change(layer)
    return {"model": model, **call}


def _of_the_model() -> Iterator[Fault]:
    for name in _MODULAR:
        net = NETS[name]
        for momentum in (0.0, 0.5, 0.9, 0.99, 1.0):
            change = _setter("momentum", momentum)
            yield f"{name}, momentum {momentum}", "BN102", lambda net=net, c=change: _changed(net, c)
        yield f"{name}, last layer's γ and β held", "BN103", lambda net=net: _changed(net, _hold, slice(-1, None))
        yield f"{name}, evaluated new", "BN106", lambda net=net: {"model": net.make().eval()}
        for value in (float("nan"), float("inf"), -1.0):
            change = _filler("running_var", value)
            yield f"{name}, variance {value}", "BN107", lambda net=net, c=change: _changed(net, c, slice(0, 1))
        yield f"{name}, half", "BN112", lambda net=net: {"model": net.make().half()}
        yield f"{name}, bfloat16", "BN112", lambda net=net: {"model": net.make().bfloat16()}
        yield (
            f"{name}, SyncBatchNorm without a group",
            "BN109",
            lambda net=net: {"model": nn.SyncBatchNorm.convert_sync_batchnorm(net.make())},
        )
        yield f"{name}, 20 steps", "BN303", lambda net=net: {"model": net.make(), "steps": 20}
        yield f"{name}, weight decay", "BN104", lambda net=net: _decayed(net)
    yield "weights averaged without buffers", "BN106", _averaged
    yield "functional, evaluated new", "BN106", lambda: {"model": Functional().eval(), "batches": data(NETS["mlp"], 2)}


def _setter(name: str, value: Any) -> Callable[[Any], None]:
    return lambda layer: setattr(layer, name, value)


def _filler(name: str, value: float) -> Callable[[Any], None]:
    return lambda layer: getattr(layer, name)[0:1].fill_(value)


def _hold(layer: Any) -> None:
    layer.requires_grad_(False)


def _decayed(net: Net) -> Call:
    model = net.make()
    return {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), weight_decay=0.01)}


def _averaged() -> Call:
    """A moving average over the parameters alone, written by hand."""
    net = NETS["cnn"]
    model = net.make()
    average = copy.deepcopy(model)
    train(model, batches_for(net, 4, 32), 8)
    with torch.no_grad():
        for mean, parameter in zip(average.parameters(), model.parameters(), strict=True):
            mean.lerp_(parameter, 0.5)
    return {"model": average.eval()}


# --- running statistics against data -----------------------------------------------------------------------
def _of_the_statistics() -> Iterator[Fault]:
    for name in (*_MODULAR, "functional"):
        net = NETS[name]
        yield f"{name}, means moved", "BN202", lambda net=net: _moved(net, 2.0, 1.0)
        yield f"{name}, variances times 8", "BN202", lambda net=net: _moved(net, 0.0, 8.0)
        yield f"{name}, variances over 8", "BN202", lambda net=net: _moved(net, 0.0, 1 / 8)
        # A skip connection carries the shift past the first normalization, so later layers are away too. And a single
        # normalization of means about 0 shows too little.
        shift = "BN202" if name in ("pre-activation", "discriminator") else "BN208"
        yield f"{name}, other data", shift, lambda net=net: _shifted(net)
    for name in _IMAGES:
        yield f"{name}, without targets", "BN202", lambda net=NETS[name]: _moved(net, 2.0, 1.0, targets=False)


def _moved(net: Net, shift: float, scale: float, targets: bool = True) -> Call:
    model = trained(net).eval()
    for mean, var in _buffers(model):
        mean += shift * var.sqrt()
        var *= scale
    batches = data(net)
    return {"model": model, "batches": batches if targets else [x for x, _ in batches]}


def _buffers(model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    named = dict(model.named_buffers())
    for name, buffer in named.items():
        if name.endswith("_mean"):
            yield buffer, named[name.removesuffix("_mean") + "_var"]


def _shifted(net: Net) -> Call:
    return {"model": trained(net).eval(), "batches": [(5 * x + 3, y) for x, y in data(net)]}


# --- data --------------------------------------------------------------------------------------------------
def _of_the_data() -> Iterator[Fault]:
    for name, net in NETS.items():
        if name == "frozen backbone":
            continue
        yield f"{name}, batches of 4", "BN201", lambda net=net: {"model": net.make(), "batches": data(net, 4, 4)}
        yield f"{name}, sorted by class", "BN206", lambda net=net: _sorted(net)
        if name not in ("generator", "encoder"):
            yield f"{name}, a last sample alone", "BN201", lambda net=net: _last_alone(net)
        yield f"{name}, a loader with a last sample", "BN201", lambda net=net: _loader(net)
    for name in _IMAGES:
        net = NETS[name]
        yield f"{name}, a filter of zeros", "BN203", lambda net=net: _dead(net)
        yield f"{name}, tiny inputs", "BN203", lambda net=net: _scaled(net, 1e-4)
    for kind, shape in ((nn.BatchNorm1d, (20,)), (nn.BatchNorm1d, (4, 9)), (nn.BatchNorm2d, (3, 6, 6))):
        net = Net(lambda kind=kind, c=shape[0]: kind(c), shape)
        yield f"{kind.__name__} {shape}, large mean", "BN204", lambda net=net: _offset(net, 1e5)
        yield f"{kind.__name__} {shape}, near float16's end", "BN207", lambda net=net: _half(net)
        if len(shape) > 1:
            yield f"{kind.__name__} {shape}, padded", "BN205", lambda net=net: _padded(net)


def _sorted(net: Net) -> Call:
    x, y = (torch.cat(parts) for parts in zip(*batches_for(net, 25, 32, spread=2.0), strict=True))
    order = y.argsort(stable=True)
    return {"model": net.make(), "batches": list(zip(x[order].split(32), y[order].split(32), strict=True))}


def _last_alone(net: Net) -> Call:
    (x, y), *rest = data(net, 3, 32)
    return {"model": net.make(), "batches": [*rest, (x[:1], y[:1])]}


def _loader(net: Net) -> Call:
    samples = TensorDataset(torch.randn(65, *net.shape))
    return {"model": net.make(), "loader": DataLoader(samples, batch_size=32)}


def _dead(net: Net) -> Call:
    model = net.make()
    convolution = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    with torch.no_grad():
        convolution.weight[1] = 0
    return {"model": model, "batches": data(net, 2)}


def _scaled(net: Net, factor: float) -> Call:
    return {"model": net.make(), "batches": [factor * x for x, _ in data(net, 2)]}


def _offset(net: Net, offset: float) -> Call:
    return {"model": net.make(), "batches": [x + offset for x, _ in data(net, 2)]}


def _half(net: Net) -> Call:
    return {"model": net.make().half(), "batches": [(x * 4e4).clamp(-6e4, 6e4).half() for x, _ in data(net, 2)]}


def _padded(net: Net) -> Call:
    lengths = torch.arange(32) % net.shape[-1] + 1
    mask = (torch.arange(net.shape[-1]) < lengths[:, None]).view(32, *(1,) * (len(net.shape) - 2), -1)
    mask = mask.expand(32, *net.shape[1:])
    batches = [{"input": (x + 1) * mask[:, None], "real": mask} for x, _ in data(net, 3)]
    return {"model": net.make(), "batches": batches, "mask": "real"}


# --- steps -------------------------------------------------------------------------------------------------
def _of_the_steps() -> Iterator[Fault]:
    for name in ("mlp", "cnn", "residual", "1-D", "functional"):
        for reentrant in (False, True):
            yield (
                f"{name}, checkpointed, reentrant {reentrant}",
                "BN301",
                lambda net=NETS[name], r=reentrant: _checkpointed(net, r),
            )
        for parts in (2, 4):
            yield f"{name}, {parts} parts a step", "BN302", lambda net=NETS[name], p=parts: _accumulated(net, p)
        yield f"{name}, a step every other call", "BN302", lambda net=NETS[name]: _every_other(net)


class Checkpointed(nn.Module):
    def __init__(self, body: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.body, self.reentrant = body, reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, x.requires_grad_(), use_reentrant=self.reentrant)


def steps(model: nn.Module, parts: int = 1, every: int = 1) -> Call:
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    count = [0]

    def step(batch: tuple[Tensor, Tensor]) -> None:
        for x, y in zip(batch[0].chunk(parts), batch[1].chunk(parts), strict=True):
            F.cross_entropy(model(x), y).backward()
        count[0] += 1
        if count[0] % every == 0:
            optimizer.step()
            optimizer.zero_grad()

    return {"model": model, "step": step, "optimizer": optimizer}


def _checkpointed(net: Net, reentrant: bool) -> Call:
    return steps(Checkpointed(net.make(), reentrant)) | {"batches": data(net, 4)}


def _accumulated(net: Net, parts: int) -> Call:
    return steps(net.make(), parts=parts) | {"batches": data(net, 4, 64)}


def _every_other(net: Net) -> Call:
    return steps(net.make(), every=2) | {"batches": data(net, 4)}


# --- graph -------------------------------------------------------------------------------------------------
class _WithBias(nn.Module):
    """A block that a trace without data cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            return x
        return F.relu(self.bn(self.conv(x)))


class _Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn, self.first, self.second = nn.BatchNorm1d(16), nn.Linear(20, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.second(self.bn(self.first(x)).relu()))


def _of_the_graph() -> Iterator[Fault]:
    pairs = {
        "Conv1d": (nn.Conv1d(4, 8, 3), nn.BatchNorm1d(8), (4, 9)),
        "Conv2d": (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), (3, 8, 8)),
        "Conv3d": (nn.Conv3d(1, 8, 3), nn.BatchNorm3d(8), (1, 5, 5, 5)),
        "ConvTranspose2d": (nn.ConvTranspose2d(3, 8, 3), nn.BatchNorm2d(8), (3, 4, 4)),
        "Linear": (nn.Linear(20, 8), nn.BatchNorm1d(8), (20,)),
    }
    for name, (layer, norm, shape) in pairs.items():
        model = nn.Sequential(layer, norm, nn.ReLU())
        yield f"{name} with bias", "BN101", lambda m=model: {"model": copy.deepcopy(m)}
        yield (
            f"{name} with bias, run",
            "BN101",
            lambda m=model, s=shape: {"model": copy.deepcopy(m), "batches": [torch.randn(32, *s)]},
        )
        yield f"{name}, to deploy", "BN402", lambda m=model: {"model": copy.deepcopy(m).eval()}
        dropped = nn.Sequential(nn.Dropout(0.5), *model)
        yield f"dropout, {name}", "BN105", lambda m=dropped: {"model": copy.deepcopy(m)}
        yield (
            f"dropout, {name}, run",
            "BN105",
            lambda m=dropped, s=shape: {"model": copy.deepcopy(m), "batches": [1 + torch.randn(32, *s)] * 4},
        )
    yield "bias behind a branch", "BN101", lambda: {"model": _WithBias(), "batches": data(NETS["cnn"], 1)}
    yield "one layer in two places", "BN110", lambda: {"model": _Twice(), "batches": data(NETS["mlp"], 1)}
    for length in (10, 16):
        yield f"(N, {length}, 16) of a Linear", "BN108", lambda n=length: _sequence(n)
    yield "images, channels last", "BN108", lambda: {"model": nn.BatchNorm2d(8), "batches": [torch.randn(16, 5, 5, 8)]}


def _sequence(length: int) -> Call:
    model = nn.Sequential(nn.Linear(6, 16, bias=False), nn.ReLU(), nn.BatchNorm1d(16), nn.Linear(16, CLASSES))
    return {"model": model, "batches": [torch.randn(32, length, 6)]}


# --- frozen layers whose statistics are wrong ------------------------------------------------------------------
def _of_frozen_layers() -> Iterator[Fault]:
    for name in ("cnn", "residual", "norm after activation"):
        yield f"{name}, γ and β held, statistics stale", "BN202", lambda net=NETS[name]: _stale(net)
        yield f"{name}, frozen at stale statistics", "BN202", lambda net=NETS[name]: _stale(net, batchnorm.freeze)


def _stale(net: Net, freeze: Callable[[nn.Module], nn.Module] | None = None) -> Call:
    """Fine-tuned on other data with the batches' statistics, and evaluated with those of the first training."""
    model = trained(net)
    for layer in norms(model):
        layer.requires_grad_(False)
        layer.track_running_stats = False
    train(model, [(3 * x + 2, y) for x, y in batches_for(net, 36, 32, seed=1)], 120)
    if freeze is not None:
        freeze(model)
    return {"model": model.eval(), "batches": [(3 * x + 2, y) for x, y in data(net)]}


# --- evaluation by the batch -------------------------------------------------------------------------------
def _of_evaluation() -> Iterator[Fault]:
    for name in ("cnn", "our mlp", "3-D"):
        yield f"{name}, one layer left in train()", "BN111", lambda net=NETS[name]: _left_in_train(net)
        yield f"{name}, no statistics in eval", "BN111", lambda net=NETS[name]: _untracked(net)
    yield "a call by the batch in eval", "BN111", lambda: {"model": ByBatch().eval()}
    yield (
        "a call by the batch in eval, run",
        "BN111",
        lambda: {"model": ByBatch().eval(), "batches": data(NETS["mlp"], 2)},
    )


class ByBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(20, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.first(x), None, None, training=True)


def _left_in_train(net: Net) -> Call:
    model = trained(net, 20).eval()
    norms(model)[-1].train()
    return {"model": model}


def _untracked(net: Net) -> Call:
    model = net.make()
    for layer in norms(model):
        layer.running_mean = layer.running_var = layer.num_batches_tracked = None
        layer.track_running_stats = False
    return {"model": model.eval(), "batches": data(net, 2)}


# --- teachers ----------------------------------------------------------------------------------------------
def _of_teachers() -> Iterator[Fault]:
    for name in ("mlp", "our mlp", "cnn", "functional"):
        for how in ("no_grad", "detached", "without parameters that learn"):
            yield f"{name}, a teacher, {how}", "BN305", lambda net=NETS[name], how=how: taught(net, how)
        yield f"{name}, validated in train()", "BN305", lambda net=NETS[name]: _validated(net)


def taught(net: Net, how: str) -> Call:
    student = net.make()
    teacher = copy.deepcopy(student).requires_grad_(how != "without parameters that learn")
    optimizer = torch.optim.SGD(student.parameters(), 0.01)

    def step(batch: tuple[Tensor, Tensor]) -> None:
        with torch.set_grad_enabled(how != "no_grad"):
            target = teacher(batch[0])
        optimizer.zero_grad()
        (student(batch[0]) - target.detach()).square().mean().backward()
        optimizer.step()

    return {"model": student, "step": step, "optimizer": optimizer, "batches": data(net, 4)}


def _validated(net: Net) -> Call:
    call = steps(net.make())
    inner = call["step"]

    def step(batch: tuple[Tensor, Tensor]) -> None:
        inner(batch)
        with torch.no_grad():
            call["model"](batch[0])

    return call | {"step": step, "batches": data(net, 4)}
