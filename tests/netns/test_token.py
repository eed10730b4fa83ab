"""Ray's token authentication is on in the cluster: who has not its token is told so, and what to do."""

from __future__ import annotations

import sys

import pytest

from tests.netns.fleet import Fleet

pytestmark = pytest.mark.timeout(300)
WRONG = "0" * 64


@pytest.mark.parametrize(
    ("title", "environment", "said"),
    [
        ("the mode is not set", {"RAY_AUTH_MODE": None}, "wants a token; set RAY_AUTH_MODE=token"),
        (
            "no mode and no token",
            {"RAY_AUTH_MODE": None, "HOME": "/nowhere"},
            "wants a token; set RAY_AUTH_MODE=token and copy the head node's",
        ),
        ("there is no token", {"HOME": "/nowhere"}, "RAY_AUTH_MODE is `token`, and there is none here"),
        ("it is a wrong one", {"RAY_AUTH_TOKEN": WRONG}, "does not take the token that is here; copy the head"),
    ],
)
def test_who_has_not_the_clusters_token_is_told_so_in_one_line(
    fleet: Fleet, title: str, environment: dict[str, str | None], said: str
) -> None:
    beta = fleet.network["beta"]
    code, out, err = beta.crucible("nodes", "--address", fleet.address, **environment).end()
    last = err.splitlines()[-1]
    assert (code, out) == (1, ""), title
    assert last.startswith("Error: "), err
    assert f"the Ray cluster at '{fleet.address}'" in last
    assert said in last
    assert "Traceback" not in err
    assert len(err.splitlines()) <= 2, "Ray says one line of its own"
    assert fleet.token not in err


def test_the_cluster_of_this_host_is_joined_with_the_token_that_is_here(fleet: Fleet) -> None:
    code = (
        "from crucible.cluster.connect import cluster, import_ray\n"
        "with cluster('auto'):\n    print(sum(node['Alive'] for node in import_ray().nodes()))\n"
    )
    assert fleet.head.python(code, RAY_AUTH_MODE=None).output() == "3\n"


def test_the_token_is_in_no_command_line_and_no_log(fleet: Fleet) -> None:
    beta = fleet.network["beta"]
    assert beta.crucible("nodes", "--address", fleet.address).output().count("http://") == 3
    for host in fleet.network.hosts:
        assert all(fleet.token not in " ".join(process.cmdline()) for process in host.processes())
        logs = [path for path in (host.folder / "ray").rglob("*") if path.suffix in (".log", ".out", ".err")]
        assert any("worker" in path.name for path in logs), "Ray's logs are elsewhere: this would show nothing"
        assert not [path for path in logs if fleet.token.encode() in path.read_bytes()]


def test_a_program_gets_a_typed_error(fleet: Fleet) -> None:
    code = (
        "import crucible.session, sys\n"
        "try:\n    crucible.session.nodes(sys.argv[1])\n"
        "except crucible.errors.ClusterRefused as error:\n    print(error.address, error.enabled, error.found)\n"
    )
    told = fleet.head.python(code, fleet.address, RAY_AUTH_TOKEN=WRONG).output()
    assert told.split() == [fleet.address, "True", "True"]


@pytest.mark.slow
def test_what_listens_and_is_no_cluster_is_named_so(fleet: Fleet) -> None:
    """Ray itself tries for ten minutes."""
    server = "import socket, time\nserver = socket.create_server(('', 7000))\nprint('up', flush=True)\ntime.sleep(999)"
    listening = fleet.head.start(sys.executable, "-c", server)
    assert next(iter(listening.lines())) == "up\n"
    address = f"{fleet.head.address}:7000"
    code, _, err = fleet.network["beta"].crucible("nodes", "--address", address).end()
    assert code == 1
    assert err.splitlines()[-1].startswith(f"Error: no Ray cluster at '{address}': what listens there does not answer")
