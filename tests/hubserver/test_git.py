"""git itself as the client of the local Hub: clone, fetch, partial clones, and who is let in."""

from __future__ import annotations

import base64
from hashlib import sha256
from pathlib import Path

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crucible.hub.pktline import Mark, packet
from crucible.hub.server import HubOptions, RateLimits, User, create_branch, create_tag, rename_repo, set_access
from crucible.hub.server.snapshot import FileEntry, Snapshot, git_sha1, lfs_pointer
from tests.crucible.git_cases import git, needs_git
from tests.hubserver.faults import FaultyHub

pytestmark = needs_git

FILES: dict[str, bytes | Path] = {
    "README.md": b"# hello\n",
    "a.txt": b"before the folder a, in git's order\n",
    "a/b.txt": b"",
    "a/deep/er/c.txt": b"c" * 5000,
    "a0.txt": b"after the folder a\n",
    "na\u00efve \u00e5/\u6f22 \U0001f600.txt": b"unicode\n",
    "copy.md": b"# hello\n",
    "data/train.bin": b"\0" * 3000,
}


class Client:
    """git on a machine of its own."""

    def __init__(self, home: Path, hub: FaultyHub) -> None:
        self.home, self.hub = home, hub

    def url(self, repo: str = "datasets/org/data", user: str = "") -> str:
        return self.hub.endpoint.replace("://", f"://{user}") + f"/{repo}"

    def clone(self, *options: str, url: str = "", to: str = "work") -> Path:
        git("clone", "-q", *options, url or self.url(), self.home / to, home=self.home)
        return self.home / to

    def run(self, *words: str, at: str = "work") -> str:
        return git("-C", self.home / at, *words, home=self.home).decode().strip()


@pytest.fixture
def client(tmp_path: Path, hub: FaultyHub) -> Client:
    (tmp_path / "client").mkdir()
    return Client(tmp_path / "client", hub)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and ".git" not in path.relative_to(folder).parts
    }


def as_in_git(files: dict[str, bytes | Path]) -> dict[str, bytes]:
    """What git has of FILES: the LFS file as a pointer."""
    made = {path: content for path, content in files.items() if isinstance(content, bytes)}
    made["data/train.bin"] = lfs_pointer(sha256(made["data/train.bin"]).hexdigest(), 3000)
    return made


def test_a_shallow_clone_has_the_files_of_the_commit_in_three_requests(hub: FaultyHub, client: Client) -> None:
    hub.import_files("org/data", {"old": b"gone"})
    commit = hub.import_files("org/data", FILES, delete=["old"])
    work = client.clone("--depth", "1")
    assert contents(work) == as_in_git(FILES)
    assert client.run("rev-parse", "HEAD") == commit
    assert client.run("rev-list", "--count", "HEAD") == "1"
    client.run("fsck", "--strict", "--no-dangling")
    assert [record.path.rpartition("org/data")[2] for record in hub.log] == [
        "/info/refs", "/git-upload-pack", "/git-upload-pack",
    ]  # fmt: skip
    assert {(record.status, record.bucket, record.done) for record in hub.log} == {(200, "pages", True)}
    assert hub.log[-1].sent > 0


def test_a_full_clone_has_the_history_that_the_api_tells(hub: FaultyHub, client: Client) -> None:
    commits = [hub.import_files("org/data", {f"{n}.txt": b"%d" % n}, message=f"number {n}\n\nwhy") for n in range(4)]
    create_tag(hub.root, "org/data", "v1", at=commits[1])
    create_branch(hub.root, "org/data", "refs/pr/1", at=commits[0])
    client.clone()
    assert client.run("log", "--format=%H").split() == commits[::-1]
    assert client.run("log", "-1", "--format=%B") == "number 3\n\nwhy"
    assert client.run("rev-parse", "v1") == commits[1]
    told = httpx.get(f"{hub.endpoint}/api/datasets/org/data/commits/main", timeout=10).json()
    assert [entry["id"] for entry in told] == commits[::-1]
    assert client.run("ls-remote", client.url(), "refs/pr/*").split() == [commits[0], "refs/pr/1"]
    client.run("fsck", "--strict", "--no-dangling")


def test_the_listing_names_folders_as_git_does(hub: FaultyHub, client: Client) -> None:
    commit = hub.import_files("org/data", FILES)
    client.clone("--depth", "1")
    tree = httpx.get(f"{hub.endpoint}/api/datasets/org/data/tree/{commit}?recursive=true", timeout=10).json()
    lines = client.run("-c", "core.quotePath=false", "ls-tree", "-r", "-t", "HEAD").splitlines()
    in_git = {line.partition("\t")[2].strip('"'): line.split()[2] for line in lines}
    assert {entry["path"]: entry["oid"] for entry in tree} == in_git


