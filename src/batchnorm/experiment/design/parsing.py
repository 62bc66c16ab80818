"""The options that list several values, as a comma-separated text or as any iterable."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from ...errors import UserError
from ..training.arms import ARMS
from ..training.optimizers import OPTIMIZERS

FULL = 0  # the batch size that stands for all training samples until their number is known


def split_list(given: str | Iterable[object]) -> list[str]:
    """Return the words of a comma-separated text, or the values of an iterable as text."""
    return [str(word).strip() for word in (given.split(",") if isinstance(given, str) else given)]


def _parse_names(given: str | Iterable[str], known: Collection[str], what: str, parameter: str) -> tuple[str, ...]:
    names = tuple(split_list(given))
    for name in names or ("",):
        if name not in known:
            raise UserError(f"unknown {what} {name!r}, study({parameter}=…), give some of {','.join(known)}")
        if names.count(name) > 1:
            raise UserError(f"{what} {name!r} is named twice, study({parameter}=…), name each once")
    return names


def parse_arms(arms: str | Iterable[str]) -> tuple[str, ...]:
    """Return the arms of a comma-separated list (or any iterable), in order; the first is the baseline."""
    names = _parse_names(arms, ARMS, "arm", "arms")
    if len(names) < 2:
        raise UserError(f"only {len(names)} arm, study(arms=…), give at least two to compare as in none,batch")
    return names


def parse_rates(lrs: str | Iterable[float]) -> tuple[float, ...]:
    """Return the learning rates of a comma-separated list (or any iterable), ascending."""
    try:
        rates = sorted(float(lr) for lr in split_list(lrs))
    except (TypeError, ValueError) as error:
        raise UserError(f"learning rates {lrs!r}, study(lrs=…), give numbers as in 0.01,0.1,1") from error
    if not rates or not all(0 < lr < float("inf") for lr in rates):
        raise UserError(f"learning rates {lrs!r}, study(lrs=…), give positive numbers as in 0.01,0.1,1")
    if len({f"{lr:g}" for lr in rates}) < len(rates):
        raise UserError(f"a learning rate is named twice in {lrs!r}, study(lrs=…), name each once")
    return tuple(rates)


def parse_batch_sizes(given: str | int | Iterable[str | int]) -> tuple[int, ...]:
    """Return the batch sizes of a comma-separated list (or a number, or any iterable), FULL for ``full``."""
    words = split_list(given if isinstance(given, Iterable) else [given])
    sizes = []
    for word in words:
        if word != "full" and not (word.isascii() and word.isdigit()):
            raise UserError(f"batch size {word!r}, study(batch_size=…), give whole numbers or full as in full,60,8")
        sizes.append(FULL if word == "full" else int(word))
        if word != "full" and sizes[-1] < 1:
            raise UserError(f"batch of {word}, study(batch_size=…), give at least 1, or full for all training samples")
    if len(set(sizes)) < len(sizes):
        listed = given if isinstance(given, str) else ",".join(words)
        raise UserError(f"a batch size is named twice in {listed}, study(batch_size=…), name each once")
    if sizes in ([], [1]):
        what = "a batch of 1 alone" if sizes else "no batch size"
        raise UserError(
            f"{what}, study(batch_size=…), name a larger one first as in 60,1: the six claims need a variance"
        )
    return tuple(sizes)


def parse_optimizers(given: str | Iterable[str]) -> tuple[str, ...]:
    """Return the optimizers of a comma-separated list (or any iterable)."""
    return _parse_names(given, OPTIMIZERS, "optimizer", "optimizer")
