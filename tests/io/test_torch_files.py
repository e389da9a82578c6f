"""Files that PyTorch itself would load, and that are refused all the same; why `io.pickles` exists."""

import io as streams
import pickle
import pickletools
import zipfile

import pytest
import torch
from torch.serialization import get_unsafe_globals_in_checkpoint

from samed_peft.errors import InputError
from samed_peft.io import load_torch_weights

BYTEARRAY = b"\x80\x02c__builtin__\nbytearray\nM\x00\x10\x85R."  # bytearray(4096), by protocol 2


def write(path, *, compression=zipfile.ZIP_STORED, data_pkl=None, twice=False):
    """A zip of `torch.save`, compressed, with another pickle, or with a second one."""
    stored = streams.BytesIO()
    random = torch.frombuffer(bytearray(torch.randint(0, 256, (40000,), dtype=torch.uint8).numpy()), dtype=torch.int16)
    torch.save({"zeros": torch.zeros(100), "random": random}, stored)
    with zipfile.ZipFile(stored) as old, zipfile.ZipFile(path, "w", compression) as new:
        for name in old.namelist():
            content = data_pkl if data_pkl and name.endswith("data.pkl") else old.read(name)
            new.writestr(name, content)
            if twice and name.endswith("data.pkl"):
                new.writestr(name.replace("data.pkl", "DATA.PKL"), content)
    return path


def test_pytorch_maps_compressed_numbers_as_if_they_were_not(tmp_path):
    path = write(tmp_path / "w.pth", compression=zipfile.ZIP_DEFLATED)
    zeros = torch.load(path, weights_only=True, mmap=True)["zeros"]
    assert zeros.view(torch.int32).any()
    with pytest.raises(InputError, match=r"expected the plain zip that torch\.save writes"):
        load_torch_weights(path)


def test_pytorch_builds_bytearrays_of_any_size(tmp_path):
    path = write(tmp_path / "w.pth", data_pkl=BYTEARRAY)
    assert get_unsafe_globals_in_checkpoint(path) == []
    assert torch.load(path, weights_only=True) == bytearray(4096)
    with pytest.raises(InputError, match=r"__builtin__\.bytearray"):
        load_torch_weights(path)


def test_pytorch_chooses_one_of_two_pickles(tmp_path):
    path = write(tmp_path / "w.pth", twice=True)
    assert torch.load(path, weights_only=True).keys() == {"zeros", "random"}
    with pytest.raises(InputError, match="entries are not unique"):
        load_torch_weights(path)


def test_pytorch_examines_no_file_of_before_its_zips(tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"Expected input to be a checkpoint returned by torch\.save"):
        get_unsafe_globals_in_checkpoint(tmp_path / "w.pth")
    assert load_torch_weights(tmp_path / "w.pth")["a"] == 1


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_opcodes_that_build_objects_are_named(tmp_path, protocol):
    data = pickle.dumps({"a": bytearray(9), "b": Exception()}, protocol=protocol)
    used = {opcode.name for opcode, _, _ in pickletools.genops(data)}
    with pytest.raises(InputError, match=r"Python objects \((STACK_GLOBAL|BYTEARRAY8|(__builtin__|builtins)\.\w+)\)"):
        load_torch_weights(write(tmp_path / "w.pth", data_pkl=data))
    assert used & {"GLOBAL", "STACK_GLOBAL"}


WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b.bias": torch.ones(2)}
PARALLEL = {f"module.{name}": tensor for name, tensor in WEIGHTS.items()}


@pytest.mark.parametrize(
    "saved",
    [
        *({name: WEIGHTS} for name in ("model", "state_dict", "model_state_dict")),
        {"model": WEIGHTS, "optimizer": {"state": {0: {"exp_avg": torch.ones(6)}}, "param_groups": []}, "epoch": 3},
        {"state_dict": {"model": PARALLEL}},
        PARALLEL,
        {f"_orig_mod.{name}": tensor for name, tensor in PARALLEL.items()},
        {f"module._orig_mod.{name}": tensor for name, tensor in WEIGHTS.items()},
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_state_dicts_are_found_as_training_programs_store_them(tmp_path, saved, zipped):
    torch.save(saved, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    found = load_torch_weights(tmp_path / "w.pth")
    assert list(found) == list(WEIGHTS)
    assert all(torch.equal(found[name], WEIGHTS[name]) for name in WEIGHTS)


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"model": WEIGHTS, "state_dict": WEIGHTS}, "found model and state_dict"),
        ({"model": WEIGHTS, "extra": torch.ones(1)}, "found 'model': dict"),
        ({"model": {"a": 1}}, "found 'a': int"),
        ({"model": {}}, "found an empty dict"),
    ],
)
def test_what_is_stored_is_not_guessed(tmp_path, saved, message):
    torch.save(saved, tmp_path / "w.pth")
    with pytest.raises(InputError, match=message):
        load_torch_weights(tmp_path / "w.pth")


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_beside_the_state_dict_count_as_claimed(tmp_path, zipped):
    bomb = torch.ones(1).expand(10**9)
    torch.save({"model": WEIGHTS, "optimizer": [bomb]}, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match=r"claims 4\d{9} bytes of tensors"):
        load_torch_weights(tmp_path / "w.pth")


def test_a_dict_that_holds_itself_ends_with_a_message(tmp_path):
    state = {"lr": 1.0}
    state["model"] = state
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(InputError, match="found 'lr': float"):
        load_torch_weights(tmp_path / "w.pth")
