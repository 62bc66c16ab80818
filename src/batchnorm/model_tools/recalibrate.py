"""Population statistics from data: the mean and variance that evaluation should use, exactly and undoably."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError, quote_error
from ..inspect.modules import is_norm, names_of, norms_out_of_reach, refuse_lazy
from ..inspect.nests import copied, samples_in
from ..inspect.untouched import generators_kept, untouched
from ..statistics.pool import Gather, Pool, gather_over
from .feed import feed, progress_bar
from .freeze import is_frozen

__all__ = ["Recalibration", "Shift", "recalibrate"]

Forward = Callable[[nn.Module, Any], Any]


@dataclass(frozen=True)
class Shift:
    """How far one layer's running statistics were from the population's, as the root mean square and the maximum over
    its channels: of the mean in population standard deviations √(σ²+ε), of the variance in powers of two."""

    mean_rms: float
    mean_max: float
    log2_var_rms: float
    log2_var_max: float
    count: int


@dataclass
class Recalibration:
    """What `recalibrate` did: per layer the `Shift` and why others were left; `undo()` puts the buffers back."""

    layers: dict[str, Shift]
    skipped: dict[str, str]
    samples: int
    batches: int
    buffers_before: list[tuple[Tensor, Tensor]] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Put the running statistics back to what they were before. A second call changes nothing."""
        with torch.no_grad():
            for buffer, value in self.buffers_before:
                buffer.copy_(value)
        self.buffers_before.clear()

    def __str__(self) -> str:
        width = max([len(name) for name in (*self.layers, *self.skipped)] or [5])
        lines = [f"{'layer':<{width}}  mean moved (sd)  variance moved (log2)  values"]
        for name, s in self.layers.items():
            lines.append(f"{name:<{width}}  {s.mean_rms:15.3f}  {s.log2_var_rms:21.3f}  {s.count}")
        lines += [f"{name:<{width}}  left alone: {why}" for name, why in self.skipped.items()]
        return "\n".join(lines)


def recalibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Forward | None = None,
    samples: int | None = None,
    layerwise: bool = True,
    unbiased: bool = True,
    frozen: bool = False,
    process_group: Any = "world",
    progress: bool = False,
) -> Recalibration:
    """Set every batch normalization's running mean and variance to those of the data, in place.

    The moments are pooled with weights: over batches (and ranks) b of n_b values a channel, n = Σ n_b,
    mean = Σ n_b·μ_b / n and M2 = Σ (n_b·σ_b² + n_b·(μ_b − mean)²), merged pairwise in float64, and the buffers get
    mean and M2/(n − 1), or M2/n with `unbiased=False`; uneven batches change nothing. Everything else is in eval,
    dropout too.

    Layer by layer (`layerwise=True`) each layer's moments are taken with all layers before it already in eval with
    their new statistics: exactly what evaluation will show it, however the data were cut into batches. This runs
    the part of the network up to the layer once a layer. `layerwise=False` takes one pass, in which each layer
    normalizes by the batch's own statistics, as `torch.optim.swa_utils.update_bn` does: for deep networks
    on little hardware; the layers after the first then depend somewhat on how the data were cut.

    Frozen layers are left alone unless `frozen`: by `freeze`, or by `.eval()` on a layer while the model trains. So are
    layers without running statistics, and ones that the data never reach. About 1,000 samples are enough
    (arXiv 2105.07576).

    Args:
        model: any module.
        batches: inputs, or (input, target) pairs of which the first is used, or mappings of keyword arguments, with
            tensors in any nest of containers and objects; they are moved to the model's device. Run through once a
            layer; an iterator is kept in memory for that.
        forward: `forward(model, batch)`, for every other form of batch; it moves the batch itself.
        samples: stop after the batch with which this many samples have been seen, on each rank; None takes all. The
            first axis of the first tensor counts them, and a batch without any counts as one.
        layerwise: see above.
        unbiased: the variance that the buffers get: True divides by n − 1, as torch's own update does; False by n, the
            variance of exactly these data, as frameworks have it whose running variance is biased.
        frozen: recalibrate frozen layers too; they stay frozen, at the new statistics.
        process_group: ranks whose data are pooled, each with its own batches, or none: "world" is all of them where
            `torch.distributed` is initialized, so all have to call; None pools nothing; or a group.
        progress: show a progress bar on stderr (needs rich).

    Returns:
        `Recalibration`, which prints as a table.

    Raises:
        UserError: no batch, a batch that the model does not take, NaN or Inf in front of a layer, or a single
            value a channel in all; the model is then unchanged.
    """
    if samples is not None and samples < 1:
        raise UserError(f"recalibrate: samples is {samples}; give a budget of at least 1, or None for all")
    refuse_lazy(model, "recalibrate")
    job = _Job(model, forward or feed, samples, gather_over(process_group), unbiased, frozen)
    job.open(batches)
    with untouched(model), torch.compiler.set_stance("force_eager"), progress_bar(progress, "recalibrate") as step:
        for module in model.modules():
            module.training = False
        order = job.order()
        pools: dict[str, Pool] = {}
        groups = [[name] for name in order] if layerwise else [order]
        job.show(step, len(groups))
        for group in groups:
            pools |= job.measure(group, by_batch=not layerwise)
    return job.finish(pools)


