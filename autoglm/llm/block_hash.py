"""Names for the content of KV blocks: a chain of hashes, so that a name stands for everything up to its block."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256


@dataclass(frozen=True)
class MediaSpan:
    """A run of placeholder tokens in a prompt; `digest` names the media they stand for. Images are `visual`."""

    digest: bytes
    start: int
    length: int
    visual: bool = True

    @property
    def end(self) -> int:
        return self.start + self.length


def prefix_key(parent: bytes, token_ids: Sequence[int], start: int, media: Sequence[MediaSpan]) -> bytes:
    """The name of the block that holds `token_ids` from index `start` of a sequence on.

    All placeholders have one id, so each span that reaches into the block adds its digest and where it begins
    relative to the block: another image in the same place has another name.
    """
    name = sha256(parent)
    name.update(array("q", token_ids).tobytes())
    end = start + len(token_ids)
    for span in media:
        if span.start < end and span.end > start:
            name.update(span.digest)
            name.update((span.start - start).to_bytes(8, "little", signed=True))
    return name.digest()
