"""SAMed's loss: cross entropy and Dice over the whole batch."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED_LABEL = -100
"""Label of pixels that the loss leaves out."""

_SMOOTH = 1e-5


class LossParts(NamedTuple):
    """A loss and its two parts, each a scalar."""

    total: Tensor
    cross_entropy: Tensor
    dice: Tensor


def dice_ce_loss(logits: Tensor, labels: Tensor, *, dice_weight: float = 0.8) -> Tensor:
    """SAMed's loss (arXiv 2304.13785): `(1 - dice_weight)` cross entropy + `dice_weight` Dice.

    Args:
        logits: (B, K + 1, h, w), background first.
        labels: (B, h, w) int64 in 0..K, or `IGNORED_LABEL`; larger ones are resized by nearest neighbour.
        dice_weight: share of the Dice loss.

    Returns:
        A scalar. As in the original, the Dice mean is over all classes, absent ones included.
    """
    return loss_parts(logits, labels, dice_weight=dice_weight).total


def loss_parts(
    logits: Tensor,
    labels: Tensor,
    *,
    dice_weight: float = 0.8,
    sum_over_processes: Callable[[Tensor], Tensor] | None = None,
) -> LossParts:
    """Compute `dice_ce_loss` and its parts, over the batches of all processes.

    Numerators and denominators are added up over processes before dividing, so that N processes give the loss of one
    process with the N-fold batch: `sum_over_processes` is a differentiable sum of a (3 K + 5,) tensor.
    """
    num_labels = logits.shape[1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if labels.shape[-2:] != logits.shape[-2:]:
        labels = F.interpolate(labels[:, None].float(), size=logits.shape[-2:], mode="nearest-exact")[:, 0].long()
    sums = _sums_over_pixels(logits, labels)
    if sum_over_processes is not None:
        sums = sum_over_processes(sums)
    overlap, predicted, actual = sums[: 3 * num_labels].reshape(3, num_labels)
    cross_entropy = sums[-2] / sums[-1].clamp(min=1)
    dice = (1 - (2 * overlap + _SMOOTH) / (predicted + actual + _SMOOTH)).mean()
    return LossParts((1 - dice_weight) * cross_entropy + dice_weight * dice, cross_entropy, dice)


def _sums_over_pixels(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum the terms of Dice and cross entropy over pixels -> (3 K + 5,).

    For each class: the probabilities of its own pixels, the squares of its probabilities, its number of pixels; then
    the cross entropies and the number of pixels that count.
    """
    counted = labels != IGNORED_LABEL
    log_probabilities = logits.log_softmax(dim=1)
    of_label = log_probabilities.gather(1, labels.where(counted, 0)[:, None])[:, 0]
    squares = (2 * log_probabilities).exp() * counted[:, None]
    # Dice needs one probability a pixel, that of its label, so one-hot maps are not needed. Sums at indices would be
    # shorter, but their order changes from run to run on GPUs.
    probability, zero = of_label.exp(), of_label.new_zeros(())
    members = [labels == label for label in range(logits.shape[1])]
    overlap = torch.stack([torch.where(member, probability, zero).sum() for member in members])
    actual = torch.stack([member.sum() for member in members])
    cross_entropy = -torch.where(counted, of_label, zero).sum()
    counts = torch.cat([actual, counted.sum()[None]]).to(logits.dtype)
    return torch.cat([overlap, squares.sum((0, 2, 3)), counts[:-1], cross_entropy[None], counts[-1:]])
