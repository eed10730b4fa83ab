"""git's framing: whatever goes in comes out, and what is none is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crucible.hub.gitpack import read_greeting
from crucible.hub.pktline import MOST, FramingError, Mark, Packets, banded, packet

COMMIT = "c" * 40


@pytest.mark.parametrize("wrong", [b"00", b"zzzz", b"-001", b"0003", b"ffff", b"fff1" + bytes(70_000), b"0009abcd"])
def test_what_is_no_packet_is_refused(wrong: bytes) -> None:
    with pytest.raises(FramingError):
        list(Packets([wrong]))


def test_the_longest_packet_and_no_longer() -> None:
    assert list(Packets([packet(bytes(MOST - 4))])) == [bytes(MOST - 4)]
    with pytest.raises(ValueError, match="at most"):
        packet(bytes(MOST - 3))


def test_marks_and_lines() -> None:
    stream = packet("a line") + b"0000" + b"0001" + b"0002" + packet(b"") + packet("")
    packets = Packets([stream[:7], stream[7:]])
    assert list(iter(packets.text, None)) == ["a line", Mark.FLUSH, Mark.DELIMITER, Mark.END, "", ""]


def test_greetings() -> None:
    refs = (
        packet(f"{COMMIT} HEAD\0shallow side-band-64k filter") + packet(f"{COMMIT} refs/heads/main") + Mark.FLUSH.value
    )
    for before in (b"", packet("# service=git-upload-pack") + Mark.FLUSH.value):
        for version in (b"", packet("version 1")):
            assert read_greeting(before + version + refs).features >= {"shallow", "filter"}
        two = read_greeting(before + packet("version 2") + packet("ls-refs") + packet("fetch=shallow filter"))
        assert (two.version, two.features, two.sha1) == (2, {"shallow", "filter"}, False)
    for wrong in (b"", b"0000", packet("hello"), packet("hello")[:-1]):
        with pytest.raises(FramingError):
            read_greeting(wrong)


@given(st.lists(st.binary(max_size=200_000), max_size=4), st.integers(1, 70_000))
def test_bands_carry_any_bytes_in_any_pieces(pieces: list[bytes], size: int) -> None:
    whole = b"".join(banded(pieces))
    found = list(Packets(whole[start : start + size] for start in range(0, len(whole), size)))
    assert all(isinstance(one, bytes) and one[0] == 1 for one in found)
    assert b"".join(one[1:] for one in found if isinstance(one, bytes)) == b"".join(pieces)
