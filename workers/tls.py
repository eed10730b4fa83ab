"""TLS between the nodes, with an authority of the cluster's own. Off unless CRUCIBLE_TLS says so.

`CRUCIBLE_TLS=1`: the first coordinator makes an authority, each agent a certificate for its node's address, by the
`openssl` command; both lie in `<home>/tls`. Every node of the Ray cluster can then make certificates, as each has the
secret: whoever may run tasks in the cluster is trusted anyway. `CRUCIBLE_TLS=FOLDER`: somebody else made them (or
`crucible tls`), and the authority's key is on no node. In a folder are

    ca.crt            the authority; a peer is believed by this one only, never by the system's
    node.crt, node.key  this node's certificate, with the address that it listens on, and its key (mode 0600)
    in-use            the agent of this node was told so by the coordinator: its processes ask nobody without TLS
    ca.key            the authority's key (mode 0600), only where certificates are made

There is no way down: where TLS is asked for, plain HTTP is refused by both sides, and in words.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import os
import shutil
import ssl
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from crucible.cache.store import Store
from crucible.config import Settings
from crucible.errors import StoreError, UsageError, VersionSkew
from crucible.hub import wire
from crucible.versions import check_reply
from crucible.workers.secret import read_private

AUTHORITY, AUTHORITY_KEY, CERTIFICATE, KEY, IN_USE = "ca.crt", "ca.key", "node.crt", "node.key", "in-use"
AUTHORITY_DAYS = 3650
NODE_DAYS = 398
WARN_DAYS = 30
_OPENSSL_S = 30
_log = logging.getLogger("crucible.agent")
_DAY_S = 86_400
MOST_TOLD = 64 << 20
"""Bytes of an agent's answer: the first manifests of a dataset of many shards are some MiB."""

_CONFIG = """
[req]
prompt = no
distinguished_name = name
[name]
CN = {name}
[ca]
default_ca = made
[made]
database = index
new_certs_dir = .
default_md = sha256
rand_serial = yes
policy = policy
[policy]
commonName = supplied
[authority]
basicConstraints = critical, CA:true, pathlen:0
keyUsage = critical, keyCertSign
subjectKeyIdentifier = hash
[node]
basicConstraints = critical, CA:false
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth
subjectAltName = {alternative}
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
"""


@dataclass(frozen=True, slots=True)
class Trust:
    """How a process believes other nodes: by this authority, and whether they must have a certificate at all."""

    authority: Path | None = None
    required: bool = False

    @classmethod
    def of(cls, settings: Settings, store: Store) -> Trust:
        """This node's: what CRUCIBLE_TLS says, else what its agent has been told by the cluster."""
        if settings.tls is not None:
            return cls(settings.tls / AUTHORITY, required=True)
        own = own_folder(store.home)
        return cls(own / AUTHORITY, required=True) if (own / IN_USE).exists() else cls()

    def client(self, url: str) -> httpx.Client:
        """The client for the agent at `url`. Raises httpx.UnsupportedProtocol for one without TLS, where it must be."""
        self._check(url)
        return wire.peer_client(self.authority)

    def context(self, url: str) -> ssl.SSLContext | None:
        """Whom a client of one's own for that agent believes; None for plain HTTP. Raises as `client`."""
        self._check(url)
        if not url.startswith("https:"):
            return None
        if self.authority is None:
            raise httpx.UnsupportedProtocol(f"{url} speaks TLS, and this node has no authority to believe")
        try:
            return wire.believing(self.authority)
        except OSError as error:
            raise httpx.UnsupportedProtocol(f"{self.authority}: {error}") from error

    def _check(self, url: str) -> None:
        if self.required and not url.startswith("https:"):
            raise httpx.UnsupportedProtocol(f"{url} speaks plain HTTP, and this node asks for TLS: not asked")


def reason_of(error: Exception) -> str:
    """What a failed request to a peer was about, with the next step where the two do not speak the same protocol."""
    said = f"{type(error).__name__}: {error}"
    if "WRONG_VERSION_NUMBER" in said or "PACKET_LENGTH_TOO_LONG" in said:
        return f"{said} (it speaks plain HTTP; set CRUCIBLE_TLS on all nodes or on none)"
    return said


