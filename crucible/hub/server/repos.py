"""The repos of a local Hub on disk: blobs by hash, trees and commits by hash, refs that name commits.

    ROOT/hub.json                                the layout's version
    ROOT/blobs/ab/abcd…                          content by sha256, shared by all repos
    ROOT/repos/datasets/ns--name/repo.json       private, gated, allowed, disabled, likes, downloads, created
    ROOT/repos/datasets/ns--name/trees/{id}      one JSON line a file; the id is of these lines, not git's
    ROOT/repos/datasets/ns--name/commits/{id}    tree, parent, message, author, date
    ROOT/repos/datasets/ns--name/refs/heads/main 40 hex; also refs/tags/…, refs/pr/N, refs/convert/parquet
    ROOT/moved/datasets/ns--old                  the id a renamed repo has now

Concurrency: everything but refs, repo.json and moved is written once under its own hash. Every write is a
temporary file and a rename, so a reader in any process sees the old or the new, and a crash leaves at most a
file in ROOT/tmp. Writers of one repo hold its lock (`Repo.lock`); readers need none.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path

from filelock import FileLock

from crucible.errors import RepoNotFound, RevisionNotFound, StoreVersion, UsageError
from crucible.refs import RepoType, check_repo_id, is_repo_id

from .names import COMMIT, REPO_TYPES, is_ref
from .snapshot import FileEntry, Snapshot, git_sha1

LAYOUT = 1
SNAPSHOTS_KEPT = 16  # trees held in memory; one of a million files takes about half a gigabyte


@dataclass(frozen=True, slots=True)
class RepoMeta:
    """What `repo.json` says of a repo; everything that is not content."""

    created: str
    private: bool = False
    gated: bool = False
    allowed: tuple[str, ...] = ()
    """Users, beside the owner, that a gated repo lets in."""
    disabled: bool = False
    likes: int = 0
    downloads: int = 0


@dataclass(frozen=True, slots=True)
class Commit:
    """One commit. Its id is git's, of a commit object that leaves out who and when: equal histories have equal ids."""

    id: str
    tree: str
    parent: str | None
    message: str
    author: str
    date: str


@dataclass(frozen=True, slots=True)
class Refs:
    """All refs of a repo, full name to commit."""

    targets: dict[str, str] = field(default_factory=dict)

    def below(self, prefix: str) -> Iterator[tuple[str, str, str]]:
        """(short name, full name, commit) of the refs that begin with `prefix`, sorted."""
        for ref in sorted(self.targets):
            if ref.startswith(prefix):
                yield ref[len(prefix) :], ref, self.targets[ref]


