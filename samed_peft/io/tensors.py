"""Save and load weights: safetensors for our own, `.pth` files of others through `torch.load(weights_only=True)`."""

import contextlib
import io
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from samed_peft.errors import InputError, system_error
from samed_peft.io.atomic import atomic_file
from samed_peft.io.files import require_file
from samed_peft.io.pickles import check_torch_file, is_zip, unsafe

if TYPE_CHECKING:  # torch takes seconds to import; reading scans does not need it
    from torch import Tensor

_MOST_BYTES_A_BYTE = 2
"""Tied weights are written once and counted twice; a file that claims more is a bomb."""

_WRAPPERS, _MOST_WRAPPERS = ("model", "state_dict", "model_state_dict"), 2
"""Names under which training programs store a state dict, beside the optimizer's for instance."""

_PREFIXES = ("module.", "_orig_mod.")
"""Added to all names by data-parallel training and `torch.compile`."""


def save_tensors(
    tensors: "Mapping[str, Tensor]", path: str | Path, *, metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors of any device and layout to a safetensors file, atomically.

    Tensors that share memory are written once each.
    """
    from safetensors.torch import save_file

    copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    with atomic_file(path) as temporary, naming_refusals():
        save_file(copies, temporary, metadata=dict(metadata) if metadata else None)


def save_torch_weights(tensors: "Mapping[str, Tensor]", path: str | Path) -> None:
    """Write tensors as a `.pth` file, in their order, for programs that read nothing else; atomically."""
    import torch

    # In memory first: given a path, PyTorch would store the temporary name inside, and equal weights shall make equal
    # files; on a full disk, it hides the system's reason behind "unexpected pos".
    buffer = io.BytesIO()
    torch.save(dict(tensors), buffer)
    with atomic_file(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


@contextlib.contextmanager
def naming_refusals() -> Iterator[None]:
    """Raise the system's refusal to write, such as a full disk, that safetensors wraps into an error of its own."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        if (refusal := system_error(error)) is not None:
            raise refusal from error
        raise


def _require_finite(tensors: "Mapping[str, Tensor]", path: Path) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise InputError(
                f"expected finite weights, found NaN or infinity in tensor {name!r} of {path}; "
                "the training that wrote it diverged, use an earlier checkpoint"
            )


def load_tensors(path: str | Path) -> "dict[str, Tensor]":
    """Load the tensors of a safetensors file, on the CPU.

    Raises:
        InputError: the file is missing or damaged, or a tensor holds NaN or infinity.
    """
    from safetensors.torch import load_file

    path = require_file(path)
    with _naming_damaged(path):
        tensors: dict[str, Tensor] = load_file(path, device="cpu")
    _require_finite(tensors, path)
    return tensors


def tensor_shapes(path: str | Path) -> dict[str, tuple[int, ...]]:
    """Read the shapes of a safetensors file's tensors, from its header alone.

    Raises:
        InputError: the file is missing or damaged.
    """
    from safetensors import safe_open

    path = require_file(path)
    # Without PyTorch, which takes seconds to import.
    with _naming_damaged(path), safe_open(path, framework="np") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


@contextlib.contextmanager
def _naming_damaged(path: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(
            f"expected a safetensors file, but {path} cannot be read: {error}; it is damaged or cut off, fetch it again"
        ) from error


def load_torch_weights(path: str | Path) -> "dict[str, Tensor]":
    """Load the state dict of a `.pth` file, on the CPU and memory-mapped if its format allows it.

    A state dict that a training program stored beside other things, under `model` for instance, is taken from there,
    and the prefix `module.` of data-parallel training is left out of its names.

    The pickle inside is never executed: anything but tensors in plain containers is refused by its name before PyTorch
    reads the file.

    Raises:
        InputError: the file is missing, damaged or compressed, holds Python objects or no state dict of dense
            floating-point weights, claims more than is in it, or a weight is not finite.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    path = require_file(path)
    check_torch_file(path)
    with FakeTensorMode():  # shapes alone; nothing is allocated
        loaded = _load_any(path, mmap=False)
        _state_of(loaded, path)
        claimed, stored = _bytes_in(loaded), path.stat().st_size
    if claimed > _MOST_BYTES_A_BYTE * stored:
        raise InputError(
            f"expected weights that fit their file, but {path} of {stored} bytes claims {claimed} bytes of tensors; "
            "do not trust its source"
        )
    # Files of PyTorch before 1.6 are not zip archives and cannot be mapped.
    state = _state_of(_load_any(path, mmap=is_zip(path)), path)
    kinds = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    for name, value in state.items():
        if value.is_meta or value.layout != torch.strided or value.dtype not in kinds:
            kind = f"{value.dtype}, {value.layout}, {value.device.type}".replace("torch.", "")
            raise InputError(
                f"expected dense weights of float16, bfloat16, float32 or float64, found {name[:80]!r} ({kind}) in "
                f"{path}; save the model's state dict as it was trained"
            )
    _require_finite(state, path)
    return state


def _load_any(path: Path, *, mmap: bool) -> object:
    """Whatever a file of tensors in plain containers holds."""
    import torch

    try:
        return torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
    except Exception as error:  # a damaged or hostile pickle can raise anything, and each means the same
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        if "weights_only" in reason:  # PyTorch's own advice is to load it unsafely
            reason = "it is not a checkpoint, or holds Python objects"
        raise unsafe(path, reason) from error


def _state_of(state: object, path: Path) -> "dict[str, Tensor]":
    """The state dict in a file, refused if it holds anything but names and tensors."""
    import torch

    for _ in range(_MOST_WRAPPERS):
        if not isinstance(state, dict) or any(isinstance(value, torch.Tensor) for value in state.values()):
            break
        inner = [name for name in _WRAPPERS if isinstance(state.get(name), dict)]
        if len(inner) > 1:
            raise InputError(f"expected one state dict, found {' and '.join(inner)} in {path}; save one of them alone")
        state = state[inner[0]] if inner else state
    if not isinstance(state, dict) or not state:
        found = "an empty dict" if isinstance(state, dict) else _kind(state)
        raise InputError(f"expected a state dict (names to tensors), found {found} in {path}; save model.state_dict()")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            shown = repr(name[:80]) if isinstance(name, str) else f"a key of type {_kind(name)}"
            raise InputError(
                f"expected a state dict (names to tensors), found {shown}: {_kind(value)} "
                f"in {path}; save the model's state dict alone"
            )
    while prefix := _common_prefix(state):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return dict(state)


def _common_prefix(names: "Iterable[str]") -> str | None:
    """The prefix of a training program that all names have."""
    return next((one for one in _PREFIXES if all(name.startswith(one) and name != one for name in names)), None)


def _bytes_in(loaded: object) -> int:
    """Bytes of all tensors in dicts and lists, each counted as often as it stands there."""
    import torch

    total, seen, left = 0, set[int](), [loaded]
    while left:
        value = left.pop()
        if isinstance(value, torch.Tensor):
            total += value.nbytes
        elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:  # a pickle can hold cycles
            seen.add(id(value))
            left += value.values() if isinstance(value, dict) else value
    return total


def _kind(value: object) -> str:
    import torch

    return "Tensor" if isinstance(value, torch.Tensor) else type(value).__name__  # not FakeTensor
