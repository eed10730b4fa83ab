"""The jobs of a coordinator and its journal together: what is asked is written down, and what was written down goes on.

No call to Ray. A job has a thread of its own.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import replace
from typing import Any

from crucible.cluster.agents import Agents
from crucible.cluster.drive import as_crucible_error
from crucible.cluster.jobs import Job, Jobs
from crucible.cluster.journal import ENDED, Cells, Value, notes
from crucible.cluster.logbook import Logbook
from crucible.cluster.remembered import (
    accepted,
    error_of,
    must_go_on,
    options_of,
    progress_of,
    report_of,
    request_of,
    shown,
    with_end,
    with_progress,
)
from crucible.cluster.running import Runner
from crucible.config import Token, node_settings
from crucible.errors import CrucibleError, JobUnknown, StaleCoordinator, StoreError
from crucible.failpoints import reach
from crucible.refs import DataRequest
from crucible.report import JobReport
from crucible.workers.tasks import JobOptions

log = logging.getLogger("crucible.coordinator")


class Memory:
    """What a coordinator was asked, by drivers and before its time.

    Concurrency: any method from any thread.
    """

    def __init__(self, logbook: Logbook, agents: Agents, jobs: Jobs, *, embedded: bool) -> None:
        self._logbook, self._agents, self._jobs, self._embedded = logbook, agents, jobs, embedded
        self.runner: Runner | None = None
        """Who does the jobs; set before the first."""
        self.known = threading.Event()
        """Set once the agents were asked what they were told, and what had not ended goes on."""

    def accept(
        self,
        job: str,
        request: DataRequest,
        options: JobOptions,
        replicas: int,
        nodes: int | None,
        token: Token | None,
    ) -> None:
        """Begin a job, if it is not known. Raises a StoreError, and begins nothing, where the journal takes no line."""
        record = self._jobs.add(job, request, options.endpoint, token)
        if record is None:
            return
        given = token is not None and options.on_this_node().token is None
        epoch, now = self._agents.turn.epoch, time.time()
        told = accepted(request, options, replicas, nodes, token=given, epoch=epoch, embedded=self._embedded, now=now)
        if (known := self._logbook.cells.get(f"job/{job}")) is not None and known.value is not None:
            told["commit"] = known.value["commit"]
        record.value = told
        try:
            self._logbook.put(f"job/{job}", told)
        except StoreError:
            self._jobs.drop(job)
            raise
        self.tell()
        self._start(job, record, request, options)

    def outcome(self, job: str, wait_s: float) -> JobReport | CrucibleError | None:
        """How a job ended; None while it runs, or while it may still be heard of."""
        record = self._jobs.get(job)
        if record is None:
            return JobUnknown(job) if self.known.wait(wait_s) and self._jobs.get(job) is None else None
        if not record.ended.wait(wait_s):
            return None
        return record.report or record.error

    def history(self) -> list[dict[str, Any]]:
        """Every job that is remembered, oldest first: see `remembered.SHOWN`."""
        mine = self._jobs.all()
        found = []
        for name, value in notes(self._logbook.cells, "job").items():
            record = mine.get(name)
            now = value if record is None else with_progress(value, self._jobs.progress(name))
            found.append(shown(name, now))
        return sorted(found, key=lambda job: (job["started"], job["job"]))

    def note(self, job: str, record: Job) -> None:
        """Keep how far a job is."""
        if not self._agents.turn.over.is_set():
            self._put(job, record.value)
            self.tell()

    def tell(self) -> None:
        """Let every node know what must not be forgotten. What cannot be told now, the next word tells.

        Raises StaleCoordinator.
        """
        try:
            self._agents.tell(*self._logbook.told())
        except StaleCoordinator:
            raise
        except Exception:  # Ray's, such as for an object store that is full: no reason to end a job
            log.warning("the nodes could not be told what must not be forgotten", exc_info=True)

    def learn(self, lines: bytes) -> None:
        """Take in what a node was told; jobs of which nobody here had heard go on."""
        before = self._logbook.cells
        try:
            fresh = self._logbook.learn(lines)
        except StoreError as error:
            log.warning("what a node was told is not in the journal: %s", error)
            fresh = True
        if fresh and self.known.is_set():
            self._resume(before)

    def resume(self) -> None:
        """Go on with every job that has not ended. A driver that waits for one finds it by its name."""
        before = self._logbook.cells
        try:
            self._resume({})
        finally:
            self.known.set()
        self._resume(before)  # what was learned between the first look and that

    def _resume(self, before: Cells) -> None:
        """Of the jobs that `before` did not have as they are now. One that is not understood holds up no other."""
        now = self._logbook.cells
        for name, value in notes(now, "job").items():
            if now[f"job/{name}"] == before.get(f"job/{name}"):
                continue
            try:
                self._go_on(name, value)
            except StaleCoordinator:
                raise
            except Exception as error:  # noqa: BLE001 - whatever it is
                log.warning("job %s: cannot go on with what the journal has of it; start it again: %r", name, error)

    def _go_on(self, name: str, value: Value) -> None:
        """Raises KeyError or TypeError for what another version wrote."""
        request, options = request_of(value), options_of(value, node_settings())
        own = options.on_this_node().token
        if must_go_on(value, self._agents.turn.epoch.cluster):
            forgotten = bool(value["token"]) and own is None
            told = {**value, "epoch": self._agents.turn.epoch.number}
            if (record := self._jobs.add(name, request, options.endpoint, own)) is not None:
                record.value, record.forgotten = told, forgotten
                self.note(name, record)
                self._start(name, record, request, options)
        elif value["phase"] not in ENDED:
            self._put(name, with_end(value, "interrupted", time.time(), None, None))
        else:
            report, progress = report_of(value), progress_of(name, value)
            error = error_of(value) or (None if report else JobUnknown(name))
            if (ended := self._jobs.add(name, request, options.endpoint, own)) is not None:
                ended.value, ended.report, ended.error, ended.progress = value, report, error, progress
                self._jobs.ended(ended)
                ended.readers.forget()  # what they were told is gone; the manifests are in the stores

    def _put(self, job: str, value: Value) -> None:
        """A disk that does not take it costs a later coordinator a look."""
        try:
            self._logbook.put(f"job/{job}", value)
        except StoreError as error:
            log.warning("job %s: its state is not in the journal: %s", job, error)

    def _start(self, job: str, record: Job, request: DataRequest, options: JobOptions) -> None:
        threading.Thread(target=self._run, args=(job, record, request, options), name=f"job-{job}", daemon=True).start()

    def _run(self, job: str, record: Job, request: DataRequest, options: JobOptions) -> None:
        try:
            assert self.runner is not None
            self.runner.run(job, record, request, options, record.value["replicas"], record.value["nodes"])
        except Exception as error:  # noqa: BLE001 - it raises nothing; what another version wrote may lack a word
            record.error = as_crucible_error(error, f"job {job}")
            record.progress = replace(record.progress, phase="failed")
        try:
            if record.progress.phase != "superseded":  # it goes on elsewhere, and has not ended
                ended = with_progress(record.value, record.progress)
                record.value = with_end(ended, record.progress.phase, time.time(), record.report, record.error)
                self.note(job, record)
                reach("job.ended")
        except StaleCoordinator as error:  # it has ended all the same, and is found done by whoever took over
            log.warning("job %s: %s", job, error)
        finally:
            self._jobs.ended(record)  # whoever waits for it hears of it, whatever became of the note
