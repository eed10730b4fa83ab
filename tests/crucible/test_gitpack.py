"""A commit's small files in two requests: from git's own server, from our Hub, and from servers that mean no good."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crucible.config import Settings, Token
from crucible.errors import OfflineMode, SourceUnavailable
from crucible.hub.client import HubRepo
from crucible.hub.gitpack import fetch_blobs, pack_limits, whole_commit, worth_a_pack
from crucible.hub.http import HubHttp
from crucible.hub.pktline import FATAL, PROGRESS, Mark, banded, packet
from crucible.hub.server import HubOptions, User
from crucible.refs import RepoRef, SourceFile
from crucible.report import Tally
from tests.crucible.git_cases import (
    GREETING,
    Answer,
    GitRepo,
    Reply,
    answering,
    canned,
    git_repo,
    lfs,
    needs_git,
    pack_head,
    packed_object,
    regular,
    sealed,
    upload_pack,
)
from tests.hubserver.faults import FaultyHub

RANDOM = Random(7)
CONTENTS = [bytes(RANDOM.choices(b"abcdefgh \n", k=RANDOM.randrange(200, 3000))) for _ in range(150)]
FILES = [regular(f"d{n % 7}/f{n}.txt", content) for n, content in enumerate(CONTENTS)]
PACK = sealed(pack_head(len(CONTENTS)) + b"".join(packed_object(3, content) for content in CONTENTS))
COMMIT = "c" * 40
TWO = ["GET info/refs", "POST git-upload-pack"]


class Taker:
    """A HubHttp and what came through it."""

    def __init__(self, endpoint: str, home: Path, **fields: object) -> None:
        self.tally = Tally()
        self.waits: list[float] = []
        made = Settings(home=home, endpoint=endpoint, timeout_s=5.0, **fields)  # type: ignore[arg-type]
        self.http = HubHttp(made, self.tally, sleep=self.waits.append)
        self.got: dict[str, bytes] = {}

    def take(
        self, wanted: Sequence[SourceFile] = FILES, listing: Sequence[SourceFile] = FILES, commit: str = COMMIT
    ) -> list[SourceFile]:
        def sink(file: SourceFile, data: bytes | memoryview) -> None:
            assert file.oid not in self.got
            self.got[file.oid] = bytes(data)

        return fetch_blobs(self.http, RepoRef("org/data", commit), wanted, listing, sink)


@contextmanager
def taker(answer: Answer, tmp_path: Path, **fields: object) -> Iterator[tuple[Taker, Callable[[], list[str]]]]:
    with answering(answer) as server:
        made = Taker(server.endpoint, tmp_path, **fields)
        with closing(made.http):
            yield made, lambda: server.targets


def contents_of(files: Sequence[SourceFile], contents: Sequence[bytes]) -> dict[str, bytes]:
    return {file.oid: content for file, content in zip(files, contents, strict=True)}


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> tuple[GitRepo, str, str]:
    """FILES and a big one, with git's own deltas, at the first of two commits; and both commits."""
    made = git_repo(tmp_path_factory.mktemp("repo"))
    files = {file.path.encode(): content for file, content in zip(FILES, CONTENTS, strict=True)}
    first = made.commit({**files, b"big.txt": bytes(RANDOM.choices(b"ab\n", k=900_000))})
    return made, first, made.commit({b"later": b"1"})


BIG = SourceFile("big.txt", 900_000, "b" * 40, lfs=False)


@needs_git
@pytest.mark.parametrize("protocol", [0, 2])
def test_gits_own_server_gives_a_commit_in_two_requests(
    tmp_path: Path, repo: tuple[GitRepo, str, str], protocol: int
) -> None:
    served, first, second = repo
    served.run("update-ref", "refs/heads/main", first)
    with taker(upload_pack(served, protocol=protocol), tmp_path) as (it, targets):
        assert it.take(commit=first) == []
        assert it.got == contents_of(FILES, CONTENTS)
        assert targets() == TWO
        assert it.tally.counts.hub_requests == 2
        assert it.tally.counts.verified_files == len(FILES)
    served.run("update-ref", "refs/heads/main", second)