class _Stop(BaseException):
    """Leaves the forward once the layer has been measured; no `except Exception` on the way catches it."""


class _Job:
    def __init__(
        self, model: nn.Module, forward: Forward, samples: int | None, gather: Gather, unbiased: bool, frozen: bool
    ) -> None:
        self.model, self.forward, self.samples, self.gather = model, forward, samples, gather
        self.frozen = frozen  # these too
        self.variance = (lambda pool: pool.unbiased) if unbiased else (lambda pool: pool.var)
        norms = {name: module for module, name in names_of(model).items() if is_norm(module)}
        self.skipped = {name: why for name, norm in norms.items() if (why := self._why_not(norm))}
        self.skipped |= norms_out_of_reach(model)
        self.norms: dict[str, Any] = {name: norm for name, norm in norms.items() if name not in self.skipped}
        self.calls = dict.fromkeys(self.norms, 0)  # in one forward
        self.seen = self.batches = 0
        self.tick: Callable[[], None] = lambda: None

    def _why_not(self, norm: nn.Module) -> str:
        if not self.frozen and (is_frozen(norm) or (self.model.training and not norm.training)):
            return "frozen"
        if getattr(norm, "domains", None) is not None:
            return "keeps its statistics by domain"
        return "keeps no running statistics" if norm.running_mean is None else ""

    # --- data --------------------------------------------------------------------------------------
    def open(self, batches: Iterable[Any]) -> None:
        # An iterator can be walked once, and every layer needs the data.
        self.data = list(self._within_budget(batches)) if isinstance(batches, Iterator) else batches

    def _within_budget(self, batches: Iterable[Any]) -> Iterator[Any]:
        seen = 0
        for batch in batches:
            yield batch
            seen += self._samples(batch)
            if self.samples is not None and seen >= self.samples:
                return

    def _samples(self, batch: Any) -> int:
        count = samples_in(batch)
        if count is None and self.samples is not None:
            raise UserError(
                f"recalibrate: how many samples a {type(batch).__name__} holds cannot be told, so samples="
                f"{self.samples} cannot be kept; pass fewer batches and samples=None"
            )
        return 1 if count is None else count

    def _run(self) -> None:
        """All batches once. The generators start from the same state each time, so that a shuffling or augmenting
        loader gives every layer the same data. Where one rank fails, all raise: none is left waiting."""
        self.seen = self.batches = 0
        failure = None
        with generators_kept():
            try:
                for batch in self._within_budget(self.data):
                    self._run_batch(batch)
                    self.seen += self._samples(batch)
                    self.batches += 1
                    self.tick()
            except UserError as error:
                failure = error
        failed = torch.stack(self.gather(torch.tensor([failure is not None], dtype=torch.float64)))
        if failure is not None:
            raise failure
        if failed.any():
            raise UserError(f"recalibrate: rank {int(failed.flatten().argmax())} failed; its own message says why")

    def _run_batch(self, batch: Any) -> None:
        try:
            # A model may write to its input, and each pass needs the data.
            self.forward(self.model, copied(batch, f"recalibrate: batch {self.batches}"))
        except _Stop:
            pass
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"recalibrate: {type(self.model).__name__} does not run on batch {self.batches}: "
                f"{quote_error(error)}; give batches as the model takes them, or a forward(model, batch)"
            ) from error

    def show(self, step: Callable[[int, int], None], passes: int) -> None:
        """From here on every batch moves the progress bar; how many there are here, the first look has counted."""
        done, total = itertools.count(1), passes * self.here
        step(0, total)
        self.tick = lambda: step(next(done), total)

    # --- layers ------------------------------------------------------------------------------------
    def order(self) -> list[str]:
        """The layers in the order of their first calls, the same on all ranks; counts calls, samples and batches."""
        first: dict[str, int] = {}
        now: dict[str, int] = {}

        def count(name: str) -> None:
            first.setdefault(name, len(first))
            now[name] = now.get(name, 0) + 1

        forward = self.forward

        def counted(model: nn.Module, batch: Any) -> None:
            now.clear()
            forward(model, batch)
            for name, calls in now.items():
                self.calls[name] = max(self.calls[name], calls)

        self.forward = counted
        with self._hooked(self.norms, lambda name, norm, args, kwargs: count(name)):
            self._run()
        self.forward = forward
        rows = [[first.get(name, torch.inf), self.calls[name]] for name in self.norms]
        rows.append([self.seen, self.batches])
        return self._agree(torch.tensor(rows, dtype=torch.float64))

    def _agree(self, mine: Tensor) -> list[str]:
        self.here = self.batches  # on this rank
        everyone = torch.stack(self.gather(mine))
        self.seen, self.batches = (int(total) for total in everyone[:, -1].sum(0))
        if self.batches == 0:
            raise UserError("recalibrate: there is no batch in the data; pass an iterable that gives at least one")
        position, calls = everyone[:, :-1, 0].amin(0), everyone[:, :-1, 1].amax(0)
        names = list(self.norms)
        self.calls = {name: int(n) for name, n in zip(names, calls, strict=True)}
        self.totals = (self.seen, self.batches)
        for name in names:
            if self.calls[name] == 0:
                self.skipped[name] = "the data never reach it"
        return [names[i] for i in position.argsort(stable=True).tolist() if self.calls[names[i]]]

    def measure(self, group: list[str], by_batch: bool) -> dict[str, Pool]:
        """Pool the group's inputs over all data, and write the moments so that the next layers see them."""
        pools = {name: Pool(self.norms[name].running_mean.numel()) for name in group}
        last = len(group) == 1 and self.calls[group[0]] == 1

        def take(name: str, norm: nn.Module, args: Any, kwargs: Any) -> None:
            given = [*args, *(kwargs[key] for key in ("input",) if key in kwargs)][0]
            mask, axis = kwargs.get("mask", args[2] if len(args) > 2 else None), getattr(norm, "feature_axis", 1)
            if mask is not None and mask.dim() == given.dim():
                mask = mask.movedim(axis, 1)
            pools[name].add_values(given.movedim(axis, 1), mask)
            if not (pools[name].mean.isfinite().all() and pools[name].m2.isfinite().all()):
                raise UserError(
                    f"recalibrate: batch {self.batches} brings NaN or Inf to {name or 'the model'}; look at that "
                    "batch, or leave it out"
                )
            if last and not by_batch:
                raise _Stop

        for name in group:
            # A layer called several times sees its own results: only batch statistics do not depend on the old.
            self.norms[name].training = by_batch or self.calls[name] > 1
        with self._hooked({name: self.norms[name] for name in group}, take):
            self._run()
        for name in group:
            self.norms[name].training = False
            pools[name] = pools[name].over_ranks(self.gather)
            if pools[name].count < 2:
                raise UserError(
                    f"recalibrate: {name or 'the model'} gets {pools[name].count:.0f} value a channel from all the "
                    "data, which has no variance; pass more samples"
                )
            self._write(name, pools[name])
        return pools

    @contextmanager
    def _hooked(self, norms: dict[str, Any], hook: Callable[[str, nn.Module, Any, Any], None]) -> Iterator[None]:
        handles = [
            norm.register_forward_pre_hook(lambda m, a, k, name=name: hook(name, m, a, k), with_kwargs=True)
            for name, norm in norms.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _write(self, name: str, pool: Pool) -> None:
        norm = self.norms[name]
        norm.running_mean.copy_(pool.mean)
        norm.running_var.copy_(self.variance(pool))
        if not (norm.running_mean.isfinite().all() and norm.running_var.isfinite().all()):
            raise UserError(
                f"recalibrate: the statistics of {name or 'the model'} do not fit {norm.running_var.dtype}; keep its "
                "running_mean and running_var in float32"
            )
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.copy_(torch.tensor(self.totals[1]))  # of any dtype, and wraps as counting does

    def finish(self, pools: dict[str, Pool]) -> Recalibration:
        done = Recalibration({}, self.skipped, *self.totals)
        with torch.no_grad():
            for name, pool in pools.items():
                norm = self.norms[name]
                done.layers[name] = _shift(norm, pool, self.variance(pool))
                held = (norm.running_mean, norm.running_var, norm.num_batches_tracked)
                done.buffers_before += [(buffer, buffer.clone()) for buffer in held if buffer is not None]
                self._write(name, pool)
        return done


def _shift(norm: Any, pool: Pool, var: Tensor) -> Shift:
    mean = (norm.running_mean.cpu().double() - pool.mean).abs() / (var + norm.eps).sqrt()
    ratio = ((norm.running_var.cpu().double() + norm.eps) / (var + norm.eps)).log2().abs()
    return Shift(
        mean.square().mean().sqrt().item(), mean.max().item(),
        ratio.square().mean().sqrt().item(), ratio.max().item(), int(pool.count),
    )  # fmt: skip
