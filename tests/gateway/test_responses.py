"""Pieces of an answer on their way to its caller."""

import asyncio
import json
from collections.abc import AsyncGenerator

from autoglm_client.result import Response

from gateway.responses import DONE, Answer

USAGE = json.dumps({"prompt_tokens": 3, "completion_tokens": 2, "cached_tokens": 0})


async def pieces() -> AsyncGenerator[list[tuple[int, Response]], None]:
    yield [(0, Response("a")), (1, Response("b"))]
    yield [(0, Response())]  # a token that is half a character
    yield [
        (1, Response("c", finish_reason="length", usage=USAGE)),
        (0, Response("d", finish_reason="stop", usage=USAGE)),
    ]


def test_what_comes_together_is_written_together() -> None:
    async def written() -> list[bytes]:
        return [each async for each in Answer("text", "id", "model", False).events(pieces())]

    first, second, last = asyncio.run(written())
    told = [[json.loads(event[6:])["choices"][0] for event in each.split(b"\n\n")[:-1]] for each in (first, second)]
    assert [[(choice["index"], choice["text"]) for choice in each] for each in told] == [
        [(0, "a"), (1, "b")],
        [(1, "c"), (0, "d")],
    ]
    assert last == DONE


def test_a_whole_answer_joins_them_by_choice() -> None:
    whole = asyncio.run(Answer("text", "id", "model", False).gather(pieces()))
    assert [(c["text"], c["finish_reason"]) for c in whole["choices"]] == [("ad", "stop"), ("bc", "length")]
    assert whole["usage"]["completion_tokens"] == 4