@needs_git
def test_big_files_are_filtered_out_and_few_of_many_are_asked_for_by_name(
    tmp_path: Path, repo: tuple[GitRepo, str, str]
) -> None:
    """The commit is not the tip of any branch, too: protocol 2 serves what the repo has."""
    served, first, _ = repo
    many = [SourceFile(f"other{n}", 1000, f"{n:040x}", lfs=False) for n in range(4000)]
    for wanted, more in ((FILES, [BIG]), (FILES[:70], many), (FILES[3:4], many)):
        assert whole_commit(wanted, [*FILES, *more], filtered=True) is (more == [BIG])
        with taker(upload_pack(served), tmp_path) as (it, targets):
            assert it.take(wanted, [*FILES, *more], first) == []
            assert it.got.keys() == {file.oid for file in wanted}
            assert targets() == TWO
            assert it.tally.counts.hub_bytes < sum(file.size for file in wanted)


@needs_git
def test_what_the_commit_has_not_is_reported(tmp_path: Path, repo: tuple[GitRepo, str, str]) -> None:
    served, first, _ = repo
    strange, pointer = regular("strange", b"nobody has it"), lfs("data.bin", b"1")[0]
    with taker(upload_pack(served), tmp_path) as (it, _targets):
        assert it.take([*FILES, strange, pointer], [*FILES, strange, pointer], first) == [strange, pointer]
        assert it.got == contents_of(FILES, CONTENTS)
    with (
        taker(upload_pack(served), tmp_path) as (it, _targets),
        pytest.raises(SourceUnavailable, match=r"org/data@.* by git from http://127.*not our ref"),
    ):
        it.take(commit="0" * 40)


def test_ten_thousand_small_files_of_our_hub_are_two_requests(tmp_path: Path, hub: FaultyHub) -> None:
    files = {f"d{n % 100}/{n}.txt": b"%d\n" % n * 20 for n in range(10_000)}
    commit = hub.import_files("org/data", {**files, "model.bin": b"\0" * 5000})
    it = Taker(hub.endpoint, tmp_path)
    with closing(it.http):
        listing = list(HubRepo(it.http).files(RepoRef("org/data", commit)))
        wanted = [file for file in listing if not file.lfs]
        assert worth_a_pack(wanted)
        hub.clear_log()
        assert it.take(wanted, listing, commit) == []
        assert it.got == {file.oid: files[file.path] for file in wanted}
    assert [record.path for record in hub.log] == [
        "/datasets/org/data.git/info/refs",
        "/datasets/org/data.git/git-upload-pack",
    ]


def test_a_filter_is_sent_only_where_it_leaves_something_out(tmp_path: Path) -> None:
    with answering(canned(PACK)) as server:
        it = Taker(server.endpoint, tmp_path)
        with closing(it.http):
            for listing in (FILES, [*FILES, lfs("big.bin", b"1" * 9999)[0]], [*FILES, BIG]):
                it.got.clear()
                assert it.take(FILES, listing) == []
        bodies = [body for method, _, _, body in server.asked if method == "POST"]
    most = max(file.size for file in FILES)
    assert [b"filter" in body for body in bodies] == [False, False, True]
    assert f"filter blob:limit={most + 1}\n".encode() in bodies[-1]
    assert all(f"want {COMMIT}\n".encode() in body and b"deepen 1\n" in body for body in bodies)


def test_equal_files_come_once(tmp_path: Path) -> None:
    pack = sealed(pack_head(1) + packed_object(3, b"same"))
    wanted = [regular("a", b"same"), regular("b", b"same")]
    with taker(canned(pack), tmp_path) as (it, _targets):
        assert it.take(wanted, wanted) == []
        assert it.got == {wanted[0].oid: b"same"}


def test_a_model_a_dataset_and_a_space_are_asked_for_where_git_has_them(tmp_path: Path) -> None:
    with answering(canned(PACK)) as server:
        it = Taker(server.endpoint, tmp_path)
        with closing(it.http):
            for kind in ("model", "dataset", "space"):
                fetch_blobs(it.http, RepoRef("org/x", COMMIT, kind), FILES, FILES, lambda *_: None)
        assert [target.partition("?")[0] for method, target, *_ in server.asked if method == "GET"] == [
            "/org/x.git/info/refs", "/datasets/org/x.git/info/refs", "/spaces/org/x.git/info/refs",
        ]  # fmt: skip


def test_the_token_goes_to_the_hub_and_to_nowhere_that_it_points(tmp_path: Path) -> None:
    with answering(canned(PACK)) as elsewhere:
        away = Reply(b"", 307, {"Location": f"{elsewhere.endpoint}/x.git/info/refs"})
        with answering(lambda *_: away) as server:
            it = Taker(server.endpoint, tmp_path, token=Token("hf_secret"))
            with closing(it.http), pytest.raises(SourceUnavailable, match="307"):
                it.take()
            assert [headers["authorization"] for _, _, headers, _ in server.asked] == ["Bearer hf_secret"]
        assert elsewhere.asked == []


