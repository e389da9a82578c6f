"""The loss by hand, and the schedule's off-by-one."""

import math

import pytest
import torch
from torch.nn import functional as F

from samed_peft.models.losses import IGNORED_LABEL, dice_ce_loss, loss_parts
from samed_peft.training.loop import learning_rate


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


def written_out(logits, labels, dice_weight):
    """The loss as its formula reads, with maps of zeros and ones."""
    counted = labels != IGNORED_LABEL
    target = F.one_hot(labels.where(counted, 0), logits.shape[1]).movedim(-1, 1) * counted[:, None]
    probabilities = logits.softmax(1) * counted[:, None]
    overlap, predicted, actual = (x.sum((0, 2, 3)) for x in (probabilities * target, probabilities**2, target))
    dice = (1 - (2 * overlap + 1e-5) / (predicted + actual + 1e-5)).mean()
    cross_entropy = F.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL)
    return (1 - dice_weight) * cross_entropy + dice_weight * dice


def example(*, dtype=torch.float32):
    """Logits and labels, with ignored pixels and without class 2."""
    random = torch.Generator().manual_seed(3)
    logits = (4 * torch.randn(3, 5, 8, 6, generator=random)).to(dtype).requires_grad_(True)
    labels = torch.randint(0, 5, (3, 8, 6), generator=random)
    return logits, labels.where(labels != 2, IGNORED_LABEL)


@pytest.mark.parametrize("dice_weight", [0.0, 0.8, 1.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_loss_and_gradient_are_those_of_the_formula(dice_weight, dtype, tolerance):
    logits, labels = example(dtype=dtype)
    loss, expected = dice_ce_loss(logits, labels, dice_weight=dice_weight), written_out(logits, labels, dice_weight)
    assert loss.dtype == dtype
    torch.testing.assert_close(loss, expected, atol=tolerance, rtol=0)
    gradients = [torch.autograd.grad(value, logits)[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients, atol=tolerance, rtol=0)
    assert not gradients[0].movedim(1, -1)[labels == IGNORED_LABEL].any()


def test_gradient_is_that_of_differences():
    logits, labels = example(dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: dice_ce_loss(x[:, :, :2], labels[:, :2]), logits)


def test_the_same_bits_every_time_and_under_autocast():
    logits, labels = example()
    runs = []
    for autocast in (False, False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = dice_ce_loss(logits, labels)
        runs.append((loss, *torch.autograd.grad(loss, logits)))
    for loss, gradient in runs[1:]:
        assert loss.equal(runs[0][0])
        assert gradient.equal(runs[0][1])


def test_sums_of_parts_of_a_batch_give_the_loss_of_the_batch():
    logits, labels = example(dtype=torch.float64)
    others = []
    loss_parts(logits[:1], labels[:1], sum_over_processes=lambda sums: others.append(sums) or sums)
    parts = loss_parts(logits[1:], labels[1:], sum_over_processes=lambda sums: sums + others[0])
    assert others[0].shape == (3 * 5 + 2,)
    torch.testing.assert_close(parts.total, dice_ce_loss(logits, labels))


def test_nothing_but_ignored_pixels():
    logits, labels = example()
    parts = loss_parts(logits, torch.full_like(labels, IGNORED_LABEL))
    assert parts.cross_entropy == parts.dice == 0
    assert not torch.autograd.grad(parts.total, logits)[0].any()


def test_rates_by_hand():
    rates = [learning_rate(s, peak=1.0, warmup_steps=2, max_steps=10, power=1.0) for s in range(6)]
    assert rates == pytest.approx([0.5, 0.5, 1.0, 1.0, 0.9, 0.8])


def test_no_warm_up_and_the_end():
    cosine = [learning_rate(s, peak=1.0, warmup_steps=2, max_steps=6, schedule="cosine") for s in range(8)]
    assert cosine == pytest.approx([0.5, 0.5, 1.0, 1.0, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2, 0.0])
    rates = [learning_rate(s, peak=1.0, warmup_steps=0, max_steps=4, power=1.0) for s in (0, 1, 2, 5, 9)]
    assert rates == pytest.approx([1.0, 1.0, 0.75, 0.0, 0.0])
