"""What a coordinator remembers is the same however its journal was cut, torn, repeated or put together."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from crucible.cache.owner import Owner
from crucible.cluster.journal import (
    ENDED,
    JOBS_KEPT,
    REMOVED_KEPT,
    REPORTS_KEPT,
    TOLD,
    Cell,
    Header,
    cell_line,
    compact,
    from_lines,
    header_line,
    highest,
    merge,
    notes,
    parse,
    to_lines,
    told,
)

HEADER = Header("session_1", False, Owner("host", "boot", "ns", 7, 70))
PHASES = ("resolve", "items", "copies", *ENDED)

values = st.one_of(
    st.none(),
    st.fixed_dictionaries(
        {"phase": st.sampled_from(PHASES), "note": st.text(max_size=8)}, optional={"report": st.just({"rows": 1})}
    ),
)
names = st.sampled_from(["job/a", "job/b", "job/ü\n", "drain/n1", "drain/n2"])
stamps = st.tuples(st.integers(1, 3), st.integers(1, 9), st.sampled_from("xy"))
lines = st.lists(st.tuples(names, st.builds(Cell, stamps, values)), max_size=12)


def text(cells: list[tuple[str, Cell]]) -> bytes:
    return header_line(HEADER) + b"".join(cell_line(name, cell) + b"\n" for name, cell in cells)


def read(data: bytes) -> dict[str, Cell]:
    page = parse(data)
    assert page is not None
    assert page.header == HEADER
    return page.cells


@given(lines, st.data())
def test_a_journal_cut_anywhere_says_what_its_whole_lines_say(cells: list[tuple[str, Cell]], data: Any) -> None:
    whole = text(cells)
    first = len(header_line(HEADER))
    cut = data.draw(st.integers(first, len(whole)))
    complete = whole[:cut].count(b"\n") - 1
    page = parse(whole[:cut])
    assert page is not None
    assert page.cells == merge({}, cells[:complete])
    assert page.damaged == 0, "a torn last line is the usual end of a killed process"


@given(lines.filter(bool), st.data())
def test_a_damaged_byte_costs_at_most_the_two_lines_that_it_is_between(
    cells: list[tuple[str, Cell]], data: Any
) -> None:
    whole = bytearray(text(cells))
    first = len(header_line(HEADER))
    at = data.draw(st.integers(first, len(whole) - 1))
    hit = bytes(whole[:at]).count(b"\n") - 1
    whole[at] ^= data.draw(st.integers(1, 255))
    page = parse(bytes(whole))
    assert page is not None
    kept = cells[:hit] + cells[hit + (1 if bytes(text(cells))[at : at + 1] != b"\n" else 2) :]
    assert page.cells == merge({}, kept)


@given(lines, lines, lines)
def test_it_does_not_matter_in_which_order_or_how_often_journals_are_put_together(
    one: list[tuple[str, Cell]], two: list[tuple[str, Cell]], three: list[tuple[str, Cell]]
) -> None:
    a, b, c = (merge({}, cells) for cells in (one, two, three))
    together = merge(merge(a, b.items()), c.items())
    assert merge(merge(c, a.items()), b.items()) == together
    assert merge(together, a.items()) == together
    assert merge({}, [*three, *one, *two, *one]) == together


@given(lines)
def test_what_is_told_and_kept_is_read_as_it_was_written(cells: list[tuple[str, Cell]]) -> None:
    known = merge({}, cells)
    assert from_lines(to_lines(known)) == known
    assert read(header_line(HEADER) + to_lines(known)) == known
    assert highest(known) == max([cell.stamp[0] for cell in known.values()], default=0)


@given(lines)
def test_what_is_not_over_survives_every_shortening(cells: list[tuple[str, Cell]]) -> None:
    known = merge({}, cells)
    for shorter in (compact(known), told(known)):
        going_on = {n: c for n, c in known.items() if c.value is not None and c.value["phase"] not in ENDED}
        assert {name: shorter[name].stamp for name in going_on} == {n: c.stamp for n, c in going_on.items()}
        assert notes(shorter, "drain").keys() == notes(known, "drain").keys()


def test_a_later_word_takes_a_standing_order_back_also_where_the_order_is_heard_afterwards() -> None:
    order, recall = Cell((1, 1, "a"), {"grace": 30}), Cell((2, 1, "b"), None)
    assert notes({"drain/n1": order}, "drain") == {"n1": {"grace": 30}}
    for both in ([order, recall], [recall, order]):
        assert notes(merge({}, [("drain/n1", cell) for cell in both]), "drain") == {}


def test_history_is_bounded_and_the_newest_of_it_stays() -> None:
    many = {f"job/{i}": Cell((1, i, "a"), {"phase": "finished", "report": {"rows": i}}) for i in range(2 * JOBS_KEPT)}
    gone = {f"drain/{i}": Cell((1, i, "a"), None) for i in range(2 * REMOVED_KEPT)}
    shorter = compact({**many, **gone})
    assert set(notes(shorter, "job")) == {str(i) for i in range(JOBS_KEPT, 2 * JOBS_KEPT)}
    assert sum(bool(job["report"]) for job in notes(shorter, "job").values()) == REPORTS_KEPT
    assert len(shorter) == JOBS_KEPT + REMOVED_KEPT
    small = told(many)
    assert len(small) == TOLD
    assert not any(job["report"] for job in notes(small, "job").values())


def test_a_journal_of_another_format_or_none_at_all_is_not_believed() -> None:
    line = cell_line("job/a", Cell((1, 1, "a"), {"phase": "items"})) + b"\n"
    for data in (b"", b"{}\n", b"[" * 100_000 + b"\n", header_line(HEADER).replace(b":1,", b":2,", 1) + line, line):
        assert parse(data) is None
    assert from_lines(b"not a line\n" + line) == {"job/a": Cell((1, 1, "a"), {"phase": "items"})}
