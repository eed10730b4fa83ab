"""Whether something listens, asked before Ray is."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from crucible.reach import check_listens, listens


@pytest.fixture
def port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "ray://127.0.0.1:{}", "http://127.0.0.1:{}"])
def test_an_address_that_listens_is_let_through(form: str, port: int) -> None:
    check_listens(form.format(port))
    assert listens(form.format(port))


def test_an_address_where_nothing_listens_is_refused_at_once() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # a port that nobody else gets, and where nobody listens
        gone = f"127.0.0.1:{closed.getsockname()[1]}"
        with pytest.raises(OSError, match="refused"):
            check_listens(gone)
        assert not listens(f"http://{gone}")


@pytest.mark.parametrize("address", ["auto", "local", "head-node"])
def test_other_forms_are_left_to_ray(address: str) -> None:
    check_listens(address)
