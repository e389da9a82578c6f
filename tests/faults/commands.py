"""Commands that write, and what they start from."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import copy2, copytree

from .outcomes import Workshop, digests, remove
from .zygote import Fault, Zygote

TRAINING = (
    *("--base", "tiny-sam", "--image_size", "64", "--batch_size", "4", "--epochs", "2", "--stop_epoch", "2"),
    *("--warmup_steps", "2", "--learning_rate", "0.003", "--checkpoint_steps", "2"),
    *("--train_cases", "5", "6", "--test_cases", "1", "--validation_cases", "2", "--validate_epochs", "1"),
    *("--data_dir", "data", "--output_dir", "run"),
)
_TRAIN = ("recipe", "synapse.py", *TRAINING, "--num_workers", "0")
_PREDICT = ("samed", "predict", "--adapter", "adapter", "--input", "scans", "--output", "masks", "--overlay")
_EVALUATE = ("samed", "evaluate", "--predictions", "predictions", "--references", "references", "--images", "scans")
_CONVERT = ("samed", "convert", "--checkpoint", "samed.pth", "--base", "tiny-sam", "--image_size", "64")
_EXPORT = ("samed", "export", "--adapter", "adapter")


@dataclass(frozen=True)
class Command:
    """A command that writes.

    Attributes:
        call: function of `subjects` and its arguments.
        inputs: files and folders it reads.
        outputs: files and folders it writes.
        before: a command that was finished before, whose outputs it replaces or adds to.
        again: options that the same command needs to go on after it was killed.
        replaces_nothing: whether it is refused where its result lies already.
        several: whether some of its cases may fail while others are done, for which the exit code is 1.
    """

    call: tuple[str | int, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    before: tuple[str | int, ...] = ()
    again: tuple[str, ...] = ()
    replaces_nothing: bool = False
    several: bool = False


COMMANDS = {
    "train": Command(_TRAIN, ("data",), ("run",), again=("--resume",)),
    "train-finished": Command((*_TRAIN, "--resume"), ("data",), ("run",), before=_TRAIN),
    "predict": Command(_PREDICT, ("adapter", "scans"), ("masks",), several=True),
    "predict-again": Command((*_PREDICT, "--overwrite"), ("adapter", "scans"), ("masks",), _PREDICT, several=True),
    "evaluate": Command(
        (*_EVALUATE, "--output", "report"), ("predictions", "references", "scans"), ("report",), several=True
    ),
    "evaluate-again": Command(
        (*_EVALUATE, "--output", "report"),
        ("predictions", "references", "scans"),
        ("report",),
        before=(*_EVALUATE, "--tolerance_mm", "3", "--output", "report"),
        several=True,
    ),
    "convert": Command((*_CONVERT, "--class_names", "a,b", "--output", "new"), ("samed.pth",), ("new",)),
    "convert-again": Command(
        (*_CONVERT, "--class_names", "a,b", "--output", "new"),
        ("samed.pth",),
        ("new",),
        before=(*_CONVERT, "--class_names", "c,d", "--output", "new"),
    ),
    "convert-base": Command(
        ("samed", "convert", "--checkpoint", "tiny-sam", "--image_size", "64", "--output", "new"), (), ("new",)
    ),
    "export-samed": Command(
        (*_EXPORT, "--format", "samed", "--output", "new.pth"), ("adapter",), ("new.pth",), replaces_nothing=True
    ),
    "export-merged": Command((*_EXPORT, "--format", "merged", "--output", "new"), ("adapter",), ("new",)),
    "export-fused": Command((*_EXPORT, "--format", "peft-fused", "--output", "new"), ("adapter",), ("new",)),
    "save_adapter": Command(("write_adapter", "new", 1), (), ("new",)),
    "save_adapter-again": Command(("write_adapter", "new", 1), (), ("new",), before=("write_adapter", "new", 2)),
    "prepare-rows": Command(("prepare_rows", "data"), ("data",), ("rows.json",)),
    "phantom": Command(("phantom", "new", 1), (), ("new",)),
    "phantom-again": Command(("phantom", "new", 1), (), ("new",), before=("phantom", "new", 2)),
}


@dataclass(frozen=True)
class Prepared:
    """A command with its starting folder, and what an undisturbed run makes of it.

    Attributes:
        operations: file operations of an undisturbed run, by kind.
        old: digests of the outputs before; empty if there were none.
        new: digests of the outputs after.
        volatile: outputs that two undisturbed runs write differently, as times or machine-dependent figures.
    """

    name: str
    command: Command
    start: Path
    operations: dict[int, int]
    old: dict[str, str]
    new: dict[str, str]
    volatile: frozenset[str]

    def begin(self, root: Path) -> None:
        """Copy the starting folder."""
        copytree(self.start, root, symlinks=True)

    def results(self, root: Path) -> dict[str, str]:
        """Digests of the outputs, logs left out: each process writes its own."""
        return {name: value for name, value in digests(root, self.command.outputs).items() if "/logs/" not in name}

    def differing(self, root: Path) -> list[str]:
        """Outputs that differ from those of an undisturbed run."""
        found = self.results(root)
        return sorted(
            name
            for name in {*found, *self.new}
            if found.get(name) != self.new.get(name) and not (name in self.volatile and name in found)
        )

    def lost(self, root: Path) -> list[str]:
        """Earlier outputs that are neither as they were nor as they will be."""
        found = self.results(root)
        return sorted(
            name
            for name, old in self.old.items()
            if name not in self.volatile and found.get(name) not in (old, self.new.get(name))
        )


def prepare(workshop: Workshop, names: Sequence[str]) -> dict[str, Prepared]:
    """Make the starting folders of commands, and run each twice undisturbed."""

    def one(zygote: Zygote, root: Path, name: str) -> Prepared:
        command = COMMANDS[name]
        start = workshop.folder / f"start-{name}"
        start.mkdir()
        for item in command.inputs:
            source = workshop.inputs / item
            copytree(source, start / item) if source.is_dir() else copy2(source, start / item)
        if command.before:
            ended = zygote.run(*command.before, root=start)
            assert ended.code == 0, ended.err
        prepared = Prepared(name, command, start, {}, {}, {}, frozenset())
        old, runs = prepared.results(start), []
        for _ in range(2):
            remove(root)
            prepared.begin(root)
            ended = zygote.run(*command.call, root=root, fault=Fault())
            assert ended.code == 0, ended.err
            runs.append(prepared.results(root))
        volatile = {key for key in runs[0] if runs[0][key] != runs[1].get(key)}
        return Prepared(name, command, start, ended.operations, old, runs[1], frozenset(volatile))

    missing = [name for name in names if name not in workshop.prepared]
    workshop.prepared |= {prepared.name: prepared for prepared in workshop.map(one, missing)}
    return {name: workshop.prepared[name] for name in names}
