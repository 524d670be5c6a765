"""Two ways to ask the demo model: the library in this process, and a running server through the client."""

from __future__ import annotations

import json
import queue
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch
from tokenizers import Tokenizer

from autoglm.checkpoint import Checkpoint
from autoglm.config import Config, EngineConfig
from autoglm.device import choose_device
from autoglm.llm.engine import Engine
from autoglm.llm.sequence import Output, Request
from autoglm.preprocess.chat import ChatRenderer
from autoglm.preprocess.messages import read_prompt
from autoglm.preprocess.sampling_params import SamplingParams
from autoglm.vision.encoder import VisionEncoder

MAX_TOKENS = 120
PHONE_ACTION = {"type": "phone_action"}  # the form that answers are limited to where that is wanted


class Backend(Protocol):
    def ask(self, questions: Sequence[tuple[bytes, str]]) -> list[str]:
        """Answers to (encoded screenshot, task) pairs, in order."""

    def close(self) -> None: ...


class LibraryBackend:
    """The steps of the ensemble, one after another, in this process."""

    def __init__(self, directory: Path, limited: bool = False) -> None:
        config = Config(engine=EngineConfig(kv_cache_mb=128))
        device, dtype = choose_device(config.model)
        self.checkpoint = checkpoint = Checkpoint.open(directory)
        self.tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self.limits = config.limits
        self.renderer = ChatRenderer(checkpoint, self.tokenizer, config.limits, checkpoint.text.max_position_embeddings)
        self.encoder = VisionEncoder(checkpoint, config.vision, config.limits, device, dtype)
        self.sampling = SamplingParams(MAX_TOKENS, response_format=json.dumps(PHONE_ACTION) if limited else None)
        self.engine = Engine.from_config(checkpoint, config, device, dtype)
        self.engine.start()

    def ask(self, questions: Sequence[tuple[bytes, str]]) -> list[str]:
        prompts = [self.renderer.render(read_prompt(task.encode(), [image], self.limits)) for image, task in questions]
        outputs: list[queue.SimpleQueue[Output]] = []
        for prompt, embeddings in zip(prompts, self.encoder.encode([prompt.images for prompt in prompts]), strict=True):
            if not isinstance(embeddings, torch.Tensor):
                raise embeddings
            sink: queue.SimpleQueue[Output] = queue.SimpleQueue()
            grids, digests = [i.grid for i in prompt.images], [i.hash.encode() for i in prompt.images]
            self.engine.submit(Request("", prompt.token_ids, self.sampling, sink.put, grids, digests, embeddings))
            outputs.append(sink)
        return [collect(sink) for sink in outputs]

    def close(self) -> None:
        self.engine.close()
        self.encoder.close()


def collect(sink: queue.SimpleQueue[Output]) -> str:
    """The whole answer that an engine puts into `sink`."""
    text = ""
    while True:
        piece = sink.get()
        if piece.error:
            raise piece.error
        text += piece.text
        if piece.is_last:
            return text


class ServerBackend:
    """A running server, through gRPC."""

    def __init__(self, server: str, limited: bool = False, concurrency: int = 8) -> None:
        from autoglm_client import Client  # the client is a package of its own, needed for this backend only

        self.client: Any = Client(server)
        self.options = {"response_format": PHONE_ACTION} if limited else {}
        self.threads = ThreadPoolExecutor(concurrency)

    def ask(self, questions: Sequence[tuple[bytes, str]]) -> list[str]:
        return list(self.threads.map(self._ask, questions))

    def _ask(self, question: tuple[bytes, str]) -> str:
        result = self.client.generate(prompt=question[1], images=[question[0]], max_tokens=MAX_TOKENS, **self.options)
        return str(result.text)

    def close(self) -> None:
        self.threads.shutdown()
        self.client.close()
