"""Play one story on the stage, and gather what the invariants are asked of."""

from __future__ import annotations

import functools
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from crucible.cache.store import Store
from crucible.errors import CrucibleError, StoreError
from crucible.hub.server import RequestRecord
from crucible.workers.scrub import scrub
from tests.chaos.asking import Job, care, undrain
from tests.chaos.data import Truth, repo_files, truth_of
from tests.chaos.schedule import AT_THE_START, SLOTS, Story, Strike
from tests.chaos.stage import PART, STREAMS, Stage, fault_of
from tests.chaos.training import Received, Run, Training
from tests.hubserver.faults import Fault
from tests.ray.jobs import file_bytes, start_coordinator_on

PHASE_S = 200
"""A phase that takes longer hangs. Without faults it takes five seconds."""
MEND_S = 90
POLL_S = 0.02
SPOIL = ("cut", "flip", "stall", "slow", "wrong-length", "ignore-range")
"""Hub faults whose reply may have cost bytes for nothing."""
SLOW = Fault("slow", origin="cdn", piece=8 << 10, wait=0.04)
"""While there are strikes to come a file takes a second or two, so that there is something to strike at."""


@dataclass
class Played:
    """What happened, for `invariants`."""

    story: Story
    truth: Truth
    repo: str
    homes: list[Path]
    folder: Path
    """Of the training: its records for verify-epoch are in `records`."""
    struck: list[Strike] = field(default_factory=list)
    missed: list[Strike] = field(default_factory=list)
    """The phase was over before, or there was nothing to strike at."""
    received: list[Received] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    flipped: list[tuple[int, str]] = field(default_factory=list)
    """(node, shard) of the bytes that were changed on disks."""
    notes: list[str] = field(default_factory=list)
    """What happened when, in seconds since the beginning: for a person."""
    problems: list[str] = field(default_factory=list)
    """What failed, or took too long, and should not have."""
    log: list[RequestRecord] = field(default_factory=list)
    paid: int = 0
    """Bytes of files that the Hub sent."""
    allowed: int = 0
    """The most that it may have sent, with what was lost."""
    quiet: list[tuple[float, float]] = field(default_factory=list)
    """(start, stop) of the times that the Hub said to be quiet, by its clock."""
    processes: int = 1
    """The most that may each have had requests on their way when the Hub said so."""


