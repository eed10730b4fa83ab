"""Bring a file that fits in memory many times over: one request, one write, no journal and no lease."""

from __future__ import annotations

from pathlib import Path

from crucible.cache.blobs import BlobFolder
from crucible.errors import ChecksumMismatch, SizeMismatch
from crucible.hashing import hash_bytes
from crucible.hub.http import Refusal
from crucible.refs import SourceFile
from crucible.report import Observer, Tally, TransferEvent
from crucible.stopping import check
from crucible.workers.ladder import Failures, Ladder
from crucible.workers.options import DownloadOptions, retried


def bring_small(
    file: SourceFile, ladder: Ladder, blobs: BlobFolder, options: DownloadOptions, tally: Tally, observe: Observer
) -> Path:
    """As `download.bring`, for a file below SMALL_BYTES."""
    if blobs.has(file):
        observe(TransferEvent("progress", file.path, file.size, source="disk"))
        return blobs.path(file.oid)
    body = bytearray(file.size)
    failures = Failures()
    at = 0
    while True:
        source = ladder.pick(failures)
        before = at
        try:
            check(options.stopped)
            if at < file.size:
                observe(TransferEvent("asking", file.path, source=source.name))
                with source.open(file, at, file.size) as reply:
                    at = at if reply.start == at else 0
                    for chunk in reply.chunks:
                        check(options.stopped)
                        source.count(len(chunk))
                        if at + len(chunk) > file.size:
                            raise SizeMismatch(file.path, source.name, file.size, at + len(chunk))
                        body[at : at + len(chunk)] = chunk
                        at += len(chunk)
                if at < file.size:
                    raise Refusal(None, {}, f"the body ended after {at:,} of {file.size:,} bytes")
            if (actual := hash_bytes(file, body)) != file.oid:
                raise ChecksumMismatch(file.path, source.name, file.oid, actual)
        except Exception as error:  # noqa: BLE001 - the ladder raises again what no source can help with
            if at > before:
                failures.forget()
            wait = ladder.failed(source, error, failures)
            at = 0 if isinstance(error, ChecksumMismatch | SizeMismatch) else at
            retried(file, source.name, error, wait, options, tally, observe)
            continue
        tally.add(verified_files=1)
        path = blobs.put(file, body)
        observe(TransferEvent("progress", file.path, file.size, source=source.name))
        observe(TransferEvent("verified", file.path, file.size, source=source.name))
        return path
