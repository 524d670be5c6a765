import os
import socket
import time
from collections.abc import Iterator
from uuid import uuid4

import pytest

from autoglm.serving import instance_ipc as siblings
from autoglm.serving.instance_ipc import Siblings


class Instance:
    """What has been asked of it, and what it could do: whatever has its name in it."""

    def __init__(self, model: str, name: str) -> None:
        self.name = name
        self.asked: list[str] = []
        self.siblings = Siblings(model, name, self.handle)

    def handle(self, message: str) -> bool:
        self.asked.append(message)
        if message == "fault":
            raise RuntimeError(message)
        return self.name in message


@pytest.fixture
def model() -> str:
    return f"model-{uuid4().hex}"


@pytest.fixture
def instances(model: str) -> Iterator[list[Instance]]:
    made = [Instance(model, name) for name in ("a", "b", "c")]
    yield made
    for instance in made:
        instance.siblings.close()


def test_all_others_are_asked_and_one_can(instances: list[Instance]) -> None:
    a, b, c = instances
    assert a.siblings.ask("for c")
    assert not a.siblings.ask("for a")
    assert not a.siblings.ask("")
    assert a.asked == []
    assert b.asked == c.asked == ["for c", "for a", ""]
    for i in range(50):
        assert b.siblings.ask(f"{i} for a") and not b.siblings.ask(f"{i}")


def test_nobody_there(instances: list[Instance], model: str) -> None:
    alone = Instance(f"{model}x", "a")
    assert not alone.siblings.ask("b")
    alone.siblings.close()
    assert not instances[0].siblings.ask("for d")
    for instance in instances[1:]:
        instance.siblings.close()
    assert not instances[0].siblings.ask("b")
    instances[1:] = [Instance(model, "b")]  # a name is free again
    assert instances[0].siblings.ask("b")


def test_what_fails_fails_alone(instances: list[Instance]) -> None:
    a, b, _ = instances
    assert not a.siblings.ask("fault")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as silent:
        silent.connect(f"\0{b.siblings._name}")
        began = time.monotonic()
        a.siblings.ask("b")
        assert time.monotonic() - began < 1
    assert a.siblings.ask("b")


def test_other_users_are_not_heard(instances: list[Instance], monkeypatch: pytest.MonkeyPatch) -> None:
    own = os.getuid()
    monkeypatch.setattr(siblings, "_user", lambda _: own + 1)
    assert not instances[0].siblings.ask("b")
    assert instances[1].asked == []
