"""Moving average of the trained weights, which is validated and saved in their place."""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn


class WeightAverage:
    """Exponential moving average of a model's trainable weights.

    Early on the decay is smaller, (1 + t) / (10 + t) after t steps, so that the first weights are soon forgotten.

    Args:
        model: whose weights are averaged, from the present ones on.
        decay: of the average at each step, 0 to 1.
    """

    def __init__(self, model: nn.Module, *, decay: float) -> None:
        self._weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self._average = {name: weight.detach().clone() for name, weight in self._weights.items()}
        self._decay = decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the weights after optimizer step `step`, counted from 1, into the average."""
        decay = min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self._average.values()), list(self._weights.values()), 1 - decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the model have the averaged weights within `with`."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, weight in self._weights.items():
            trained = weight.detach().clone()
            weight.copy_(self._average[name])
            self._average[name].copy_(trained)

    def tensors(self) -> dict[str, Tensor]:
        """The averaged weights by name, for a checkpoint."""
        return dict(self._average)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from `tensors`, which must have the names and shapes of the model's."""
        for name, average in self._average.items():
            average.copy_(tensors[name])
