"""Reading, computing and writing at the same time."""

import threading

import pytest
from tqdm import tqdm

from samed_peft.prediction.pipeline import process_in_order


def run(items, read, compute):
    process_in_order(items, read, compute, progress=tqdm(total=len(items), disable=True))


def test_the_next_item_is_read_and_the_last_one_written_meanwhile():
    items = list(range(5))
    is_read, is_written = ([threading.Event() for _ in items] for _ in range(2))
    waited = []

    def read(item):
        is_read[item].set()
        return item * 10

    def compute(item, value):
        assert value() == item * 10
        waited.append(item == items[-1] or is_read[item + 1].wait(20))
        waited.append(item == 0 or is_written[item - 1].wait(20))
        return is_written[item].set

    run(items, read, compute)
    assert waited == [True] * 10
    assert all(event.is_set() for event in is_written)


@pytest.mark.parametrize("stage", ["read", "compute", "write"])
def test_an_error_ends_it_once_what_is_being_written_is_whole(stage):
    written, begun = [], threading.Event()

    def fail_at(found, item):
        if found == stage and item == 2:
            raise OSError("no space")

    def compute(item, value):
        fail_at("compute", value())

        def write():
            fail_at("write", item)
            begun.wait(0.05)
            written.append(item)

        return write

    def read(item):
        fail_at("read", item)
        return item

    with pytest.raises(OSError, match="no space"):
        run(range(6), read, compute)
    assert written == [0, 1]


def test_an_item_may_leave_nothing_to_write():
    computed = []
    run("abc", str.upper, lambda item, value: computed.append(item + value()))
    assert computed == ["aA", "bB", "cC"]
    run("", str.upper, lambda item, value: None)