class Player:
    """Plays one story. Used once."""

    def __init__(self, stage: Stage, story: Story, folder: Path, set_env: Callable[[str, str], None]) -> None:
        self._stage, self._story, self._folder, self._set_env = stage, story, folder, set_env
        self._excused = False
        """A store was full or read-only: a job or a rank may end with the error that says so."""
        self._faults: list[Fault] = []
        self._jobs = 0
        self._toll = 0
        self._spoilt = 0
        self._flips: list[Strike] = []
        """Those that wait for the next start of the ranks."""
        self._began = time.monotonic()

    def play(self) -> Played:
        story, stage = self._story, self._stage
        stage.reset()
        for name, value in stage.environment.items():
            self._set_env(name, value)
        files = repo_files(story, self._folder / "data")
        repo = f"ann/chaos-{story.seed}-{self._folder.name}"
        stage.hub.import_files(repo, files, private=True, lfs=True)
        calm = self._folder / "calm"
        self._set_env("CRUCIBLE_HOME", str(calm))
        truth = truth_of(repo, story, files, calm)
        self._set_env("CRUCIBLE_HOME", str(stage.homes[0]))
        stage.hub.clear_log()
        self._training = Training(story, repo, self._folder / "training", stage.homes, stage.environment)
        self._training.before_start = self._flip
        self.played = Played(story, truth, repo, stage.homes, self._training.folder)
        try:
            went_well = self._perform(repo)
            self._note_faults()
        finally:
            self._training.end()
            stage.whole()
        if went_well:
            self._mend()
        self._gather()
        return self.played

    def _note(self, what: object) -> None:
        self.played.notes.append(f"{time.monotonic() - self._began:6.1f} s  {what}")

    # --- the two phases

    def _perform(self, repo: str) -> bool:
        """False if something did not end in time."""
        story, stage = self._story, self._stage
        self._note("begins")
        if story.coordinator:
            start_coordinator_on(stage.node_id(story.coordinator))
        if story.prefetch:
            stage.hub.add(SLOW)
        due = [("prefetch", strike) for strike in story.prefetch]
        if story.early:
            due += [("training", strike) for strike in story.training]
        went_well = self._phase(repo, due, "prefetch")
        self._note("the prefetch has ended")
        if not went_well:
            return False
        if not story.early:
            self._flips += [strike for strike in story.training if strike.kind == "flip-shard"]
            self._training.start(stage.up())
            others = [("training", strike) for strike in story.training if strike.kind != "flip-shard"]
            went_well = self._phase(repo, others, "training")
        self._note("the training has ended")
        return went_well

    def _mend(self) -> None:
        """What an admin does afterwards: look at every shard, and bring back what is missing or wrong."""
        played = self.played
        try:
            for node in [node["node"] for node in care("nodes") if node["state"] == "drained"]:
                care("undrain", [node])
            for slot in {slot for slot, _ in played.flipped}:
                list(scrub(Store(played.homes[slot]), deep=True))
            begun = care("start_repair")
            ended = care("operation", begun["operation"], MEND_S)
        except CrucibleError as error:
            played.problems.append(f"repair failed: {type(error).__name__}: {error}")
            return
        self._note(
            f"verified and repaired: {ended['remade']} made again, {ended['copied']} copied, {ended['left']} left"
        )
        if ended["phase"] != "done" or ended["left"]:
            played.problems.append(f"repair ended with {ended}")

    def _phase(self, repo: str, due: list[tuple[str, Strike]], name: str) -> bool:
        """Until the job, or the training, or both have ended. False if that took too long."""
        for phase, strike in list(due):
            if strike.kind in AT_THE_START:
                due.remove((phase, strike))
                self._strike(strike)
                if strike.kind == "failpoint":  # a flip is noted when it is made
                    self.played.struck.append(strike)
        job = self._job(repo) if name == "prefetch" else None
        deadline = time.monotonic() + PHASE_S
        while True:
            self._stage.tick()
            if self._story.early and not self._training.runs and (job is None or job.seen):
                # not before the cluster knows of the job: a rank that is first brings it all by itself
                self._training.start(self._stage.up())
            if self._training.runs and not self._training.done:
                self._training.tick(self._stage.up())
            at = {"prefetch": self._share_of_bytes(), "training": self._training.progress()}
            over = {"prefetch": job is None or job.ended, "training": bool(self._training.runs) and self._training.done}
            for phase, strike in list(due):
                if strike.at <= at[phase] or over[phase]:
                    due.remove((phase, strike))
                    happened = not over[phase] and self._strike(strike)
                    self._note(f"{strike}: {'struck' if happened else 'nothing to strike at'}")
                    (self.played.struck if happened else self.played.missed).append(strike)
            if not due:
                self._calm_down()
            if job is not None and job.ended and (problem := job.problem()) is not None:
                job = self._failed(repo, problem)
            elif (
                not due
                and (self._training.runs or not self._story.early)
                and all(over[phase] for phase in ("prefetch", "training") if self._waits_for(phase, name))
            ):
                return True
            if time.monotonic() > deadline:
                stacks = self._training.tell_stacks()
                self.played.problems.append(f"{name} did not end within {PHASE_S} s; {self._told(job)}\n{stacks}")
                return False
            time.sleep(POLL_S)

    def _waits_for(self, phase: str, name: str) -> bool:
        return phase == name or (phase == "training" and self._story.early)

    def _calm_down(self) -> None:
        """All strikes have happened: what is left may be fast."""
        self._training.hurry()
        self._stage.hub.faults.remove(SLOW)

    def _job(self, repo: str) -> Job:
        self._jobs += 1
        return Job(repo, self._stage.address, self._story.replicas)

    def _failed(self, repo: str, problem: BaseException) -> Job | None:
        """A job that a broken disk has ended is run again when the disk is whole; any other failure is a finding."""
        if self._excused and isinstance(problem, StoreError) and self._jobs < 4:
            self._stage.tick(all_of_it=True)
            return self._job(repo)
        self.played.problems.append(f"the prefetch failed: {type(problem).__name__}: {problem}")
        return None

    def _share_of_bytes(self) -> float:
        return file_bytes(self._stage.hub) / self.played.truth.source_bytes

    def _told(self, job: Job | None) -> str:
        seen = job.seen[-1] if job is not None and job.seen else None
        return f"the job's last word: {seen}; nodes up: {self._stage.up()}; struck: {[*map(str, self.played.struck)]}"

    # --- strikes

    def _strike(self, strike: Strike) -> bool:
        """False if there is nothing to strike at."""
        stage, truth = self._stage, self.played.truth
        verb, _, what = strike.kind.partition("-")
        titles = {
            "worker": "ray::item",
            "agent": "ray::Agent",
            "coordinator": "ray::Coordinator",
            "governor": "ray::Governor",
        }
        if what in titles:
            found = stage.processes(strike.node, titles[what])
            if not found and what != "agent":  # on whatever node it runs
                found = stage.anywhere(titles[what])
            if not found:
                return False
            if verb == "kill":
                found[0].kill()
            else:
                stage.stop(found[0], strike.seconds)
            self._toll += truth.largest_item + (self._remade(strike.node) if what == "agent" else 0)
            if self._story.early and what in ("agent", "coordinator"):
                self._toll += (
                    SLOTS * truth.source_bytes
                )  # a rank that starts now hears of no job, and brings all itself
            return True
        match strike.kind:
            case "kill-node":
                return self._kill_node(strike)
            case "kill-rank":
                self._toll += truth.largest_item
                return self._training.kill(strike.rank)
            case "stop-rank":
                process = self._training.process(strike.rank)
                if process is not None:
                    stage.stop(psutil.Process(process.pid), strike.seconds)
                return process is not None
            case "hub":
                for fault in fault_of(strike.what, strike.times, strike.seconds):
                    self._faults.append(fault)
                    stage.hub.faults.add(fault, first=True)
                    if strike.what == "down":
                        stage.later(strike.seconds, functools.partial(stage.hub.faults.remove, fault))
                return True
            case "drain":
                return self._drain(strike)
            case "failpoint":
                self._toll += truth.largest_item
                stage.arm(strike.what, strike.times)
                return True
            case "disk-full" | "read-only":
                return self._break_disk(strike)
            case "clock-jump":
                return stage.shift_clock(strike.node, 90_000 if strike.rank else -90_000) > 0
            case "flip-shard":
                self._flips.append(strike)
                return True
        raise AssertionError(strike.kind)

    def _kill_node(self, strike: Strike) -> bool:
        stage = self._stage
        if strike.node not in stage.up():
            return False
        # what it alone has is made again, by the cluster and by readers that do not wait; what it was at is begun anew
        lost = self._only_on(strike.node) + self._remade(strike.node)
        self._toll += lost + 3 * self.played.truth.largest_item
        stage.kill_node(strike.node)
        self._training.kill_on(strike.node)
        if strike.what == "lost":
            stage.lose_disk(strike.node)
        stage.later(strike.seconds, lambda: stage.start_node(strike.node))
        return True

    def _drain(self, strike: Strike) -> bool:
        stage = self._stage
        if strike.node not in stage.up():
            return False
        node = stage.node_id(strike.node)
        with suppress(CrucibleError):  # it has just died, or nobody knows it yet
            care("start_drain", [node])
            stage.later(strike.seconds, lambda: undrain(node))
            return True
        return False

    def _break_disk(self, strike: Strike) -> bool:
        stage = self._stage
        if not stage.mounts or strike.node not in stage.up():
            return False
        mend = stage.fill_disk(strike.node) if strike.kind == "disk-full" else stage.freeze_disk(strike.node)
        if mend is None:
            return False
        self._excused = True
        # what it brings and cannot keep is brought elsewhere
        self._toll += 4 * self.played.truth.largest_item
        stage.later(strike.seconds, mend)
        return True

    def _only_on(self, slot: int) -> int:
        """Source bytes of the items of which a node holds a shard that no other one does."""
        held = [{key for key, _ in Store(home).shards()} for home in self._stage.homes]
        elsewhere = set().union(*(keys for number, keys in enumerate(held) if number != slot))
        items = self.played.truth.items
        return sum(dict(items[key] for key in held[slot] - elsewhere if key in items).values())

    def _remade(self, slot: int) -> int:
        """What it may cost that nobody can reach a node: a reader on another one makes what it needs by itself."""
        reading = SLOTS - 1 if self._training.runs else 0
        return reading * self._only_on(slot)

    def _flip(self) -> None:
        """Nobody has a shard open: change bytes on disks."""
        for strike in self._flips:
            key = self._stage.flip_a_byte(strike.node, (strike.seconds * 7 + strike.times) % 1)
            self._note(f"{strike}: {f'shard {key[:12]}' if key else 'nothing to strike at'}")
            (self.played.struck if key else self.played.missed).append(strike)
            if key:
                self._toll += 2 * self.played.truth.largest_item
                self.played.flipped.append((strike.node, key))
        self._flips.clear()

    # --- evidence

    def _note_faults(self) -> None:
        """What the Hub's faults did, before they are taken away."""
        hub = self._stage.hub
        self._spoilt = sum(hub.hits(fault) for fault in self._faults if fault.kind in SPOIL)
        for fault in self._faults:
            if fault.kind == "429" and (first := hub.faults.first_hit(fault)):
                self.played.quiet.append((first, first + fault.wait))

    def _gather(self) -> None:
        played, hub = self.played, self._stage.hub
        played.received, played.runs = self._training.received(), list(self._training.runs)
        played.problems += self._failures()
        self._note(f"died at failpoints: {', '.join(self._stage.reached()) or 'none'}")
        played.log, played.paid = list(hub.log), file_bytes(hub)
        lost = sum(strike.what == "lost" for strike in played.struck)
        played.allowed = (
            played.truth.source_bytes
            # whatever happened, no node has a use for more than all of it, once for each disk that it had
            + min(self._toll, (SLOTS + lost) * played.truth.source_bytes)
            + self._spoilt * (played.truth.largest_item + STREAMS * PART)
            + self._early_footers()
        )
        if played.runs:
            played.processes = 1 + max(run.world for run in played.runs) * len(played.runs)
        shutil.rmtree(self._folder / "calm", ignore_errors=True)

    def _early_footers(self) -> int:
        """The ends of parquet files, which come first: once a job, once a node, and once more after each restart."""
        deaths = sum(strike.kind in ("kill-coordinator", "failpoint") for strike in self.played.struck)
        tails = self._story.files * (64 << 10)
        return (1 + SLOTS + deaths) * tails if self._story.form == "parquet" else 0

    def _failures(self) -> list[str]:
        """Ranks that ended with an error, but for those that a broken disk gave it to."""
        names = ("DiskFull", "NoRoom", "StoreReadOnly", "StoreError")
        return [
            failure
            for failure in self._training.failures
            if not (self._excused and any(name in failure for name in names))
        ]
