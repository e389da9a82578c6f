"""Windows of intensities: one, or two or three through which the same slice is seen."""

import argparse
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeAlias

from samed_peft.config.fields import Rule
from samed_peft.errors import InputError

Window: TypeAlias = tuple[float, float]
"""(low, high) clipped to and scaled to [0, 1]."""

Windows: TypeAlias = Window | tuple[Window, ...] | None
"""One window, two or three that fill the encoder's channels, or None for each scan's percentiles."""

CT_WINDOW_HU: Window = (-125.0, 275.0)
"""Hounsfield units that SAMed (arXiv 2304.13785) clips to before scaling to [0, 1]."""

CT_WINDOWS: Mapping[str, Window] = MappingProxyType(
    {
        "samed": CT_WINDOW_HU,
        "soft_tissue": (-160.0, 240.0),
        "mediastinum": (-125.0, 225.0),
        "liver": (-45.0, 105.0),
        "lung": (-1350.0, 150.0),
        "bone": (-500.0, 1300.0),
        "brain": (0.0, 80.0),
        "subdural": (-32.0, 182.0),
        "stroke": (20.0, 60.0),
    }
)
"""Windows in Hounsfield units by the names that radiologists give them."""

ENCODER_CHANNELS = 3
"""Channels of SAM's input."""


def _are_windows(window: tuple[Any, ...]) -> bool:
    kinds = {isinstance(value, tuple | list) for value in window}
    if kinds not in ({True}, {False}) or not 2 <= len(window) <= ENCODER_CHANNELS:
        return False
    pairs = window if kinds == {True} else [window]
    return all(len(pair) == 2 and -math.inf < pair[0] < pair[1] < math.inf for pair in pairs)


WINDOW_RULE: Rule = ("be (low, high) with low < high, or two or three such windows", _are_windows)
CHANNELS_RULE: Rule = (
    "be two or three different numbers from 0 on",
    lambda numbers: 2 <= len(set(numbers)) == len(numbers) <= ENCODER_CHANNELS and min(numbers) >= 0,
)


def windows_of(window: Windows | Sequence[Any]) -> tuple[Window, ...]:
    """The windows of a config's `window`: none, one, or several."""
    if window is None:
        return ()
    if len(window) == 2 and all(isinstance(value, int | float) for value in window):
        return ((float(window[0]), float(window[1])),)  # type: ignore[arg-type] # mypy does not narrow by items
    return tuple((float(low), float(high)) for low, high in window)  # type: ignore[misc]


def windows_text(window: Windows) -> str:
    """Windows for readers, such as "-160 to 240 and -500 to 1300"; empty for None."""
    texts = [f"{low:g} to {high:g}" for low, high in windows_of(window)]
    return texts[0] if len(texts) == 1 else ", ".join(texts[:-1]) + f" and {texts[-1]}" if texts else ""


def first_window(window: Windows) -> Window | None:
    """The only or the first window, through which pictures show scans."""
    windows = windows_of(window)
    return windows[0] if windows else None


def parse_windows(texts: Sequence[str]) -> tuple[Window, ...]:
    """Two or three windows, each a name of `CT_WINDOWS` or two numbers.

    Raises:
        InputError: a name is unknown, a number has no partner, or there are fewer than two windows or more than three.
    """
    found: list[Window] = []
    left = list(texts)
    while left:
        if left[0] in CT_WINDOWS:
            found.append(CT_WINDOWS[left.pop(0)])
            continue
        try:
            low, high = (float(text) for text in left[:2])
        except ValueError:
            raise InputError(
                f"expected names of windows ({', '.join(CT_WINDOWS)}) or pairs of numbers LOW HIGH as windows, found "
                f"{' '.join(left[:2])!r:.80}; give two or three, such as --windows soft_tissue lung -500 1300"
            ) from None
        found.append((low, high))
        del left[:2]
    if not 2 <= len(found) <= ENCODER_CHANNELS:
        raise InputError(
            f"expected two or three windows, one for each of the encoder's three channels, found {len(found)}; for one "
            "window give --window LOW HIGH"
        )
    return tuple(found)


class WindowsAction(argparse.Action):
    """Store `parse_windows` of an option's values."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, _: str | None = None
    ) -> None:
        """Parse, or end the program with one message."""
        try:
            vars(namespace)[self.dest] = parse_windows(values)
        except InputError as error:
            parser.error(str(error))
