"""An agent serves its store's shards to who knows the secret, and nothing else to anybody. Readers need no Ray."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from crucible.cache.store import Store
from crucible.config import Settings
from crucible.errors import AgentUnavailable, SourceUnavailable
from crucible.manifest import Manifest
from crucible.refs import NodeId
from crucible.session import data_request, local_job
from crucible.workers.fetch import NodeShards
from crucible.workers.secret import ensure_secret, keep_secret
from crucible.workers.serve import AgentAddress, AgentServer, read_address, write_address

ROWS = 50


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    folder = tmp_path / "repo"
    folder.mkdir()
    for name in ("a", "b"):
        lines = "".join(json.dumps({"id": f"{name}{i}", "text": "x" * i}) + "\n" for i in range(ROWS))
        (folder / f"train-{name}.jsonl").write_text(lines)
        (folder / f"pad-{name}.bin").write_bytes(b"")
    return folder


@pytest.fixture
def made(repo: Path, tmp_path: Path) -> tuple[Settings, Manifest]:
    """A store that holds the repo's only split."""
    settings = Settings(tmp_path / "full")
    manifests, _ = local_job(data_request(str(repo), None, split="train", revision=None, columns=None), settings)
    return settings, manifests[0]


@pytest.fixture
def agent(made: tuple[Settings, Manifest]) -> Iterator[AgentServer]:
    store = Store(made[0].home)
    server = AgentServer(store, ensure_secret(store), NodeId("full"), "127.0.0.1", 0, lambda _: [])
    yield server
    server.close()


def get(agent: AgentServer, path: str, secret: str | None, **headers: str) -> httpx.Response:
    if secret is not None:
        headers["authorization"] = f"Bearer {secret}"
    return httpx.get(agent.url + path, headers=headers, timeout=10)


def test_a_shard_is_served_whole_and_in_ranges(made: tuple[Settings, Manifest], agent: AgentServer) -> None:
    settings, manifest = made
    store = Store(settings.home)
    secret, shard = ensure_secret(store), manifest.shards[0]
    data = store.shard_path(shard.key).read_bytes()
    assert get(agent, f"/v1/shards/{shard.key}", secret).content == data
    part = get(agent, f"/v1/shards/{shard.key}", secret, range="bytes=5-99")
    assert (part.status_code, part.content) == (206, data[5:100])
    assert part.headers["content-range"] == f"bytes 5-99/{len(data)}"
    assert get(agent, f"/v1/shards/{shard.key}", secret, range=f"bytes={len(data)}-").status_code == 416


@pytest.mark.parametrize("secret", [None, "x", "wrong-but-as-long-as-a-real-one-is-usually"])
@pytest.mark.parametrize("path", ["/v1/shards/{key}", "/v1/locate/{key}", "/v1/status", "/", "/x"])
def test_without_the_secret_everything_is_401(
    made: tuple[Settings, Manifest], agent: AgentServer, path: str, secret: str | None
) -> None:
    manifest = made[1]
    reply = get(agent, path.format(key=manifest.shards[0].key), secret)
    assert reply.status_code == 401
    assert manifest.shards[0].key not in reply.text


@pytest.mark.parametrize(
    "path", ["/v1/shards/../../secret", "/v1/shards/..%2F..%2Fsecret", "/v1/shards/secret", "/secret", "/v1/shards/%00"]
)
def test_nothing_outside_the_shards_can_be_asked_for(
    made: tuple[Settings, Manifest], agent: AgentServer, path: str
) -> None:
    secret = ensure_secret(Store(made[0].home))
    reply = get(agent, path, secret)
    assert reply.status_code in (404, 400)
    assert secret not in reply.text


def test_a_port_that_is_taken_is_an_error_that_names_it(made: tuple[Settings, Manifest], agent: AgentServer) -> None:
    port = int(agent.url.rpartition(":")[2])
    with pytest.raises(AgentUnavailable, match=str(port)):
        AgentServer(Store(made[0].home), "s", NodeId("n"), "127.0.0.1", port, lambda _: [])


