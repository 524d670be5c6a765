"""Two ways to speak to the demo model: the library in this process, and a running server through the client."""

from __future__ import annotations

import queue
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from autoglm.audio.encoder import SpeechEncoder
from autoglm.audio.speech import Mode, Speech
from autoglm.config import AudioSection, Config
from autoglm.device import choose_device
from autoglm.errors import RequestError
from autoglm.llm.sequence import Clip, Output, Request
from autoglm.preprocess.chat import ChatRenderer, Prompt
from autoglm.preprocess.messages import read_prompt
from autoglm.preprocess.sampling_params import SamplingParams
from demo.backends import MAX_TOKENS, LibraryBackend, ServerBackend, collect


@dataclass(frozen=True)
class Reply:
    """An answer, and what the encoder wrote down of the clip; "" in mode bridge."""

    answer: str
    transcript: str


class SpeechBackend(Protocol):
    def hear(self, questions: Sequence[tuple[bytes, bytes]], mode: Mode) -> list[Reply]:
        """Replies to (encoded screenshot, sound file) pairs, in order."""

    def close(self) -> None: ...


class SpeechLibrary(LibraryBackend):
    """The steps of the ensemble, one after another, in this process."""

    def __init__(self, directory: Path, speech: Path) -> None:
        """speech: holds encoder/ and bridge/."""
        super().__init__(directory)
        config = Config(audio=AudioSection(loading="lazy"))
        device, dtype = choose_device(config.model)
        hidden_size = self.checkpoint.text.hidden_size
        found = Speech.open(speech / "encoder", speech / "bridge", hidden_size)
        assert found is not None
        self.audio = config.audio
        self.renderer = ChatRenderer(
            self.checkpoint,
            self.tokenizer,
            self.limits,
            self.checkpoint.text.max_position_embeddings,
            speech=found,
            audio=config.audio,
        )
        self.ears = SpeechEncoder(found, config.audio, hidden_size, device, dtype)

    def hear(self, questions: Sequence[tuple[bytes, bytes]], mode: Mode) -> list[Reply]:
        prompts = [
            self.renderer.render(
                read_prompt(b"", [image], self.limits, [sound], self.audio),
                audio_mode=mode,
            )
            for image, sound in questions
        ]
        seen = self.encoder.encode([prompt.images for prompt in prompts])
        heard = self.ears.encode([prompt.clips for prompt in prompts])
        waiting: list[tuple[queue.SimpleQueue[Output], str]] = []
        for prompt, visual, said in zip(prompts, seen, heard, strict=True):
            if isinstance(visual, RequestError):
                raise visual
            if isinstance(said, RequestError):
                raise said
            sink: queue.SimpleQueue[Output] = queue.SimpleQueue()
            self.engine.submit(self._request(prompt, sink, visual, said))
            waiting.append((sink, said.transcripts[0]))
        return [Reply(collect(sink), transcript) for sink, transcript in waiting]

    def _request(self, prompt: Prompt, sink: queue.SimpleQueue[Output], visual: Any, said: Any) -> Request:
        return Request(
            "",
            prompt.token_ids,
            SamplingParams(max_tokens=MAX_TOKENS),
            sink.put,
            [image.grid for image in prompt.images],
            [image.hash.encode() for image in prompt.images],
            visual,
            clips=[
                Clip(clip.hash.encode(), clip.tokens, text)
                for clip, text in zip(prompt.clips, said.transcripts, strict=True)
            ],
            audio_embeddings=said.embeddings,
        )

    def close(self) -> None:
        super().close()
        self.ears.close()


class SpeechServer(ServerBackend):
    """A running server, through gRPC."""

    def hear(self, questions: Sequence[tuple[bytes, bytes]], mode: Mode) -> list[Reply]:
        return list(self.threads.map(lambda question: self._hear(question, mode), questions))

    def _hear(self, question: tuple[bytes, bytes], mode: Mode) -> Reply:
        image, sound = question
        result = self.client.generate(prompt="", images=[image], audio=[sound], audio_mode=mode, max_tokens=MAX_TOKENS)
        return Reply(result.text, "".join(result.transcripts))