def test_a_private_repo_opens_for_its_owners_token(tmp_path: Path) -> None:
    with FaultyHub(tmp_path / "hub", options=HubOptions(tokens={"hf_org": User("org")})) as hub:
        contents = {file.path: content for file, content in zip(FILES, CONTENTS, strict=True)}
        commit = hub.import_files("org/data", contents, private=True)
        for token, opens in ((Token("hf_org"), True), (None, False), (Token("hf_wrong"), False)):
            it = Taker(hub.endpoint, tmp_path, token=token)
            with closing(it.http):
                if opens:
                    assert it.take(commit=commit) == []
                else:
                    with pytest.raises(SourceUnavailable, match="401"):
                        it.take(commit=commit)


# --- what goes wrong


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (lambda *_: Reply(b"", 404), "404"),
        (lambda *_: Reply(b"", 403), "403"),
        (lambda *_: Reply(b"", 500), "500"),
        (lambda *_: Reply(b"", 302, {"Location": "/login"}), "302"),
        (lambda *_: Reply(b"<html>", headers={"Content-Type": "text/html"}), "does not speak git"),
        (lambda *_: Reply(b""), "no greeting"),
        (lambda *_: Reply(b"zzzz"), "not git's protocol"),
        (lambda *_: Reply(packet("version 2") + packet("fetch") + Mark.FLUSH.value), "no shallow"),
        (lambda *_: Reply(packet(COMMIT + " HEAD\0shallow") + packet("ERR no")), "ERR|no"),
        (lambda method, *_: Reply(GREETING if method == "GET" else packet("ERR go away")), "go away"),
        (lambda method, *_: Reply(GREETING if method == "GET" else b""), "no pack"),
        (lambda method, *_: Reply(GREETING if method == "GET" else packet("packfile")), "ends before"),
        (lambda method, *_: Reply(GREETING if method == "GET" else packet("packfile") + Mark.END.value), "band"),
        (lambda method, *_: Reply(GREETING, 200 if method == "GET" else 500), "500"),
        (
            lambda method, *_: Reply(
                GREETING if method == "GET" else packet("packfile") + packet(bytes([FATAL]) + b"disk on fire")
            ),
            "disk on fire",
        ),
        (canned(b"no pack of anything, whatever its length is"), "checksum"),
        (canned(sealed(pack_head(1 << 30))), "objects where at most"),
        (canned(sealed(pack_head(0) + bytes(20 << 20))), "bytes, which cannot be this commit"),
    ],
)  # fmt: skip
def test_whatever_goes_wrong_is_one_error_that_names_the_hub(tmp_path: Path, answer: Answer, says: str) -> None:
    with (
        taker(answer, tmp_path) as (it, targets),
        pytest.raises(SourceUnavailable, match=says) as raised,
    ):
        it.take()
    assert raised.value.source.startswith("http://127.0.0.1:")
    assert it.got == {}
    assert it.waits == []
    assert len(targets()) <= 2


def test_nobody_there_is_the_same_error(tmp_path: Path) -> None:
    with answering(canned(PACK)) as server:
        endpoint = server.endpoint
    it = Taker(endpoint, tmp_path)
    with closing(it.http), pytest.raises(SourceUnavailable):
        it.take()


def test_offline_asks_nobody(tmp_path: Path) -> None:
    with taker(canned(PACK), tmp_path, offline=True) as (it, targets):
        with pytest.raises(OfflineMode):
            it.take()
        assert targets() == []


def test_progress_and_keepalives_are_passed_over(tmp_path: Path) -> None:
    chatty = b"".join(
        [packet("shallow-info"), packet(f"shallow {COMMIT}"), Mark.DELIMITER.value, packet("packfile"), packet(b"\1"),
         packet(bytes([PROGRESS]) + b"counting"), *banded([PACK[:999], b"", PACK[999:]]), Mark.FLUSH.value]
    )  # fmt: skip
    with taker(lambda method, *_: Reply(GREETING if method == "GET" else chatty), tmp_path) as (it, _targets):
        assert it.take() == []


