"""The moving average against its formula."""

import pytest
import torch

from samed_peft.training.average import WeightAverage


def test_the_average_follows_its_formula_and_takes_turns_with_the_weights():
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(0.0)
    average = WeightAverage(model, decay=0.5)
    expected = 0.0
    for step in range(1, 30):
        model.weight.data.fill_(float(step))
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    with average.in_place():
        assert model.weight.item() == pytest.approx(expected, rel=1e-5)
    assert model.weight.item() == 29.0
    assert average.tensors()["weight"].item() == pytest.approx(expected, rel=1e-5)


def test_frozen_weights_are_left_out():
    model = torch.nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    assert list(WeightAverage(model, decay=0.9).tensors()) == ["weight"]


def test_weights_come_back_after_an_error():
    model = torch.nn.Linear(1, 1, bias=False)
    average = WeightAverage(model, decay=0.9)
    model.weight.data.fill_(7.0)
    with pytest.raises(KeyError), average.in_place():
        raise KeyError
    assert model.weight.item() == 7.0
