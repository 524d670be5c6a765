"""The keys that callers show as `Authorization: Bearer KEY`."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

from gateway.errors import ApiError


class Keys:
    """Keys from a file, one on each line; `#` begins a comment. Only their digests are kept."""

    def __init__(self, path: Path | None) -> None:
        """Without a path every caller is let in. Raises ValueError for a file without a key, OSError for none."""
        self._digests: list[bytes] | None = None
        if path is not None:
            lines = (line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
            self._digests = [_digest(line.encode()) for line in lines if line]
            if not self._digests:
                raise ValueError(f"{path} holds no key: write one on each line")

    def check(self, authorization: bytes | None) -> None:
        """Raises ApiError (401) for a header without one of the keys."""
        if self._digests is None:
            return
        scheme, _, key = (authorization or b"").partition(b" ")
        shown = _digest(key.strip())
        # All are compared, each in constant time: how long it takes tells nothing about any of them.
        if sum(hmac.compare_digest(shown, digest) for digest in self._digests) == 0 or scheme.lower() != b"bearer":
            got = "another" if authorization else "none"
            message = f"Authorization: got {got}; allowed: Bearer and a key of this server"
            raise ApiError(401, message, "invalid_api_key")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
