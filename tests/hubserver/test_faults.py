"""The faults do what they say, by raw HTTP: checklist items 5, 8-10, 28 and 29, and the rest of the table."""

from __future__ import annotations

import collections
import gzip
import time

import httpx
import pytest

from tests.hubserver.faults import Fault, FaultyHub

BLOB = bytes(range(256)) * 400
FILE = "/datasets/org/data/resolve/main/a.parquet"


@pytest.fixture
def served(hub: FaultyHub) -> FaultyHub:
    hub.import_files("org/data", {"a.parquet": BLOB, "b.parquet": BLOB[::-1], "text.txt": b"text " * 100})
    return hub


def get(hub: FaultyHub, url: str = FILE, **headers: str) -> httpx.Response:
    return httpx.get(hub.endpoint + url, headers=headers, follow_redirects=True, timeout=10)


def test_an_expired_link_is_refused_by_the_cdn_only_as_often_as_asked(served: FaultyHub) -> None:
    fault = served.add("expired", origin="cdn", times=2, status=401)
    assert [get(served).status_code for _ in range(3)] == [401, 401, 200]
    assert served.hits(fault) == 2


def test_an_ignored_range_is_a_200_with_the_whole_body(served: FaultyHub) -> None:
    served.add("ignore-range", origin="cdn", times=1)
    reply = get(served, Range="bytes=5-9")
    assert (reply.status_code, reply.content) == (200, BLOB)
    assert served.requests(origin="cdn")[-1].range == "bytes=5-9"
    assert get(served, Range="bytes=5-9").content == BLOB[5:10]


def test_a_cut_body_ends_early_and_the_log_counts_what_came(served: FaultyHub) -> None:
    served.add("cut", path="*.parquet", origin="cdn", after=1000, times=1)
    with pytest.raises(httpx.RemoteProtocolError, match="1000 bytes"):
        get(served)
    assert served.bytes_sent() == 1000
    assert get(served).content == BLOB
    assert served.bytes_sent("*/a.parquet") == 1000 + len(BLOB)


def test_a_flipped_byte_is_at_its_place_in_the_file_also_within_a_range(served: FaultyHub) -> None:
    served.add("flip", origin="cdn", after=700)
    assert [at for at, byte in enumerate(get(served).content) if byte != BLOB[at]] == [700]
    part = get(served, Range="bytes=600-799").content
    assert [at for at, byte in enumerate(part, start=600) if byte != BLOB[at]] == [700]
    assert get(served, Range="bytes=0-99").content == BLOB[:100]


def test_a_content_length_may_lie_in_both_directions(served: FaultyHub) -> None:
    served.add("wrong-length", origin="cdn", by=10, times=1)
    with pytest.raises(httpx.RemoteProtocolError):
        get(served)
    served.add("wrong-length", origin="cdn", by=-10, times=1)
    assert get(served).content == BLOB[:-10]


def test_a_content_range_may_lie(served: FaultyHub) -> None:
    served.add("wrong-range", origin="cdn", by=3)
    reply = get(served, Range="bytes=10-19")
    assert (reply.status_code, reply.content) == (206, BLOB[10:20])
    assert reply.headers["content-range"].startswith("bytes 13-22/")


def test_a_429_lasts_as_long_as_it_says(served: FaultyHub) -> None:
    served.add("429", origin="hub", wait=1.0)
    first = get(served)
    assert (first.status_code, first.headers["ratelimit"]) == (429, '"resolvers";r=0;t=1')
    assert first.headers["x-error-message"]
    assert "retry-after" not in first.headers
    deadline = time.monotonic() + 10
    while (reply := get(served)).status_code == 429 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert reply.content == BLOB


@pytest.mark.parametrize("status", [429, 503])
def test_a_refusal_may_carry_retry_after_only(served: FaultyHub, status: int) -> None:
    served.add("retry-after", status=status, wait=7, times=1)
    reply = get(served)
    assert (reply.status_code, reply.headers["retry-after"]) == (status, "7")
    assert "ratelimit" not in reply.headers
    assert get(served).status_code == 200


def test_a_server_error_is_bare(served: FaultyHub) -> None:
    served.add("status", status=502, times=1, skip=1, method="GET", origin="hub")
    assert [get(served).status_code for _ in range(3)] == [200, 502, 200]


def test_a_slow_body_comes_whole_but_late(served: FaultyHub) -> None:
    served.add("slow", origin="cdn", piece=len(BLOB) // 4 + 1, wait=0.1)
    began = time.monotonic()
    assert get(served).content == BLOB
    assert time.monotonic() - began >= 0.3


def test_a_stalled_body_stops_and_the_connection_stays(served: FaultyHub) -> None:
    served.add("stall", origin="cdn", after=500, times=1)
    got = bytearray()
    with httpx.stream(
        "GET", served.endpoint + FILE, follow_redirects=True, timeout=httpx.Timeout(30, read=1.5)
    ) as reply:
        with pytest.raises(httpx.ReadTimeout):
            collections.deque(map(got.extend, reply.iter_raw()))
        assert bytes(got) == BLOB[:500]
    assert get(served).content == BLOB


def test_a_reset_connection_gives_no_reply_at_all(served: FaultyHub) -> None:
    served.add("reset", origin="cdn", times=1)
    with pytest.raises(httpx.TransportError):
        get(served)
    assert get(served).content == BLOB


def test_a_text_may_come_gzipped_without_a_length(served: FaultyHub) -> None:
    served.add("gzip", path="*.txt", times=1)
    url = served.endpoint + "/datasets/org/data/resolve/main/text.txt"
    with httpx.stream("GET", url) as reply:
        packed = b"".join(reply.iter_raw())
    assert (reply.headers["content-encoding"], gzip.decompress(packed)) == ("gzip", b"text " * 100)
    assert "content-length" not in reply.headers


def test_a_fault_hits_only_what_it_names(served: FaultyHub) -> None:
    served.add(Fault("status", path="*/a.parquet", origin="cdn", method="GET", status=500))
    other = FILE.replace("a.parquet", "b.parquet")
    assert get(served, other).content == BLOB[::-1]
    assert httpx.head(served.endpoint + FILE, follow_redirects=True).status_code == 200
    assert get(served).status_code == 500
    served.clear_faults()
    assert get(served).status_code == 200
