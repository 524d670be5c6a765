"""Two ways to query the demo model by voice: the library in this process, and a running server through the client."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from autoglm.audio.encoder import AudioEncoder, EncodedClips
from autoglm.audio.speech import Speech
from autoglm.config import AudioMode, AudioSection
from autoglm.preprocess.chat import ChatRenderer
from autoglm.preprocess.messages import read_user_prompt
from demo.backends import MAX_TOKENS, LibraryBackend, ServerBackend, collect


@dataclass(frozen=True)
class Reply:
    """An answer, and the transcript of its clip; "" in mode bridge."""

    answer: str
    transcript: str


class SpeechBackend(Protocol):
    def answer_clips(self, questions: Sequence[tuple[bytes, bytes]], mode: AudioMode) -> list[Reply]:
        """Replies to (encoded screenshot, audio file) pairs, in order."""

    def close(self) -> None: ...


class SpeechLibraryBackend(LibraryBackend):
    """The steps of the ensemble, run in this process."""

    def __init__(self, directory: Path, speech_directory: Path) -> None:
        """speech_directory: contains encoder/ and bridge/."""
        super().__init__(directory)
        self.audio = AudioSection(loading="lazy")
        hidden_size = self.checkpoint.text.hidden_size
        speech = Speech.open(speech_directory / "encoder", speech_directory / "bridge", hidden_size)
        assert speech is not None
        self.renderer = ChatRenderer(
            self.checkpoint, self.tokenizer, self.limits, max_context=self.max_context, speech=speech, audio=self.audio
        )
        self.audio_encoder = AudioEncoder(speech, self.audio, hidden_size, self.device, self.dtype)

    def answer_clips(self, questions: Sequence[tuple[bytes, bytes]], mode: AudioMode) -> list[Reply]:
        turns = [
            read_user_prompt(b"", [image], self.limits, clips=[clip], audio_limits=self.audio)
            for image, clip in questions
        ]
        prompts = [self.renderer.render(messages, audio_mode=mode) for messages in turns]
        images = self.vision_encoder.encode([prompt.images for prompt in prompts])
        audio = self.audio_encoder.encode([prompt.clips for prompt in prompts])
        sinks = [self.submit(*inputs) for inputs in zip(prompts, images, audio, strict=True)]
        transcripts = [encoded.transcripts[0] for encoded in audio if isinstance(encoded, EncodedClips)]
        return [Reply(collect(sink), transcript) for sink, transcript in zip(sinks, transcripts, strict=True)]

    def close(self) -> None:
        super().close()
        self.audio_encoder.close()


class SpeechServerBackend(ServerBackend):
    """A running server, over gRPC."""

    def answer_clips(self, questions: Sequence[tuple[bytes, bytes]], mode: AudioMode) -> list[Reply]:
        return list(self.threads.map(lambda question: self._answer_clip(question, mode), questions))

    def _answer_clip(self, question: tuple[bytes, bytes], mode: AudioMode) -> Reply:
        image, clip = question
        result = self.client.generate(prompt="", images=[image], audio=[clip], audio_mode=mode, max_tokens=MAX_TOKENS)
        return Reply(result.text, "".join(result.transcripts))
