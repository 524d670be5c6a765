"""Content hashes of KV blocks, chained: a block's hash covers its whole prefix."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256


@dataclass(frozen=True)
class MediaSpan:
    """A run of placeholder tokens in a prompt, and the hash of the media they represent. Images are `visual`."""

    media_hash: bytes
    start: int
    length: int
    visual: bool = True

    @property
    def end(self) -> int:
        return self.start + self.length


def hash_block(parent: bytes, token_ids: Sequence[int], start: int, media: Sequence[MediaSpan]) -> bytes:
    """The hash of the block that holds `token_ids`, which begin at index `start` of a sequence.

    All placeholders have the same id. So each span that overlaps the block adds its media hash and its offset from the
    block's start: another image in the same place has another hash.
    """
    digest = sha256(parent)
    digest.update(array("q", token_ids).tobytes())
    end = start + len(token_ids)
    for span in media:
        if span.start < end and span.end > start:
            digest.update(span.media_hash)
            digest.update((span.start - start).to_bytes(8, "little", signed=True))
    return digest.digest()
