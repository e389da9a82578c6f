"""The loss by hand, and the schedule's off-by-one."""

import math

import pytest
import torch

from samed_peft.losses import IGNORED_LABEL, dice_ce_loss, loss_parts
from samed_peft.schedules import learning_rate


def test_by_hand():
    # Two pixels, two classes, even probabilities; pixel 0 is background, pixel 1 foreground.
    parts = loss_parts(torch.zeros(1, 2, 1, 2), torch.tensor([[[0, 1]]]), dice_weight=0.8)
    # Each class: overlap 0.5, squares 2 * 0.25, target 1 -> Dice 1 / 1.5.
    assert parts.cross_entropy.item() == pytest.approx(math.log(2))
    assert parts.dice.item() == pytest.approx(1 - 1 / 1.5, abs=1e-5)
    assert parts.total.item() == pytest.approx(0.2 * math.log(2) + 0.8 / 3, abs=1e-5)


def test_perfect_prediction_costs_nothing():
    labels = torch.tensor([[[0, 1], [2, 1]]])
    logits = 50.0 * torch.nn.functional.one_hot(labels, 3).movedim(-1, 1)
    assert dice_ce_loss(logits, labels).item() == pytest.approx(0, abs=1e-5)


def test_larger_labels_are_resized_by_nearest_neighbour():
    logits = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 3, (2, 4, 4), generator=torch.Generator().manual_seed(1))
    larger = labels.repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert dice_ce_loss(logits, larger).equal(dice_ce_loss(logits, labels))


def test_ignored_pixels_count_nowhere():
    logits = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 3, (2, 4, 4), generator=torch.Generator().manual_seed(1))
    labels[1] = IGNORED_LABEL
    torch.testing.assert_close(dice_ce_loss(logits, labels), dice_ce_loss(logits[:1], labels[:1]))


def test_dice_sums_run_over_the_batch():
    logits = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 3, (4, 4, 4), generator=torch.Generator().manual_seed(1))
    tiled = dice_ce_loss(logits.reshape(1, 4, 3, 4, 4).transpose(1, 2).reshape(1, 3, 16, 4), labels.reshape(1, 16, 4))
    torch.testing.assert_close(dice_ce_loss(logits, labels), tiled)


def test_rates_by_hand():
    rates = [learning_rate(s, peak=1.0, warmup_steps=2, max_steps=10, power=1.0) for s in range(6)]
    assert rates == pytest.approx([0.5, 0.5, 1.0, 1.0, 0.9, 0.8])


def test_no_warm_up_and_the_end():
    rates = [learning_rate(s, peak=1.0, warmup_steps=0, max_steps=4, power=1.0) for s in (0, 1, 2, 5, 9)]
    assert rates == pytest.approx([1.0, 1.0, 0.75, 0.0, 0.0])
