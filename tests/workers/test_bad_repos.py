"""A Hub and a repo that mean ill, through the public door: a typed error soon, nothing outside, run or leaked."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import crucible
from crucible import session
from crucible.errors import (
    CorruptFile,
    CrucibleError,
    InvalidCard,
    NoDataFiles,
    PullIncomplete,
    ScriptRepo,
    SizeMismatch,
    SourceUnavailable,
    StoreError,
    UnsafePath,
)
from crucible.hub import client
from crucible.printable import printable, printable_json
from tests.fakes.badhub import COMMIT, REPO, BadHub, entry
from tests.fakes.wired import Hangup, Talk, Wired

ROWS = b'{"a": 1}\n'
TOKEN = "hf_of_a_test"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "HF_TOKEN": TOKEN,
        "CRUCIBLE_TRIES": "2",
        "CRUCIBLE_BACKOFF_CAP": "0.01",
        "HF_HUB_DOWNLOAD_TIMEOUT": "5",
        "CRUCIBLE_ROW_BYTES": "1MiB",
        "CRUCIBLE_UNPACKED_BYTES": "8MiB",
    }.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def kept() -> Iterator[Callable[[], set[Path]]]:
    """What lies beside this test's home that was not there before: nothing, ever."""
    home = Path(os.environ["HOME"])
    before = set(home.parent.iterdir())
    yield lambda: set(home.parent.iterdir()) - before
    assert set(home.parent.iterdir()) == before
    assert {path.name for path in home.iterdir()} <= {"hf", "crucible"}


def load(hub: BadHub) -> list[dict[str, Any]]:
    return list(crucible.load_dataset(REPO, split="train", endpoint=hub.url))


def pull(hub: BadHub) -> Any:
    return session.pull(REPO, endpoint=hub.url)


def says(body: bytes, *headers: str, status: str = "200 OK") -> Callable[[Talk], None]:
    return lambda talk: talk.reply(body, *headers, status=status)


def a_list(*entries: Any) -> Callable[[Talk], None]:
    return says(json.dumps(entries).encode())


def sized(size: Any) -> dict[str, Any]:
    return entry("train.jsonl", ROWS, lfs={"oid": "0" * 64, "size": size})


LISTINGS = {
    "deep": says(b"[" * 200_000),
    "no list": says(b'{"a": 1}'),
    "no entries": a_list(1, "x", None),
    "no UTF-8": says(b"\xff\xfe[]"),
    "infinite size": says(b'[{"type":"file","path":"t.jsonl","size":Infinity,"oid":"' + b"0" * 40 + b'"}]'),
    "size of no file": a_list(sized(10**40)),
    "size beyond all": a_list(sized(1 << 62)),
    "size below nothing": a_list(sized(-5)),
    "size of letters": a_list(sized("many")),
    "lfs of another kind": a_list(entry("train.jsonl", ROWS, lfs=[1])),
    "hash that is a path": a_list(entry("train.jsonl", ROWS, lfs={"oid": "../" * 20, "size": 9})),
    "hash in capitals": a_list(entry("train.jsonl", ROWS, lfs={"oid": "A" * 64, "size": 9})),
}


@pytest.mark.parametrize("listing", LISTINGS)
def test_a_listing_that_no_hub_would_give_is_refused(listing: str, kept: Callable[[], set[Path]]) -> None:
    with BadHub({"train.jsonl": ROWS}) as hub:
        hub.answers["/tree/"] = LISTINGS[listing]
        for command in (load, pull):
            with pytest.raises(SourceUnavailable, match=r"listing|answer is not JSON|absurd"):
                command(hub)


@pytest.mark.parametrize("sha", ["../" * 13 + "x", "", "A" * 40, 5, None, ["c" * 40], "c" * 39 + "\n"])
def test_a_commit_that_is_none_is_refused(sha: Any) -> None:
    with BadHub({"train.jsonl": ROWS}) as hub:
        hub.answers["/revision/"] = says(json.dumps({"sha": sha}).encode())
        with pytest.raises(SourceUnavailable, match="names no commit"):
            load(hub)