@pytest.mark.parametrize("length", ["right", "wrong"])
def test_a_connection_that_breaks_leaves_what_came(tmp_path: Path, length: str) -> None:
    bands = b"".join(packet(b"\1" + PACK[start : start + 999]) for start in range(0, len(PACK), 999))
    body = packet("packfile") + bands + Mark.FLUSH.value
    cut = Reply(body[: len(body) // 2], length=len(body) if length == "wrong" else None)
    with taker(lambda method, *_: Reply(GREETING) if method == "GET" else cut, tmp_path) as (it, targets):
        missing = it.take()
        assert 0 < len(missing) < len(FILES)
        assert {file.oid for file in missing} == {file.oid for file in FILES} - it.got.keys()
        assert targets() == TWO


def test_a_flipped_byte_is_refused_and_what_came_before_is_right(tmp_path: Path) -> None:
    flipped = bytearray(PACK)
    flipped[len(PACK) // 2] ^= 1
    with taker(canned(sealed(bytes(flipped[:-20]))), tmp_path) as (it, _targets):
        try:
            missing = len(it.take())
        except SourceUnavailable:
            missing = len(FILES) - len(it.got)
        assert missing > 0
        assert it.got.items() <= contents_of(FILES, CONTENTS).items()


@pytest.mark.parametrize("target", ["*info/refs", "*git-upload-pack"])
def test_a_hub_that_says_not_now_is_asked_again(tmp_path: Path, hub: FaultyHub, target: str) -> None:
    commit = hub.import_files("org/data", {file.path: content for file, content in zip(FILES, CONTENTS, strict=True)})
    fault = hub.add("retry-after", path=target, status=429, wait=1, times=1)
    it = Taker(hub.endpoint, tmp_path)
    with closing(it.http):
        assert it.take(commit=commit) == []
    assert hub.hits(fault) == 1
    assert it.tally.counts.retries == 1


def test_a_full_disk_for_the_pack_is_the_same_error_and_one_of_the_sink_is_not(tmp_path: Path) -> None:
    with taker(canned(PACK), tmp_path) as (it, _targets):
        with pytest.raises(SourceUnavailable, match="could not be written here"):
            fetch_blobs(it.http, RepoRef("org/x", COMMIT), FILES, FILES, lambda *_: None, folder=tmp_path / "none")

        def full(*_: object) -> None:
            raise OSError(28, "full")

        with pytest.raises(OSError, match="full"):
            fetch_blobs(it.http, RepoRef("org/x", COMMIT), FILES, FILES, full)


def test_nothing_is_left_in_the_folder(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    with taker(canned(PACK), tmp_path) as (it, _targets):
        seen: list[list[Path]] = []
        fetch_blobs(
            it.http, RepoRef("org/x", COMMIT), FILES, FILES,
            lambda *_: seen.append(list((tmp_path / "blobs").iterdir())), folder=tmp_path / "blobs",
        )  # fmt: skip
    assert seen == [[]] * len(FILES)


# --- what is decided


def test_a_pack_is_for_many_files_that_are_not_too_much() -> None:
    small = [SourceFile(f"{n}", 2000, f"{n:040x}", lfs=False) for n in range(100)]
    assert worth_a_pack(small)
    assert not worth_a_pack(small[:63])
    assert not worth_a_pack([SourceFile(f.path, 1 << 30, f.oid, lfs=False) for f in small])


@given(wanted=st.lists(st.integers(0, 1 << 20), max_size=50), more=st.lists(st.integers(0, 1 << 24), max_size=50))
def test_a_whole_commit_never_brings_more_than_its_share_of_what_nobody_wants(
    wanted: list[int], more: list[int]
) -> None:
    files = [SourceFile(f"{n}", size, f"{n:040x}", lfs=False) for n, size in enumerate([*wanted, *more])]
    chosen = files[: len(wanted)]
    plain, filtered = (whole_commit(chosen, files, filtered=how) for how in (False, True))
    assert filtered or not plain
    if plain:
        assert sum(more) <= sum(wanted) + (1 << 20)
    assert whole_commit(files, files, filtered=False)


@needs_git
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    files=st.dictionaries(
        st.lists(st.text("abc", min_size=1, max_size=2), min_size=1, max_size=4).map("/".join).map(lambda p: p + ".f"),
        st.binary(max_size=2000), min_size=1, max_size=30,
    )
)  # fmt: skip
def test_the_limits_let_gits_packs_through(tmp_path: Path, files: dict[str, bytes]) -> None:
    folder = tmp_path / f"{abs(hash(tuple(files)))}"
    made = git_repo(folder)
    made.commit({path.encode(): content for path, content in files.items()})
    pack = made.run("pack-objects", "--stdout", "--revs", "-q", stdin=b"main\n")
    limits = pack_limits([regular(path, content) for path, content in files.items()])
    assert len(pack) <= limits.size
    assert int.from_bytes(pack[8:12], "big") <= limits.objects
