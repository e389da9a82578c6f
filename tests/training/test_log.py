"""TensorBoard's log of a run: read back, resumed, and on a disk that refuses to write."""

import contextlib
import re
import sys
import threading
import warnings

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from samed_peft.training.log import EventLog


def logged(folder):
    """Tag -> its (step, value) in the log, as TensorBoard reads it."""
    found = EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


@contextlib.contextmanager
def largest_file(size):
    """Let no file of this process grow beyond a number of bytes."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_values_are_in_the_file_when_they_are_written(tmp_path):
    threads = threading.active_count()
    log = EventLog(tmp_path / "logs", start=0)
    for step in (1, 2):
        log.write({"train/loss": step / 4, "train/rate": 0.5}, step=step)
        assert logged(tmp_path / "logs")["train/loss"][-1] == (step, step / 4)
    assert logged(tmp_path / "logs")["train/rate"] == [(1, 0.5), (2, 0.5)]
    assert threading.active_count() == threads


def test_a_resumed_run_replaces_the_steps_that_it_repeats(tmp_path):
    for start in (0, 2):
        log = EventLog(tmp_path, start=start)
        for step in (start + 1, start + 2, start + 3):
            log.write({"loss": float(start)}, step=step)
    assert logged(tmp_path) == {"loss": [(1, 0.0), (2, 0.0), (3, 2.0), (4, 2.0), (5, 2.0)]}


def test_other_processes_write_nothing(tmp_path):
    EventLog(tmp_path / "logs", start=0, enabled=False).write({"loss": 1.0}, step=1)
    assert not (tmp_path / "logs").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="no such limits")
def test_a_write_that_fails_is_one_warning_and_made_up_for(tmp_path):
    log = EventLog(tmp_path, start=0)
    log.write({"loss": 1.0}, step=1)
    (file,) = tmp_path.iterdir()
    with largest_file(file.stat().st_size + 9):  # a part of the next entry
        with pytest.warns(UserWarning, match=f"^{re.escape(str(file))}: File too large; .* while the training goes on"):
            log.write({"loss": 2.0}, step=2)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            log.write({"loss": 3.0}, step=3)
    log.write({"loss": 4.0}, step=4)
    assert logged(tmp_path) == {"loss": [(step, float(step)) for step in (1, 2, 3, 4)]}


def test_a_log_that_cannot_be_begun_is_a_warning(tmp_path):
    (tmp_path / "logs").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match=re.escape(f"{tmp_path / 'logs'}: File exists; ")):
        log = EventLog(tmp_path / "logs", start=0)
    (tmp_path / "logs").unlink()
    log.write({"loss": 1.0}, step=1)
    assert logged(tmp_path / "logs") == {"loss": [(1, 1.0)]}
