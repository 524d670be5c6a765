"""Users for Locust. `python -m loadtest` runs them."""

from __future__ import annotations

import random
from argparse import Namespace
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
    """The options of this file beside Locust's own."""
    parser.add_argument("--grpc-server", default="127.0.0.1:8001")
    parser.add_argument("--http-server", default="http://127.0.0.1:8000")
    parser.add_argument("--samples", type=Path, default=SAMPLES)
    parser.add_argument("--max-tokens", type=int, default=256)


class ScreenUser(User):
    """Asks about one screen after another, without a pause."""

    abstract = True
    wait_time = constant(0)

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        self.options: Namespace = environment.parsed_options or Namespace()
        self._samples = read_samples(self.options.samples)

    def sample(self) -> Sample:
        """Any of the samples."""
        return random.choice(self._samples)

    def meter(self, protocol: str) -> Meter:
        """A meter for the request that begins now."""
        return Meter(protocol, self.environment.events.request.fire)


class GrpcUser(ScreenUser):
    """A user of the Python client."""

    def on_start(self) -> None:
        """Every user has a connection of its own, as on a machine of its own."""
        self.client = Client(self.options.grpc_server, timeout=TIMEOUT)

    def on_stop(self) -> None:
        """Close the connection."""
        self.client.close()

    @task
    def ask(self) -> None:
        """One request from beginning to end."""
        sample = self.sample()
        meter = self.meter("grpc")
        try:
            with self.client.stream(
                prompt=sample.task, images=[sample.image], temperature=0.0, max_tokens=self.options.max_tokens
            ) as stream:
                for piece in stream:
                    meter.piece(len(piece.token_ids))
        except AutoGLMError as error:
            meter.end(error)
        else:
            meter.end()


class HttpUser(ScreenUser):
    """A user of plain HTTP."""

    def on_start(self) -> None:
        """Every user has a connection of its own."""
        self.session = requests.Session()

    def on_stop(self) -> None:
        """Close the connection."""
        self.session.close()

    @task
    def ask(self) -> None:
        """One request from beginning to end."""
        sample = self.sample()
        meter = self.meter("http")
        request = http_stream.body(sample.task, sample.image, temperature=0.0, max_tokens=self.options.max_tokens)
        try:
            for ids in http_stream.stream(self.session, self.options.http_server, request, TIMEOUT):
                meter.piece(len(ids))
        except (http_stream.StreamError, requests.RequestException, ValueError) as error:
            meter.end(error)
        else:
            meter.end()
