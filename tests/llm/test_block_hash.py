"""A block's name changes with everything that its content depends on, and with nothing else."""

from autoglm.llm.block_hash import MediaSpan, prefix_key

IDS = [9, 9, 9, 9]


def test_depends_on_tokens_and_on_all_before() -> None:
    assert prefix_key(b"", IDS, 0, []) == prefix_key(b"", list(IDS), 0, [])
    assert prefix_key(b"", IDS, 0, []) != prefix_key(b"", [9, 9, 9, 8], 0, [])
    assert prefix_key(b"", IDS, 4, []) != prefix_key(b"parent", IDS, 4, [])
    assert prefix_key(b"", [1, 23], 0, []) != prefix_key(b"", [12, 3], 0, [])


def test_depends_on_media_inside_the_block_only() -> None:
    def key(*spans: MediaSpan, start: int = 8) -> bytes:
        return prefix_key(b"p", IDS, start, spans)

    plain = key()
    assert key(MediaSpan(b"a", 0, 8)) == plain
    assert key(MediaSpan(b"a", 12, 8)) == plain
    assert len({plain, key(MediaSpan(b"a", 9, 2)), key(MediaSpan(b"b", 9, 2)), key(MediaSpan(b"a", 10, 2))}) == 4
    assert key(MediaSpan(b"a", 7, 9)) != key(MediaSpan(b"a", 6, 9))
    # The same place relative to the block is the same content.
    assert key(MediaSpan(b"a", 9, 2)) == key(MediaSpan(b"a", 13, 2), start=12)
