"""Read, compute and write at the same time."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import TypeVar

from tqdm import tqdm

ItemT = TypeVar("ItemT")
ReadT = TypeVar("ReadT")


def process_in_order(
    items: Sequence[ItemT],
    read: Callable[[ItemT], ReadT],
    compute: Callable[[ItemT, Callable[[], ReadT]], Callable[[], None] | None],
    *,
    progress: tqdm,
    stopped: Callable[[], bool] = lambda: False,
) -> None:
    """Compute item after item, while one thread prefetches the next item and another writes the previous result.

    At most three items are in memory. However this ends, the writing thread finishes its files first.

    Args:
        items: items in the order of their processing.
        read: reads an item; runs in a thread.
        compute: takes an item and a function that returns the value of `read`, or raises its error; returns a function
            that writes the result, which runs in another thread, or None.
        progress: bar that counts finished items.
        stopped: asked before each item; no further item is computed once it is true.

    Raises:
        Exception: any error of `compute`, or of the function it returned.
    """
    with progress, ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        writing: Future[None] | None = None
        for item, reading in _prefetched(items, read, reader):
            if stopped():
                break
            write = compute(item, reading.result)
            if writing is not None:
                writing.result()
            writing = None if write is None else writer.submit(write)
            progress.update()
        if writing is not None:
            writing.result()


def _prefetched(
    items: Sequence[ItemT], read: Callable[[ItemT], ReadT], reader: Executor
) -> Iterator[tuple[ItemT, Future[ReadT]]]:
    """Yield each item with its reading in a thread; the next item is read while this one is in use."""
    begun: deque[tuple[ItemT, Future[ReadT]]] = deque()
    for item in items:
        begun.append((item, reader.submit(read, item)))
        if len(begun) > 1:
            yield begun.popleft()
    yield from begun
