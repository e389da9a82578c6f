"""Weights as safetensors and as PyTorch files."""

import errno
import math
import pickle
import resource

import pytest
import torch
from scan_files import Payload

from samed_peft import io
from samed_peft.errors import InputError


def test_tensors_round_trip(tmp_path):
    shared = torch.arange(6.0).reshape(2, 3)
    tensors = {
        "a": shared,
        "transposed": shared.T,
        "half": torch.ones(2, dtype=torch.bfloat16),
        "n": torch.tensor(3),
    }
    io.save_tensors(tensors, tmp_path / "w.safetensors", metadata={"kind": "test"})
    loaded = io.load_tensors(tmp_path / "w.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


def test_damaged_tensors_are_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    io.save_tensors({"a": torch.ones(100)}, path)
    data = path.read_bytes()
    for size in (0, 5, 60, len(data) - 3):
        path.write_bytes(data[:size])
        with pytest.raises(InputError, match=r"w\.safetensors"):
            io.load_tensors(path)
    io.save_tensors({"good": torch.ones(1), "bad": torch.tensor([1.0, math.inf])}, path)
    with pytest.raises(InputError, match=r"tensor 'bad' of .*w\.safetensors"):
        io.load_tensors(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_weights(tmp_path, zipped):
    state = {"a.weight": torch.randn(3, 2), "b": torch.arange(3).bfloat16()}
    torch.save(state, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    loaded = io.load_torch_weights(tmp_path / "w.pth")
    assert all(torch.equal(loaded[name], state[name]) for name in state)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "found an empty dict"),
        ([torch.ones(1)], "found list"),
        (torch.ones(1), "found Tensor"),
        ({"epochs": {"a": torch.ones(1)}}, "found 'epochs': dict"),
        ({3: torch.ones(1)}, "found a key of type int: Tensor"),
        ({"n": torch.ones(2, dtype=torch.int64)}, r"'n' \(int64, strided, cpu\)"),
        ({"n": torch.ones(2, dtype=torch.bool)}, r"'n' \(bool"),
        ({"n": torch.ones(2, dtype=torch.complex64)}, r"'n' \(complex64"),
        ({"n": torch.ones(2).to(torch.float8_e4m3fn)}, r"torch\._utils\._rebuild_tensor_v3"),
        ({"n": torch.eye(3).to_sparse()}, r"torch\._utils\._rebuild_sparse_tensor"),
        ({"n": torch.empty(3, device="meta")}, r"'n' \(float32, strided, meta"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files_without_plain_weights_are_named(tmp_path, value, message, zipped):
    path = tmp_path / "w.pth"
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match=message):
        io.load_torch_weights(path)


def test_unsafe_torch_files_are_refused(tmp_path):
    path = tmp_path / "w.pth"
    for value in ({"a": torch.ones(1), "x": Payload(tmp_path / "ran")}, [torch.ones(1)], {"epoch": 3}, {}):
        torch.save(value, path)
        with pytest.raises(InputError, match=r"w\.pth"):
            io.load_torch_weights(path)
    path.write_bytes(pickle.dumps({"x": Payload(tmp_path / "ran")}))
    with pytest.raises(InputError, match="cannot be loaded safely"):
        io.load_torch_weights(path)
    torch.save({"a": torch.ones(5000)}, path)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(InputError, match="cannot be loaded safely"):
        io.load_torch_weights(path)
    torch.save({"a": torch.tensor(math.nan)}, path)
    with pytest.raises(InputError, match="tensor 'a'"):
        io.load_torch_weights(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("save", [io.save_tensors, io.save_torch_weights])
def test_a_disk_that_takes_no_more_is_named_as_such(tmp_path, save):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large.*w\.bin") as error:
            save({"a": torch.ones(50_000)}, tmp_path / "w.bin")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.errno == errno.EFBIG
    assert list(tmp_path.iterdir()) == []