def answer_of(
    client: httpx.Client, method: str, url: str, *, secret: str, timeout: httpx.Timeout, question: Any = None
) -> Any:
    """What an agent answers, as JSON: of `MOST_TOLD` bytes at most, and whole in the time of the timeouts together.

    Raises httpx.HTTPError or ValueError.
    """
    give_up = time.monotonic() + (timeout.connect or 0.0) + (timeout.read or 0.0)
    body = bytearray()
    headers = {"authorization": f"Bearer {secret}"}
    with client.stream(method, url, headers=headers, json=question, timeout=timeout) as reply:
        try:
            check_reply(reply.headers, url)
        except VersionSkew as skew:
            _log.warning("%s", skew)
            raise httpx.RemoteProtocolError(str(skew)) from skew
        reply.raise_for_status()
        for chunk in reply.iter_bytes():
            body += chunk
            if len(body) > MOST_TOLD:
                raise httpx.RemoteProtocolError(f"{url} answers with more than {MOST_TOLD:,} bytes")
            if time.monotonic() > give_up:
                raise httpx.ReadTimeout(f"{url} does not come to the end of its answer")
    try:
        return json.loads(body)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def own_folder(home: Path) -> Path:
    """Where a node keeps what `CRUCIBLE_TLS=1` made."""
    return home / "tls"


# --- what the nodes agree on


def offer(settings: Settings) -> dict[str, bytes] | None:
    """What the coordinator tells an agent: None for plain HTTP, else files of the folder. Makes the authority first.

    Of an authority that somebody else made, the certificate only. Raises UsageError or StoreError.
    """
    folder = settings.tls
    if folder is None:
        return None
    if folder != own_folder(settings.home):
        return {AUTHORITY: _bytes(folder / AUTHORITY)}
    make_authority(folder)
    return {AUTHORITY: _bytes(folder / AUTHORITY), AUTHORITY_KEY: read_private(folder / AUTHORITY_KEY) or b""}


def prepare_node(settings: Settings, offered: Mapping[str, bytes] | None, host: str) -> ssl.SSLContext | None:
    """An agent's side of TLS as the cluster has it, or None for plain HTTP. Raises UsageError where they differ."""
    mine, own = settings.tls, own_folder(settings.home)
    if offered is None:
        if mine is not None:
            raise UsageError(
                "CRUCIBLE_TLS is set on this node and not on the coordinator's; set it for all `ray start`, or for none"
            )
        (own / IN_USE).unlink(missing_ok=True)
        return None
    given = mine if mine not in (None, own) else None
    if AUTHORITY_KEY not in offered:
        if given is None or _bytes(given / AUTHORITY) != offered[AUTHORITY]:
            raise UsageError(
                "the coordinator's CRUCIBLE_TLS names a folder of certificates; set this node's to one of the same "
                f"authority, with a {CERTIFICATE} for {host}"
            )
        _write(own / AUTHORITY, offered[AUTHORITY])
    elif given is not None:
        raise UsageError("the coordinator has CRUCIBLE_TLS=1, and this node's names a folder; let both be the same")
    else:
        for name in (AUTHORITY, AUTHORITY_KEY):
            _write(own / name, offered[name], private=name == AUTHORITY_KEY)
        issue(own, own, host)
    context = server_context(given or own, host)
    _write(own / IN_USE, b"")
    return context


# --- contexts


def server_context(folder: Path, host: str) -> ssl.SSLContext:
    """Of an agent that listens on `host`: as a peer would see it, tried at once. Raises UsageError or StoreError."""
    read_private(folder / KEY)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(folder / CERTIFICATE, folder / KEY)
        expires = _rehearse(context, wire.believing(folder / AUTHORITY), host)
    except (OSError, ssl.SSLError) as error:  # SSLError is an OSError
        raise UsageError(
            f"{folder}: no peer would believe this node's certificate ({_plain(error)}); it must be of {AUTHORITY}, "
            f"for {host}, and not over: see `crucible tls --help`"
        ) from error
    if expires - time.time() < WARN_DAYS * _DAY_S:
        days = max(0, round((expires - time.time()) / _DAY_S))
        _log.warning("%s is over in %d days; give this node a new one", folder / CERTIFICATE, days)
    return context


