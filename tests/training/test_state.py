"""Checkpoints whose files were damaged, edited or left by others."""

import json
import pickle

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from samed_peft.errors import InputError
from samed_peft.training.state import Progress, load_checkpoint, save_checkpoint


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


def stepped():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


@pytest.fixture
def checkpoint(accelerator, tmp_path):
    model, optimizer = stepped()
    progress = Progress(7, best_dice=0.5, best_epoch=2)
    save_checkpoint(tmp_path, model, optimizer, progress=progress, accelerator=accelerator)
    return tmp_path / "step-00000007"


def load(checkpoint, accelerator):
    return load_checkpoint(checkpoint.parent, *stepped(), accelerator=accelerator)


def edit(checkpoint, **changes):
    values = json.loads((checkpoint / "state.json").read_text())
    values.pop("checksums", None)
    (checkpoint / "state.json").write_text(json.dumps(values | changes))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_flipped_bit_is_noticed(checkpoint, accelerator, name):
    assert load(checkpoint, accelerator) == Progress(7, 0.5, 2)
    data = bytearray((checkpoint / name).read_bytes())
    data[data.index(b'"step": 7') + 8 if name == "state.json" else -1] ^= 1
    (checkpoint / name).write_bytes(data)
    with pytest.raises(InputError, match=rf"{name} as it was saved, .*remove the entry checksums from .*state\.json"):
        load(checkpoint, accelerator)


def test_an_older_checkpoint_that_was_left_behind_goes(checkpoint, accelerator):
    """As after a save that put the new one in place and could not remove the one before."""
    older = checkpoint.with_name("step-00000003")
    older.mkdir()
    (older / "state.json").write_text("{}")
    assert load(checkpoint, accelerator).step == 7
    assert list(checkpoint.parent.iterdir()) == [checkpoint]


def test_checkpoints_without_the_entry_load_as_before(checkpoint, accelerator):
    edit(checkpoint)
    assert load(checkpoint, accelerator) == Progress(7, 0.5, 2)


GOOD = {"step": 7, "best_dice": 0.5, "best_epoch": 2}
SCALER = torch.amp.GradScaler("cpu").state_dict()


@pytest.mark.parametrize(
    "changes",
    [
        {"progress": None},
        {"progress": [7]},
        {"progress": {}},
        {"progress": GOOD | {"step": "7"}},
        {"progress": GOOD | {"step": -1}},
        {"progress": GOOD | {"step": 1e300}},
        {"progress": GOOD | {"step": True}},
        {"progress": GOOD | {"best_dice": 7}},
        {"progress": GOOD | {"best_dice": "x"}},
        {"progress": GOOD | {"best_epoch": 1.5}},
        {"progress": GOOD | {"colour": 1}},
        {"scaler": [1]},
        {"scaler": {"scale": "x"}},
        {"scaler": {"scale": -1.0}},
        {"scaler": {"__class__": 1}},
        {"scaler": []},
        {"scaler": {name: value for name, value in SCALER.items() if name != "scale"}},
        {"scaler": SCALER | {"scale": 10**60}},
        {"scaler": SCALER | {"_growth_tracker": 0.5}},
        {"scaler": SCALER | {"growth_interval": 2**31}},
    ],
)
def test_a_state_of_nonsense_is_named(checkpoint, accelerator, changes):
    edit(checkpoint, **changes)
    with pytest.raises(InputError, match=rf"as {next(iter(changes))} in .*state\.json, found .*remove this checkpoint"):
        load(checkpoint, accelerator)


@pytest.mark.parametrize("state", [SCALER, SCALER | {"scale": 8.0}, None, {}])
def test_a_loss_scaler_goes_on(checkpoint, accelerator, state):
    edit(checkpoint, progress=GOOD, scaler=state)
    accelerator.scaler = torch.amp.GradScaler("cpu")
    load(checkpoint, accelerator)
    assert accelerator.scaler.state_dict() == (state or SCALER)


@pytest.mark.parametrize("content", ["[1]", "3", '"x"', "{", "null"])
def test_a_state_that_is_no_object_is_named(checkpoint, accelerator, content):
    (checkpoint / "state.json").write_text(content)
    with pytest.raises(InputError, match=r"state\.json"):
        load(checkpoint, accelerator)


@pytest.mark.parametrize("key", ["weight", "nothing|exp_avg", "weight|exp_avg"])
def test_moments_of_another_model_are_named(checkpoint, accelerator, key):
    edit(checkpoint)
    moments = load_file(checkpoint / "optimizer.safetensors")
    save_file(moments | {key: torch.zeros(5)}, checkpoint / "optimizer.safetensors")
    with pytest.raises(InputError, match=rf"moments of this model in .*optimizer\.safetensors, found '{key}"):
        load(checkpoint, accelerator)


class Payload:
    def __reduce__(self):
        return (open, ("RAN", "w"))


def test_cve_2026_1839_random_states_and_pickles_in_a_checkpoint_are_never_opened(
    checkpoint, accelerator, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for name in ("rng_state.pth", "rng_state_0.pth", "optimizer.pt", "scheduler.pt", "training_args.bin", "state.pkl"):
        (checkpoint / name).write_bytes(pickle.dumps(Payload()))
    assert load(checkpoint, accelerator) == Progress(7, 0.5, 2)
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"model\.safetensors"):
        load(checkpoint, accelerator)
    assert not (tmp_path / "RAN").exists()
