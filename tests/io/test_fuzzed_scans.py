"""Seeded damage to files of every format ends as an `InputError` or as a scan, never otherwise."""

import contextlib
import warnings

import numpy as np
import pytest
from scan_files import WRITERS

from samed_peft import io
from samed_peft.errors import InputError

_FILES = 250
_WORDS = (b"-1", b"999", b"1e999", b"nan", b"0", b"9" * 20, b"x" * 1000, b"", b"none", b"LIST", b"..", b"\xff")


def _damaged(data, rng):
    """One to three bytes, pieces, lines or words changed, doubled or taken out."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        place, length = int(rng.integers(min(len(data), rng.choice([64, 400, 10**6])))), int(rng.integers(1, 20))
        match rng.integers(6):
            case 0:
                data[place] ^= 1 << int(rng.integers(8))
            case 1:
                data[place : place + 4] = rng.choice([b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x00" * 4])
            case 2:
                del data[place : place + length]
            case 3:
                data[place:place] = rng.bytes(length)
            case 4:
                lines = bytes(data).split(b"\n")
                lines.insert(0, lines[int(rng.integers(min(len(lines), 12)))])
                data = bytearray(b"\n".join(lines[1:] if rng.integers(2) else lines))
            case _:
                words = bytes(data).split(b" ")
                words[int(rng.integers(min(len(words), 40)))] = _WORDS[rng.integers(len(_WORDS))]
                data = bytearray(b" ".join(words))
        data = data or bytearray(b"0")
    return bytes(data)


@pytest.mark.parametrize("suffix", list(WRITERS))
def test_damage_of_any_kind_is_an_input_error(tmp_path, suffix):
    WRITERS[suffix](tmp_path / f"whole{suffix}")
    data, path = (tmp_path / f"whole{suffix}").read_bytes(), tmp_path / f"damaged{suffix}"
    rng = np.random.default_rng(0)
    for _ in range(_FILES):
        path.write_bytes(_damaged(data, rng))
        for read in (io.read_volume, io.read_affine, io.read_label_names):
            with contextlib.suppress(InputError), warnings.catch_warnings(action="ignore"):
                read(path)
