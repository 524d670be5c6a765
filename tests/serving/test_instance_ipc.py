"""Messages between instances of a model, with real sockets."""

import os
import socket
import time
from collections.abc import Iterator
from uuid import uuid4

import pytest

from autoglm.serving.instance_ipc import UNIX_SOCKETS, InstanceIPC


class Instance:
    """Records the messages it receives, and handles those that contain its name."""

    def __init__(self, model: str, name: str) -> None:
        self.name = name
        self.received: list[str] = []
        self.ipc = InstanceIPC(model, name, self.handle)

    def handle(self, message: str) -> bool:
        self.received.append(message)
        if message == "fail":
            raise RuntimeError(message)
        return self.name in message


@pytest.fixture
def model() -> str:
    return f"model-{uuid4().hex}"


@pytest.fixture
def instances(model: str) -> Iterator[list[Instance]]:
    created = [Instance(model, name) for name in ("a", "b", "c")]
    yield created
    for instance in created:
        instance.ipc.close()


def test_broadcast_reaches_all_other_instances(instances: list[Instance]) -> None:
    a, b, c = instances
    assert a.ipc.broadcast("for c")
    assert not a.ipc.broadcast("for a")
    assert not a.ipc.broadcast("")
    assert a.received == []
    assert b.received == c.received == ["for c", "for a", ""]
    for i in range(50):
        assert b.ipc.broadcast(f"{i} for a") and not b.ipc.broadcast(f"{i}")


def test_broadcast_without_other_instances(instances: list[Instance], model: str) -> None:
    alone = Instance(f"{model}x", "a")
    assert not alone.ipc.broadcast("b")
    alone.ipc.close()
    assert not instances[0].ipc.broadcast("for d")
    for instance in instances[1:]:
        instance.ipc.close()
    assert not instances[0].ipc.broadcast("b")
    instances[1:] = [Instance(model, "b")]  # the name can be reused
    assert instances[0].ipc.broadcast("b")


def test_failing_and_silent_instances_do_not_affect_others(instances: list[Instance], model: str) -> None:
    a, _, _ = instances
    assert not a.ipc.broadcast("fail")
    (name,) = {line.rpartition(" @")[2] for line in UNIX_SOCKETS.read_text().splitlines() if f"{model}/b" in line}
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as silent:
        silent.connect(f"\0{name}")
        began = time.monotonic()
        a.ipc.broadcast("b")
        assert time.monotonic() - began < 1
    assert a.ipc.broadcast("b")


def test_other_users_are_ignored(instances: list[Instance], monkeypatch: pytest.MonkeyPatch) -> None:
    user_id = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: user_id + 1)
    assert not instances[0].ipc.broadcast("b")
    assert instances[1].received == []
