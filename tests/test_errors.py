"""One message and an exit code for whatever ends a program."""

import errno
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors import SafetensorError
from tqdm import tqdm

from samed_peft.errors import (
    InputError,
    InterruptedBySignalError,
    NonFiniteLossError,
    RunInterruptedError,
    SomeCasesFailedError,
    StopSignal,
    exit_on_error,
    exit_resumable,
    printable,
)
from samed_peft.io import atomic_file


def end(raising, capsys, decorate=exit_on_error):
    """Exit code and message of a program whose `main` calls `raising`."""
    with pytest.raises(SystemExit) as stopped:
        decorate(raising)()
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    return stopped.value.code, message.removeprefix("error: ").rstrip()


def raises(error, cause=None):
    def main():
        raise error from cause

    return main


@pytest.mark.parametrize(
    ("error", "code"),
    [(SomeCasesFailedError, 1), (InputError, 2), (NonFiniteLossError, 3), (RunInterruptedError, 75)],
)
def test_exit_codes(error, code, capsys):
    assert end(raises(error("what happened")), capsys) == (code, "what happened")


NO_SPACE = OSError(errno.ENOSPC, "No space left on device", "/disk/mask.nii.gz")


@pytest.mark.parametrize(
    "error",
    [
        NO_SPACE,
        RuntimeError("An error occurred while generating the dataset"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_named_with_a_remedy(error, capsys):
    cause = NO_SPACE if isinstance(error, RuntimeError) else None
    code, message = end(raises(error, cause), capsys)
    assert code == 2
    assert "No space left on device; free space there" in message
    assert "Results that were finished before are whole" in message
    assert ("/disk/mask.nii.gz" in message) == (not isinstance(error, SafetensorError))


def test_a_write_that_fails_names_the_target_and_not_its_temporary_name(tmp_path, capsys):
    def main():
        with atomic_file(tmp_path / "weights.safetensors"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    code, message = end(main, capsys)
    assert code == 2
    assert message.startswith(
        f"{tmp_path / 'weights.safetensors'}: Input/output error; the disk or its connection fails"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB")])
def test_memory_that_runs_out(error, capsys):
    code, message = end(raises(error), capsys)
    assert code == 2
    assert message.startswith("not enough memory")


def test_an_unforeseen_error_leaves_its_trace_in_a_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code, message = end(lambda: {}["absent"], capsys)
    assert code == 70
    assert message.startswith("unexpected KeyError: 'absent'; please report this fault of samed_peft")
    (trace,) = tmp_path.iterdir()
    assert str(trace) in message
    assert 'lambda: {}["absent"]' in trace.read_text(encoding="utf-8")


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("decorate", "code"), [(exit_on_error, None), (exit_resumable, 75)])
def test_a_signal_ends_a_program_with_one_line(sent, decorate, code, capsys):
    before = signal.getsignal(sent)
    code_found, message = end(lambda: [os.kill(os.getpid(), sent), time.sleep(10)], capsys, decorate)
    assert code_found == (code or 128 + sent)
    assert message.startswith(f"stopped by {sent.name}")
    assert signal.getsignal(sent) == before


@pytest.mark.parametrize("error", [RuntimeError("DataLoader worker (pid 7) exited"), InputError("it is damaged")])
def test_an_error_of_a_library_that_a_signal_interrupts_is_that_signal(capsys, error):
    def main():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        except KeyboardInterrupt:
            raise error from None

    assert end(main, capsys)[0] == 128 + signal.SIGTERM


def test_a_program_that_does_not_end_is_ended_with_a_message():
    code = (
        "import os, signal, time; from samed_peft.errors import exit_on_error, signals; signals._LONGEST_END_S = 0.2\n"
        "@exit_on_error\n"
        "def main():\n"
        "    try: os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)\n"
        "    finally: time.sleep(9)\n"
        "main()"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=False)
    assert ended.returncode == 143
    assert ended.stderr.strip().startswith("error: stopped by SIGTERM while libraries waited")


def test_what_was_done_before_a_signal_is_said(capsys):
    code, message = end(raises(InterruptedBySignalError("3 masks written", signal.SIGINT)), capsys)
    assert (code, message) == (130, "3 masks written")


def test_a_signal_is_noted_and_a_later_one_interrupts(monkeypatch):
    with StopSignal() as stop:
        for sent in (signal.SIGTERM, signal.SIGINT):  # at once, as a launcher passes on what the group got already
            os.kill(os.getpid(), sent)
        assert stop.received == signal.SIGTERM
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + 5)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_program_that_says_its_last_word_is_not_interrupted():
    with StopSignal(raises=True) as stop:
        stop.note_only()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == signal.SIGINT


def test_the_message_has_a_line_of_its_own_below_a_progress_bar_that_is_left_open(capsys):
    with tqdm(total=2, desc="loading") as bar:

        def main():
            bar.update()
            os.kill(os.getpid(), signal.SIGTERM)

        with pytest.raises(SystemExit, match="143"):
            exit_on_error(main)()
        lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    assert sum(line.startswith("error: stopped by SIGTERM") for line in lines) == 1


def test_the_first_signal_is_passed_on():
    told = []
    with StopSignal(on_first=lambda: told.append(stop.received)) as stop:
        for sent in (signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), sent)
    assert told == [signal.SIGTERM]


def test_a_signal_after_the_results_are_whole_changes_nothing(capsys):
    def main():
        with StopSignal():
            StopSignal.results_are_whole()
        os.kill(os.getpid(), signal.SIGTERM)
        print("done")

    exit_on_error(main)()
    assert capsys.readouterr().out == "done\n"


def test_an_error_after_a_signal_was_noted_is_that_signal(capsys):
    def main():
        with StopSignal():
            os.kill(os.getpid(), signal.SIGTERM)
            raise RuntimeError("a worker has died")

    assert end(main, capsys)[0] == 143


NEW_PROCESS = """
import os, signal, sys, threading, time

def early():  # in the new process, whose signals are still blocked
    if sys.argv[1] == "another process":
        kill = os.posix_spawn("/bin/kill", ["kill", "-TERM", str(os.getpid())], {})
        os.waitpid(kill, 0)
    time.sleep(0.2)

os.register_at_fork(after_in_child=early)
from samed_peft.errors import StopSignal

def fork():
    global pid
    pid = os.fork()
    if pid == 0:
        time.sleep(0.3)
        os._exit(7)

with StopSignal():
    if sys.argv[1] == "nobody":
        thread = threading.Thread(target=fork)
        thread.start()
        thread.join()
    else:
        fork()
    if sys.argv[1] == "parent":
        os.kill(pid, signal.SIGTERM)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="signals at a parent's death are Linux's")
@pytest.mark.parametrize(("sender", "code"), [("nobody", 7), ("another process", 7), ("parent", -signal.SIGTERM)])
def test_a_new_process_ends_when_its_parent_tells_it_to_and_not_with_a_group_or_thread(sender, code):
    """A pool's worker that dies with its lock hangs the pool."""
    ended = subprocess.run(
        [sys.executable, "-c", NEW_PROCESS, sender], capture_output=True, encoding="utf-8", check=True
    )
    assert ended.stdout == f"{code}\n", ended.stderr


ENDS = """
import atexit, os, signal, sys, time
from samed_peft.errors import exit_on_error

atexit.register(lambda: [time.sleep(0.1) for _ in range(200)])
atexit.register(print, "ends", flush=True)

@exit_on_error
def main():
    if sys.argv[1] == "interrupted":
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(20)

main()
"""


@pytest.mark.parametrize(("how", "code"), [("interrupted", 143), ("done", 0)])
def test_a_signal_to_a_program_that_ends_changes_nothing(how, code):
    process = subprocess.Popen(
        [sys.executable, "-c", ENDS, how], stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8"
    )
    assert process.stdout.readline() == "ends\n"
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=10)
    assert process.returncode == code
    assert stderr.count("\n") == stderr.count("error: stopped by SIGTERM") == (code != 0)


GLOO = "[/torch/third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:42411. This is"


@pytest.mark.parametrize(("decorate", "code"), [(exit_on_error, 1), (exit_resumable, 75)])
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError(GLOO), "closed by peer"),
        (torch.distributed.DistNetworkError("Broken pipe"), "broken pipe"),
        (torch.distributed.DistBackendError("NCCL error in: x.cpp:1, remote process exited"), "remote process exited"),
    ],
)
def test_a_process_that_lost_another_one_ends_with_one_line(error, reason, decorate, code, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    found, message = end(raises(error), capsys, decorate)
    assert found == code
    assert message.startswith(f"lost the connection to another process of this launch ({reason}); ")
    assert ("--resume goes on" in message) == (decorate is exit_resumable)


TWO_PROCESSES = """
import os, signal, sys
import torch
from samed_peft.errors import exit_resumable

@exit_resumable
def main():
    place, rank = f"file://{sys.argv[1]}", int(sys.argv[2])
    torch.distributed.init_process_group("gloo", init_method=place, rank=rank, world_size=2)
    torch.distributed.barrier()
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    torch.distributed.all_reduce(torch.zeros(3))

main()
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_the_process_that_outlives_another_says_so(tmp_path):
    command = [sys.executable, "-c", TWO_PROCESSES, tmp_path / "store"]
    pipes = {"stderr": subprocess.PIPE, "encoding": "utf-8"}
    processes = [
        subprocess.Popen([*command, rank], env=os.environ | {"RANK": rank, "WORLD_SIZE": "2"}, **pipes) for rank in "01"
    ]
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [-signal.SIGKILL, 75], errors
    assert errors[1].startswith("error: lost the connection to another process of this launch (")
    assert errors[1].count("\n") == 1


def test_other_errors_between_processes_are_faults(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for error in (torch.distributed.DistBackendError("NCCL error: invalid usage"), RuntimeError("closed by peer")):
        assert end(raises(error), capsys)[0] == 70


FORKS = """
import os, signal, sys, time
from samed_peft.errors import exit_on_error

@exit_on_error
def main():
    child = os.fork()
    if child == 0:
        time.sleep(60)
    print(child, flush=True)
    time.sleep(60)

main()
"""


def is_running(process):
    try:
        with open(f"/proc/{process}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and asks Linux to end children")
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
def test_forked_workers_miss_signals_to_the_group_but_end_with_their_process(sent):
    process = subprocess.Popen(
        [sys.executable, "-c", FORKS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    child = int(process.stdout.readline())
    time.sleep(0.2)
    assert os.getpgid(child) != os.getpgid(process.pid)
    os.killpg(process.pid, sent)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == (143 if sent == signal.SIGTERM else -9)
    assert b"Traceback" not in stderr
    deadline = time.monotonic() + 10
    while is_running(child):
        assert time.monotonic() < deadline
        time.sleep(0.05)


INTERRUPTED = """
import multiprocessing, os, signal, sys, threading, time
from samed_peft.errors import exit_on_error

def stop():
    os.kill(os.getpid(), signal.SIGTERM)

class StopsWhenItIsDeleted:
    def __del__(self):
        stop()

def in_a_destructor():
    StopsWhenItIsDeleted()

def before_a_fork():
    os.register_at_fork(before=stop)
    os.fork()

def after_a_fork():
    os.register_at_fork(after_in_parent=stop)
    os.fork()

def with_a_process_that_would_be_joined():
    multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,)).start()
    stop()

