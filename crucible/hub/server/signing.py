"""Links to blobs on the second origin that need no token: signed and good for a while. No I/O."""

from __future__ import annotations

import hashlib
import hmac
from urllib.parse import parse_qs, quote


class Signer:
    """Makes and checks blob links with one secret; a new secret (a restart) ends all links made before."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def link(self, sha256: str, path: str, *, expires: int) -> str:
        """Path and query of a link to one blob, under the file's name, good until `expires` (Unix seconds)."""
        target = f"/blobs/{sha256}/{quote(path)}"
        return f"{target}?Expires={expires}&Signature={self._sign(target, expires)}"

    def refusal(self, raw_path: str, query: str, *, now: float) -> str | None:
        """Why this link is not good at `now`, or None when it is."""
        fields = parse_qs(query)
        expires, signature = fields.get("Expires", [""])[0], fields.get("Signature", [""])[0]
        if not expires.isdecimal() or not hmac.compare_digest(
            self._sign(raw_path, int(expires)).encode(), signature.encode()
        ):
            return "SignatureDoesNotMatch"
        return "Request has expired" if now >= int(expires) else None

    def _sign(self, target: str, expires: int) -> str:
        return hmac.new(self._secret, f"{target}\n{expires}".encode(), hashlib.sha256).hexdigest()
