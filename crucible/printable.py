"""Text from a repo, a Hub or a peer, as a terminal may get it: nothing in it moves the cursor or turns a line round.

Names of files, configs and columns come from strangers. A terminal obeys escape sequences (C0 and C1 controls), and the
marks that change the direction of writing make one name look like another.
"""

from __future__ import annotations

import re

_OBEYED = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str) -> str:
    """The text with each such character written as its escape, `\\x1b`. Line ends and tabs stay."""
    return _OBEYED.sub(_escape, text)


def printable_json(text: str) -> str:
    """JSON text as `printable` would have it, and still the same JSON: `\\u009b`."""
    return _OBEYED.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
