"""``gatehouse serve``: preflight, checkpoints, identity provider, Ray, engines; and back again.

Runs below ``deployments.guard``. Every step is announced with its time; what cannot work is said
in one line with the remedy; a stop signal at any moment ends all that was started.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

from deployments.capacity import LOCAL_FILE, cluster_groups, needs, shortfalls
from deployments.dev_process import DevIdentityProvider, IssuerError, answers
from deployments.guard import stop_signals
from deployments.local_cluster import ClusterError, LocalCluster
from deployments.machine import LocalMachine, Machine, raise_file_limit
from deployments.preflight import Check, check_machine, check_port, failures
from deployments.processes import descendants, identify
from deployments.run_record import AlreadyRunning, RunFolder, RunRecord
from deployments.serve_file import ServeFile
from deployments.settings import Settings
from deployments.steps import Step, Steps

SERVE_STOP_S = 20.0
"""Time that running requests have when the service stops."""
STOP_BOUND_S = 45
"""Time in which a stop is over; the guard kills what is left then."""
POLL_S = 0.5
Builder = Callable[[ServeFile], Any]


class StartError(Exception):
    """Starting cannot go on: what is wrong, and what to do."""

    def __init__(self, message: str, remedy: str) -> None:
        super().__init__(message, remedy)
        self.message = message
        self.remedy = remedy


class MachineUnfit(Exception):
    """Checks of the machine have failed; carries them."""

    def __init__(self, checks: list[Check]) -> None:
        super().__init__(checks)
        self.checks = checks


class StopRequested(BaseException):
    """A stop signal arrived; like ``KeyboardInterrupt`` not an error."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to start."""

    file: ServeFile
    config_path: Path
    settings: Settings
    issuer: str | None
    """URL of the development identity provider to start, or ``None``."""
    ready_timeout_s: float
    announcement: Callable[[Plan, Path], str]
    """Text to print when ready; gets the plan and the folder of logs."""


def build_application(file: ServeFile) -> Any:
    """The real application."""
    from deployments.app import build_app

    return build_app(file.app)


