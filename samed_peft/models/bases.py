"""How adapters name their SAM, and what to say where it cannot be fetched."""

import contextlib
import os
from collections.abc import Iterator

from samed_peft.config import TINY_SAM, is_hub_id
from samed_peft.errors import InputError


def recorded_base(base: str) -> str:
    """`base` as an adapter records it: files and folders by their absolute path, so that they are found from anywhere.

    What is not there, such as a Hub id, stays as it is.
    """
    # Not resolved: the target of a link, in a cache for instance, may have no telling name.
    return os.path.abspath(base) if base != TINY_SAM and os.path.exists(base) else base


@contextlib.contextmanager
def without_connection(base: str) -> Iterator[None]:
    """Within `with`, an error of fetching `base` from the Hub says what does without it.

    Raises:
        InputError: the one that was raised, with this advice where it applies.
    """
    try:
        yield
    except InputError as error:
        if not is_hub_id(base) or not isinstance(error.__cause__, OSError):
            raise
        raise InputError(
            f"{error}; without a connection, give as base a folder that Transformers saved or one of Meta's .pth files"
        ) from error
