"""Start Ray in this process, or join a running cluster, for as long as a `with` lasts. Imports Ray when it must."""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from crucible.errors import ClusterError, ClusterRefused, ClusterUnreachable, VersionSkew
from crucible.failure import first_line
from crucible.reach import check_listens

GCS_TIMEOUT_S = 10.0
"""For the head of a cluster to answer that it is one. A busy one takes a second or two."""


class cluster:
    """`with cluster(address) as embedded`: connected to Ray inside, and as before outside.

    A process that is connected already (a user's own `ray.init`) stays connected, and its cluster is used. So is the
    one that another thread of this process is inside of: the last one out disconnects.
    """

    _lock = threading.Lock()
    _inside = 0
    """Threads inside of a connection that we made; `_embedded` is what it is."""
    _embedded = False

    def __init__(self, address: str | None) -> None:
        self._address = address
        self._ours = False

    def __enter__(self) -> bool:
        kind = type(self)
        with kind._lock:
            if kind._inside == 0:
                if "ray" in sys.modules and sys.modules["ray"].is_initialized():
                    return False
                kind._embedded = self._connect()
            kind._inside += 1
            self._ours = True
            return kind._embedded

    def __exit__(self, *_: object) -> None:
        kind = type(self)
        with kind._lock:
            if self._ours:
                self._ours = False
                kind._inside -= 1
                if kind._inside == 0:
                    import_ray().shutdown()

    def _connect(self) -> bool:
        embedded = self._address in (None, "local")
        ray = import_ray()
        _keep_off_stdout(ray)
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": False}
        try:
            if embedded:
                with _on_loopback():
                    ray.init(address="local", namespace="crucible", include_dashboard=False, **quiet)
            else:
                where = _resolved(str(self._address))
                check_listens(where)
                if self._address == "auto":
                    _use_own_token()
                _check_admitted(where)
                ray.init(address=self._address, namespace="crucible", **quiet)
        except (OSError, ValueError, RuntimeError, TimeoutError) as error:
            if (skew := _skew_in(str(self._address), str(error))) is not None:
                raise skew from error
            first = first_line(error)
            if embedded:
                raise ClusterError(f"Ray could not be started in this process: {first}") from error
            hint = "start one with `ray start --head`, or name another; what needs no cluster runs without an address"
            raise ClusterUnreachable(str(self._address), f"{first} ({hint})") from error
        return embedded


def _skew_in(address: str, text: str) -> VersionSkew | None:
    """What Ray says when the cluster has another Ray or Python than this process (2.60: two of each, theirs first)."""
    found = re.findall(r"^ *(?:Ray|Python): *(\S+)", text, re.MULTILINE)
    if "ersion mismatch" not in text or len(found) != 4:
        return None
    theirs, ours = (f"Ray {ray} and Python {python}" for ray, python in (found[:2], found[2:]))
    todo = f"install ray=={found[0]} on Python {found[1]} here, or the same as here on the cluster"
    return VersionSkew(f"the Ray cluster at {address!r}", "it runs", theirs, ours, todo)


def _keep_off_stdout(ray: Any) -> None:
    """Have Ray say on stderr what becomes of the cluster's nodes. It does so on stdout (2.60), among our results."""
    worker = ray._private.worker
    say = getattr(worker, "print_to_stdstream", None)
    if say is None or hasattr(say, "aside"):
        return

    def aside(data: dict[str, Any], ignore_prefix: bool) -> None:
        say({**data, "is_err": True}, ignore_prefix)

    aside.aside = True  # type: ignore[attr-defined]
    worker.print_to_stdstream = aside


def _resolved(address: str) -> str:
    """Where `auto` leads: Ray notes its newest cluster in a file, which outlives the cluster."""
    if address != "auto":
        return address
    from ray._private.services import canonicalize_bootstrap_address

    return canonicalize_bootstrap_address(address) or address


def _use_own_token() -> None:
    """What Ray itself does for a cluster that it finds on this machine: use the token that is here, unless
    RAY_AUTH_MODE says otherwise. For an address it never does (2.60).
    """
    import_ray()
    with suppress(ImportError):  # another Ray
        from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available

        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def _check_admitted(address: str) -> None:
    """Raise ClusterRefused when the cluster at `host:port` does not take this process's Ray token, or what it has for
    one, and TimeoutError when what listens there is no Ray cluster.

    `ray.init` itself tries for twenty seconds in the first case, and for ten minutes in the second, and says in neither
    what is wrong (2.60).
    """
    ray = import_ray()
    refusal = getattr(ray.exceptions, "AuthenticationError", None)
    asking = getattr(ray._raylet, "InnerGcsClient", None)
    if "://" in address or refusal is None or asking is None:  # its client protocol, or another Ray
        return
    enabled = os.environ.get("RAY_AUTH_MODE", "").lower() == "token"
    found = ray._raylet.AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True)
    if enabled and not found:
        raise ClusterRefused(address, enabled, found)  # asking without one would end this process
    try:
        asking.standalone(address, None, int(GCS_TIMEOUT_S * 1000))
    except refusal as error:
        raise ClusterRefused(address, enabled, found) from error
    except ray.exceptions.RpcError as error:
        raise TimeoutError("what listens there does not answer as a Ray cluster does") from error


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Start Ray on 127.0.0.1, where nobody else can reach it. Ray has no argument for that: it turns a loopback address
    that it is given into the machine's own, except where it runs single-node only, by this switch of its own (2.60).
    The children read it from the environment, this process from the constant; both are put back afterwards.
    """
    from ray._private import ray_constants

    name = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
    before, constant = os.environ.get(name), ray_constants.ENABLE_RAY_CLUSTER
    os.environ[name], ray_constants.ENABLE_RAY_CLUSTER = "0", False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = constant
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def import_ray() -> Any:
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # its future default; unset, it warns
    import ray

    return ray