def test_any_commit_can_be_fetched_and_a_shallow_clone_made_whole(hub: FaultyHub, client: Client) -> None:
    commits = [hub.import_files("org/data", {"n": b"%d" % n}) for n in range(4)]
    work = client.clone("--depth", "1")
    client.run("fetch", "-q", "--depth", "1", "origin", commits[1])
    client.run("checkout", "-q", commits[1])
    assert contents(work) == {"n": b"1"}
    client.run("fetch", "-q", "--depth", "2", "origin", "main")
    client.run("fetch", "-q", "--unshallow", "origin")
    assert client.run("log", "--format=%H", "origin/main").split() == commits[::-1]
    client.run("fsck", "--strict", "--no-dangling")


@pytest.mark.parametrize("depth", [(), ("--depth", "1")])
def test_a_fetch_brings_only_what_is_new(hub: FaultyHub, client: Client, depth: tuple[str, ...]) -> None:
    hub.import_files("org/data", {"big": bytes(range(1, 256)) * 4000, "n": b"0"}, lfs=False)
    work = client.clone(*depth)
    hub.clear_log()
    commit = hub.import_files("org/data", {"n": b"1"})
    client.run("pull", "-q")
    assert client.run("rev-parse", "HEAD") == commit
    assert contents(work)["n"] == b"1"
    assert hub.bytes_sent("*git-upload-pack", origin="hub") < 2000
    hub.clear_log()
    client.run("pull", "-q")
    assert hub.bytes_sent("*git-upload-pack", origin="hub") < 200
    client.run("fsck", "--strict", "--no-dangling")


@pytest.mark.parametrize("filtering", ["blob:none", "blob:limit=100", "blob:limit=1k"])
def test_a_partial_clone_asks_for_its_blobs_when_it_needs_them(hub: FaultyHub, client: Client, filtering: str) -> None:
    hub.import_files("org/data", FILES)
    work = client.clone("--depth", "1", "--no-checkout", f"--filter={filtering}")
    missing = client.run("rev-list", "--objects", "--missing=print", "HEAD").count("?")
    assert missing == {"blob:none": 7, "blob:limit=100": 2, "blob:limit=1k": 1}[filtering]
    client.run("checkout", "-q", "main")
    assert contents(work) == as_in_git(FILES)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--filter=tree:0",), "not done here"),
        (("--shallow-since=2020-01-01",), "not done here"),
        (("-c", "protocol.version=0"), "protocol 2 only"),
    ],
)
def test_what_is_not_served_is_said(hub: FaultyHub, client: Client, options: tuple[str, ...], says: str) -> None:
    hub.import_files("org/data", {"a": b"1"})
    with pytest.raises(AssertionError, match=says):
        client.clone(*options)


def test_a_push_is_refused(hub: FaultyHub, client: Client) -> None:
    hub.import_files("org/data", {"a": b"1"})
    client.clone()
    with pytest.raises(AssertionError, match="403"):
        client.run("push", "origin", "main:other")


def test_private_gated_and_disabled_repos_are_closed_to_git_too(tmp_path: Path) -> None:
    tokens = {"hf_org": User("org"), "hf_guest": User("guest"), "hf_other": User("other")}
    with FaultyHub(tmp_path / "hub", options=HubOptions(tokens=tokens)) as hub:
        client = Client(tmp_path, hub)
        hub.import_files("org/data", {"a": b"1"})

        def may(user: str) -> bool:
            done = git("ls-remote", client.url(user=user), home=tmp_path, check=False)
            assert b"hf_" not in b"".join(record.path.encode() for record in hub.log)
            return b"refs/heads/main" in done

        anyone, org, guest, other = "", "x:hf_org@", "x:hf_guest@", "x:hf_other@"
        assert [may(user) for user in (anyone, org, other)] == [True, True, True]
        set_access(hub.root, "org/data", private=True)
        assert not may("x:wrong@")
        assert [may(user) for user in (anyone, org, other)] == [False, True, False]
        set_access(hub.root, "org/data", private=False, gated=True, allowed=["guest"])
        assert [may(user) for user in (anyone, org, guest, other)] == [False, True, True, False]
        set_access(hub.root, "org/data", disabled=True)
        assert not may(org)
        refused = httpx.get(f"{client.url('datasets/no/such')}/info/refs?service=git-upload-pack", timeout=10)
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"].startswith("Basic")
        header = {"authorization": "Basic " + base64.b64encode(b"\xff").decode()}
        assert httpx.get(f"{hub.endpoint}/api/whoami-v2", headers=header, timeout=10).status_code == 401


