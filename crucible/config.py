"""Settings, read once from the environment at the edge. Nothing else in crucible reads `os.environ`.

The ecosystem's own names come first (HF_*, RANK, WORLD_SIZE, RAY_ADDRESS), then CRUCIBLE_*.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import urlsplit

from crucible.cache.quota import Quota
from crucible.errors import UsageError
from crucible.launch import LAUNCHERS, rank_of_environment

DEFAULT_ENDPOINT = "https://huggingface.co"
_TRUE = {"1", "ON", "YES", "TRUE"}
_PERCENT = re.compile(r"(\d+(?:\.\d+)?)\s*%")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:I?B)?", re.IGNORECASE)


class Token(str):
    """The Hub token. Its repr hides it, so that a log line or a traceback of a settings object cannot leak it."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "Token(***)"


@dataclass(frozen=True)
class Settings:
    """Everything that can be set from outside. Make one with `Settings.from_env()`; change a field with `replace`."""

    home: Path
    """Root of this node's store."""
    endpoint: str = DEFAULT_ENDPOINT
    """Origin of the Hub, without a slash at the end."""
    token: Token | None = field(default=None, repr=False)
    """Goes to `endpoint`'s origin only."""
    offline: bool = False
    hub_cache: Path = Path("~/.cache/huggingface/hub")
    agent_url: str | None = None
    """This node's agent, when discovery through `home` is not enough (CRUCIBLE_AGENT)."""
    ray_address: str | None = None
    rank: int | None = None
    world_size: int | None = None
    shard_bytes: int = 64 << 20
    """Target size of one shard in bytes of Arrow data. 64 MiB: big enough that a peer fetch is mostly bytes and not
    round trips, small enough that shards spread evenly over nodes. One shard in the making is held in memory."""
    part_bytes: int = 64 << 20
    """Largest range asked for in one request."""
    row_bytes: int = 1 << 30
    """Bytes of one file that becomes a value of a row, such as an image of a folder or of an archive, and of a metadata
    file. It is held in memory; a bigger one is an error (CRUCIBLE_ROW_BYTES)."""
    unpacked_bytes: int = 64 << 30
    """What one archive may unpack to, and the rows of a file that is a thousandth of them; more is an error
    (CRUCIBLE_UNPACKED_BYTES)."""
    inflight_bytes: int = 4 << 30
    """Source bytes that may be in flight in the whole cluster at once: what the coordinator dispatches against."""
    tries: int = 5
    """How often one request is tried before its source counts as unavailable."""
    timeout_s: float = 10.0
    """Seconds without a byte after which a connection counts as stalled (HF_HUB_DOWNLOAD_TIMEOUT)."""
    backoff_cap_s: float = 60.0
    """No wait of our own choosing between tries is longer; what the Hub says it wants to wait is another matter."""
    streams: int = 8
    """Ranges of one big file in flight at once (CRUCIBLE_STREAMS). They hide latency; a near source gets fewer."""
    connections: int = 64
    """Requests in flight at once to the Hub, its mirrors and its CDN: of the whole cluster where there is one, else of
    this process (CRUCIBLE_CONNECTIONS)."""
    stall_s: float = 3.0
    """Seconds without a byte after which another source is asked for the rest, while this one may still wake up
    (CRUCIBLE_STALL)."""
    stall_log_s: float = 10.0
    """Seconds that a reader waits for a shard before the log says what for; then at 20, 40, ... (CRUCIBLE_STALL_LOG).
    Longer than `stall_s`, so that a source that stalls has made way for another by then, and what is logged is worth
    a look."""
    ahead_bytes: int = 1 << 30
    """Bytes of shards that a reader has fetched and not opened yet; 0: it fetches none ahead (CRUCIBLE_AHEAD)."""
    mirrors: tuple[str, ...] = ()
    """Endpoints that serve the same repos and are asked before the Hub, without a token (CRUCIBLE_MIRRORS)."""
    tls: Path | None = None
    """Folder of this node's certificates, if its cluster speaks TLS between nodes (CRUCIBLE_TLS; `workers.tls`)."""
    agent_ports: tuple[int, int] = (0, 0)
    """First and last port that an agent may listen on; 0 is any that is free (CRUCIBLE_AGENT_PORT)."""
    quota: Quota = field(default_factory=Quota)
    """What this node's store may take of its disk (CRUCIBLE_QUOTA)."""
    scrub_rate: int = 8 << 20
    """Bytes a second that the agent reads to look for shards that have rotted; 0: it does not (CRUCIBLE_SCRUB_RATE)."""
    rack: str = ""
    """Where this node stands, for replicas to be spread (CRUCIBLE_RACK). Ray's node label `rack` goes before it."""
    repair_after_s: float | None = 300.0
    """Seconds after a node was lost until what it held is copied or made again without being asked; None: never
    (CRUCIBLE_REPAIR_AFTER). A node that is only being restarted is back by then, with its store."""
    grace_s: float = 30.0
    """Seconds that an agent has after a SIGTERM to see its node drained (CRUCIBLE_GRACE)."""
    xet: bool = False
    """Ask Xet storage before the Hub's HTTP, where a file is in it (CRUCIBLE_XET, unless HF_HUB_DISABLE_XET)."""

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Read the environment. Raises UsageError naming the variable that makes no sense."""
        env = os.environ if environ is None else environ
        rank, world_size = rank_of_environment(env) or (None, None)
        return cls(
            home=home_dir(env),
            endpoint=check_endpoint(env.get("HF_ENDPOINT") or DEFAULT_ENDPOINT),
            token=_token(env),
            offline=any(_flag(env, name) for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")),
            hub_cache=_hub_cache(env),
            agent_url=env.get("CRUCIBLE_AGENT") or None,
            ray_address=env.get("RAY_ADDRESS") or None,
            rank=rank,
            world_size=world_size,
            shard_bytes=_size(env, "CRUCIBLE_SHARD_BYTES", 64 << 20),
            part_bytes=_size(env, "CRUCIBLE_PART_BYTES", 64 << 20),
            row_bytes=_size(env, "CRUCIBLE_ROW_BYTES", 1 << 30),
            unpacked_bytes=_size(env, "CRUCIBLE_UNPACKED_BYTES", 64 << 30),
            inflight_bytes=_size(env, "CRUCIBLE_INFLIGHT_BYTES", 4 << 30),
            tries=_count(env, "CRUCIBLE_TRIES", 5),
            timeout_s=_seconds(env, "HF_HUB_DOWNLOAD_TIMEOUT", 10.0),
            backoff_cap_s=_seconds(env, "CRUCIBLE_BACKOFF_CAP", 60.0),
            streams=_count(env, "CRUCIBLE_STREAMS", 8),
            connections=_count(env, "CRUCIBLE_CONNECTIONS", 64),
            stall_s=_seconds(env, "CRUCIBLE_STALL", 3.0),
            stall_log_s=_seconds(env, "CRUCIBLE_STALL_LOG", 10.0),
            ahead_bytes=_size(env, "CRUCIBLE_AHEAD", 1 << 30, least=0),
            mirrors=tuple(
                check_endpoint(part.strip()) for part in env.get("CRUCIBLE_MIRRORS", "").split(",") if part.strip()
            ),
            tls=_tls(env),
            agent_ports=_ports(env, "CRUCIBLE_AGENT_PORT"),
            quota=_quota(env),
            scrub_rate=_size(env, "CRUCIBLE_SCRUB_RATE", 8 << 20, least=0),
            rack=env.get("CRUCIBLE_RACK", "").strip(),
            repair_after_s=_repair_after(env),
            grace_s=_seconds(env, "CRUCIBLE_GRACE", 30.0),
            xet=_flag(env, "CRUCIBLE_XET") and not _flag(env, "HF_HUB_DISABLE_XET"),
        )


MOST_DECODERS = 8
"""Threads that decode in one rank, unless it is said otherwise: more of them wait for Python's lock on each other."""


