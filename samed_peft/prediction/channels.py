"""Tell from the names of scans which are channels of one case, as nnU-Net names them, and choose one channel."""

import re
from collections.abc import Sequence
from pathlib import Path

from samed_peft.errors import InputError
from samed_peft.io import is_picture

Named = Sequence[tuple[str, Path]]
"""Names of cases, and their files."""

CaseFiles = tuple[str, tuple[Path, ...]]
"""Name of a case, and its files."""

_NNUNET_NAME = re.compile(r"(.+)_(\d{4})")


def files_of_channel(named: Named, channel: int | None, channel_files: bool | None) -> Named | None:
    """Cases and files of one channel, whose ending such as _0000 is left out of the case's name.

    Args:
        named: names without suffix, and files.
        channel: None for the first.
        channel_files: `SamedConfig.channel_files`. If it is None, as of older adapters, the names decide: they are
            nnU-Net's if all of several end in numbers from _0000 on, unless they are those of frames.

    Returns:
        None if the names are not those of channels.

    Raises:
        InputError: no file has this channel; the only file is of another one, by its name.
    """
    if channel_files is False and channel is None:
        return None
    if not channel_files:
        is_list = len(named) > 1 and all(_NNUNET_NAME.fullmatch(case) for case, _ in named)
        return None if not is_list or (channel is None and _are_frames(named)) else _chosen(named, channel or 0)
    return _chosen(named, channel or 0) if len(named) > 1 else _only(*named[0], channel or 0)


def files_of_channels(named: Named, channels: Sequence[int], channel_files: bool | None) -> list[CaseFiles] | None:
    """Cases with a file for each of several channels that are seen together, in their order.

    A case whose other files lack gets their expected names, and fails alone when it is read. Names without a number of
    these channels are those of cases with one file.

    Args:
        named: names without suffix, and files.
        channels: two or more.
        channel_files: `SamedConfig.channel_files`. If it is not True, the names must speak for channels: a case has all
            of them, and if it is the only one, no other numbers.

    Returns:
        None if the names are not those of channels.
    """
    numbered: dict[tuple[str, str], dict[int, Path]] = {}
    plain: list[CaseFiles] = []
    for case, path in named:
        if (match := _NNUNET_NAME.fullmatch(case)) and (int(match[2]) in channels or channel_files is not True):
            numbered.setdefault((match[1], path.name[len(case) :]), {})[int(match[2])] = path
        elif match is None:
            plain.append((case, (path,)))
    found = {
        key: tuple(next(iter(files.values())).with_name(f"{key[0]}_{number:04d}{key[1]}") for number in channels)
        for key, files in numbered.items()
    }
    if len(named) == 1 and found:
        is_sure = all(path.exists() for path in next(iter(found.values())))
    else:
        is_sure = any(
            {*channels} <= files.keys() and (len(found) > 1 or len(files) == len(channels))
            for files in numbered.values()
        )
    if not found or not (channel_files or is_sure):
        return None
    return [*((case, files) for (case, _), files in found.items()), *plain]


def _are_frames(named: Named) -> bool:
    """Whether pictures are numbered as the frames of one sequence, frame_0000 and on, and not as channels of cases."""
    matches = [_NNUNET_NAME.fullmatch(case) for case, path in named if is_picture(path)]
    parts = [(match[1], int(match[2])) for match in matches if match]
    numbers = sorted(number for _, number in parts)
    one_sequence = len({stem for stem, _ in parts}) == 1 and numbers == list(range(len(numbers)))
    return len(parts) == len(named) and one_sequence


def _chosen(named: Named, channel: int) -> Named | None:
    """Cases and files of one channel, beside those whose names have no number.

    For a case that lacks the channel's file, its expected name is returned, and that case fails alone when it is read.
    """
    parts = [(match, path) for case, path in named if (match := _NNUNET_NAME.fullmatch(case))]
    found = sorted({int(match[2]) for match, _ in parts})
    if not found or found[0] != 0:  # nnU-Net counts from 0; these are numbers of cases
        return None
    if channel not in found:
        raise InputError(
            f"expected files ending in _{channel:04d} for channel {channel} in {named[0][1].parent}, found channels "
            f"{found[0]} to {found[-1]}; choose one of these"
        )
    wanted: dict[tuple[str, str], Path] = {}
    for match, path in parts:
        case, suffix = match[1], path.name[len(match[0]) :]
        wanted.setdefault((case, suffix), path.with_name(f"{case}_{channel:04d}{suffix}"))
    plain = [(case, path) for case, path in named if not _NNUNET_NAME.fullmatch(case)]
    return [*((case, path) for (case, _), path in wanted.items()), *plain]


def _only(name: str, path: Path, channel: int) -> Named | None:
    """The case of the only file, whose number may be that of a case if it is not the channel's."""
    match = _NNUNET_NAME.fullmatch(name)
    if match is None:
        return None
    case, number = match[1], int(match[2])
    if number == channel:
        return [(case, path)]
    right = path.with_name(f"{case}_{channel:04d}{path.name[len(name) :]}")
    if number == 0 or right.exists():
        raise InputError(
            f"expected a file of channel {channel}, which the adapter segments, found {path} of channel {number} by "
            f"its name; give {right.name}, or --channel {number} to segment this one all the same"
        )
    return None
