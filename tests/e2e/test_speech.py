"""Speech on a real server with the demo's encoder and projector: answers equal to the library's, and invalid audio."""

import json
import queue
from base64 import b64encode
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import pytest
import soundfile
import soxr
import torch
from autoglm_client import Tap, parse
from autoglm_client.cli import main
from playwright.sync_api import expect, sync_playwright
from tokenizers import Tokenizer
from tritonclient.utils import InferenceServerException

from autoglm.audio.encoder import AudioEncoder, EncodedClips
from autoglm.audio.speech import Speech
from autoglm.checkpoint import Checkpoint
from autoglm.config import AudioMode, load_config
from autoglm.llm.engine import Engine
from autoglm.llm.sequence import Clip, Output, Request
from autoglm.preprocess.chat import ChatRenderer
from autoglm.preprocess.messages import read_messages
from autoglm.preprocess.sampling_params import SamplingParams
from autoglm.vision.encoder import VisionEncoder
from autoglm_launcher.server import TritonServer
from gateway.app import create_app
from tests.audio.speech_checkpoints import sound_file, tone
from tests.e2e.conftest import ROOT
from tests.e2e.ensemble_client import Call, ask
from tests.gateway.playground.conftest import ARGUMENTS, CHROMIUM
from tests.gateway.playground.using import choose
from tests.gateway.running import configured, serve
from tests.images import encode, picture
from tests.media.test_audio_file import REFUSED

CPU = torch.device("cpu")
HIDDEN = 256
PARAMETERS = {"max_tokens": 24, "ignore_eos": True}
SHORT = {"max_tokens": 2, "ignore_eos": True}
CLIP = sound_file(tone(1.3), 16000)
MIXED = [
    sound_file(tone(2.1, 44100, 300, 1), 44100, "FLAC"),
    sound_file(tone(0.7, 8000, 150, 2), 8000, "OGG"),
    sound_file(tone(1.5, 48000, 500, 3), 48000, "MP3"),
]
SPEECH = ROOT / "demo" / "speech"
SAMPLES: list[dict[str, Any]] = json.loads((SPEECH / "samples" / "samples.json").read_text(encoding="utf-8"))
SPOKEN: list[bytes] = [(SPEECH / "samples" / sample["audio"]).read_bytes() for sample in SAMPLES]


