"""On which axis of a tensor the features of the layer lie that it comes from, however many operators ago."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from .storages import Key, key_of

__all__ = ["FeatureAxes"]


class FeatureAxes:
    """Follows the features from tensor to tensor. Of each storage it holds their number and their stride, so that views
    (transposed, sliced, flattened before the features) need no rules."""

    def __init__(self) -> None:
        self._held: dict[Key, tuple[int, int]] = {}

    def put(self, tensor: Tensor, axis: int | None) -> None:
        """The features in this storage lie on the tensor's axis; None: it is not known where."""
        self._held.pop(key_of(tensor), None)
        if axis is not None and -tensor.dim() <= axis < tensor.dim() and tensor.size(axis) > 1:
            self._held[key_of(tensor)] = (tensor.size(axis), tensor.stride(axis))

    def axis(self, tensor: Tensor) -> int | None:
        """The axis that holds the features, or None where that is not known."""
        held = self._held.get(key_of(tensor))
        sizes = zip(tensor.shape, tensor.stride(), strict=True) if held is not None else ()
        return next((axis for axis, size_and_stride in enumerate(sizes) if size_and_stride == held), None)

    def carry(self, inputs: Iterable[Tensor], outputs: Iterable[Tensor]) -> None:
        """An operator made the outputs; in those with a storage of their own, the features lie where they lay."""
        given = list(inputs)
        storages = {key_of(tensor) for tensor in given}
        source = next((tensor for tensor in given if self.axis(tensor) is not None), None)
        for output in outputs:
            if key_of(output) not in storages:
                self.put(output, None if source is None else self._axis_in(output, source))

    def _axis_in(self, output: Tensor, source: Tensor) -> int | None:
        axis = self.axis(source)
        if source.shape == output.shape:
            return axis
        last = axis == source.dim() - 1 and output.dim() > 0 and output.size(-1) == source.size(-1)
        return output.dim() - 1 if last else None