def _rehearse(server: ssl.SSLContext, client: ssl.SSLContext, host: str) -> float:
    """A handshake of the two in memory; gives the time at which the server's certificate is over. Raises SSLError."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    there = server.wrap_bio(to_server, to_client, server_side=True)
    here = client.wrap_bio(to_client, to_server, server_hostname=host)
    done: set[int] = set()
    while len(done) < 2:
        for number, side in enumerate((here, there)):
            try:
                side.do_handshake()
                done.add(number)
            except ssl.SSLWantReadError:
                pass
    return float(ssl.cert_time_to_seconds(str((here.getpeercert() or {})["notAfter"])))


def _plain(error: Exception) -> str:
    return getattr(error, "verify_message", "") or getattr(error, "strerror", "") or str(error)


# --- making certificates


def make_authority(folder: Path) -> None:
    """An authority in `folder`, unless one is there. Raises StoreError or UsageError."""
    if (folder / AUTHORITY_KEY).exists():
        return
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch)
        _request(made, "crucible cluster", "", AUTHORITY_KEY)
        _sign(made, "authority", AUTHORITY_DAYS, AUTHORITY, "-selfsign", "-keyfile", AUTHORITY_KEY)
        # the key last: its name says that all is there
        _write(folder / AUTHORITY, (made / AUTHORITY).read_bytes())
        _write(folder / AUTHORITY_KEY, (made / AUTHORITY_KEY).read_bytes(), private=True)


def issue(authority: Path, folder: Path, host: str, days: float = NODE_DAYS) -> None:
    """A new key and certificate for the node at `host`, an address or a name, in `folder`; and the authority's own.

    Raises StoreError or UsageError.
    """
    key = read_private(authority / AUTHORITY_KEY)
    if key is None:
        raise StoreError(str(authority / AUTHORITY_KEY), "is not there; certificates are made where it is")
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch)
        _request(made, "crucible node", _names(host), KEY)
        _write(made / AUTHORITY, _bytes(authority / AUTHORITY))
        _write(made / AUTHORITY_KEY, key, private=True)
        _sign(made, "node", days, CERTIFICATE, "-cert", AUTHORITY, "-keyfile", AUTHORITY_KEY)
        if folder != authority:
            _write(folder / AUTHORITY, (made / AUTHORITY).read_bytes())
        _write(folder / KEY, (made / KEY).read_bytes(), private=True)
        _write(folder / CERTIFICATE, (made / CERTIFICATE).read_bytes())


def _request(folder: Path, name: str, alternative: str, key: str) -> None:
    (folder / "config").write_text(_CONFIG.format(name=name, alternative=alternative or "DNS:none"))
    (folder / "index").touch()
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256")
    _openssl(folder, "req", "-new", "-config", "config", *curve, "-nodes", "-keyout", key, "-out", "request")


def _sign(folder: Path, kind: str, days: float, certificate: str, *by: str) -> None:
    """`openssl ca`, and not its simpler kin, as it alone can say since when: a day ago, for clocks that are behind."""
    now = time.time()
    begins, ends = (time.strftime("%Y%m%d%H%M%SZ", time.gmtime(at)) for at in (now - _DAY_S, now + days * _DAY_S))
    dates = ("-startdate", begins, "-enddate", ends)
    options = ("-batch", "-config", "config", "-notext", "-extensions", kind, *dates)
    _openssl(folder, "ca", *options, "-in", "request", "-out", certificate, *by)


def _names(host: str) -> str:
    try:
        return f"IP:{ipaddress.ip_address(host)}"
    except ValueError:
        if not all(part.isalnum() for part in host.replace(".", "-").split("-")):
            raise UsageError(f"{host!r} is no address or name of a node") from None
        return f"DNS:{host}"


def _openssl(folder: Path, *arguments: str) -> None:
    """Run the command in `folder`, where its files are: no key is ever in its arguments. Raises UsageError."""
    command = shutil.which("openssl")
    if command is None:
        raise UsageError(
            "CRUCIBLE_TLS=1 needs the `openssl` command on every node; or make the certificates elsewhere, and let "
            "CRUCIBLE_TLS name their folder"
        )
    try:
        done = subprocess.run(  # noqa: S603 - what it is told is made here
            [command, *arguments],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_OPENSSL_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        why = "did not end" if isinstance(error, subprocess.TimeoutExpired) else f"cannot be run ({error})"
        raise UsageError(f"{command} {arguments[0]} {why}; CRUCIBLE_TLS=1 needs one that works") from error
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise UsageError(f"openssl {arguments[0]} failed: {said[-1] if said else done.returncode}")


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}); CRUCIBLE_TLS needs it") from None


def _write(path: Path, data: bytes, *, private: bool = False) -> None:
    """All of it or nothing under the name; a key is never readable by others, not for a moment."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o644), "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StoreError(str(path), f"cannot be written ({error.strerror})") from error