def decoders(environ: Mapping[str, str] | None = None) -> int:
    """Threads that decode images in one rank, all of its DataLoader workers together; at least one.

    CRUCIBLE_DECODERS, else this rank's share of the cores that its process may use, where the launcher says how many
    ranks there are on a node.
    """
    env = os.environ if environ is None else environ
    if env.get("CRUCIBLE_DECODERS"):
        return _count(env, "CRUCIBLE_DECODERS", 1)
    ranks = 1
    for name in ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "SLURM_NTASKS_PER_NODE"):
        if env.get(name, "").isdecimal():
            ranks = max(1, int(env[name]))
            break
    return max(1, min(MOST_DECODERS, len(os.sched_getaffinity(0)) // ranks))


def lock_bytes(environ: Mapping[str, str] | None = None) -> int:
    """Bytes of the biggest lock file that is read (CRUCIBLE_LOCK_BYTES). That of a million shards has two thirds."""
    return _size(os.environ if environ is None else environ, "CRUCIBLE_LOCK_BYTES", 1 << 30)


def node_settings() -> Settings:
    """The settings of a Ray worker: nobody's rank, whatever launcher its raylet was started in."""
    launchers = {name for names in LAUNCHERS for name in names}
    return Settings.from_env({name: value for name, value in os.environ.items() if name not in launchers})


def failpoint_folder(environ: Mapping[str, str] | None = None) -> Path | None:
    """Where tests arm failpoints (CRUCIBLE_FAILPOINTS); see `failpoints`."""
    folder = (os.environ if environ is None else environ).get("CRUCIBLE_FAILPOINTS")
    return Path(folder) if folder else None


def home_dir(env: Mapping[str, str]) -> Path:
    """CRUCIBLE_HOME, else `crucible` in the user's cache folder."""
    if env.get("CRUCIBLE_HOME"):
        return Path(env["CRUCIBLE_HOME"]).expanduser().absolute()
    return _cache_home(env) / "crucible"


def _tls(env: Mapping[str, str]) -> Path | None:
    """CRUCIBLE_TLS: `1` is `tls` in the store, which crucible fills; a folder is one that somebody else filled."""
    said = env.get("CRUCIBLE_TLS", "")
    if said.upper() in _TRUE:
        return home_dir(env) / "tls"
    if said.upper() in ("", "0", "OFF", "NO", "FALSE"):
        return None
    if not Path(said).expanduser().is_dir():
        raise UsageError(f"CRUCIBLE_TLS={said!r} is neither 1 nor a folder with this node's certificates")
    return Path(said).expanduser().absolute()


def _ports(env: Mapping[str, str], name: str) -> tuple[int, int]:
    """`7000` or `7000-7015`, both included."""
    said = [part.strip() for part in (env.get(name) or "0").split("-")]
    ports = (int(said[0]), int(said[-1])) if len(said) < 3 and all(map(str.isdecimal, said)) else (-1, -1)
    if not 0 <= ports[0] <= ports[1] <= 65535:
        raise UsageError(f"{name}={env[name]!r} is no port or range of ports; write it like 7000 or 7000-7015")
    return ports


def _cache_home(env: Mapping[str, str]) -> Path:
    return Path(env.get("XDG_CACHE_HOME") or "~/.cache").expanduser()


def _hub_cache(env: Mapping[str, str]) -> Path:
    if env.get("HF_HUB_CACHE"):
        return Path(env["HF_HUB_CACHE"]).expanduser()
    return _hf_home(env) / "hub"


def _hf_home(env: Mapping[str, str]) -> Path:
    return Path(env["HF_HOME"]).expanduser() if env.get("HF_HOME") else _cache_home(env) / "huggingface"


def _token(env: Mapping[str, str]) -> Token | None:
    """The official order: HF_TOKEN, HUGGING_FACE_HUB_TOKEN, the file of HF_TOKEN_PATH, the file in HF_HOME."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if value := "".join(env.get(name, "").split()):
            return Token(value)
    if _flag(env, "HF_HUB_DISABLE_IMPLICIT_TOKEN"):
        return None
    path = Path(env["HF_TOKEN_PATH"]).expanduser() if env.get("HF_TOKEN_PATH") else _hf_home(env) / "token"
    try:
        value = "".join(path.read_text().split())
    except (OSError, UnicodeDecodeError):
        return None  # no such file is the normal case of a user without a token
    return Token(value) if value else None


def check_endpoint(value: str) -> str:
    """An http(s) origin without the slash at the end, or UsageError."""
    url = urlsplit(value)
    if url.scheme not in ("http", "https") or not url.hostname:
        raise UsageError(f"HF_ENDPOINT (or --endpoint) {value!r} is not an http(s) address like {DEFAULT_ENDPOINT}")
    return value.rstrip("/")


def parse_size(text: str, name: str) -> int:
    """`64MB`, `1.5GiB`, `4096` as bytes; powers of 1024 whichever way it is spelt."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"{name}={text!r} is not a size; write it like 64MiB")
    return int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " "))


