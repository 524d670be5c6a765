"""The command `autoglm`: its output and exit codes."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import wave
from functools import partial
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from autoglm_client import cli
from autoglm_client.cli import main
from PIL import Image

from tests.client.fake_server import ANSWER, FakeServer, inputs

Output = pytest.CaptureFixture[str]


@pytest.fixture
def screen(tmp_path: Path) -> Path:
    path = tmp_path / "screen.png"
    Image.new("RGB", (100, 200)).save(path)
    return path


def test_prints_thought_and_action(fake: FakeServer, screen: Path, capsys: Output) -> None:
    other = screen.with_name("b.png")
    other.write_bytes(b"b")
    arguments = ["ask", "打开设置", "--image", str(screen), "--image", str(other), "--server", fake.url]
    assert main([*arguments, "--max-tokens", "9", "--temperature", "0"]) == 0
    output = capsys.readouterr()
    assert output.out == '点设置\ndo(action="Tap", element=[517,233])\n'
    assert output.err.startswith("stop: first piece ")
    assert "prompt 40 tokens (32 image, 8 cached), answer 12; ms: queue 0" in output.err
    assert output.err.count("\n") == 1
    (request,) = fake.requests
    assert inputs(request) == {"PROMPT": ["打开设置".encode()], "IMAGES": [screen.read_bytes(), b"b"]}
    assert request.parameters["max_tokens"].int64_param == 9
    assert request.parameters["temperature"].double_param == 0


def test_quiet_prints_only_the_action(fake: FakeServer, capsys: Output) -> None:
    assert main(["ask", "x", "--server", fake.url, "--quiet"]) == 0
    assert capsys.readouterr() == ('do(action="Tap", element=[517,233])\n', "")


def test_json_prints_one_object(fake: FakeServer, capsys: Output) -> None:
    assert main(["ask", "x", "--server", fake.url, "--json"]) == 0
    output = capsys.readouterr()
    answer = json.loads(output.out)
    assert answer["thought"] == "点设置"
    assert answer["action"] == {"name": "Tap", "element": [517, 233]}
    assert answer["usage"]["image_tokens"] == 32
    assert answer["finish_reason"] == "stop"
    assert answer["total_seconds"] >= answer["first_piece_seconds"] > 0
    assert output.err == ""


def test_draws_on_the_last_image(fake: FakeServer, screen: Path, capsys: Output) -> None:
    drawn = screen.with_name("out.png")
    assert main(["ask", "x", "--server", fake.url, "--image", str(screen), "--draw", str(drawn)]) == 0
    with Image.open(drawn) as image:
        assert image.size == (100, 200)
        assert image.getpixel((51, 46)) != (0, 0, 0)
        assert image.getpixel((10, 190)) == (0, 0, 0)


def test_a_system_prompt_is_sent_as_a_chat(fake: FakeServer, screen: Path, capsys: Output) -> None:
    system = screen.with_name("system.txt")
    system.write_text("你是助手", "utf-8")
    assert main(["ask", "x", "--server", fake.url, "--image", str(screen), "--system", str(system)]) == 0
    chat = json.loads(inputs(fake.requests[0])["MESSAGES"][0])
    assert chat == [
        {"role": "system", "content": "你是助手"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "x"}]},
    ]


def test_response_format_is_a_name_or_a_file(fake: FakeServer, tmp_path: Path, capsys: Output) -> None:
    file = tmp_path / "format.json"
    wanted = {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}}
    file.write_text(json.dumps(wanted), "utf-8")
    arguments = ["ask", "x", "--server", fake.url, "--response-format"]
    assert main([*arguments, "phone_action"]) == 0
    assert capsys.readouterr().out == '点设置\ndo(action="Tap", element=[517,233])\n'
    for given in (str(file), "json_object"):  # JSON answers are printed unchanged
        assert main([*arguments, given]) == 0
        assert capsys.readouterr().out == "".join(ANSWER) + "\n"
    sent = [json.loads(request.parameters["response_format"].string_param) for request in fake.requests]
    assert sent == [{"type": "phone_action"}, wanted, {"type": "json_object"}]
    arguments[1] = "finish:length"
    assert main([*arguments, "json_object"]) == 1
    assert capsys.readouterr().err.endswith("autoglm: the answer was cut off (length)\n")


INVALID = [
    ([], "command"),
    (["ask"], "task"),
    (["ask", "x", "--max-tokens", "many"], "--max-tokens"),
    (["ask", "x", "--json", "--quiet"], "not allowed with"),
    (["ask", "x", "--draw", "out.png"], "--draw needs an --image"),
    (["ask", "x", "--timeout", "0"], "--timeout must be positive (got 0)"),
]


@pytest.mark.parametrize(("arguments", "message"), INVALID)
def test_invalid_arguments(arguments: list[str], message: str, capsys: Output) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_invalid_files(tmp_path: Path, screen: Path, capsys: Output) -> None:
    text = tmp_path / "text.png"
    text.write_text("no image")
    cut = tmp_path / "cut.png"
    cut.write_bytes(screen.read_bytes()[:80])
    schema = tmp_path / "schema.json"
    schema.write_text("{")
    for arguments, message in (
        (["--image", str(tmp_path / "none.png")], "none.png: No such file"),
        (["--audio", str(tmp_path / "none.wav")], "--audio must be a readable file"),
        (["--image", str(screen), "--system", str(tmp_path / "none.txt")], "No such file"),
        (["--system", str(screen)], "--system must be a text file in UTF-8"),
        (["--image", str(text), "--draw", str(tmp_path / "out.png")], "--draw needs a valid image file"),
        (["--image", str(cut), "--draw", str(tmp_path / "out.png")], "--draw needs a valid image file"),
        (["--image", str(screen), "--draw", str(tmp_path / "out.what")], "the extension of an image format"),
        (["--image", str(screen), "--draw", str(tmp_path / "out.psd")], "the extension of an image format"),
        (["--image", str(screen), "--draw", str(tmp_path / "none" / "out.png")], "in an existing directory"),
        (["--response-format", "phone_acton"], "phone_acton"),
        (["--response-format", str(schema)], "schema.json: error at line 1, column 2)"),
        (["--image", str(screen), "--draw", "out.png", "--response-format", "json_object"], "no action to draw"),
    ):
        assert main(["ask", "x", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_cache_requires_the_server_package(capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "entry_points", lambda group: EntryPoints())
    assert main(["cache", "clear", "--force"]) == 2
    assert capsys.readouterr() == ("", "autoglm: cache requires the package autoglm-triton, which is not installed\n")


def test_plug_ins_add_commands(capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    here = EntryPoint("greet", f"{__name__}:register", "autoglm.commands")
    monkeypatch.setattr(cli, "entry_points", lambda group: EntryPoints([here]))
    assert main(["greet", "you"]) == 7
    assert capsys.readouterr().out == "hello you\n"


def register(commands: Any) -> None:
    parser = commands.add_parser("greet")
    parser.add_argument("name")
    parser.set_defaults(run=lambda options: print(f"hello {options.name}") or 7)


def test_an_unreachable_server_fails(capsys: Output) -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        server = f"127.0.0.1:{reserved.getsockname()[1]}"
        assert main(["ask", "x", "--server", server]) == 1
    assert capsys.readouterr() == ("", f"autoglm: no server at {server} (Connection refused)\n")


def test_server_errors_and_answers_without_an_action_fail(fake: FakeServer, capsys: Output) -> None:
    assert (
        main(["ask", "error:INVALID_ARGUMENT: PROMPT must be a non-empty text", "--server", fake.url, "--quiet"]) == 1
    )
    assert capsys.readouterr() == ("", "autoglm: PROMPT must be a non-empty text\n")
    assert main(["ask", "finish:length", "--server", fake.url]) == 1
    output = capsys.readouterr()
    assert output.out == "a\n"
    assert "the answer cannot be parsed: no action: expected do(...)" in output.err


def test_interrupt_stops_the_request_on_the_server(fake: FakeServer) -> None:
    command = [sys.executable, "-m", "autoglm_client.cli", "ask", "endless", "--server", fake.url]
    reset = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore interrupts
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=reset)
    try:
        assert process.stdout and process.stdout.read(2) == "字字"
        os.kill(process.pid, signal.SIGINT)
        _, error = process.communicate(timeout=20)
    finally:
        process.kill()
    assert (process.returncode, error) == (130, "autoglm: cancelled\n")
    assert fake.was_stopped(fake.requests[0].id)


def test_audio_is_sent_and_its_transcript_is_printed(fake: FakeServer, screen: Path, capsys: Output) -> None:
    command = screen.with_name("command.wav")
    command.write_bytes(b"RIFF")
    arguments = ["ask", "--image", str(screen), "--audio", str(command), "--server", fake.url]
    arguments += ["--audio-mode", "transcript"]
    assert main(arguments) == 0
    assert capsys.readouterr().err.startswith("transcript: 4 bytes\nstop: ")
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["transcripts"] == ["4 bytes"]
    (request, _) = fake.requests
    assert inputs(request) == {"PROMPT": [b""], "IMAGES": [screen.read_bytes()], "AUDIO": [b"RIFF"]}
    assert request.parameters["audio_mode"].string_param == "transcript"


def test_a_recording_is_sent(fake: FakeServer, monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    class Microphone:
        PortAudioError = RuntimeError
        wait = staticmethod(lambda: None)

        @staticmethod
        def rec(count: int, samplerate: int, channels: int, dtype: str) -> Any:
            assert (count, samplerate, channels, dtype) == (8000, 16000, 1, "int16")
            return np.arange(count, dtype=np.int16)

    monkeypatch.setitem(sys.modules, "sounddevice", Microphone)
    assert main(["ask", "--record", "0.5", "--server", fake.url]) == 0
    assert capsys.readouterr().err.startswith("recording 0.5 s\ntranscript: 16044 bytes\n")
    with wave.open(io.BytesIO(inputs(fake.requests[0])["AUDIO"][0])) as file:
        assert (file.getframerate(), file.getnchannels(), file.getnframes()) == (16000, 1, 8000)


def test_recording_needs_sounddevice_and_a_microphone(monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    assert main(["ask", "--record", "1"]) == 2
    assert "recording needs the package sounddevice: pip install" in capsys.readouterr().err

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("PortAudio: device -1")

    monkeypatch.setitem(sys.modules, "sounddevice", SimpleNamespace(rec=fail, PortAudioError=RuntimeError))
    assert main(["ask", "--record", "1"]) == 2
    assert capsys.readouterr().err == "recording 1 s\nautoglm: no microphone can be opened\n"
    with pytest.raises(SystemExit):
        main(["ask"])
    assert "the task is missing: give it in words, with --audio or with --record" in capsys.readouterr().err
