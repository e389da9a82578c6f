"""Kill commands at any of their file operations, and let any of those fail."""

import errno
from collections.abc import Sequence
from pathlib import Path

from .commands import COMMANDS, Prepared, prepare
from .outcomes import Failure, Result, Workshop, generator, last_line, litter
from .zygote import CONTENT, FAIL, HALF_THEN_KILL, KILL, NAME, REMOVAL, Ended, Fault, Zygote

_FAILING = {
    errno.ENOSPC: CONTENT | NAME,
    errno.EDQUOT: CONTENT | NAME,
    errno.EIO: CONTENT | NAME | REMOVAL,
    errno.EROFS: NAME | REMOVAL,
    errno.EACCES: NAME | REMOVAL,
}
"""Errors, and the operations that a system answers with them."""


def kill_points(workshop: Workshop, *, trials: int, seed: int, names: Sequence[str] = tuple(COMMANDS)) -> Result:
    """Kill at a random operation, run the same command again; its result equals an undisturbed one."""
    commands = prepare(workshop, list(names))
    items = [(commands[names[index % len(names)]], index) for index in range(trials)]

    def trial(zygote: Zygote, root: Path, item: tuple[Prepared, int]) -> Failure | None:
        prepared, index = item
        random = generator(seed, "kill", prepared.name, index)
        at = random.randint(1, sum(prepared.operations.values()))
        return _killed(zygote, root, prepared, Fault(at, action=random.choice((KILL, HALF_THEN_KILL))))

    return Result("kill points", notes=_notes(commands)).add(workshop.map(trial, items))


def _notes(commands: dict[str, Prepared]) -> dict[str, object]:
    return {
        "operations": {name: sum(prepared.operations.values()) for name, prepared in commands.items()},
        "written differently each time": sorted({file for prepared in commands.values() for file in prepared.volatile}),
    }


def _killed(zygote: Zygote, root: Path, prepared: Prepared, fault: Fault) -> Failure | None:
    prepared.begin(root)
    ended = zygote.run(*prepared.command.call, root=root, fault=fault)
    how = "half done" if fault.action == HALF_THEN_KILL else "not done"
    repeat = f"{prepared.name}: killed at operation {fault.at}, {ended.hit}, {how}"
    if ended.code not in (-9, 0):
        return Failure("not killed", f"code {ended.code}: {last_line(ended.err)}", repeat)
    if lost := prepared.lost(root):
        return Failure("earlier result lost", ", ".join(lost[:3]), repeat)
    return _again(zygote, root, prepared, repeat)


def _again(zygote: Zygote, root: Path, prepared: Prepared, repeat: str) -> Failure | None:
    """Run the command once more, undisturbed, unless it replaces nothing and its result is whole already."""
    if prepared.command.replaces_nothing and not prepared.differing(root):
        return None
    ended = zygote.run(*prepared.command.call, *prepared.command.again, root=root)
    if ended.code != 0:
        return Failure("cannot go on", f"code {ended.code}: {last_line(ended.err)}", repeat)
    if differing := prepared.differing(root):
        return Failure("result differs", ", ".join(differing[:3]), repeat)
    if left := litter(root):
        return Failure("litter", ", ".join(left[:3]), repeat)
    return None


def failing_writes(workshop: Workshop, *, trials: int, seed: int, names: Sequence[str] = tuple(COMMANDS)) -> Result:
    """Let a random operation fail, once or from then on: a documented code, one line, nothing lost."""
    commands = prepare(workshop, list(names))
    items = [(commands[names[index % len(names)]], index) for index in range(trials)]

    def trial(zygote: Zygote, root: Path, item: tuple[Prepared, int]) -> Failure | None:
        prepared, index = item
        random = generator(seed, "fail", prepared.name, index)
        error = random.choice(list(_FAILING))
        kinds = _FAILING[error]
        at = random.randint(1, sum(count for kind, count in prepared.operations.items() if kind & kinds))
        return _failed(zygote, root, prepared, Fault(at, kinds, FAIL, error, sticky=random.random() < 0.5))

    return Result("failing writes", notes=_notes(commands)).add(workshop.map(trial, items))


def _failed(zygote: Zygote, root: Path, prepared: Prepared, fault: Fault) -> Failure | None:
    prepared.begin(root)
    ended = zygote.run(*prepared.command.call, root=root, fault=fault)
    often = "from then on" if fault.sticky else "once"
    repeat = f"{prepared.name}: {errno.errorcode[fault.error]} {often} at operation {fault.at}, {ended.hit}"
    if fault.kinds != CONTENT | NAME | REMOVAL:
        repeat += f", counting kinds {fault.kinds}"
    if (kind := _misbehaved(ended, prepared)) is not None:
        return Failure(kind, f"code {ended.code}: {last_line(ended.err)}", repeat)
    if lost := prepared.lost(root):
        return Failure("earlier result lost", ", ".join(lost[:3]), repeat)
    if ended.code == 0 and (differing := prepared.differing(root)):
        return Failure("claims success", ", ".join(differing[:3]), repeat)
    is_removal = ended.hit.startswith(("unlink", "rmdir"))  # then it stays until the next run
    if not (fault.sticky or is_removal) and (left := litter(root)):
        return Failure("litter", ", ".join(left[:3]), repeat)
    return _again(zygote, root, prepared, repeat)


def _misbehaved(ended: Ended, prepared: Prepared) -> str | None:
    if ended.code is None:
        return "hang"
    if ended.code < 0:
        return "crash"
    if "Traceback" in ended.err:
        return "traceback"
    if ended.orphans:
        return "orphans"
    if ended.code == 70:
        return "unexpected error"
    if ended.code not in ((0, 1, 2) if prepared.command.several else (0, 2)):
        return "wrong code"
    if ended.code and sum(line.startswith("error: ") for line in ended.err.splitlines()) != 1:
        return "not one message"
    return None
