"""The benchmark of a running server, with few requests: checks the rows, not the figures."""

import argparse

import pytest

from autoglm_launcher.server import TritonServer
from benchmarks import screens, served
from tests.images import encode, picture


def test_rows(server: TritonServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("TOKENS", 3), ("CONCURRENCY", 2), ("REPEATS", 1)):
        monkeypatch.setattr(served, name, value)
    monkeypatch.setattr(screens, "random_screen", lambda seed, size: encode(picture(84, 112, seed=seed)))
    asked = served.BenchmarkClient(server.grpc_url)
    try:
        rows = {row.name: row for row in served.measure(asked, argparse.Namespace(machine="cpu", setting="bf16"))}
    finally:
        asked.close()
    assert list(rows) == [
        "text-first-token-grpc",
        "text-3-grpc",
        "screenshot-first-token-grpc",
        "screenshot-3-grpc",
        "screenshot-2-grpc",
    ]
    assert all(row.value > 0 for row in rows.values())
    assert rows["screenshot-3-grpc"].also["vision ms"] > 0
