"""Choose one channel, or two or three, of those that a `dataset.json` lists."""

from collections.abc import Sequence
from pathlib import Path

from samed_peft.config.windows import ENCODER_CHANNELS
from samed_peft.errors import InputError


def choose_channels(names: Sequence[str], wanted: Sequence[str], path: Path, *, take_all: bool) -> list[int]:
    """Numbers of the channels that users name, in their order.

    Args:
        names: of channels 0, 1 and so on.
        wanted: names or numbers; empty if users leave the choice out.
        path: of the `dataset.json`, for messages.
        take_all: of several channels, as many as fill the encoder's, take all if none is wanted.

    Raises:
        InputError: a channel is not listed or wanted twice, more are wanted than the encoder has, or several are listed
            and none is wanted.
    """
    if not wanted and (len(names) == 1 or (take_all and len(names) <= ENCODER_CHANNELS)):
        return list(range(len(names)))
    chosen = [number for text in wanted for number in _matching(names, text)]
    if len(chosen) != len(wanted) or not 1 <= len(set(chosen)) == len(chosen) <= ENCODER_CHANNELS:
        listed = ", ".join(f"{number} ({name:.80})" for number, name in enumerate(names[:20]))
        listed += f" and {len(names) - 20} more" if len(names) > 20 else ""
        found = " ".join(map(repr, wanted)) or "none chosen"
        raise InputError(
            f"expected one of the channels {listed} of {path}, or two or three different ones for the encoder's "
            f"channels, found {found:.200}; choose by name or number, with --channel on the command line"
        )
    return chosen


def _matching(names: Sequence[str], wanted: str) -> list[int]:
    """The number of the channel, or none if no channel or several are called so."""
    found = [number for number, name in enumerate(names) if wanted.lower() in (name.lower(), str(number))]
    return found if len(found) == 1 else []


def common_name(names: Sequence[str]) -> str:
    """The name of all chosen channels, such as CT of two phases; several names in a list, which no modality has."""
    return names[0] if len({name.lower() for name in names}) == 1 else ", ".join(names)
