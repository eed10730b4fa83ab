"""git itself as the other end: repos made by it, served by its own upload-pack; and a server of canned replies."""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
import subprocess
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from crucible.hub.pktline import Mark, banded, packet
from crucible.hub.server.snapshot import git_sha1, lfs_pointer
from crucible.refs import SourceFile

GIT = shutil.which("git")
needs_git = pytest.mark.skipif(GIT is None, reason="git is not on this machine")
TIMEOUT_S = 120


def git(*words: str | bytes | Path, home: Path, stdin: bytes = b"", check: bool = True, **env: str) -> bytes:
    """Run git as if this machine had no settings of its own; its standard output."""
    settings = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_LFS_SKIP_SMUDGE": "1",
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@localhost", "GIT_AUTHOR_DATE": "1600000000 +0000",
        "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@localhost", "GIT_COMMITTER_DATE": "1600000000 +0000",
        **env,
    }  # fmt: skip
    done = subprocess.run(
        ["git", *words], input=stdin, env=settings, capture_output=True, timeout=TIMEOUT_S, check=False
    )
    assert not check or done.returncode == 0, done.stderr.decode(errors="replace")
    return done.stdout


@dataclass(frozen=True)
class GitRepo:
    """A bare repo made by git, with one branch."""

    path: Path
    home: Path

    def commit(self, files: Mapping[bytes, bytes]) -> str:
        """A commit that holds exactly these files, on top of what there was; names are bytes, as for git."""
        lines = [b"commit refs/heads/main\ncommitter a <a@localhost> 1 +0000\ndata 1\nm\n"]
        if git("rev-parse", "-q", "--verify", "main", home=self.home, check=False, GIT_DIR=str(self.path)):
            lines.append(b"from refs/heads/main^0\n")
        lines.append(b"deleteall\n")
        for name, content in files.items():
            quoted = b"".join(
                b"\\%03o" % byte if byte < 32 or byte > 126 or byte in b'"\\' else bytes([byte]) for byte in name
            )
            lines.append(b'M 100644 inline "%b"\ndata %d\n%b\n' % (quoted, len(content), content))
        git("fast-import", "--quiet", home=self.home, stdin=b"".join(lines), GIT_DIR=str(self.path))
        return self.run("rev-parse", "main").decode().strip()

    def run(self, *words: str, stdin: bytes = b"") -> bytes:
        return git(*words, home=self.home, stdin=stdin, GIT_DIR=str(self.path))

    def pack(self, *options: str) -> bytes:
        """All that `main` holds, packed by git."""
        return self.run("pack-objects", "--stdout", "--revs", "-q", *options, stdin=b"main\n")


def git_repo(folder: Path) -> GitRepo:
    folder.mkdir(parents=True, exist_ok=True)
    repo = GitRepo(folder / "repo.git", folder)
    git("init", "--bare", "-q", "-b", "main", repo.path, home=folder)
    for setting in ("uploadpack.allowFilter=true", "gc.auto=0"):
        repo.run("config", *setting.split("="))
    return repo


def regular(path: str, content: bytes) -> SourceFile:
    return SourceFile(path, len(content), git_sha1(content), lfs=False)


def lfs(path: str, content: bytes) -> tuple[SourceFile, bytes]:
    """An LFS file as a listing has it, and the text that git has in its place."""
    sha256 = hashlib.sha256(content).hexdigest()
    return SourceFile(path, len(content), sha256, lfs=True), lfs_pointer(sha256, len(content))


def sealed(body: bytes) -> bytes:
    """A pack with its checksum."""
    return body + hashlib.sha1(body, usedforsecurity=False).digest()


def packed_object(kind: int, content: bytes, base: bytes = b"", *, says: int | None = None) -> bytes:
    """One object of a pack. `base` goes between head and body; `says` is the size it claims."""
    length = len(content) if says is None else says
    head, length = bytearray([kind << 4 | length & 15]), length >> 4
    while length:
        head[-1] |= 0x80
        head.append(length & 0x7F)
        length >>= 7
    return bytes(head) + base + zlib.compress(content)


def pack_head(count: int, version: int = 2) -> bytes:
    return struct.pack(">4sII", b"PACK", version, count)


def varint(number: int) -> bytes:
    made = bytearray()
    while number > 0x7F:
        made.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*made, number])


def copying(base_size: int, result_size: int, *ranges: tuple[int, int]) -> bytes:
    """A delta that copies (offset, count) ranges of its base."""
    copies = b"".join(b"\xff" + struct.pack("<I", offset) + struct.pack("<I", count)[:3] for offset, count in ranges)
    return varint(base_size) + varint(result_size) + copies


GREETING = b"".join(
    [
        packet("# service=git-upload-pack"), Mark.FLUSH.value, packet("version 2"), packet("agent=canned"),
        packet("fetch=shallow filter"), packet("object-format=sha1"), Mark.FLUSH.value,
    ]
)  # fmt: skip


def pack_reply(pack: bytes) -> bytes:
    return b"".join([packet("packfile"), *banded([pack]), Mark.FLUSH.value])


@dataclass
class Reply:
    body: bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    length: int | None = None
    """What Content-Length says, if not the truth."""


@dataclass
class GitServer:
    endpoint: str
    asked: list[tuple[str, str, dict[str, str], bytes]] = field(default_factory=list)
    """(method, target, headers with lower-case names, body) of each request."""

    @property
    def targets(self) -> list[str]:
        return [f"{method} {target.partition('?')[0].rpartition('.git/')[2]}" for method, target, _, _ in self.asked]


Answer = Callable[[str, str, dict[str, str], bytes], Reply]


@contextmanager
def answering(answer: Answer) -> Iterator[GitServer]:
    """A server on loopback that answers as it is told."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            headers = {name.lower(): value for name, value in self.headers.items()}
            server.asked.append((self.command, self.path, headers, body))
            reply = answer(self.command, self.path, headers, body)
            self.send_response(reply.status)
            kind = "result" if self.command == "POST" else "advertisement"
            for name, value in {"Content-Type": f"application/x-git-upload-pack-{kind}", **reply.headers}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(reply.body) if reply.length is None else reply.length))
            self.end_headers()
            self.wfile.write(reply.body)
            self.close_connection = reply.length is not None

        do_GET = do_POST = handle_any

        def log_message(self, *words: object) -> None:
            pass

    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listener.daemon_threads = True
    server = GitServer(f"http://127.0.0.1:{listener.server_port}")
    thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        listener.shutdown()
        listener.server_close()
        thread.join(10)


def upload_pack(repo: GitRepo, *, protocol: int = 2) -> Answer:
    """git's own server for one repo. `protocol` 0: one that has never heard of another."""

    def answer(method: str, target: str, headers: dict[str, str], body: bytes) -> Reply:
        env = {"GIT_PROTOCOL": headers.get("git-protocol", "")} if protocol == 2 else {}
        words = ["upload-pack", "--stateless-rpc"]
        if method == "GET":
            assert target.endswith("/info/refs?service=git-upload-pack")
            said = git(*words, "--advertise-refs", repo.path, home=repo.home, **env)
            return Reply(packet("# service=git-upload-pack") + Mark.FLUSH.value + said)
        assert headers["content-type"] == "application/x-git-upload-pack-request"
        return Reply(git(*words, repo.path, home=repo.home, stdin=body, check=False, **env))

    return answer


def canned(pack: bytes) -> Answer:
    """A server that answers every fetch with this pack."""
    return lambda method, *_: Reply(GREETING if method == "GET" else pack_reply(pack))
