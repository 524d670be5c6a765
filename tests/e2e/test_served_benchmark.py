"""The benchmark of a running server, with small numbers: it is the form of what it says that counts."""

import argparse

import pytest

from autoglm_launcher.server import TritonServer
from benchmarks import screens, served
from tests.images import encode, picture


def test_rows(server: TritonServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("TOKENS", 3), ("AT_ONCE", 2), ("REPEATS", 1)):
        monkeypatch.setattr(served, name, value)
    monkeypatch.setattr(screens, "random_screen", lambda seed, size: encode(picture(84, 112, seed=seed)))
    asked = served.Server(server.grpc_url)
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
