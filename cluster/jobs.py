"""The jobs of a coordinator, as others see them: how far each is, how it ended, what its readers may know. No Ray."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from crucible.cluster.drive import with_waiting
from crucible.cluster.readers import Answer, Readers
from crucible.config import Token
from crucible.errors import CrucibleError
from crucible.hub.governor import Governor
from crucible.refs import DataRequest
from crucible.report import JobReport, Progress

REMEMBERED = 4
"""Jobs that have ended and whose readers are still answered in full. Later ones find the manifests in the stores."""


@dataclass
class Job:
    """One job's public face: written by its thread, read by whoever asks."""

    progress: Progress
    request: DataRequest
    endpoint: str
    token: Token | None = field(repr=False)
    readers: Readers
    governor: Governor | None = None
    arrived: int = 0
    report: JobReport | None = None
    error: CrucibleError | None = None
    ended: threading.Event = field(default_factory=threading.Event)


class Jobs:
    """All jobs of one coordinator, oldest first.

    Concurrency: any method from any thread.
    """

    def __init__(self) -> None:
        self._jobs: dict[str, Job] = {}
        self._lock = threading.Lock()

    def add(self, name: str, request: DataRequest, endpoint: str, token: Token | None) -> Job | None:
        """A new job; None if there is one of this name: its driver lost sight of us, and asks again."""
        with self._lock:
            if name in self._jobs:
                return None
            self._jobs[name] = job = Job(Progress(name, "resolve"), request, endpoint, token, Readers(name, request))
            return job

    def get(self, name: str) -> Job | None:
        return self._jobs.get(name)

    def __getitem__(self, name: str) -> Job:
        return self._jobs[name]

    def arrived(self, name: str, size: int) -> None:
        """So many source bytes more."""
        with self._lock:
            if name in self._jobs:
                self._jobs[name].arrived += size

    def progress(self, name: str) -> Progress:
        """How far a job is, and how much longer the Hub wants it to wait."""
        job = self._jobs[name]
        if job.governor is None or job.ended.is_set():
            return job.progress
        return with_waiting(job.progress, job.governor.waiting())

    def ended(self, job: Job) -> None:
        """The job has its report or its error. What the readers of long ended ones were told is dropped."""
        if job.error is not None:
            job.readers.fail(job.error)
        job.ended.set()
        with self._lock:
            over = [one for one in self._jobs.values() if one.ended.is_set()]
        for old in over[:-REMEMBERED]:
            old.readers.forget()

    def listing(self) -> list[tuple[DataRequest, Progress, str]]:
        """(request, progress, error text) of every job."""
        with self._lock:
            return [(job.request, job.progress, str(job.error or "")) for job in self._jobs.values()]

    def opening(self, request: DataRequest, endpoint: str) -> Answer:
        """What a reader of `request` at that Hub may begin with, by the newest job that is about it."""
        with self._lock:
            newest = [job for job in reversed(self._jobs.values()) if job.endpoint == endpoint]
        for job in newest:
            if (answer := job.readers.opening(request)) is not None:
                return answer
        return {"state": "none"}
