"""Log probabilities are those of the reference model, whether tokens are sampled, penalized or forced by a grammar."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.conftest import Pair
from tests.llm.harness import Harness
from tests.llm.structured_output.test_engine import FORMATS, grammar_requests
from tests.llm.test_engine import mixed_requests
from tests.prompts import random_text

OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {"logprobs": 0},
    "penalized": {"logprobs": 5, "frequency_penalty": 0.4, "repetition_penalty": 1.2},
    "sampled": {"logprobs": 20, "temperature": 1.4, "seed": 3},
    "truncated": {"logprobs": 3, "temperature": 0.9, "top_p": 0.8, "top_k": 30, "seed": 4, "stream": False},
    "grammar": {"logprobs": 4, "response_format": FORMATS["choice"], "ignore_eos": False},
    "sampled grammar": {"logprobs": 1, "response_format": FORMATS["text"], "temperature": 1.0, "seed": 5},
}
WITHOUT_LOGPROBS: dict[str, dict[str, Any]] = {"plain": {}, "plain sampled": {"temperature": 1.0, "seed": 1}}
PROMPT = random_text(30, 8)


def run(pair: Pair, options: dict[str, dict[str, Any]], **changes: Any) -> Harness:
    harness = Harness(pair.checkpoint, **changes)
    harness.run(*(harness.request(name, PROMPT, max_tokens=40, **each) for name, each in options.items()))
    assert harness.all_blocks_available()
    return harness


@pytest.mark.parametrize("changes", [{}, {"max_tokens_per_step": 8}])
def test_logprobs_equal_those_of_the_reference(plain: Pair, changes: dict[str, Any]) -> None:
    harness = run(plain, OPTIONS | WITHOUT_LOGPROBS, **changes)
    for name, options in OPTIONS.items():
        answer, count = harness.answers[name], options["logprobs"]
        assert all(len(output.logprobs) == len(output.token_ids) for output in answer.outputs)
        assert [item.token_id for item in answer.logprobs] == answer.token_ids
        sequence = torch.tensor([PROMPT + answer.token_ids])
        rows = plain.reference(input_ids=sequence).logits[0, len(PROMPT) - 1 : -1].detach().double().log_softmax(-1)
        for row, item in zip(rows, answer.logprobs, strict=True):
            values = [value for _, value in item.top]
            assert item.logprob == pytest.approx(float(row[item.token_id]), abs=1e-4)
            assert len({id_ for id_, _ in item.top}) == len(item.top) == count
            assert values == sorted(values, reverse=True)
            assert values == pytest.approx([float(row[id_]) for id_, _ in item.top], abs=1e-4)
            assert values == pytest.approx(row.topk(count).values.tolist(), abs=1e-4)
    assert not any(harness.answers[name].logprobs for name in WITHOUT_LOGPROBS)


def test_logprobs_do_not_change_the_tokens(plain: Pair) -> None:
    """Neither of sampled answers nor of those in a grammar, where they disable forced tokens."""
    without, mixed = Harness(plain.checkpoint), Harness(plain.checkpoint)
    without.run(*mixed_requests(without), *grammar_requests(without))
    requests = [*mixed_requests(mixed), *grammar_requests(mixed)]
    requests[::2] = [replace(r, sampling_params=replace(r.sampling_params, logprobs=2)) for r in requests[::2]]
    mixed.run(*requests)
    assert mixed.token_ids == without.token_ids
    for index, request in enumerate(requests):
        answer = mixed.answers[request.request_id]
        assert len(answer.logprobs) == (0 if index % 2 else len(answer.token_ids))


def test_logprobs_survive_preemption(plain: Pair) -> None:
    undisturbed = run(plain, OPTIONS)
    harness = Harness(plain.checkpoint)
    harness.submit(*(harness.request(name, PROMPT, max_tokens=40, **options) for name, options in OPTIONS.items()))
    scheduler = harness.engine.scheduler
    for step in range(40):
        for sequence in scheduler.running[step % 7 :: 7]:
            scheduler.preempt(sequence)
        harness.step()
    harness.run()
    for name, answer in undisturbed.answers.items():
        found, expected = harness.answers[name].logprobs, answer.logprobs
        assert [item.token_id for item in found] == [item.token_id for item in expected]
        assert [item.logprob for item in found] == pytest.approx([item.logprob for item in expected], abs=1e-4)
