"""Reading, computing and writing at the same time."""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from tqdm import tqdm

ItemT = TypeVar("ItemT")
ReadT = TypeVar("ReadT")


def overlap(
    items: Sequence[ItemT],
    read: Callable[[ItemT], ReadT],
    compute: Callable[[ItemT, Callable[[], ReadT]], Callable[[], None] | None],
    *,
    progress: tqdm,
) -> None:
    """Compute item after item; meanwhile one thread reads the next and another writes what came of the one before.

    At most three items are in memory. Whatever ends this, the thread that writes finishes its files first.

    Args:
        items: what there is to do, in this order.
        read: what an item needs; runs in a thread.
        compute: is given an item and a function that returns what was read of it, or raises what reading raised;
            returns what is left to do, which runs in another thread, or None.
        progress: bar that shows the items done.

    Raises:
        Exception: whatever `compute`, or what it left to do, does not handle itself.
    """
    with progress, _reading_ahead(items, read) as readings, ThreadPoolExecutor(1) as writer:
        writing: Future[None] | None = None
        for item, reading in readings:
            finish = compute(item, reading.result)
            if writing is not None:
                writing.result()
            writing = None if finish is None else writer.submit(finish)
            progress.update()
        if writing is not None:
            writing.result()


@contextlib.contextmanager
def _reading_ahead(
    items: Sequence[ItemT], read: Callable[[ItemT], ReadT]
) -> Iterator[Iterator[tuple[ItemT, Future[ReadT]]]]:
    """Each item in turn with what a thread reads of it; the one after is read while an item is in use."""
    reader = ThreadPoolExecutor(1)

    def in_turn() -> Iterator[tuple[ItemT, Future[ReadT]]]:
        begun: deque[tuple[ItemT, Future[ReadT]]] = deque()
        for item in items:
            begun.append((item, reader.submit(read, item)))
            if len(begun) > 1:
                yield begun.popleft()
        yield from begun

    try:
        yield in_turn()
    finally:
        reader.shutdown(cancel_futures=True)
