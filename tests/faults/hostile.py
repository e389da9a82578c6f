"""Artefacts made to harm, and one bad file among good ones."""

import json
import re
from pathlib import Path

from .commands import Prepared, prepare
from .outcomes import Failure, Result, Workshop, generator, last_line, remove
from .zygote import Zygote

CASES = ("pickle", "elsewhere", "listed", "expression", "huge", "escapes")
_RAW = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e]")
_SECONDS = 25


def hostile(workshop: Workshop, *, trials: int, seed: int, kinds: tuple[str, ...] = CASES) -> Result:
    """Use artefacts that are made to harm: no code runs, no other file is read, nothing stalls."""

    def trial(zygote: Zygote, root: Path, index: int) -> Failure | None:
        kind = kinds[index % len(kinds)]
        remove(root)
        root.mkdir()
        ended = zygote.run("attack", kind, seed, index, str(workshop.inputs), root=root, timeout_s=_SECONDS)
        command = json.loads((root / "command.json").read_text())
        repeat = f"{kind}, seed {seed}, trial {index}, {' '.join(command)}"
        found = f"code {ended.code}: {last_line(ended.err)!r}"
        if (root / "in" / "ran").exists():
            return Failure("code ran", found, repeat)
        if ended.code is None:
            return Failure("hang", found, repeat)
        if kind in ("elsewhere", "listed") and ended.code == 0:
            return Failure("read elsewhere", found, repeat)
        if _RAW.search(ended.out + ended.err):
            return Failure("raw escape", found, repeat)
        if ended.code not in (0, 1, 2) or "Traceback" in ended.err:
            return Failure("traceback or crash", found, repeat)
        return None

    return Result("hostile artefacts").add(workshop.map(trial, range(trials)))


def one_bad_file(workshop: Workshop, *, trials: int, seed: int) -> Result:
    """Damage one of several scans or masks: all others are done as without it."""
    prepared = prepare(workshop, ["predict", "evaluate"])
    folders = {"predict": "scans", "evaluate": "predictions"}

    def trial(zygote: Zygote, root: Path, index: int) -> Failure | None:
        name = ("predict", "evaluate")[index % 2]
        random, command = generator(seed, "bad", name, index), prepared[name]
        command.begin(root)
        bad = random.choice(sorted((root / folders[name]).iterdir()))
        data = bad.read_bytes()
        cut = random.random() < 0.5
        bad.write_bytes(data[: random.randrange(len(data))] if cut else random.randbytes(len(data)))
        ended = zygote.run(*command.command.call, root=root)
        repeat = f"{name}, seed {seed}, trial {index}, {bad.name} {'cut' if cut else 'random'}"
        if ended.code not in (0, 1) or "Traceback" in ended.err:
            return Failure("stopped", f"code {ended.code}: {last_line(ended.err)}", repeat)
        if missing := _missing(command, root, bad.name.split(".")[0]):
            return Failure("others not done", ", ".join(missing), repeat)
        return None

    return Result("one bad file").add(workshop.map(trial, range(trials)))


def _missing(command: Prepared, root: Path, bad: str) -> list[str]:
    if command.name == "predict":
        return [name for name in command.differing(root) if not Path(name).name.startswith(bad)]
    report = json.loads((root / "report" / "report.json").read_text())
    done = {case["case"] for case in report["cases"]}
    return [name for name in ("s0", "s1", "s2", "s3") if name not in {*done, bad}]
