"""``guarded``: run the supervisor under a parent that leaves nothing behind.

Ray's agents outlive a killed driver for a minute, and a killed supervisor cannot clean up. So the
process that the user started does nothing but wait: it adopts every orphan below it, passes
signals on, and when the supervisor has ended, however that came about, ends all that is left. If
the guard itself is killed, the kernel sends the supervisor SIGTERM, which is an orderly stop.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType

from deployments.processes import adopt_orphans, descendants, die_with_parent, end

IMPATIENT_S = 2.0
"""A second stop signal this much later means at once. Sooner it is the same wish arriving twice,
from the terminal and from make."""


def stop_signals() -> list[signal.Signals]:
    """Signals that mean stop.

    SIGINT also where it came in ignored, as it does for `make serve &` in a script; SIGHUP not
    where it came in ignored, as under `nohup`.
    """
    hangup = [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGINT, signal.SIGTERM, *hangup]


def guarded(work: Callable[[], int], *, stop_bound_s: int, sweep_grace_s: float = 3.0) -> int:
    """Run ``work`` in a child process and return its exit status.

    Call it before anything starts a thread: it forks.

    Args:
        work: The supervisor; gets SIGTERM for each stop signal that reaches the guard.
        stop_bound_s: Seconds after a stop signal in which ``work`` must have ended, else it is
            killed.
        sweep_grace_s: Seconds that processes left behind have between SIGTERM and SIGKILL.
    """
    adopt_orphans()
    sys.stdout.flush()
    sys.stderr.flush()
    guard = os.getpid()
    child = os.fork()
    if child == 0:
        _work_and_exit(work, guard)
    signals = stop_signals()
    _pass_signals_on(child, signals, stop_bound_s)
    status = _wait(child)
    signal.alarm(0)
    for signum in signals:
        signal.signal(signum, signal.SIG_IGN)
    _sweep(sweep_grace_s)
    if status > 128 and status - 128 in (signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT):
        name = signal.Signals(status - 128).name
        with contextlib.suppress(OSError):
            print(f"error: ended by {name}; everything it had started is stopped", flush=True)
    return status


def _work_and_exit(work: Callable[[], int], guard: int) -> None:
    """The child: never returns."""
    code = 1
    try:
        # A group of its own, so that Ctrl-C reaches it once, through the guard.
        os.setpgid(0, 0)
        die_with_parent()
        if os.getppid() == guard:
            code = work()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _pass_signals_on(child: int, signals: list[signal.Signals], stop_bound_s: int) -> None:
    asked_s: list[float] = []

    def stop(signum: int, frame: FrameType | None) -> None:
        now_s = time.monotonic()
        if not asked_s:
            signal.alarm(stop_bound_s)
        elif now_s - asked_s[0] > IMPATIENT_S:
            signal.alarm(1)
        asked_s.append(now_s)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGTERM)

    def kill(signum: int, frame: FrameType | None) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)

    for signum in signals:
        signal.signal(signum, stop)
    signal.signal(signal.SIGALRM, kill)


def _wait(child: int) -> int:
    """Reap until the child has ended; adopted orphans are reaped on the way."""
    while True:
        pid, status = os.waitpid(-1, 0)
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


def _sweep(grace_s: float) -> None:
    """End what is left below us, deepest adopters included, until nothing is."""
    for _ in range(5):
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        left = descendants(os.getpid())
        if not left:
            return
        end(left, grace_s)
