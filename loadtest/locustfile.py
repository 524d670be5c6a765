"""Locust users, run by `python -m loadtest`."""

import random
from abc import abstractmethod
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import grpc.experimental.gevent
import requests
from autoglm_client import AutoGLMError, Client
from locust import User, constant, events, task
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment

from loadtest import http_stream
from loadtest.meter import Meter
from loadtest.samples import SAMPLES, Sample, read_samples

grpc.experimental.gevent.init_gevent()

TIMEOUT = 120.0  # seconds


@events.init_command_line_parser.add_listener  # type: ignore[untyped-decorator]
def add_options(parser: LocustArgumentParser) -> None:
    """Add the options of this file to those of Locust."""
    parser.add_argument("--grpc-server", default="127.0.0.1:8001")
    parser.add_argument("--http-server", default="http://127.0.0.1:8000")
    parser.add_argument("--samples", type=Path, default=SAMPLES)
    parser.add_argument("--max-tokens", type=int, default=256)


class ScreenUser(User):
    """Sends one screenshot after another, without pauses."""

    abstract = True
    protocol: str
    wait_time = constant(0)

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        self.options: Namespace = environment.parsed_options or Namespace()
        self._samples = read_samples(self.options.samples)

    @task
    def ask(self) -> None:
        """Send one request and read its answer."""
        meter = Meter(self.protocol, self.environment.events.request.fire)
        try:
            for num_tokens in self.stream(random.choice(self._samples)):
                meter.piece(num_tokens)
        except (AutoGLMError, http_stream.StreamError, requests.RequestException, ValueError) as error:
            meter.end(error)
        else:
            meter.end()

    @abstractmethod
    def stream(self, sample: Sample) -> Iterator[int]:
        """Send a request; yield the number of tokens of each piece."""


class GrpcUser(ScreenUser):
    """A user of the Python client."""

    protocol = "grpc"

    def on_start(self) -> None:
        """Open a connection for this user."""
        self.client = Client(self.options.grpc_server, timeout=TIMEOUT)

    def on_stop(self) -> None:
        """Close the connection."""
        self.client.close()

    def stream(self, sample: Sample) -> Iterator[int]:
        with self.client.stream(
            prompt=sample.task, images=[sample.image], temperature=0.0, max_tokens=self.options.max_tokens
        ) as stream:
            for piece in stream:
                yield len(piece.token_ids)


class HttpUser(ScreenUser):
    """A user of plain HTTP."""

    protocol = "http"

    def on_start(self) -> None:
        """Open a connection for this user."""
        self.session = requests.Session()

    def on_stop(self) -> None:
        """Close the connection."""
        self.session.close()

    def stream(self, sample: Sample) -> Iterator[int]:
        request = http_stream.body(sample.task, sample.image, temperature=0.0, max_tokens=self.options.max_tokens)
        yield from map(len, http_stream.stream(self.session, self.options.http_server, request, TIMEOUT))
