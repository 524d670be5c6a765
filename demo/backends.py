"""Two ways to query the demo model: the library in this process, and a running server through the client."""

from __future__ import annotations

import json
import queue
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from tokenizers import Tokenizer

from autoglm.checkpoint import Checkpoint
from autoglm.config import Config, EngineConfig
from autoglm.device import choose_device
from autoglm.errors import RequestError
from autoglm.llm.engine import Engine
from autoglm.llm.sequence import Clip, Output, Request
from autoglm.preprocess.chat import ChatRenderer, RenderedPrompt
from autoglm.preprocess.messages import read_user_prompt
from autoglm.preprocess.sampling_params import SamplingParams
from autoglm.vision.encoder import VisionEncoder

if TYPE_CHECKING:
    from autoglm.audio.encoder import EncodedClips

MAX_TOKENS = 120
PHONE_ACTION = {"type": "phone_action"}


class Backend(Protocol):
    def answer(self, questions: Sequence[tuple[bytes, str]]) -> list[str]:
        """Answers to (encoded screenshot, task) pairs, in order."""

    def close(self) -> None: ...


class LibraryBackend:
    """The steps of the ensemble, run in this process."""

    def __init__(self, directory: Path, phone_action: bool = False) -> None:
        """phone_action: use this response_format."""
        config = Config(engine=EngineConfig(kv_cache_mb=128))
        self.device, self.dtype = choose_device(config.model)
        self.checkpoint = checkpoint = Checkpoint.open(directory)
        self.tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self.limits, self.max_context = config.limits, checkpoint.text.max_position_embeddings
        self.renderer = ChatRenderer(checkpoint, self.tokenizer, self.limits, max_context=self.max_context)
        self.vision_encoder = VisionEncoder(checkpoint, config.vision, self.limits, self.device, self.dtype)
        response_format = json.dumps(PHONE_ACTION) if phone_action else None
        self.sampling_params = SamplingParams(max_tokens=MAX_TOKENS, response_format=response_format)
        self.engine = Engine.from_config(checkpoint, config, self.device, self.dtype)
        self.engine.start()

    def answer(self, questions: Sequence[tuple[bytes, str]]) -> list[str]:
        prompts = [
            self.renderer.render(read_user_prompt(task.encode(), [image], self.limits)) for image, task in questions
        ]
        images = self.vision_encoder.encode([prompt.images for prompt in prompts])
        sinks = [self.submit(*pair) for pair in zip(prompts, images, strict=True)]
        return [collect(sink) for sink in sinks]

    def submit(
        self,
        prompt: RenderedPrompt,
        image_embeddings: torch.Tensor | RequestError,
        audio: EncodedClips | RequestError | None = None,
    ) -> queue.SimpleQueue[Output]:
        """Submit a request to the engine; returns the queue that receives its outputs."""
        if isinstance(image_embeddings, RequestError):
            raise image_embeddings
        if isinstance(audio, RequestError):
            raise audio
        transcripts = audio.transcripts if audio else []
        sink: queue.SimpleQueue[Output] = queue.SimpleQueue()
        request = Request(
            request_id="",
            token_ids=prompt.token_ids,
            sampling_params=self.sampling_params,
            sink=sink.put,
            image_grids=[image.grid for image in prompt.images],
            image_hashes=[image.media_hash.encode() for image in prompt.images],
            image_embeddings=image_embeddings,
            clips=[
                Clip(clip.media_hash.encode(), clip.num_tokens, transcript)
                for clip, transcript in zip(prompt.clips, transcripts, strict=True)
            ],
            audio_embeddings=audio.embeddings if audio else None,
        )
        self.engine.submit(request)
        return sink

    def close(self) -> None:
        self.engine.close()
        self.vision_encoder.close()


def collect(sink: queue.SimpleQueue[Output]) -> str:
    """Wait for the whole answer."""
    text = ""
    while True:
        output = sink.get()
        if output.error:
            raise output.error
        text += output.text
        if output.is_last:
            return text


class ServerBackend:
    """A running server, over gRPC."""

    def __init__(self, server: str, phone_action: bool = False) -> None:
        from autoglm_client import Client  # a separate package, needed only here

        self.client: Any = Client(server)
        self.options = {"response_format": PHONE_ACTION} if phone_action else {}
        self.threads = ThreadPoolExecutor(8)

    def answer(self, questions: Sequence[tuple[bytes, str]]) -> list[str]:
        return list(self.threads.map(self._answer, questions))

    def _answer(self, question: tuple[bytes, str]) -> str:
        image, task = question
        result = self.client.generate(prompt=task, images=[image], max_tokens=MAX_TOKENS, **self.options)
        return str(result.text)

    def close(self) -> None:
        self.threads.shutdown()
        self.client.close()
