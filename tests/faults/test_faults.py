"""A sample of each attack; `benchmarks/reliability.py` runs them in full."""

import shutil
import sys

import pytest

from faults import fuzz, hostile, signals, writes
from faults.commands import COMMANDS
from faults.outcomes import Workshop

LEFT_OUT = {
    "failing writes": (),
    "load_adapter beside a writer": False,
    "signals": (),
    "fuzzed": (),
    "flipped": (),
    "hostile": (),
}
"""Attacks that the package does not withstand yet. Empty this, and all are part of the tests."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="file operations are caught by LD_PRELOAD, on Linux alone"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="the library that catches them needs a C compiler, cc"),
]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    made = Workshop(tmp_path_factory.mktemp("faults"))
    yield made
    made.close()


def without(left_out, names):
    return tuple(name for name in names if name not in LEFT_OUT[left_out])


def check(result):
    assert result.tried
    assert not result.failures, result.text()


def test_a_command_killed_at_any_file_operation_goes_on(workshop):
    check(writes.kill_points(workshop, trials=34, seed=1))


def test_file_operations_that_fail_give_one_message_and_lose_nothing(workshop):
    names = without("failing writes", COMMANDS)
    check(writes.failing_writes(workshop, trials=2 * len(names), seed=1, names=names))


def test_a_signal_at_any_time_gives_one_line_and_its_code(workshop):
    check(signals.stopped(workshop, trials=12, seed=1, names=without("signals", signals.PROGRAMS)))


def test_readers_beside_a_replacing_writer(workshop):
    check(signals.readers(workshop, trials=200, seed=1, every=0 if LEFT_OUT["load_adapter beside a writer"] else 10))


def test_damaged_files_are_refused(workshop):
    kinds = without("fuzzed", fuzz.SCANS + fuzz.OWN)
    check(fuzz.fuzz(workshop, trials=30 * len(kinds), seed=1, kinds=kinds))


def test_a_flipped_byte_is_seen(workshop):
    kinds = without("flipped", fuzz.FLIPPED)
    if not kinds:
        pytest.skip("all are left out")
    check(fuzz.flipped_bytes(workshop, trials=20 * len(kinds), seed=1, kinds=kinds))


def test_hostile_artefacts_do_no_harm(workshop):
    check(hostile.hostile(workshop, trials=12, seed=1, kinds=without("hostile", hostile.CASES)))


def test_one_bad_file_leaves_the_others(workshop):
    check(hostile.one_bad_file(workshop, trials=6, seed=1))