def _quota(env: Mapping[str, str]) -> Quota:
    text = env.get("CRUCIBLE_QUOTA", "").strip()
    if not text:
        return Quota()
    if (match := _PERCENT.fullmatch(text)) is None:
        return Quota(size=_size(env, "CRUCIBLE_QUOTA", 0))
    if not 0 < float(match[1]) <= 100:
        raise UsageError(f"CRUCIBLE_QUOTA={text!r} must be more than 0 % and at most 100 %")
    return Quota(share=float(match[1]) / 100)


def _flag(env: Mapping[str, str], name: str) -> bool:
    return env.get(name, "").upper() in _TRUE


def _size(env: Mapping[str, str], name: str, default: int, *, least: int = 1) -> int:
    size = parse_size(env[name], name) if env.get(name) else default
    if size < least:
        raise UsageError(f"{name} must be {'more than 0' if least else '0 or more'}")
    return size


def _integer(env: Mapping[str, str], name: str, default: int) -> int:
    try:
        return int(env.get(name) or default)
    except ValueError:
        raise UsageError(f"{name}={env[name]!r} is not a whole number") from None


def _count(env: Mapping[str, str], name: str, default: int) -> int:
    value = _integer(env, name, default)
    if value < 1:
        raise UsageError(f"{name}={value} must be at least 1")
    return value


def _seconds(env: Mapping[str, str], name: str, default: float) -> float:
    try:
        value = float(env.get(name) or default)
    except ValueError:
        raise UsageError(f"{name}={env[name]!r} is not a number of seconds") from None
    if not 0 < value < float("inf"):
        raise UsageError(f"{name}={env[name]!r} must be more than 0 seconds")
    return value


def _repair_after(env: Mapping[str, str]) -> float | None:
    if env.get("CRUCIBLE_REPAIR_AFTER", "").strip().lower() in ("off", "never"):
        return None
    return _seconds(env, "CRUCIBLE_REPAIR_AFTER", 300.0)


def settings_with(settings: Settings, *, endpoint: str | None = None, token: str | bool | None = None) -> Settings:
    """`settings` with what the caller gave by argument. `token` True means that one is required."""
    if endpoint is not None:
        settings = replace(settings, endpoint=check_endpoint(endpoint))
    if token is False:
        return replace(settings, token=None)
    if token is True and settings.token is None:
        raise UsageError("token=True, but there is none; set HF_TOKEN or run `hf auth login`")
    return replace(settings, token=Token(token)) if isinstance(token, str) else settings