class Store:
    """The folder of a local Hub. See the module docstring for the layout and for who may write when."""

    def __init__(self, root: str | os.PathLike[str], *, create: bool = True, durable: bool = True) -> None:
        self.root = Path(root)
        self.durable = durable
        self._snapshots: OrderedDict[str, Snapshot] = OrderedDict()
        self._guard = threading.Lock()
        marker = self.root / "hub.json"
        if marker.exists():
            layout = json.loads(marker.read_bytes()).get("layout")
            if layout != LAYOUT:
                raise StoreVersion(str(self.root), f"layout {layout}, this version reads {LAYOUT}")
        elif not create:
            raise UsageError(f"{self.root} is no Hub folder (no hub.json); import a folder into it first")
        elif self.root.exists() and any(self.root.iterdir()):
            raise UsageError(f"{self.root} is not empty and no Hub folder (no hub.json); choose another")
        else:
            self.write(marker, json.dumps({"layout": LAYOUT}).encode())

    def blob_path(self, sha256: str) -> Path:
        return self.root / "blobs" / sha256[:2] / sha256

    def temporary(self) -> Path:
        """A new empty file on the same filesystem as the blobs."""
        folder = self.root / "tmp"
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder)
        os.close(handle)
        return Path(name)

    def publish(self, temporary: Path, target: Path) -> None:
        """Make a finished temporary file visible under its name, at once and after its bytes are on disk."""
        if self.durable:
            with temporary.open("rb") as stream:
                os.fsync(stream.fileno())
        temporary.chmod(0o644)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.replace(target)

    def write(self, target: Path, content: bytes | Iterable[bytes]) -> None:
        temporary = self.temporary()
        try:
            with temporary.open("wb") as stream:
                stream.writelines([content] if isinstance(content, bytes) else content)
            self.publish(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def repos(self, repo_type: RepoType) -> Iterator[Repo]:
        folder = self.root / "repos" / f"{repo_type}s"
        for name in sorted(os.listdir(folder)) if folder.is_dir() else []:
            repo = Repo(self, repo_type, name.replace("--", "/"))
            if repo.exists():
                yield repo

    def find(self, repo_type: RepoType, repo_id: str) -> Repo | None:
        if not is_repo_id(repo_id):
            return None
        repo = Repo(self, repo_type, repo_id)
        return repo if repo.exists() else None

    def open(self, repo_type: str, repo_id: str) -> Repo:
        """The repo, which must exist. Raises RepoNotFound."""
        repo = self.find(_checked_type(repo_type), check_repo_id(repo_id))
        if repo is None:
            raise RepoNotFound(repo_id, str(self.root))
        return repo

    def create(self, repo_type: str, repo_id: str, meta: RepoMeta) -> Repo:
        """The repo, made if there is none; an existing one keeps its own meta."""
        repo = Repo(self, _checked_type(repo_type), check_repo_id(repo_id))
        if not repo.exists():
            repo.set_meta(meta)
            self._moved(repo.type, repo_id).unlink(missing_ok=True)  # a new repo takes the old name back
        return repo

    def _moved(self, repo_type: RepoType, repo_id: str) -> Path:
        return self.root / "moved" / f"{repo_type}s" / repo_id.replace("/", "--")

    def moved_to(self, repo_type: RepoType, repo_id: str) -> str | None:
        """The present id of a repo that was renamed from `repo_id`, through any number of renames."""
        seen: set[str] = set()
        while is_repo_id(repo_id) and repo_id not in seen:
            seen.add(repo_id)
            try:
                repo_id = self._moved(repo_type, repo_id).read_text()
            except (FileNotFoundError, NotADirectoryError):
                return repo_id if len(seen) > 1 else None
        return None

    def rename(self, repo: Repo, new_id: str) -> None:
        target = Repo(self, repo.type, check_repo_id(new_id))
        if target.exists():
            raise UsageError(f"{new_id}: there is already a {repo.type} of this name")
        with repo.lock():
            repo.folder.rename(target.folder)
            self._moved(repo.type, new_id).unlink(missing_ok=True)
            self.write(self._moved(repo.type, repo.id), new_id.encode())

    def delete(self, repo: Repo) -> None:
        """Remove a repo. Blobs stay: other repos may share them."""
        with repo.lock():
            (self.root / "tmp").mkdir(exist_ok=True)
            doomed = Path(tempfile.mkdtemp(dir=self.root / "tmp"))
            repo.folder.rename(doomed / "repo")  # gone at once for every reader, then emptied
        shutil.rmtree(doomed)

    def snapshot(self, repo: Repo, tree: str) -> Snapshot:
        """The tree in memory, from a small cache. Safe from any thread."""
        with self._guard:
            if known := self._snapshots.get(tree):
                self._snapshots.move_to_end(tree)
                return known
        made = Snapshot(repo.read_tree(tree))
        with self._guard:
            self._snapshots[tree] = made
            while len(self._snapshots) > SNAPSHOTS_KEPT:
                self._snapshots.popitem(last=False)
        return made


class Repo:
    """One repo's folder. Cheap to make; holds nothing in memory."""

    def __init__(self, store: Store, repo_type: RepoType, repo_id: str) -> None:
        self.store, self.id = store, repo_id
        self.type: RepoType = repo_type
        self.folder = store.root / "repos" / f"{repo_type}s" / repo_id.replace("/", "--")

    @property
    def owner(self) -> str:
        return self.id.partition("/")[0] if "/" in self.id else ""

    def exists(self) -> bool:
        return (self.folder / "repo.json").is_file()

    def lock(self) -> FileLock:
        folder = self.store.root / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / f"{self.folder.parent.name}--{self.folder.name}.lock")

    def meta(self) -> RepoMeta:
        raw = json.loads((self.folder / "repo.json").read_bytes())
        return RepoMeta(**{**raw, "allowed": tuple(raw.get("allowed", ()))})

    def set_meta(self, meta: RepoMeta) -> None:
        self.store.write(self.folder / "repo.json", json.dumps(asdict(meta), indent=1).encode())

    def refs(self) -> Refs:
        targets = {}
        base = self.folder / "refs"
        for folder, _, names in os.walk(base):
            for name in names:
                path = Path(folder, name)
                targets[f"refs/{path.relative_to(base).as_posix()}"] = path.read_text()
        return Refs(targets)

    def ref(self, ref: str) -> str | None:
        if not ref.startswith("refs/") or not is_ref(ref):
            return None
        try:
            return (self.folder / ref).read_text()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return None

    def set_ref(self, ref: str, commit: str) -> None:
        self.store.write(self.folder / ref, commit.encode())

    def resolve(self, revision: str) -> str | None:
        """A commit id, branch, tag or full ref name to the commit id; None when there is no such revision."""
        if COMMIT.fullmatch(revision) and (self.folder / "commits" / revision).is_file():
            return revision
        return self.ref(revision) or self.ref(f"refs/heads/{revision}") or self.ref(f"refs/tags/{revision}")

    def pin(self, revision: str) -> str:
        """Like `resolve`. Raises RevisionNotFound, naming the revisions there are."""
        commit = self.resolve(revision)
        if commit is None:
            raise RevisionNotFound(self.id, revision, sorted(self.refs().targets))
        return commit

    def commit(self, commit_id: str) -> Commit:
        return Commit(commit_id, **json.loads((self.folder / "commits" / commit_id).read_bytes()))

    def history(self, commit_id: str | None) -> Iterator[Commit]:
        """The commit and its ancestors, newest first."""
        while commit_id is not None:
            commit = self.commit(commit_id)
            yield commit
            commit_id = commit.parent

    def snapshot(self, commit_id: str) -> Snapshot:
        return self.store.snapshot(self, self.commit(commit_id).tree)

    def lfs_files(self, wanted: Collection[str]) -> dict[str, FileEntry]:
        """sha256 -> a file of that content, of those of `wanted` that are LFS files of any commit; branches first."""
        found: dict[str, FileEntry] = {}
        trees: set[str] = set()
        heads = sorted(set(self.refs().targets.values()))
        for commit_id in chain(heads, sorted(os.listdir(self.folder / "commits")) if heads else ()):
            if len(found) == len(wanted):
                break
            if (tree := self.commit(commit_id).tree) not in trees:
                trees.add(tree)
                known = self.store.snapshot(self, tree).lfs
                found |= {oid: known[oid] for oid in wanted if oid in known and oid not in found}
        return found

    def read_tree(self, tree: str) -> Iterator[FileEntry]:
        with (self.folder / "trees" / tree).open("rb") as stream:
            for line in stream:
                yield FileEntry(*json.loads(line))

    def add_commit(
        self, files: Iterable[FileEntry], *, parent: str | None, message: str, author: str, date: str
    ) -> Commit:
        """Store a tree and a commit on it; no ref moves. The same tree on its own parent gives the parent back."""
        digest = hashlib.sha1(usedforsecurity=False)
        lines = []
        snapshot = Snapshot(files)
        for file in snapshot.files:
            line = json.dumps([file.path, file.size, file.sha256, file.oid, file.lfs], ensure_ascii=False) + "\n"
            digest.update(line.encode())
            lines.append(line.encode())
        tree = digest.hexdigest()
        if parent is not None and (before := self.commit(parent)).tree == tree:
            return before
        if not (self.folder / "trees" / tree).exists():
            self.store.write(self.folder / "trees" / tree, lines)
        commit_id = git_sha1(commit_object(snapshot.oid, parent, message), "commit")
        path = self.folder / "commits" / commit_id
        if not path.exists():
            body = {"tree": tree, "parent": parent, "message": message, "author": author, "date": date}
            self.store.write(path, json.dumps(body).encode())
        return self.commit(commit_id)


def commit_object(tree: str, parent: str | None, message: str) -> bytes:
    """A commit as git stores it; `tree` is git's own id."""
    lines = [f"tree {tree}", *([f"parent {parent}"] if parent else [])]
    lines += [f"{who} crucible <crucible@localhost> 0 +0000" for who in ("author", "committer")]
    return ("\n".join(lines) + "\n\n" + message.replace("\0", "") + "\n").encode()


def _checked_type(repo_type: str) -> RepoType:
    for known in REPO_TYPES:
        if repo_type == known:
            return known
    raise UsageError(f"{repo_type!r} is no repo type; there are: {', '.join(REPO_TYPES)}")