def num_embeddings(samples: int) -> int:
    """Number of embeddings that the demo's projector produces for a number of samples at 16 kHz."""
    shape = json.loads((SPEECH / "encoder" / "config.json").read_text())
    for kernel, stride in zip(shape["conv_kernel"], shape["conv_stride"], strict=True):
        samples = (samples - kernel) // stride + 1
    return -(-samples // 5)


@pytest.fixture(scope="module")
def speech_server(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    speech, bridge = SPEECH / "encoder", SPEECH / "bridge"
    log = tmp_path_factory.mktemp("server") / "server.log"
    config = ROOT / "autoglm-config.yaml"
    with TritonServer(checkpoint=demo_checkpoint, config=config, speech=speech, bridge=bridge, log_path=log) as running:
        yield running


class Library:
    """The components of the server, in this process."""

    def __init__(self, directory: Path, speech: Speech | None) -> None:
        self.config = config = load_config(ROOT / "autoglm-config.yaml")
        self.checkpoint = Checkpoint.open(directory)
        tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        assert speech is not None
        self.renderer = ChatRenderer(
            self.checkpoint, tokenizer, config.limits, max_context=8192, speech=speech, audio=config.audio
        )
        self.vision = VisionEncoder(self.checkpoint, config.vision, config.limits, CPU, torch.float32)
        self.audio = AudioEncoder(speech, config.audio, HIDDEN, CPU, torch.float32)
        self.engine = Engine(self.checkpoint, config.engine, CPU, torch.float32)
        self.engine.start()

    def answer(self, messages: str, images: Sequence[bytes], clips: Sequence[bytes], mode: AudioMode) -> list[Output]:
        limits, audio = self.config.limits, self.config.audio
        chat = read_messages(
            messages.encode(), images, limits, roles=self.renderer.roles, clips=clips, audio_limits=audio
        )
        prompt = self.renderer.render(chat, audio_mode=mode)
        (visual,), (audible,) = self.vision.encode([prompt.images]), self.audio.encode([prompt.clips])
        assert isinstance(visual, torch.Tensor) and isinstance(audible, EncodedClips)
        transcribed = zip(prompt.clips, audible.transcripts, strict=True)
        arrived: queue.SimpleQueue[Output] = queue.SimpleQueue()
        self.engine.submit(
            Request(
                request_id="0",
                token_ids=prompt.token_ids,
                sampling_params=SamplingParams.from_parameters(PARAMETERS, {}),
                sink=arrived.put,
                image_grids=[image.grid for image in prompt.images],
                image_hashes=[image.media_hash.encode() for image in prompt.images],
                image_embeddings=visual,
                clips=[Clip(clip.media_hash.encode(), clip.num_tokens, text) for clip, text in transcribed],
                audio_embeddings=audible.embeddings if mode == "bridge" else None,
            )
        )
        pieces = [arrived.get()]
        while not pieces[-1].is_last:
            pieces.append(arrived.get())
        return pieces

    def close(self) -> None:
        self.engine.close()
        self.vision.close()
        self.audio.close()


@pytest.fixture(scope="module")
def library(demo_checkpoint: Path) -> Iterator[Library]:
    made = Library(demo_checkpoint, Speech.open(SPEECH / "encoder", SPEECH / "bridge", HIDDEN))
    yield made
    made.close()


@pytest.mark.parametrize("mode", ["transcript", "bridge"])
def test_served_tokens_equal_the_librarys(speech_server: TritonServer, library: Library, mode: AudioMode) -> None:
    parts: list[dict[str, Any]] = [
        {"type": "audio"}, {"type": "image"}, {"type": "text", "text": "do this"}, {"type": "audio"},
        {"type": "input_audio", "input_audio": {"data": b64encode(MIXED[2]).decode(), "format": "mp3"}},
        {"type": "image"}, {"type": "audio"},
    ]  # fmt: skip
    clips = [*MIXED[:2], SPOKEN[0]]
    messages = json.dumps([{"role": "system", "content": "be brief"}, {"role": "user", "content": parts}])
    images = [encode(picture(200, 300, 1)), encode(picture(300, 150, 2), "JPEG")]
    inputs: dict[str, Sequence[bytes | str]] = {"MESSAGES": [messages], "IMAGES": images, "AUDIO": clips}
    served = ask(speech_server, inputs, audio_mode=mode, **PARAMETERS)
    again = ask(speech_server, inputs, audio_mode=mode, **PARAMETERS)

    pieces = library.answer(messages, images, clips, mode)

    assert not any(piece.error for piece in pieces)
    assert served.token_ids == again.token_ids == [id_ for piece in pieces for id_ in piece.token_ids]
    assert served.transcripts == [text for piece in pieces for text in piece.transcripts]
    assert len(served.transcripts) == (4 if mode == "transcript" else 0)
    assert mode == "bridge" or served.transcripts[-1] == SAMPLES[0]["text"]
    usage = pieces[-1].usage
    assert usage is not None and served.usage["prompt_tokens"] == usage.prompt_tokens
    lengths = [int(16000 * seconds) for seconds in (2.1, 0.7, 1.5)] + [soundfile.info(BytesIO(SPOKEN[0])).frames]
    expected = sum(map(num_embeddings, lengths)) if mode == "bridge" else 0
    assert served.usage["audio_tokens"] == usage.audio_tokens == expected
    assert again.usage["cached_tokens"] > again.usage["prompt_tokens"] - 20


@pytest.mark.parametrize("mode", ["transcript", "bridge"])
def test_spoken_commands_give_the_right_action(speech_server: TritonServer, mode: AudioMode) -> None:
    for sample, clip in zip(SAMPLES, SPOKEN, strict=True):
        screen = (ROOT / "demo" / "samples" / sample["image"]).read_bytes()
        reply = ask(
            speech_server, {"PROMPT": [""], "IMAGES": [screen], "AUDIO": [clip]}, audio_mode=mode, max_tokens=64
        )
        action = parse(reply.text).action
        if "box" not in sample:
            assert str(action) == sample["action"]
            continue
        assert isinstance(action, Tap), (sample, reply)
        left, top, right, bottom = sample["box"]
        assert left <= action.element.x < right and top <= action.element.y < bottom, (sample, reply)


def test_different_audio_shares_no_prefix(speech_server: TritonServer) -> None:
    """Clips of one length have the same tokens; only their hashes differ in the prefix cache."""
    first, second = (sound_file(tone(1.3, pitch=pitch, seed=7)) for pitch in (210, 640))
    for clip in (first, second):
        reply = ask(speech_server, {"PROMPT": [""], "AUDIO": [clip]}, audio_mode="bridge", **SHORT)
        assert reply.usage["cached_tokens"] < 16


def test_invalid_audio_fails_only_its_request(speech_server: TritonServer) -> None:
    good = [Call(speech_server, {"PROMPT": ["hi"], "AUDIO": [sound_file(tone(0.5, seed=i))]}, SHORT) for i in range(4)]
    bad = [Call(speech_server, {"PROMPT": ["hi"], "AUDIO": [data]}, SHORT) for data, _ in REFUSED.values()]
    for call, (_, message) in zip(bad, REFUSED.values(), strict=True):
        with pytest.raises(InferenceServerException) as caught:
            call.result()
        assert f"INVALID_ARGUMENT: {message}" in caught.value.message()
    assert [call.result().finish_reason for call in good] == ["length"] * 4
    for data in (sound_file(tone(0.02)), sound_file(tone(1)[:1])):
        with pytest.raises(InferenceServerException, match=r"AUDIO\[0\] must be at least .* s long \(got \d+ samples"):
            ask(speech_server, {"PROMPT": ["hi"], "AUDIO": [data]}, **SHORT)
    with pytest.raises(InferenceServerException, match=r"AUDIO must be at most 10 per request \(got 11\)"):
        ask(speech_server, {"PROMPT": ["hi"], "AUDIO": [CLIP] * 11}, **SHORT)
    with pytest.raises(InferenceServerException, match=r"audio_mode must be one of transcript, bridge \(got 'words'\)"):
        ask(speech_server, {"PROMPT": ["hi"], "AUDIO": [CLIP]}, audio_mode="words", **SHORT)


def test_audio_without_a_speech_encoder(server: TritonServer) -> None:
    with pytest.raises(InferenceServerException, match="AUDIO must not contain clips: this server has no"):
        ask(server, {"PROMPT": ["hi"], "AUDIO": [CLIP]}, **SHORT)


@pytest.mark.parametrize("mode", ["transcript", "bridge"])
def test_audio_through_the_gateway(speech_server: TritonServer, mode: AudioMode) -> None:
    screen = encode(picture(200, 300, 1))
    given = {"audio_mode": mode, "max_tokens": 12, "ignore_eos": True}
    clips: list[dict[str, Any]] = [
        {"type": "input_audio", "input_audio": {"data": b64encode(data).decode(), "format": kind}}
        for data, kind in ((MIXED[0], "flac"), (MIXED[2], "mp3"))
    ]
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{b64encode(screen).decode()}"}}
    content = [image, clips[0], {"type": "text", "text": "then"}, clips[1]]
    body: dict[str, Any] = {"messages": [{"role": "user", "content": content}], **given}
    with serve(create_app(speech_server.grpc_url, configured())) as url, httpx.Client(base_url=url, timeout=60) as http:
        whole = http.post("/v1/chat/completions", json=body).json()
        lines = http.post("/v1/chat/completions", json=body | {"stream": True}).text.splitlines()
        rejected = http.post("/v1/chat/completions", json=body | {"audio_mode": "words"})
    parts = [{"type": "image"}, {"type": "audio"}, {"type": "text", "text": "then"}, {"type": "audio"}]
    messages = json.dumps([{"role": "user", "content": parts}])
    inputs: dict[str, Sequence[bytes | str]] = {
        "MESSAGES": [messages], "IMAGES": [screen], "AUDIO": [MIXED[0], MIXED[2]],
    }  # fmt: skip
    direct = ask(speech_server, inputs, **given)

    assert whole["choices"][0]["message"]["content"] == direct.text
    assert whole["usage"]["prompt_tokens"] == direct.usage["prompt_tokens"]
    assert whole.get("transcripts", []) == direct.transcripts
    assert len(direct.transcripts) == (2 if mode == "transcript" else 0)
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == direct.text
    assert [chunk["transcripts"] for chunk in chunks if "transcripts" in chunk] == [direct.transcripts] * bool(
        direct.transcripts
    )
    assert rejected.status_code == 400 and rejected.json()["error"]["param"] == "audio_mode"


def test_the_command_line_sends_audio(
    speech_server: TritonServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    screen, command = tmp_path / "screen.png", tmp_path / "command.wav"
    screen.write_bytes(encode(picture(200, 300)))
    command.write_bytes(CLIP)
    main(
        [
            "ask",
            "--image",
            str(screen),
            "--audio",
            str(command),
            "--server",
            speech_server.grpc_url,
            "--max-tokens",
            "4",
        ]
    )
    assert "transcript: " in capsys.readouterr().err


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium found; it needs: apt-get install chromium")
def test_a_task_spoken_into_the_playgrounds_microphone(speech_server: TritonServer, tmp_path: Path) -> None:
    speech, rate = soundfile.read(BytesIO(SPOKEN[0]))
    spoken = tmp_path / "spoken.wav"
    soundfile.write(spoken, soxr.resample(speech, rate, 48_000), 48_000)
    arguments = [*ARGUMENTS, f"--use-file-for-fake-audio-capture={spoken}%noloop"]
    with serve(create_app(speech_server.grpc_url, configured())) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        page = browser.new_page(locale="en-US")
        page.goto(url)
        choose(page, SAMPLES[0]["image"])
        page.get_by_role("button", name="Record the task").click()
        page.wait_for_timeout(1000 * len(speech) / rate + 1000)
        page.get_by_role("button", name="Send").click()
        step = page.locator(".step")
        expect(step.locator(".chip")).to_contain_text("Tap ", timeout=30_000)
        expect(step).to_contain_text(SAMPLES[0]["text"])
        expect(step.locator(".thought")).to_contain_text("Battery")
        browser.close()
