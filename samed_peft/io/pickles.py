"""Read from a PyTorch file's pickle which objects it would build, and refuse all but tensors before PyTorch loads it.

`torch.load(weights_only=True)` alone is not enough: it allocates bytearrays of any size, maps compressed entries into
memory as if they were not compressed, and chooses one of several pickles.
"""

import io
import pickletools
import zipfile
from pathlib import Path

from samed_peft.errors import InputError

_ZIP_START = b"PK\x03\x04"  # torch.load looks for the same bytes

_MOST_PICKLE_BYTES = 4 << 20
"""A thousand times the size for a SAM: the pickle names tensors, whose numbers lie outside of it."""

_LEGACY_PICKLES = 5
"""Magic number, version, machine, state dict and storage keys; raw numbers follow."""

_OPCODES_THAT_BUILD = {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "BYTEARRAY8"}

_PLAIN_GLOBALS = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_meta_tensor_no_storage",
}


def is_zip(path: Path) -> bool:
    """Whether PyTorch sees its zip format (the default since 1.6), which can be mapped into memory."""
    with path.open("rb") as stream:
        return stream.read(len(_ZIP_START)) == _ZIP_START


def check_torch_file(path: Path) -> None:
    """Refuse a compressed file of `torch.save`, or one with more than tensors in dicts, before any of it is built."""
    if is_zip(path):
        stream, pickles = io.BytesIO(_pickle_of_zip(path)), 1
    else:
        with path.open("rb") as file:
            stream, pickles = io.BytesIO(file.read(_MOST_PICKLE_BYTES)), _LEGACY_PICKLES
    try:
        found = next((name for _ in range(pickles) for name in _foreign_names(stream)), None)
    except (ValueError, OverflowError) as error:  # from pickletools, for other bytes than a pickle
        raise unsafe(path, f"it is not a checkpoint, or damaged ({str(error) or type(error).__name__})") from error
    if found is not None:
        raise unsafe(path, f"it is not a checkpoint, or holds Python objects ({found})")


def unsafe(path: Path, reason: str) -> InputError:
    """The error for a file that must not be given to PyTorch, or that PyTorch refuses."""
    return InputError(
        f"expected PyTorch weights without Python objects, but {path} cannot be loaded safely: {reason}; "
        "fetch it again from a source you trust, or save only its state dict"
    )


def _pickle_of_zip(path: Path) -> bytes:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            names = [entry.filename.lower() for entry in entries]  # PyTorch finds entries in either case
            for entry in entries:
                if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
                    raise InputError(
                        f"expected the plain zip that torch.save writes, found {entry.filename} compressed in {path}; "
                        "load it with the program that wrote it and save it again with torch.save"
                    )
            pickles = [entry for entry, name in zip(entries, names, strict=True) if name.endswith("data.pkl")]
            if len(pickles) != 1 or len(set(names)) != len(names):
                raise unsafe(path, "it is not a checkpoint, or its entries are not unique")
            if pickles[0].file_size > _MOST_PICKLE_BYTES:
                raise unsafe(path, f"its {pickles[0].filename} has {pickles[0].file_size} bytes, too many for names")
            return archive.read(pickles[0])
    except (zipfile.BadZipFile, NotImplementedError, OSError, EOFError, RuntimeError) as error:
        raise unsafe(path, f"its zip archive is damaged ({error})") from error


def _foreign_names(stream: io.BytesIO) -> list[str]:
    """Names of objects other than tensors and their containers that one pickle of the stream builds."""
    names = []
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name in _OPCODES_THAT_BUILD:
            names.append(opcode.name)
        elif opcode.name == "GLOBAL" and argument not in _PLAIN_GLOBALS:
            module, _, attribute = str(argument).partition(" ")
            is_storage = attribute.endswith("Storage") and attribute.isalnum()
            is_dtype = attribute.startswith(("float", "bfloat", "int", "uint", "complex", "bool"))
            if module != "torch" or not (is_storage or is_dtype):
                names.append(f"{module}.{attribute}")
    return names
