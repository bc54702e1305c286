"""The guard leaves nothing behind, however its supervisor ends. Real processes, no Ray."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from deployments.processes import ProcessId, descendants, end, identify
from deployments.run_record import AlreadyRunning, RunFolder, RunRecord

# A supervisor with a child that ignores SIGTERM and a grandchild in a session of its own whose
# parent has ended: what Ray's agents look like.
GUARDED = """
import json, os, signal, subprocess, sys, time
from deployments.guard import guarded

CHILD = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
ORPHAN = (
    "import subprocess, sys;"
    "print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'],"
    " start_new_session=True, stdout=subprocess.DEVNULL).pid)"
)

class Stop(BaseException):
    pass

def work():
    def stop(signum, frame):
        raise Stop
    signal.signal(signal.SIGTERM, stop)
    child = subprocess.Popen([sys.executable, "-c", CHILD])
    orphan = int(subprocess.run([sys.executable, "-c", ORPHAN], stdout=subprocess.PIPE).stdout)
    with open(sys.argv[1], "w") as file:
        json.dump({"supervisor": os.getpid(), "child": child.pid, "orphan": orphan}, file)
    try:
        if sys.argv[2] == "fail":
            return 7
        while True:
            time.sleep(0.05)
    except Stop:
        if sys.argv[2] == "hang":
            time.sleep(600)
        return 0

sys.exit(guarded(work, stop_bound_s=1, sweep_grace_s=0.3))
"""


def wait_until(condition: Callable[[], bool], within_s: float = 10.0) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return condition()


class Guarded:
    def __init__(self, folder: Path, how: str, **options: object) -> None:
        script, self._pids = folder / "guarded.py", folder / "pids.json"
        script.write_text(GUARDED)
        self.process = subprocess.Popen(
            [sys.executable, str(script), str(self._pids), how],
            cwd=Path(__file__).resolve().parents[2],
            env={**os.environ, "PYTHONPATH": "."},
            stdout=subprocess.DEVNULL,
            **options,  # type: ignore[call-overload]
        )
        assert wait_until(lambda: self._pids.exists() and self._pids.read_text().endswith("}"))
        pids = json.loads(self._pids.read_text())
        self.supervisor = pids["supervisor"]
        found = [identify(pid) for pid in pids.values()]
        self.below = [process for process in found if process is not None]

    def all_gone(self) -> bool:
        return wait_until(lambda: not any(process.alive for process in self.below))


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stop_signal_ends_everything(tmp_path: Path, signum: signal.Signals) -> None:
    # The suite itself may run under nohup, where SIGHUP comes in ignored, and then stays so.
    default = {"preexec_fn": lambda: signal.signal(signum, signal.SIG_DFL)}
    run = Guarded(tmp_path, "wait", **default)
    assert len(run.below) == 3
    run.process.send_signal(signum)
    assert run.process.wait(10) == 0
    assert run.all_gone()


def test_a_hang_up_that_came_in_ignored_stays_ignored(tmp_path: Path) -> None:
    ignore = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)}
    run = Guarded(tmp_path, "wait", **ignore)
    run.process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert all(process.alive for process in run.below)
    run.process.send_signal(signal.SIGTERM)
    assert run.process.wait(10) == 0
    assert run.all_gone()


def test_sigint_stops_also_where_a_script_had_it_ignored(tmp_path: Path) -> None:
    ignore = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)}
    run = Guarded(tmp_path, "wait", **ignore)
    run.process.send_signal(signal.SIGINT)
    assert run.process.wait(10) == 0
    assert run.all_gone()


def test_a_killed_supervisor_leaves_nothing(tmp_path: Path) -> None:
    run = Guarded(tmp_path, "wait")
    os.kill(run.supervisor, signal.SIGKILL)
    assert run.process.wait(10) == 128 + signal.SIGKILL
    assert run.all_gone()


def test_a_killed_guard_has_the_supervisor_stop(tmp_path: Path) -> None:
    run = Guarded(tmp_path, "wait")
    supervisor = run.below[0]
    run.process.kill()
    run.process.wait(10)
    assert wait_until(lambda: not supervisor.alive)
    end(run.below, 0.1)


def test_a_hanging_supervisor_is_killed_within_the_bound(tmp_path: Path) -> None:
    run = Guarded(tmp_path, "hang")
    start_s = time.monotonic()
    run.process.send_signal(signal.SIGTERM)
    assert run.process.wait(10) == 128 + signal.SIGKILL
    assert 0.9 < time.monotonic() - start_s < 8
    assert run.all_gone()


def test_the_status_of_the_supervisor_is_passed_on(tmp_path: Path) -> None:
    run = Guarded(tmp_path, "fail")
    assert run.process.wait(10) == 7
    assert run.all_gone()


def test_an_id_given_to_another_process_is_not_that_process() -> None:
    me = identify(os.getpid())
    assert me is not None
    assert me.alive
    earlier = ProcessId(me.pid, me.start_ticks - 1)
    assert not earlier.alive
    end([earlier], 0.0)  # Would end this very test.
    assert identify(2**22 + 1) is None


def test_descendants_are_found() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        assert child.pid in [process.pid for process in descendants(os.getpid())]
        child.communicate(b"\n")
    assert child.pid not in [process.pid for process in descendants(os.getpid())]


def record(*processes: ProcessId) -> RunRecord:
    me = identify(os.getpid())
    assert me is not None
    return RunRecord(me, "http://127.0.0.1:8000", 1_700_000_000, processes)


def test_a_held_folder_names_who_holds_it(tmp_path: Path) -> None:
    first, second = RunFolder(tmp_path), RunFolder(tmp_path)
    assert first.acquire() == []
    first.write(record())
    with pytest.raises(AlreadyRunning) as refused:
        second.acquire()
    assert refused.value.record == record()
    first.clear()
    assert second.acquire() == []
    assert second.read() is None
    second.clear()


def test_leftovers_of_an_earlier_start_are_ended_and_strangers_are_not(tmp_path: Path) -> None:
    with (
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as left,
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as stranger,
    ):
        mine, other = identify(left.pid), identify(stranger.pid)
        assert mine is not None
        assert other is not None
        crashed = RunFolder(tmp_path)
        crashed.acquire()
        reused = ProcessId(other.pid, other.start_ticks - 1)
        crashed.write(record(mine, reused))
        crashed._lock.close()  # type: ignore[union-attr]
        next_start = RunFolder(tmp_path)
        assert next_start.acquire() == [mine]
        next_start.clear()
        assert left.wait(5) == -signal.SIGTERM
        assert stranger.poll() is None
        stranger.kill()


def test_a_torn_record_is_no_obstacle(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.acquire()
    (tmp_path / "run" / "serve.json").write_text('{"guard": {"pid"')
    assert folder.read() is None
    folder.clear()
    assert folder.acquire() == []
    folder.clear()