def with_an_open_bar():
    from tqdm import tqdm
    bar = tqdm(range(2))
    stop()

@exit_on_error
def main():
    {how}()
    time.sleep(60)

main()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
@pytest.mark.parametrize(
    "how",
    [
        "in_a_destructor",
        "before_a_fork",
        "after_a_fork",
        "with_a_process_that_would_be_joined",
        "with_an_open_bar",
    ],
)
def test_a_signal_counts_wherever_it_arrives(how):
    command = [sys.executable, "-c", INTERRUPTED.replace("{how}", how)]
    ended = subprocess.run(command, capture_output=True, encoding="utf-8", check=False, timeout=10)
    assert ended.returncode == 143, ended.stderr
    lines = [line for line in ended.stderr.replace("\r", "\n").splitlines() if line and "it/s" not in line]
    assert lines == ["error: stopped by SIGTERM; files that were finished are whole, the others are not there"]


FORKS_AT_ITS_END = """
import atexit, os, signal, sys, time
from samed_peft.errors import exit_on_error

def fork():
    child = os.fork()
    if child == 0:
        time.sleep(60)
    print(child, flush=True)

atexit.register(fork)

@exit_on_error
def main():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)

main()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and asks Linux to end children")
def test_what_an_interrupted_program_forks_at_its_end_ends_with_it():
    ended = subprocess.run([sys.executable, "-c", FORKS_AT_ITS_END], stdout=subprocess.PIPE, check=False, timeout=70)
    assert ended.returncode == 143
    deadline = time.monotonic() + 10
    while is_running(int(ended.stdout)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


PRINTS = """
from samed_peft.errors import exit_on_error

@exit_on_error
def main():
    for line in range(100_000):
        print(line)

main()
"""


def test_a_reader_that_has_seen_enough_gets_no_traceback():
    command = f"{sys.executable} -c '{PRINTS}' | head -1"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, check=False, timeout=60)
    assert (ended.stdout, ended.stderr) == (b"0\n", b"")


WARNS = r"""
import warnings
from samed_peft.errors import exit_on_error

before = warnings.formatwarning
exit_on_error(lambda: warnings.warn("a\x1b[2J\u202ename"))()
assert warnings.formatwarning is before
"""


def test_warnings_of_a_program_reach_terminals_as_text():
    ended = subprocess.run([sys.executable, "-c", WARNS], capture_output=True, encoding="utf-8", check=True, timeout=60)
    assert r"warning: a\x1b[2J\u202ename" in ended.stderr
    assert "\x1b" not in ended.stderr


def test_control_characters_reach_no_terminal(capsys):
    text = "a\x1b[2J\x9b1m\u202ename\r\x07"
    assert printable(text) == r"a\x1b[2J\x9b1m\u202ename\r\x07"
    assert printable("Größe\t1 µm\n") == "Größe\t1 µm\n"
    assert end(raises(InputError(text)), capsys) == (2, printable(text))