def other_node(made: tuple[Settings, Manifest], tmp_path: Path, agent: AgentServer, *, secret: str = "") -> Settings:
    """A node with an empty store that knows the cluster's secret and the full node's agent as a peer."""
    settings = replace(made[0], home=tmp_path / "empty")
    store = Store(settings.home)
    keep_secret(store, secret or ensure_secret(Store(made[0].home)))
    write_address(store, AgentAddress("http://127.0.0.1:9", NodeId("empty"), 0, (agent.url,)))
    return settings


def test_a_reader_takes_a_missing_shard_from_a_peer_once(
    made: tuple[Settings, Manifest], tmp_path: Path, agent: AgentServer, repo: Path
) -> None:
    settings = other_node(made, tmp_path, agent)
    for path in repo.iterdir():
        path.unlink()  # so that nothing but the peer can have it
    source = NodeShards(settings)
    manifest = made[1]
    for shard in manifest.shards:
        data = source.path(manifest, shard).read_bytes()
        assert data == Store(made[0].home).shard_path(shard.key).read_bytes()
    assert source.note()["peer_shards"] == len(manifest.shards)
    assert source.counts.peer_bytes == manifest.size
    agent.close()
    again = NodeShards(settings)
    assert all(again.path(manifest, shard).exists() for shard in manifest.shards)
    assert again.note()["disk_shards"] == len(manifest.shards)


def test_when_no_peer_answers_the_shard_is_made_again_and_is_the_same(
    made: tuple[Settings, Manifest], tmp_path: Path, agent: AgentServer
) -> None:
    settings = other_node(made, tmp_path, agent)
    agent.close()
    manifest = made[1]
    source = NodeShards(settings)
    shard = manifest.shards[0]
    assert source.path(manifest, shard).read_bytes() == Store(made[0].home).shard_path(shard.key).read_bytes()
    assert source.note()["hub_shards"] == 1


def test_a_peer_with_altered_bytes_is_not_believed(
    made: tuple[Settings, Manifest], tmp_path: Path, agent: AgentServer
) -> None:
    manifest, shard = made[1], made[1].shards[0]
    path = Store(made[0].home).shard_path(shard.key)
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    settings = other_node(made, tmp_path, agent)
    assert NodeShards(settings).path(manifest, shard).read_bytes() == good


def test_with_the_wrong_secret_and_no_source_the_error_says_what_was_tried(
    made: tuple[Settings, Manifest], tmp_path: Path, agent: AgentServer, repo: Path
) -> None:
    settings = other_node(made, tmp_path, agent, secret="of another cluster")
    for path in repo.iterdir():
        path.unlink()
    with pytest.raises(SourceUnavailable) as caught:
        NodeShards(settings).path(made[1], made[1].shards[0])
    assert any("401" in note for note in caught.value.__notes__)


def test_an_agent_named_by_hand_is_asked_first(
    made: tuple[Settings, Manifest], tmp_path: Path, agent: AgentServer
) -> None:
    settings = replace(other_node(made, tmp_path, agent), agent_url=agent.url)
    write_address(Store(settings.home), AgentAddress("http://127.0.0.1:9", NodeId("x"), 0))
    source = NodeShards(settings)
    source.path(made[1], made[1].shards[0])
    assert source.note()["peer_shards"] == 1


def test_the_source_of_a_dataset_travels_to_worker_processes(made: tuple[Settings, Manifest]) -> None:
    source = pickle.loads(pickle.dumps(NodeShards(made[0])))
    assert source.path(made[1], made[1].shards[0]).exists()


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"url": 1}', b"\xff\xfe"])
def test_an_unreadable_agent_file_means_no_agent(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "agent.json").write_bytes(data)
    assert read_address(Store(tmp_path)) is None
