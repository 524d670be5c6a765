"""The benchmark of the gateway, with small numbers: only the form of its results is checked."""

import argparse
import asyncio

import pytest

from autoglm_launcher.server import TritonServer
from benchmarks import gateway as benchmark
from benchmarks.gateway import Timing


def test_tokens_are_timed_while_no_prompt_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "TOKENS", 5)
    early, late = Timing(sent=0.0, first=1.0, ended=9.0), Timing(sent=0.5, first=4.0, ended=10.0)
    assert benchmark.seconds_per_token([early, late]) == benchmark.seconds_per_token([late, early]) == 1.5
    assert (early.to_first, late.to_first) == (1.0, 3.5)


def test_rows(server: TritonServer, gateway: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("TOKENS", 3), ("CONCURRENCY", 2), ("ROUNDS", 1), ("ALONE", 1)):
        monkeypatch.setattr(benchmark, name, value)
    address = gateway.removeprefix("http://")
    options = argparse.Namespace(machine="cpu", setting="bf16", server=server.grpc_url, gateway=address)
    rows = {row.name: row for row in asyncio.run(benchmark.measure(options))}
    assert list(rows) == [
        f"{prompt}-{figure}"
        for prompt in ("text", "screenshot")
        for figure in ("first-token-alone-added", "first-token-2-added", "token-2-added", "cpu-per-token")
    ]
    assert all(min(row.also.values()) > 0 for row in rows.values() if row.also)
