"""A block hash changes with everything that the block's content depends on, and with nothing else."""

from hypothesis import given
from hypothesis import strategies as st

from autoglm.llm.block_hash import MediaSpan, hash_block

IDS = [9, 9, 9, 9]


def test_depends_on_the_tokens_and_the_parent() -> None:
    assert hash_block(b"", IDS, 0, []) == hash_block(b"", list(IDS), 0, [])
    assert hash_block(b"", IDS, 0, []) != hash_block(b"", [9, 9, 9, 8], 0, [])
    assert hash_block(b"", IDS, 4, []) != hash_block(b"parent", IDS, 4, [])
    assert hash_block(b"", [1, 23], 0, []) != hash_block(b"", [12, 3], 0, [])


def test_depends_only_on_media_in_the_block() -> None:
    def hashed(*spans: MediaSpan, start: int = 8) -> bytes:
        return hash_block(b"p", IDS, start, spans)

    plain = hashed()
    assert hashed(MediaSpan(b"a", 0, 8)) == plain
    assert hashed(MediaSpan(b"a", 12, 8)) == plain
    assert (
        len({plain, hashed(MediaSpan(b"a", 9, 2)), hashed(MediaSpan(b"b", 9, 2)), hashed(MediaSpan(b"a", 10, 2))}) == 4
    )
    assert hashed(MediaSpan(b"a", 7, 9)) != hashed(MediaSpan(b"a", 6, 9))
    # The same offset from the block's start is the same content.
    assert hashed(MediaSpan(b"a", 9, 2)) == hashed(MediaSpan(b"a", 13, 2), start=12)


contents = st.tuples(
    st.lists(st.integers(0, 3), min_size=4, max_size=4),
    st.sampled_from([b"", b"p", b"q"]),
    st.sampled_from([b"a", b"b"]),
)


@given(contents, contents, st.integers(0, 3), st.integers(0, 3))
def test_equal_exactly_for_equal_content(
    first: tuple[list[int], bytes, bytes], second: tuple[list[int], bytes, bytes], start: int, other_start: int
) -> None:
    def hashed(content: tuple[list[int], bytes, bytes], start: int) -> bytes:
        token_ids, parent, media_hash = content
        return hash_block(parent, token_ids, 8, [MediaSpan(media_hash, 8 + start, 2)])

    assert (hashed(first, start) == hashed(second, other_start)) == (first == second and start == other_start)
