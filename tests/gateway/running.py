"""The gateway under a real HTTP server, in a thread of the tests."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI

from autoglm.config import Config, load_config

ROOT = Path(__file__).parents[2]


@contextmanager
def serve(app: FastAPI) -> Iterator[str]:
    """Yield the URL, such as http://127.0.0.1:1234. The server has stopped when the block is left."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started and thread.is_alive():
                time.sleep(0.01)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(20)


def configured(**settings: Any) -> Config:
    """The project's configuration with other settings of the gateway."""
    return load_config(ROOT / "autoglm-config.yaml", overrides=f"gateway: {settings!r}" if settings else None)


def metrics(client: httpx.Client) -> dict[str, float]:
    """The gateway's samples, without the common prefix of their names."""
    lines = [line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines() if not line.startswith("#")]
    return {name.removeprefix("autoglm_gateway_"): float(value) for name, value in lines}


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