@pytest.mark.parametrize("files", [False, True])
def test_a_listing_without_an_end_is_given_up(files: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "BARREN_PAGES", 30)
    monkeypatch.setattr(client, "MOST_FILES", 30)
    with BadHub() as hub:

        def page(talk: Talk) -> None:
            number = len(hub.heads)
            link = f'Link: <{hub.url}/api/datasets/{REPO}/tree/{COMMIT}?cursor={number}>; rel="next"'
            talk.reply(json.dumps([entry(f"{number}.jsonl", ROWS)] if files else []).encode(), link)

        hub.answers["/tree/"] = page
        with pytest.raises(SourceUnavailable, match="listing does not end"):
            load(hub)
        assert len(hub.heads) < 40


UNSAFE = [
    *("../x.jsonl", "/etc/x.jsonl", "a/../../x.jsonl", "a//b.jsonl", "./a.jsonl", "..", "a/..", "a/"),
    *("C:/x.jsonl", "a\\..\\b.jsonl", "\\\\host\\x.jsonl", "a\x00b.jsonl", "\udc80.jsonl", "x" * 300 + ".jsonl"),
]


@pytest.mark.parametrize("path", UNSAFE)
def test_a_name_that_leads_elsewhere_is_refused_before_a_byte(path: str, kept: Callable[[], set[Path]]) -> None:
    with BadHub({"train.jsonl": ROWS}) as hub:
        hub.listing = [entry(path, ROWS)]
        with pytest.raises(UnsafePath) as caught:
            pull(hub)
        assert caught.value.path == path
        str(caught.value).encode()  # also of what is no text
        if path.endswith(".jsonl"):  # else it is no data, and nobody asks for it
            with pytest.raises(UnsafePath):
                load(hub)
        assert not [head for head in hub.heads if "/resolve/" in head]


@pytest.mark.parametrize(
    "paths",
    [
        ["/".join(["d" * 200] * 25) + "/x.jsonl"],  # longer than a path may be, no part of it too long
        ["a", "a/x.jsonl"],
        ["a/x.jsonl", "a"],
    ],
)
def test_names_that_this_disk_cannot_hold_are_a_named_error(paths: list[str], kept: Callable[[], set[Path]]) -> None:
    with BadHub(dict.fromkeys(paths, ROWS)) as hub:
        with pytest.raises((StoreError, PullIncomplete)):
            pull(hub)
        assert load(hub) == [{"a": 1}] * sum(path.endswith(".jsonl") for path in paths)


@pytest.mark.parametrize(
    "path", ["NUL", "con.jsonl", "train .", "a" * 240 + ".jsonl", ".git/config", "-rf", "~/x.jsonl"]
)
def test_odd_names_are_names(path: str, kept: Callable[[], set[Path]]) -> None:
    with BadHub({path: ROWS, "train.jsonl": ROWS}) as hub:
        assert (Path(pull(hub).path) / path).read_bytes() == ROWS


def test_names_that_differ_in_case_only_stay_apart() -> None:
    files = {"train.jsonl": b'{"a": 1}\n', "Train.jsonl": b'{"a": 2}\n', "TRAIN.JSONL": b'{"a": 3}\n'}
    with BadHub(files) as hub:
        folder = Path(pull(hub).path)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == files


OBEYED = "\x1b]0;owned\x07\x1b[2J\x9b1m\u202egnp\u2066"


def test_no_name_or_word_of_a_hub_speaks_to_the_terminal() -> None:
    with BadHub({f"{OBEYED}.jsonl": b"no json"}) as hub:
        with pytest.raises(CorruptFile) as caught:
            load(hub)
        assert OBEYED in caught.value.path
        hub.answers["/resolve/"] = says(b"", "X-Error-Message: " + "\x9b2J", status="500 \x1b[2J")
        with pytest.raises(PullIncomplete) as other:
            pull(hub)
    for text in (str(caught.value), str(other.value), *getattr(other.value, "__notes__", ())):
        assert text == printable(text)
        assert not set(OBEYED) & set(text) & set("\x1b\x07\x9b\u202e\u2066")
    assert json.loads(printable_json(json.dumps(OBEYED, ensure_ascii=False))) == OBEYED
    assert printable("a\tb\nc d é 中") == "a\tb\nc d é 中"


