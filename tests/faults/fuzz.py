"""Damaged files of every format and every artefact of the package."""

from pathlib import Path

from .outcomes import Failure, Result, Workshop, last_line, remove
from .zygote import Zygote

SCANS = ("nii", "nii.gz", "nrrd", "mha", "npz", "npy.h5", "png", "tif", "jpg", "dicom")
OWN = ("adapter", "checkpoint", "rows", "report.json", "dataset.json", "run.json")
FLIPPED = ("adapter", "checkpoint", "rows")
_SHARE = 50


def fuzz(workshop: Workshop, *, trials: int, seed: int, kinds: tuple[str, ...] = SCANS + OWN) -> Result:
    """Flip, cut, insert, double and overwrite: refused, or read as it was where the format has a checksum."""
    return _attack(workshop, "fuzzed files", kinds, trials=trials, seed=seed, how=None)


def flipped_bytes(workshop: Workshop, *, trials: int, seed: int, kinds: tuple[str, ...] = FLIPPED) -> Result:
    """Flip one byte of an adapter, a checkpoint or prepared rows: refused, or nothing else is used."""
    return _attack(workshop, "flipped bytes", kinds, trials=trials, seed=seed, how="flip")


def _attack(
    workshop: Workshop, name: str, kinds: tuple[str, ...], *, trials: int, seed: int, how: str | None
) -> Result:
    each = [trials // len(kinds) + (index < trials % len(kinds)) for index in range(len(kinds))]
    shares = [
        (kind, first, min(_SHARE, count - first))
        for kind, count in zip(kinds, each, strict=True)
        for first in range(0, count, _SHARE)
    ]

    def share(zygote: Zygote, root: Path, item: tuple[str, int, int]) -> list[Failure | None]:
        kind, first, count = item
        found: list[Failure | None] = []
        while len(found) < count:
            found += _batch(zygote, root, workshop.inputs, (kind, seed, first + len(found), count - len(found), how))
        return found

    result = Result(name)
    for found in workshop.map(share, shares):
        result.add(found)
    result.notes["failures by file"] = {
        kind: number for kind in kinds if (number := sum(f.repeat.startswith(f"{kind},") for f in result.failures))
    }
    return result


def _batch(
    zygote: Zygote, root: Path, inputs: Path, batch: tuple[str, int, int, int, str | None]
) -> list[Failure | None]:
    """Try some files in one process; if it ends early, the last one is what ended it."""
    kind, seed, first, count, how = batch
    remove(root)
    root.mkdir()
    ended = zygote.run("corrupt", kind, seed, first, count, str(inputs), how, root=root, timeout_s=60 + 5 * count)
    text = (root / "found.txt").read_text(encoding="utf-8") if (root / "found.txt").exists() else ""
    found: list[Failure | None] = []
    for line in text.splitlines()[1:]:
        number, what, finding = line.split("\t")
        repeat = f"{kind}, seed {seed}, trial {number}, {what}"
        if finding == "":  # the process ended while it read this file
            how_ended = "hang" if ended.code in (-14, None) else f"crash, code {ended.code}"
            found.append(Failure(how_ended, last_line(ended.err), repeat))
        else:
            failure = Failure(finding.split(":")[0], finding, repeat)
            found.append(None if finding == "held" else failure)
    if not found:
        raise RuntimeError(f"{kind} could not be prepared: code {ended.code}, {ended.err}")
    return found
