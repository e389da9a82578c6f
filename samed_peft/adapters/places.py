"""Recognise paths of this machine, and cut them to their last part before a text is published."""

import re
from collections.abc import Iterable
from typing import Any

from samed_peft.config import TINY_SAM, is_hub_id

_WORD = r"""[^\s|`"'<>()\[\]{},;]"""
_REST = rf"{_WORD}*(?:(?: (?![/\\~])(?:(?![:=/\\]){_WORD})+){{1,3}}[/\\]{_WORD}*)*"
"""To the end of a path: up to three words before a separator are taken for a part of it, to be safe."""
_PLACE = re.compile(
    rf"(?:file|smb|nfs|ssh|sftp|s3|gs)://{_REST}|[\w.+-]+@[\w.-]+:(?=[/~]){_REST}|"
    rf"(?<![\w./<~\\-])(?:~[\w.-]*/|\$\w+/|/(?=[\w.@$%+-])|(?<!:)//(?=[\w.-]+/)|[A-Za-z]:[\\/]|"
    rf"\\\\(?=[\w.-]+\\)){_REST}"
)
"""Absolute paths of any system in running text, but not fractions, units, web addresses and closing tags."""


def is_place(text: str) -> bool:
    """Whether a text begins like an absolute path of any system."""
    return re.match(r"~[\w.-]*/|/|\\\\|[A-Za-z]:[\\/]|file:", text) is not None


def last_part(path: str) -> str:
    """The name at the end of a path."""
    # Both separators: an adapter made on Windows may be published elsewhere.
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1] or path


def published_base(base: str) -> str:
    """A base as others may know it: the name of a Hub repository, or the last part of a path."""
    return base if base == TINY_SAM or is_hub_id(base) else last_part(base)


def without_place(value: Any) -> Any:
    """A JSON value in which each text that is an absolute path is cut to its last part, at any depth."""
    if isinstance(value, dict):
        return {key: without_place(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [without_place(entry) for entry in value]
    return last_part(value) if isinstance(value, str) and is_place(value) else value


def without_places(text: str, known: Iterable[str] = ()) -> str:
    """Running text with its absolute paths cut to their last part; those in `known` may have spaces in them."""
    for place in sorted(known, key=len, reverse=True):
        if len(place) > 3:  # not / and C:\
            text = re.sub(re.escape(place) + _REST, lambda found: last_part(found[0]), text)
    return _PLACE.sub(lambda found: last_part(found[0]), text)
