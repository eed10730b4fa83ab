"""The jobs of a coordinator, as others see them: how far each is, how it ended, what its readers may know. No Ray."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from crucible.cluster.drive import with_waiting
from crucible.cluster.journal import JOBS_KEPT, Value
from crucible.cluster.readers import Answer, Readers
from crucible.config import Token
from crucible.errors import CrucibleError, JobUnknown, TokenForgotten
from crucible.hub.governor import Governor
from crucible.refs import DataRequest
from crucible.report import JobReport, Progress

TOKEN_WAIT_S = 20.0
"""For a driver that gave a token to be back with it, once its coordinator has been replaced; it takes seconds. Without
one the Hub would be asked for nothing, and readers of the job would hear that it failed."""
REMEMBERED = 4
"""Jobs that have ended and whose readers are still answered in full. Later ones find the manifests in the stores."""
HELD = JOBS_KEPT
"""Jobs that have ended and whose end is told to a driver that comes late. The journal has no more of them either."""


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
    value: Value = field(default_factory=dict)
    """As the journal has it (`remembered`)."""
    forgotten: bool = False
    """It goes on without the token that its driver had given to a coordinator before this one."""
    _given: threading.Event = field(default_factory=threading.Event)

    def take(self, token: Token | None) -> None:
        """Its driver asks again, and gives the token that may lack."""
        if self.token is None and token is not None:
            self.token, self.forgotten = token, False
            self._given.set()

    def await_token(self, wait_s: float = TOKEN_WAIT_S) -> Token | None:
        """The token. One that is forgotten is waited for: the driver is likely on its way."""
        if self.forgotten:
            self._given.wait(wait_s)
        return self.token


class Jobs:
    """All jobs of one coordinator, oldest first.

    Concurrency: any method from any thread.
    """

    def __init__(self) -> None:
        self._jobs: dict[str, Job] = {}
        self._lock = threading.Lock()

    def add(self, name: str, request: DataRequest, endpoint: str, token: Token | None) -> Job | None:
        """A new job; None if there is one of this name: its driver lost sight of us, and asks again.

        It is then given the token that it may lack. One that ended for want of it is begun anew, and so is one of which
        only the end is known.
        """
        with self._lock:
            known = self._jobs.get(name)
            lost = known is not None and (
                isinstance(known.error, JobUnknown) or (isinstance(known.error, TokenForgotten) and token is not None)
            )
            if known is not None and not lost:
                known.take(token)
                return None
            self._jobs[name] = job = Job(Progress(name, "resolve"), request, endpoint, token, Readers(name, request))
            return job

    def drop(self, name: str) -> None:
        """Forget a job that could not be accepted."""
        with self._lock:
            self._jobs.pop(name, None)

    def get(self, name: str) -> Job | None:
        return self._jobs.get(name)

    def arrived(self, name: str, size: int) -> None:
        """So many source bytes more."""
        with self._lock:
            if name in self._jobs:
                self._jobs[name].arrived += size

    def progress(self, name: str) -> Progress:
        """How far a job is, and how much longer the Hub wants it to wait. One that is unknown is at its beginning."""
        job = self._jobs.get(name)
        if job is None:
            return Progress(name, "resolve")
        if job.governor is None or job.ended.is_set():
            return job.progress
        return with_waiting(job.progress, job.governor.waiting())

    def ended(self, job: Job) -> None:
        """The job has its report or its error. What the readers of long ended ones were told is dropped, and the
        oldest are forgotten."""
        if job.error is not None:
            job.readers.fail(job.error)
        job.ended.set()
        with self._lock:
            over = [(name, one) for name, one in self._jobs.items() if one.ended.is_set()]
            for name, _ in over[:-HELD]:
                del self._jobs[name]
        for _, old in over[:-REMEMBERED]:
            old.readers.forget()

    def all(self) -> dict[str, Job]:
        """name -> job, oldest first, of those that this coordinator did or does."""
        with self._lock:
            return dict(self._jobs)

    def opening(self, request: DataRequest, endpoint: str) -> Answer:
        """What a reader of `request` at that Hub may begin with, by the newest job that is about it."""
        with self._lock:
            newest = [job for job in reversed(self._jobs.values()) if job.endpoint == endpoint]
        for job in newest:
            if (answer := job.readers.opening(request)) is not None:
                return answer
        return {"state": "none"}