REDIRECTS = ["file:///etc/passwd", "gopher://x", "http://[::1", "//", "javascript:x", "http://\x00", "loop"]


@pytest.mark.parametrize("part", ["/resolve/", "/tree/", "/revision/"])
@pytest.mark.parametrize("where", REDIRECTS)
def test_a_redirect_that_leads_nowhere_ends(part: str, where: str) -> None:
    with BadHub({"train.jsonl": ROWS}) as hub:

        def redirect(talk: Talk) -> None:
            target = f"{hub.url}{part}{len(hub.heads)}" if where == "loop" else where
            talk.reply(b"", f"Location: {target}", status="302 Found")

        hub.answers[part] = redirect
        with pytest.raises(CrucibleError):
            load(hub)
        assert len(hub.heads) < 100


@pytest.mark.parametrize("part", ["/resolve/", "/tree/", "/revision/"])
def test_the_token_does_not_follow_a_redirect(part: str) -> None:
    with Wired(says(ROWS)) as other, BadHub({"train.jsonl": ROWS}) as hub:
        hub.answers[part] = says(b"", f"Location: {other.url}/x", status="302 Found")
        try:
            assert load(hub) == [{"a": 1}]
        except SourceUnavailable:
            assert part != "/resolve/"
        assert other.heads
        assert not [head for head in other.heads if TOKEN in head]
        assert [head for head in hub.heads if TOKEN in head], "the Hub itself was not told"


def endless(talk: Talk) -> None:
    talk.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        talk.send(b"10000\r\n", b"x" * 0x10000, b"\r\n")


def headers_for_ever(talk: Talk) -> None:
    talk.send(b"HTTP/1.1 200 OK\r\n")
    while True:
        talk.send(b"X-Y: " + b"z" * 1000 + b"\r\n")


def one_endless_header(talk: Talk) -> None:
    talk.send(b"HTTP/1.1 200 OK\r\nX: ")
    while True:
        talk.send(b"z" * 65536)


def interim_for_ever(talk: Talk) -> None:
    while True:
        talk.send(b"HTTP/1.1 103 Early Hints\r\n\r\n" * 1000)


