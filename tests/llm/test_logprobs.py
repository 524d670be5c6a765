"""Log probabilities that come with tokens: those of the reference, whatever is drawn, penalised or forced."""

from typing import Any

import pytest
import torch

from autoglm.llm.sequence import TokenLogprob
from tests.conftest import Pair
from tests.llm.harness import Answer, Harness
from tests.llm.structured_output.test_engine import FORMATS, all_requests, tokens_of
from tests.llm.test_engine import mixed_requests
from tests.prompts import random_text

KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"logprobs": 0},
    "penalised": {"logprobs": 5, "frequency_penalty": 0.4, "repetition_penalty": 1.2},
    "drawn": {"logprobs": 20, "temperature": 1.4, "seed": 3},
    "cut": {"logprobs": 3, "temperature": 0.9, "top_p": 0.8, "top_k": 30, "seed": 4, "stream": False},
    "in a grammar": {"logprobs": 4, "response_format": FORMATS["choice"], "ignore_eos": False},
    "drawn in a grammar": {"logprobs": 1, "response_format": FORMATS["text"], "temperature": 1.0, "seed": 5},
}
PLAIN: dict[str, dict[str, Any]] = {"free": {}, "free and drawn": {"temperature": 1.0, "seed": 1}}
PROMPT = random_text(30, 8)


def run(pair: Pair, kinds: dict[str, dict[str, Any]], **changes: Any) -> Harness:
    harness = Harness(pair.checkpoint, **changes)
    harness.run(*(harness.request(name, PROMPT, max_tokens=40, **options) for name, options in kinds.items()))
    assert harness.all_blocks_back()
    return harness


def logprobs_of(answer: Answer) -> list[TokenLogprob]:
    return [item for piece in answer.pieces for item in piece.logprobs]


@pytest.mark.parametrize("changes", [{}, {"max_tokens_per_step": 8}])
def test_they_are_the_reference_s(plain: Pair, changes: dict[str, Any]) -> None:
    harness = run(plain, KINDS | PLAIN, **changes)
    for name, options in KINDS.items():
        answer, count = harness.answers[name], options["logprobs"]
        assert all(len(piece.logprobs) == len(piece.token_ids) for piece in answer.pieces)
        given = logprobs_of(answer)
        assert [item.token_id for item in given] == answer.token_ids
        sequence = torch.tensor([PROMPT + answer.token_ids])
        rows = plain.reference(input_ids=sequence).logits[0, len(PROMPT) - 1 : -1].detach().double().log_softmax(-1)
        for row, item in zip(rows, given, strict=True):
            assert item.logprob == pytest.approx(float(row[item.token_id]), abs=1e-4)
            assert len({id_ for id_, _ in item.top}) == len(item.top) == count
            assert [value for _, value in item.top] == sorted((value for _, value in item.top), reverse=True)
            assert [value for _, value in item.top] == pytest.approx([float(row[id_]) for id_, _ in item.top], abs=1e-4)
            assert [value for _, value in item.top] == pytest.approx(row.topk(count).values.tolist(), abs=1e-4)
    assert not any(logprobs_of(harness.answers[name]) for name in PLAIN)


def test_they_change_no_token(plain: Pair) -> None:
    """Neither of drawn answers nor of those in a grammar, though these get no forced tokens then."""
    without, beside = Harness(plain.checkpoint), Harness(plain.checkpoint)
    without.run(*mixed_requests(without), *all_requests(without))
    requests = [*mixed_requests(beside), *all_requests(beside)]
    for request in requests[::2]:
        object.__setattr__(request.sampling, "logprobs", 2)
    beside.run(*requests)
    assert tokens_of(beside) == tokens_of(without)
    for place, request in enumerate(requests):
        answer = beside.answers[request.request_id]
        assert len(logprobs_of(answer)) == (0 if place % 2 else len(answer.token_ids))


def test_they_survive_being_pushed_out(plain: Pair) -> None:
    wanted = run(plain, KINDS)
    harness = Harness(plain.checkpoint)
    harness.submit(*(harness.request(name, PROMPT, max_tokens=40, **options) for name, options in KINDS.items()))
    scheduler = harness.engine.scheduler
    for step in range(40):
        for sequence in scheduler.running[step % 7 :: 7]:
            scheduler._preempt(sequence)
        harness.step()
    harness.run()
    for name, answer in wanted.answers.items():
        ours, theirs = logprobs_of(harness.answers[name]), logprobs_of(answer)
        assert [item.token_id for item in ours] == [item.token_id for item in theirs]
        assert [item.logprob for item in ours] == pytest.approx([item.logprob for item in theirs], abs=1e-4)