@dataclass
class Supervisor:
    """Starts everything, watches it, stops everything."""

    plan: Plan
    steps: Steps
    builder: Builder = build_application
    machine: Machine = field(default_factory=LocalMachine)
    cluster: LocalCluster = field(default_factory=LocalCluster)
    ready: bool = False
    _issuer: DevIdentityProvider | None = None
    _folder: RunFolder | None = None
    _guard_pid: int = field(default_factory=os.getppid)
    _signals: list[signal.Signals] = field(default_factory=stop_signals)

    def run(self) -> int:
        """Run until asked to stop.

        Returns:
            0 after an orderly stop of a ready service, 130 if stopped before that, 1 on failure.
        """
        code = 1
        try:
            self._arm()
            self._start()
            self._watch()
        except StopRequested:
            code = 0 if self.ready else 130
        except MachineUnfit as unfit:
            for check in unfit.checks:
                self._fail(f"{check.name}: {check.detail}", check.remedy)
        except StartError as error:
            self._fail(error.message, error.remedy)
        except ClusterError as error:
            self._fail(str(error), f"logs: {self.plan.settings.state / 'logs'}")
        finally:
            self._stop()
        return code

    def _arm(self) -> None:
        """Turn the first stop signal into ``StopRequested``."""

        def stop(signum: int, frame: FrameType | None) -> None:
            for each in self._signals:
                signal.signal(each, signal.SIG_IGN)
            raise StopRequested

        for signum in self._signals:
            signal.signal(signum, stop)

    def _start(self) -> None:
        plan, steps = self.plan, self.steps
        self._take_over()
        with steps.step("check this machine"):
            self._check()
        if folder := plan.file.checkpoint_folder(plan.settings.config_root):
            with steps.step("prepare checkpoints") as step:
                self._prepare_checkpoints(folder, step)
        if plan.issuer:
            with steps.step(f"start the development identity provider ({plan.issuer})"):
                self._issuer = DevIdentityProvider(plan.issuer, plan.settings.state)
                self._start_issuer(self._issuer)
        with steps.step("start Ray"):
            raise_file_limit()
            self._export_roots()
            self.cluster.start()
            self._arm()  # Ray installs handlers of its own.
            self._record()
            self._check_gpus()
        with steps.step("start Serve"):
            self.cluster.deploy(plan.file, self.builder(plan.file))
        with steps.step("load engines") as step:
            self._wait_until_ready(step)
        self._record()
        self.ready = True
        steps.say(plan.announcement(plan, self.cluster.log_folder))

    def _take_over(self) -> None:
        folder = RunFolder(self.plan.settings.state)
        try:
            left = folder.acquire()
        except AlreadyRunning as running:
            record = running.record
            if record is None:
                raise StartError(
                    "another `gatehouse serve` is starting with the same state folder",
                    "wait for it, or set GATEHOUSE_STATE to another folder",
                ) from None
            raise StartError(
                f"already running at {record.url} (process {record.guard.pid})",
                f"stop it (`kill {record.guard.pid}`), or set GATEHOUSE_STATE to another folder",
            ) from None
        except OSError as error:
            raise StartError(
                f"the state folder cannot be written: {error.strerror}",
                "set GATEHOUSE_STATE to a folder of yours",
            ) from None
        self._folder = folder
        if left:
            self.steps.say(f"- ended {len(left)} process(es) that an earlier start left behind")

    def _check(self) -> None:
        plan = self.plan
        checks = check_machine(plan.file.app, self.machine, plan.settings.state)
        http = plan.file.http_options
        remedy = f"choose another port: `make serve PORT={http.port + 1}`"
        checks.append(check_port("port", http.host, http.port, self.machine, remedy))
        if plan.issuer:
            where = urlsplit(plan.issuer)
            remedy = "change the issuer's port in the identity file"
            checks.append(
                check_port(
                    "identity provider's port",
                    where.hostname or "127.0.0.1",
                    where.port or 80,
                    self.machine,
                    remedy,
                )
            )
        if failed := failures(checks):
            raise MachineUnfit(failed)

    def _prepare_checkpoints(self, folder: Path, step: Step) -> None:
        from deployments.checkpoints import build_apart

        def report(line: str) -> None:
            step.detail = line

        try:
            build_apart(folder, report)
        except OSError as error:
            reason = error.strerror or str(error)
            raise StartError(
                f"the local checkpoints cannot be built: {reason}",
                f"remove {folder} and start again",
            ) from error

    def _start_issuer(self, issuer: DevIdentityProvider) -> None:
        try:
            issuer.start()
        except IssuerError as error:
            raise StartError(
                f"the development identity provider: {error}", "that log says why"
            ) from None

    def _export_roots(self) -> None:
        """Have every process of the cluster see the same roots, wherever it runs."""
        os.environ["GATEHOUSE_CONFIG_ROOT"] = str(self.plan.settings.config_root)
        os.environ["GATEHOUSE_STATE"] = str(self.plan.settings.state)

    def _check_gpus(self) -> None:
        wanted = needs(self.plan.file.app)
        if wanted and (lines := shortfalls(wanted, cluster_groups())):
            raise StartError(
                f"neither the cluster nor an autoscaler has the GPUs: {'; '.join(lines)}",
                f"without such GPUs use {LOCAL_FILE} (`make serve`)",
            )

    def _wait_until_ready(self, step: Step) -> None:
        plan = self.plan
        name = plan.file.application.name
        deadline = time.monotonic() + plan.ready_timeout_s
        while True:
            status = self.cluster.status(name)
            logs = f"logs: {self.cluster.log_folder}"
            if status.failed:
                raise StartError(f"an engine or the gateway failed: {status.message}", logs)
            if not self.cluster.alive:
                raise StartError("Ray ended while the engines were loading", logs)
            if status.state == "RUNNING" and answers(f"{plan.file.url}/readyz"):
                return
            if time.monotonic() > deadline:
                waiting = ", ".join(d for d, s in status.deployments.items() if s != "HEALTHY")
                raise StartError(
                    f"not ready after {plan.ready_timeout_s:g} s; waiting for "
                    f"{waiting or 'the gateway'}",
                    f"allow more with --ready-timeout; {logs}",
                )
            step.detail = ", ".join(
                f"{deployment} {'ready' if state == 'HEALTHY' else 'loading'}"
                for deployment, state in status.deployments.items()
            )
            time.sleep(POLL_S)

    def _watch(self) -> None:
        """Stay until something that we started ends; a stop signal leaves through here."""
        while True:
            time.sleep(1.0)
            if not self.cluster.alive:
                raise StartError("Ray has ended", f"logs: {self.cluster.log_folder}")
            if self._issuer and not self._issuer.alive:
                self.steps.say("- the development identity provider has ended; starting it again")
                self._start_issuer(self._issuer)

    def _record(self) -> None:
        guard = identify(self._guard_pid)
        if self._folder is None or guard is None:
            return
        me = identify(os.getpid())
        mine = ([me] if me else []) + descendants(os.getpid())
        started_s = int(time.time())
        self._folder.write(RunRecord(guard, self.plan.file.url, started_s, tuple(mine)))

    def _fail(self, message: str, remedy: str) -> None:
        self.steps.say(f"error: {message}\n  {remedy}")

    def _stop(self) -> None:
        """Stop all, newest first; signals no longer interrupt."""
        for signum in self._signals:
            signal.signal(signum, signal.SIG_IGN)
        if self._folder is None:
            return
        with self.steps.step("stop"):
            self.cluster.stop(SERVE_STOP_S)
            if self._issuer:
                self._issuer.stop()
            self._folder.clear()