def cut(talk: Talk) -> None:
    talk.send(b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999\r\n\r\n{")
    raise Hangup


BODIES = {
    "endless": endless,
    "headers": headers_for_ever,
    "one header": one_endless_header,
    "interim": interim_for_ever,
    "cut": cut,
    "longer": says(ROWS + b"x" * 1000),
    "shorter": says(ROWS[:-2]),
    "empty": says(b""),
    "below nothing": lambda talk: talk.send(b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n"),
    "packed": says(gzip.compress(bytes(64 << 20)), "Content-Encoding: gzip"),
    "packed twice": says(gzip.compress(gzip.compress(bytes(8 << 20))), "Content-Encoding: gzip, gzip"),
    "packed otherwise": says(ROWS, "Content-Encoding: zstd"),
}


@pytest.mark.parametrize("part", ["/resolve/", "/revision/"])
@pytest.mark.parametrize("body", BODIES)
def test_a_reply_that_lies_or_does_not_end_is_an_error(body: str, part: str, kept: Callable[[], set[Path]]) -> None:
    with BadHub({"train.jsonl": ROWS}) as hub:
        hub.answers[part] = BODIES[body]
        with pytest.raises((SourceUnavailable, SizeMismatch)):
            load(hub)


def folded(levels: int, one: str) -> str:
    """A YAML list of lists, each of which has the one before ten times."""
    lines = [f"a0: &a0 [{', '.join([one] * 10)}]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, levels)]
    return "\n".join(lines) + "\n"


MERGED = "m0: &m0 {a: 1}\n" + "".join(f"m{n}: &m{n} {{<<: [{', '.join([f'*m{n - 1}'] * 8)}]}}\n" for n in range(1, 12))
STRUCTS = "f0: &f0 [{name: a, dtype: int64}]\n" + "".join(
    f"f{n}: &f{n} [{{name: a, struct: *f{n - 1}}}, {{name: b, struct: *f{n - 1}}}]\n" for n in range(1, 40)
)
CARDS = {
    "aliases": folded(30, "1"),
    "aliases as configs": folded(30, "1") + "configs: *a29\n",
    "aliases in a config's name": folded(30, "1") + "configs:\n- config_name: *a29\n",
    "merged keys": MERGED,
    "structs": STRUCTS + "dataset_info:\n  features: *f39\n",
    "an alias to itself": "a: &a [*a]\nconfigs: *a\n",
    "a struct in itself": "dataset_info:\n  features: &a [{name: x, struct: *a}]\n",
    "deep": "a: " + "[" * 20_000,
    "deep keys": "".join(" " * n + "a:\n" for n in range(1500)),
    "a long number": "a: " + "9" * 100_000,
    "an object": "a: !!python/object/apply:os.system ['touch owned']\n",
    "a module": "a: !!python/module:os\n",
    "a control character": "a: \x00",
    "a name for the terminal": 'configs:\n- config_name: "a\\e[2J"\n  data_files: train.jsonl\n',
}


@pytest.mark.parametrize("card", CARDS)
def test_a_card_that_is_a_bomb_is_refused(card: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with BadHub({"README.md": f"---\n{CARDS[card].rstrip()}\n---\n".encode(), "train.jsonl": ROWS}) as hub:
        with pytest.raises(InvalidCard) as caught:
            load(hub)
        assert len(str(caught.value)) < 2000
    assert list(tmp_path.iterdir()) == []


def test_aliases_that_stand_for_a_few_values_are_read() -> None:
    text = "---\nfiles: &f\n- split: train\n  path: one.jsonl\nconfigs:\n- config_name: x\n  data_files: *f\n---\n"
    with BadHub({"README.md": text.encode(), "one.jsonl": ROWS}) as hub:
        assert load(hub) == [{"a": 1}]


class Evil:
    """What does harm when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("owned",)


def tar_of(*members: tuple[str, bytes | str]) -> bytes:
    """Files, and for a text as content a link, device or pipe of that type and target."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
            else:
                member.type, member.linkname = content[:1].encode(), content[1:]
                archive.addfile(member)
    return packed.getvalue()


def pickled_array() -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([Evil()], dtype=object), allow_pickle=True)
    return file.getvalue()


@pytest.mark.parametrize(
    ("files", "error"),
    [
        ({"train.pkl": pickle.dumps(Evil())}, NoDataFiles),
        ({"train.pt": pickle.dumps(Evil()), "model.bin": pickle.dumps(Evil())}, NoDataFiles),
        ({"train.tar": tar_of(("a.npy", pickled_array()), ("a.json", b"{}"))}, CorruptFile),
        ({"bad.py": b"import os; os.mkdir('owned')"}, ScriptRepo),
    ],
)
def test_nothing_is_unpickled_or_run(
    files: dict[str, bytes], error: type[CrucibleError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with BadHub(files) as hub, pytest.raises(error):
        load(hub)
    assert list(tmp_path.iterdir()) == []


def test_pickles_in_an_archive_are_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    evil = pickle.dumps(Evil())
    with BadHub({"train.tar": tar_of(("a.pkl", evil), ("a.pickle", evil), ("a.txt", b"x"))}) as hub:
        (row,) = load(hub)
    assert row["pkl"] == row["pickle"] == evil
    assert list(tmp_path.iterdir()) == []


def test_links_and_devices_in_an_archive_are_passed_over(kept: Callable[[], set[Path]]) -> None:
    links = [("a.txt", "2/etc/passwd"), ("b.txt", "1../../etc/passwd"), ("c.txt", "3"), ("d.txt", "4"), ("e.txt", "6")]
    with BadHub({"train.tar": tar_of(*links, ("../../f.txt", b"f"), ("/g.txt", b"g"))}) as hub:
        assert [(row["__key__"], row["txt"]) for row in load(hub)] == [("../../f", "f"), ("/g", "g")]
