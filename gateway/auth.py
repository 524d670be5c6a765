"""API keys, sent by callers as `Authorization: Bearer <key>`."""

import hashlib
import hmac
from pathlib import Path

from gateway.errors import ApiError


class ApiKeys:
    """Keys from a file, one per line; `#` begins a comment. Only their SHA-256 digests are stored."""

    def __init__(self, path: Path | None) -> None:
        """Without a path no key is required. Raises ValueError for a file without a key or one that cannot be read."""
        self._digests: list[bytes] | None = None
        if path is not None:
            try:
                lines = [line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
            except OSError as error:
                raise ValueError(f"{path} cannot be read: {error.strerror}") from error
            self._digests = [_digest(line.encode()) for line in lines if line]
            if not self._digests:
                raise ValueError(f"{path} contains no API key; write one per line")

    def check(self, authorization: bytes | None) -> None:
        """Raise ApiError (401) unless the header contains one of the keys."""
        if self._digests is None:
            return
        scheme, _, key = (authorization or b"").partition(b" ")
        sent = _digest(key.strip())
        # Compare with all keys, each in constant time: the duration reveals nothing about any of them.
        if sum(hmac.compare_digest(sent, digest) for digest in self._digests) == 0 or scheme.lower() != b"bearer":
            problem = "invalid" if authorization else "missing"
            message = f"Authorization: {problem} API key; send 'Authorization: Bearer <key>'"
            raise ApiError(401, message, "invalid_api_key")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