def test_a_renamed_repo_is_found_and_types_are_kept_apart(hub: FaultyHub, client: Client) -> None:
    hub.import_files("org/data", {"a": b"dataset"})
    hub.import_files("org/data", {"a": b"model"}, repo_type="model")
    hub.import_files("org/data", {"a": b"space"}, repo_type="space")
    rename_repo(hub.root, "org/data", "org/new")
    for repo, content in (
        ("datasets/org/data", b"dataset"), ("datasets/org/new.git", b"dataset"),
        ("org/data.git", b"model"), ("spaces/org/data.git", b"space"),
    ):  # fmt: skip
        assert contents(client.clone("--depth", "1", url=client.url(repo), to=repo)) == {"a": content}


def test_git_spends_the_quota_of_pages_and_is_told_when_it_is_used_up(tmp_path: Path) -> None:
    options = HubOptions(limits=RateLimits(pages=1), clock=lambda: 1_800_000_000.0)  # both in one window
    with FaultyHub(tmp_path / "hub", options=options) as hub:
        hub.import_files("org/data", {"a": b"1"})
        url = f"{hub.endpoint}/datasets/org/data.git/info/refs?service=git-upload-pack"
        first, second = (httpx.get(url, headers={"git-protocol": "version=2"}, timeout=10) for _ in range(2))
        assert first.status_code == 200
        assert '"pages";r=0' in first.headers["ratelimit"]
        assert second.status_code == 429
        assert '"pages";r=0' in second.headers["ratelimit"]


@pytest.mark.parametrize(
    ("lines", "status", "says"),
    [
        (
            [packet("command=fetch"), Mark.DELIMITER.value, packet("want " + "0" * 40), packet("done")],
            200,
            "not our ref",
        ),
        ([packet("command=fetch"), Mark.DELIMITER.value, packet("want ../../x"), packet("done")], 200, "not our ref"),
        ([packet("command=push"), Mark.DELIMITER.value], 200, "unknown command"),
        ([packet("command=fetch"), packet("object-format=sha256"), Mark.DELIMITER.value], 200, "sha1"),
        ([b"00zz"], 400, "length"),
        ([b"0"], 400, "inside a packet"),
        ([], 200, ""),
    ],
)
def test_nonsense_is_answered_and_not_believed(hub: FaultyHub, lines: list[bytes], status: int, says: str) -> None:
    hub.import_files("org/data", {"a": b"1"})
    url = f"{hub.endpoint}/datasets/org/data.git/git-upload-pack"
    reply = httpx.post(url, content=b"".join(lines), headers={"git-protocol": "version=2"}, timeout=10)
    assert (reply.status_code, says in reply.text) == (status, True)
    assert httpx.get(url, timeout=10).status_code == 405
    assert httpx.get(url.replace("git-upload-pack", "info/refs"), timeout=10).status_code == 400


names = st.text(
    st.characters(exclude_characters="/\\\0:", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=8
).filter(lambda name: name not in (".", "..") and ".git" not in name.lower())


@pytest.fixture(scope="module")
def empty_repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hash")
    git("init", "-q", "--bare", folder / "r.git", home=folder)
    return folder


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(paths=st.lists(st.lists(names, min_size=1, max_size=4), min_size=1, max_size=12))
def test_trees_are_named_as_git_names_them(empty_repo: Path, paths: list[list[str]]) -> None:
    files: dict[str, FileEntry] = {}
    folders: set[str] = set()
    for parts in paths:
        above = {"/".join(parts[:end]) for end in range(1, len(parts))}
        path = "/".join(parts)
        if path not in folders and not above & files.keys():
            folders |= above
            files[path] = FileEntry(path, 1, "0" * 64, git_sha1(path.encode()), lfs=False)
    lines = b"".join(b"100644 %b\t%b\0" % (file.oid.encode(), file.path.encode()) for file in files.values())
    at = {"GIT_DIR": str(empty_repo / "r.git"), "GIT_INDEX_FILE": str(empty_repo / "index")}
    git("read-tree", "--empty", home=empty_repo, **at)
    git("update-index", "-z", "--index-info", home=empty_repo, stdin=lines, **at)
    named = git("write-tree", "--missing-ok", home=empty_repo, **at).decode().strip()
    snapshot = Snapshot(files.values())
    assert snapshot.oid == named == git_sha1(next(snapshot.trees()), "tree")
