"""TLS between nodes: a peer is believed by the cluster's authority only, and nobody falls back to plain HTTP."""

from __future__ import annotations

import json
import shutil
import ssl
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner

from crucible.cache.store import Store
from crucible.cli.app import cli
from crucible.config import Settings
from crucible.data_files import data_request
from crucible.errors import SourceUnavailable, StoreError, UsageError
from crucible.hashing import shard_digest
from crucible.refs import NodeId, ShardInfo, SourceFile
from crucible.report import Tally
from crucible.session import local_job
from crucible.workers.asking import Line
from crucible.workers.fetch import NodeShards
from crucible.workers.secret import keep_secret
from crucible.workers.serve import AgentAddress, AgentServer, write_address
from crucible.workers.spare import SparePusher
from crucible.workers.tls import Trust, issue, make_authority, offer, own_folder, prepare_node, server_context
from crucible.workers.work import Workplace, copy_shard

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl command on this machine")

HOST = "127.0.0.1"
SECRET = "of-this-cluster"
KEY = "ab" * 32
DATA = bytes(range(256)) * 5000


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an authority and a certificate for this machine."""
    folder = tmp_path_factory.mktemp("tls")
    make_authority(folder)
    issue(folder, folder, HOST)
    return folder


@pytest.fixture
def shard(tmp_path: Path) -> ShardInfo:
    path = Store(tmp_path / "full").shard_path(KEY)
    path.parent.mkdir(parents=True)
    path.write_bytes(DATA)
    return ShardInfo(KEY, 1, len(DATA), shard_digest(path), "0" * 64, 0, 0)


@pytest.fixture
def serve(tmp_path: Path, shard: ShardInfo) -> Iterator[Callable[..., AgentServer]]:
    """`serve(context)` is an agent that has the shard."""
    with ExitStack() as stack:

        def begin(tls: ssl.SSLContext | None, host: str = HOST) -> AgentServer:
            store = Store(tmp_path / "full")
            agent = AgentServer(store, SECRET, NodeId("n"), host, 0, lambda _: [], lambda *_: {"a": 1}, tls=tls)
            stack.callback(agent.close)
            return agent

        yield begin


def reader(tmp_path: Path, authority: Path | None) -> Workplace:
    """Another node, which believes that authority, or speaks plain HTTP."""
    settings = Settings(tmp_path / "empty", tls=authority, tries=1)
    keep_secret(Store(settings.home), SECRET)
    return Workplace(Store(settings.home), settings, NodeId("m"))


def copied(shard: ShardInfo, agent: AgentServer, place: Workplace) -> bytes:
    return copy_shard(shard, [agent.url], SECRET, place, Tally()).read_bytes()


def test_a_shard_comes_over_tls_whole_and_in_ranges(
    tmp_path: Path, cluster: Path, shard: ShardInfo, serve: Callable[..., AgentServer]
) -> None:
    agent = serve(server_context(cluster, HOST))
    assert agent.url.startswith("https://")
    place = reader(tmp_path, cluster)
    assert copied(shard, agent, place) == DATA
    client = Trust(cluster / "ca.crt").client(agent.url)
    headers = {"authorization": f"Bearer {SECRET}", "range": "bytes=5-99"}
    reply = client.get(f"{agent.url}/v1/shards/{KEY}", headers=headers)
    assert (reply.status_code, reply.content) == (206, DATA[5:100])
    assert client.get(f"{agent.url}/v1/shards/{KEY}").status_code == 401


def test_all_that_processes_of_a_node_ask_of_agents_goes_over_tls(tmp_path: Path, cluster: Path) -> None:
    repo = tmp_path / "repo"
    repo.mkdir()
    (repo / "train.jsonl").write_bytes(b'{"a": 1}\n')
    full = Settings(tmp_path / "full", tls=cluster)
    ((manifest,), _) = local_job(data_request(str(repo), None, split="train", revision=None, columns=None), full)
    (repo / "train.jsonl").unlink()  # so that nothing but the peer can have it
    place = reader(tmp_path, cluster)
    with ExitStack() as stack:

        def agent(store: Store, where: list[str]) -> AgentServer:
            context = server_context(cluster, HOST)
            made = AgentServer(store, SECRET, NodeId("n"), HOST, 0, lambda _: where, lambda *_: {"a": 1}, tls=context)
            stack.callback(made.close)
            return made

        near = agent(place.store, [agent(Store(full.home), []).url])
        write_address(place.store, AgentAddress(near.url, NodeId("m"), 1, ()))
        assert Line(place.settings).wish("job", ["k"]) == {"a": 1}
        source = NodeShards(place.settings)
        source.path(manifest, manifest.shards[0])
        assert source.note()["peer_shards"] == 1
        content = tmp_path / "content"
        content.write_bytes(DATA)
        tally = Tally()
        push = SparePusher(near.url, SECRET, tally, Trust(cluster / "ca.crt"))
        with content.open("rb") as file:
            push(SourceFile("f", len(DATA), "0" * 64, True), file.fileno(), 0, 1000)
        push.close()
        assert (tally.counts.spare_bytes, tally.counts.spare_failures) == (1000, 0)


@pytest.mark.parametrize("wrong", ["another authority", "another host", "over"])
def test_a_peer_that_cannot_prove_who_it_is_is_not_believed(
    tmp_path: Path, cluster: Path, shard: ShardInfo, serve: Callable[..., AgentServer], wrong: str
) -> None:
    theirs = tmp_path / "theirs"
    if wrong == "another authority":
        make_authority(theirs)
        issue(theirs, theirs, HOST)
        says = "self-signed|unable to get"
    elif wrong == "another host":
        issue(cluster, theirs, "10.1.2.3")
        says = "not valid for '127.0.0.1'"
    else:
        issue(cluster, theirs, HOST, days=-0.5)
        says = "expired"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(theirs / "node.crt", theirs / "node.key")
    with pytest.raises(SourceUnavailable, match=says):
        copied(shard, serve(context), reader(tmp_path, cluster))


def test_plain_and_tls_say_in_words_that_they_do_not_fit(
    tmp_path: Path, cluster: Path, shard: ShardInfo, serve: Callable[..., AgentServer]
) -> None:
    secure, plain = serve(server_context(cluster, HOST)), serve(None)
    said = httpx.get(secure.url.replace("https", "http") + "/v1/status")
    assert (said.status_code, said.reason_phrase.partition(";")[0]) == (400, "this agent speaks TLS only")
    place = reader(tmp_path, None)
    with pytest.raises(SourceUnavailable, match="speaks TLS only; set CRUCIBLE_TLS"):
        copy_shard(shard, [secure.url.replace("https", "http")], SECRET, place, Tally())
    with pytest.raises(SourceUnavailable, match="speaks plain HTTP; set CRUCIBLE_TLS"):
        copy_shard(shard, [plain.url.replace("http", "https")], SECRET, reader(tmp_path, cluster), Tally())


def test_where_tls_is_asked_for_nobody_is_asked_without(
    tmp_path: Path, cluster: Path, shard: ShardInfo, serve: Callable[..., AgentServer]
) -> None:
    plain = serve(None)
    with pytest.raises(SourceUnavailable, match="plain HTTP, and this node asks for TLS"):
        copied(shard, plain, reader(tmp_path, cluster))
    assert copied(shard, plain, reader(tmp_path, None)) == DATA


class TestAgreement:
    def node(self, tmp_path: Path, name: str, tls: Path | str | None = None) -> Settings:
        settings = Settings(tmp_path / name)
        return replace(settings, tls=own_folder(settings.home) if tls == "own" else tls)  # type: ignore[arg-type]

    def test_the_coordinators_authority_is_everybodys(self, tmp_path: Path, serve: Callable[..., AgentServer]) -> None:
        offered = offer(self.node(tmp_path, "head", "own"))
        assert offered == offer(self.node(tmp_path, "head", "own"))
        node = self.node(tmp_path, "node")  # which has not set CRUCIBLE_TLS: its cluster decides
        agent = serve(prepare_node(node, offered, HOST))
        trust = Trust.of(node, Store(node.home))
        assert trust.required
        headers = {"authorization": f"Bearer {SECRET}"}
        assert trust.client(agent.url).get(f"{agent.url}/v1/shards/{KEY}", headers=headers).content == DATA
        for key in own_folder(node.home).glob("*.key"):
            assert key.stat().st_mode & 0o777 == 0o600

    def test_a_cluster_that_went_back_to_plain_http_is_believed_so(self, tmp_path: Path) -> None:
        node = self.node(tmp_path, "node")
        prepare_node(node, offer(self.node(tmp_path, "head", "own")), HOST)
        assert prepare_node(node, offer(self.node(tmp_path, "other head")), HOST) is None
        assert not Trust.of(node, Store(node.home)).required

    def test_given_certificates_must_be_of_one_authority(self, tmp_path: Path, cluster: Path) -> None:
        theirs = tmp_path / "theirs"
        make_authority(theirs)
        issue(theirs, theirs, HOST)
        offered = offer(self.node(tmp_path, "head", cluster))
        assert offered is not None
        assert list(offered) == ["ca.crt"], "the key of a given authority goes nowhere"
        node = self.node(tmp_path, "node", cluster)
        assert prepare_node(node, offered, HOST) is not None
        rank = Trust.of(self.node(tmp_path, "node"), Store(node.home))  # which has no setting
        assert rank.required
        assert rank.authority is not None
        assert rank.authority.read_bytes() == (cluster / "ca.crt").read_bytes()
        for tls in (None, "own", theirs):
            with pytest.raises(UsageError, match="names a folder of certificates"):
                prepare_node(self.node(tmp_path, "node", tls), offered, HOST)

    def test_nodes_that_ask_for_different_things_say_so(self, tmp_path: Path, cluster: Path) -> None:
        with pytest.raises(UsageError, match="not on the coordinator's"):
            prepare_node(self.node(tmp_path, "node", "own"), offer(self.node(tmp_path, "head")), HOST)
        with pytest.raises(UsageError, match="let both be the same"):
            prepare_node(self.node(tmp_path, "node", cluster), offer(self.node(tmp_path, "head", "own")), HOST)

    @pytest.mark.parametrize(("host", "days", "says"), [("10.9.9.9", 30, "not valid for"), (HOST, -0.5, "expired")])
    def test_an_agent_with_a_certificate_that_nobody_would_believe_does_not_start(
        self, tmp_path: Path, cluster: Path, host: str, days: float, says: str
    ) -> None:
        issue(cluster, tmp_path / "made", host, days)
        with pytest.raises(UsageError, match=f"(?s)made.*{says}"):
            server_context(tmp_path / "made", HOST)

    def test_a_key_that_others_may_read_is_refused(self, tmp_path: Path, cluster: Path) -> None:
        issue(cluster, tmp_path / "made", HOST)
        (tmp_path / "made" / "node.key").chmod(0o644)
        with pytest.raises(StoreError, match=r"node\.key: has mode 0644"):
            server_context(tmp_path / "made", HOST)

    def test_the_command_makes_a_folder_for_each_node_without_the_authoritys_key(self, tmp_path: Path) -> None:
        made = CliRunner().invoke(cli, ["tls", str(tmp_path / "made"), "127.0.0.1", "node-2", "--days", "90", "--json"])
        assert made.exit_code == 0, made.output
        assert [json.loads(line)["host"] for line in made.stdout.splitlines()] == ["127.0.0.1", "node-2"]
        for host in ("127.0.0.1", "node-2"):
            assert {path.name for path in (tmp_path / "made" / host).iterdir()} == {"ca.crt", "node.crt", "node.key"}
            server_context(tmp_path / "made" / host, host)
        refused = CliRunner().invoke(cli, ["tls", str(tmp_path / "made"), "../elsewhere"])
        assert refused.exit_code == 2
        assert not (tmp_path / "elsewhere").exists()

    @pytest.mark.parametrize("host", ["", "a b", "x,IP:1.2.3.4", "$ENV::HOME", "x\ny"])
    def test_a_host_that_is_none_gets_no_certificate(self, tmp_path: Path, cluster: Path, host: str) -> None:
        with pytest.raises(UsageError, match="no address or name"):
            issue(cluster, tmp_path / "made", host)

    def test_without_the_command_the_error_says_what_else_can_be_done(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(UsageError, match=r"`openssl` command.*name their folder"):
            make_authority(tmp_path / "made")

    @pytest.mark.parametrize("program", ["#!/bin/sh\nexec {sleep} 60\n", "no program"])
    def test_a_command_that_does_not_end_or_is_none_is_named(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str
    ) -> None:
        command = tmp_path / "openssl"
        command.write_text(program.format(sleep=shutil.which("sleep")))
        command.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setattr("crucible.workers.tls._OPENSSL_S", 0.1)
        with pytest.raises(UsageError, match=rf"{command} req (did not end|cannot be run)"):
            make_authority(tmp_path / "made")

    def test_the_setting_is_on_off_or_a_folder(self, tmp_path: Path) -> None:
        home = {"CRUCIBLE_HOME": str(tmp_path)}
        assert Settings.from_env({**home, "CRUCIBLE_TLS": "1"}).tls == tmp_path / "tls"
        assert Settings.from_env({**home, "CRUCIBLE_TLS": "off"}).tls is None
        assert Settings.from_env({**home, "CRUCIBLE_TLS": str(tmp_path)}).tls == tmp_path
        with pytest.raises(UsageError, match="CRUCIBLE_TLS"):
            Settings.from_env({**home, "CRUCIBLE_TLS": "maybe"})

    @pytest.mark.parametrize(("said", "ports"), [("", (0, 0)), ("7000", (7000, 7000)), ("7000-7015", (7000, 7015))])
    def test_ports_are_one_or_a_range(self, said: str, ports: tuple[int, int]) -> None:
        assert Settings.from_env({"CRUCIBLE_AGENT_PORT": said} if said else {}).agent_ports == ports

    @pytest.mark.parametrize("said", ["x", "7000-", "9-8", "-1", "70000", "1-2-3"])
    def test_what_is_no_port_is_said(self, said: str) -> None:
        with pytest.raises(UsageError, match="CRUCIBLE_AGENT_PORT"):
            Settings.from_env({"CRUCIBLE_AGENT_PORT": said})
