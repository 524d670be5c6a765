"""The command `autoglm`: what it prints where, and its exit codes."""

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
    asked = [
        "ask",
        "打开设置",
        "--image",
        str(screen),
        "--image",
        str(other),
        "--server",
        fake.url,
        "--max-tokens",
        "9",
    ]
    assert main([*asked, "--temperature", "0"]) == 0
    output = capsys.readouterr()
    assert output.out == '点设置\ndo(action="Tap", element=[517,233])\n'
    assert output.err.startswith("stop: first piece ")
    assert "prompt 40 tokens (32 image, 8 cached), answer 12; ms: queue 0" in output.err
    assert output.err.count("\n") == 1
    (request,) = fake.requests
    assert inputs(request) == {"PROMPT": ["打开设置".encode()], "IMAGES": [screen.read_bytes(), b"b"]}
    assert request.parameters["max_tokens"].int64_param == 9
    assert request.parameters["temperature"].double_param == 0


def test_quiet_prints_the_action_alone(fake: FakeServer, capsys: Output) -> None:
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


def test_system_prompt_makes_a_chat(fake: FakeServer, screen: Path, capsys: Output) -> None:
    system = screen.with_name("system.txt")
    system.write_text("你是助手", "utf-8")
    assert main(["ask", "x", "--server", fake.url, "--image", str(screen), "--system", str(system)]) == 0
    chat = json.loads(inputs(fake.requests[0])["MESSAGES"][0])
    assert chat == [
        {"role": "system", "content": "你是助手"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "x"}]},
    ]


def test_a_response_format_is_a_word_or_a_file(fake: FakeServer, tmp_path: Path, capsys: Output) -> None:
    file = tmp_path / "format.json"
    wanted = {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}}
    file.write_text(json.dumps(wanted), "utf-8")
    asked = ["ask", "x", "--server", fake.url, "--response-format"]
    assert main([*asked, "phone_action"]) == 0
    assert capsys.readouterr().out == '点设置\ndo(action="Tap", element=[517,233])\n'
    for given in (str(file), "json_object"):  # an answer in JSON is printed as it is
        assert main([*asked, given]) == 0
        assert capsys.readouterr().out == "".join(ANSWER) + "\n"
    sent = [json.loads(request.parameters["response_format"].string_param) for request in fake.requests]
    assert sent == [{"type": "phone_action"}, wanted, {"type": "json_object"}]
    asked[1] = "finish:length"
    assert main([*asked, "json_object"]) == 1
    assert capsys.readouterr().err.endswith("autoglm: ended early: length\n")


WRONG = [
    ([], "command"),
    (["ask"], "task"),
    (["ask", "x", "--max-tokens", "many"], "--max-tokens"),
    (["ask", "x", "--json", "--quiet"], "not allowed with"),
    (["ask", "x", "--draw", "out.png"], "--draw needs an --image"),
    (["ask", "x", "--timeout", "0"], "--timeout must be positive"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_wrong_arguments(arguments: list[str], message: str, capsys: Output) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_wrong_files(tmp_path: Path, screen: Path, capsys: Output) -> None:
    text = tmp_path / "text.png"
    text.write_text("no image")
    schema = tmp_path / "schema.json"
    schema.write_text("{")
    for arguments, message in (
        (["--image", str(tmp_path / "none.png")], "No such file"),
        (["--image", str(screen), "--system", str(tmp_path / "none.txt")], "No such file"),
        (["--image", str(text), "--draw", str(tmp_path / "out.png")], "not an image file"),
        (["--image", str(screen), "--draw", str(tmp_path / "out.what")], "no ending of an image format"),
        (["--image", str(screen), "--draw", str(tmp_path / "none" / "out.png")], "no directory"),
        (["--response-format", "phone_acton"], "phone_acton"),
        (["--response-format", str(schema)], "schema.json is no JSON file"),
        (["--image", str(screen), "--draw", "out.png", "--response-format", "json_object"], "no action to draw"),
    ):
        assert main(["ask", "x", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_without_the_library_a_command_of_its_says_so(capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "entry_points", lambda group: EntryPoints())
    assert main(["cache", "clear", "--force"]) == 2
    assert capsys.readouterr() == (
        "",
        "autoglm: cache: the package autoglm-triton is not installed beside this client\n",
    )


def test_plug_ins_add_commands(capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    here = EntryPoint("greet", f"{__name__}:register", "autoglm.commands")
    monkeypatch.setattr(cli, "entry_points", lambda group: EntryPoints([here]))
    assert main(["greet", "you"]) == 7
    assert capsys.readouterr().out == "hello you\n"


def register(commands: Any) -> None:
    parser = commands.add_parser("greet")
    parser.add_argument("name")
    parser.set_defaults(run=lambda options: print(f"hello {options.name}") or 7)


def test_no_server(capsys: Output) -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        server = f"127.0.0.1:{reserved.getsockname()[1]}"
        assert main(["ask", "x", "--server", server]) == 1
    assert capsys.readouterr() == ("", f"autoglm: no server at {server} (Connection refused)\n")


def test_server_errors_and_answers_without_an_action(fake: FakeServer, capsys: Output) -> None:
    assert main(["ask", "error:INVALID_ARGUMENT: PROMPT: is empty", "--server", fake.url, "--quiet"]) == 1
    assert capsys.readouterr() == ("", "autoglm: PROMPT: is empty\n")
    assert main(["ask", "finish:length", "--server", fake.url]) == 1
    output = capsys.readouterr()
    assert output.out == "a\n"
    assert "the answer holds no action" in output.err


def test_interrupt_stops_the_request_on_the_server(fake: FakeServer) -> None:
    command = [sys.executable, "-m", "autoglm_client.cli", "ask", "endless", "--server", fake.url]
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore interrupts
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    try:
        assert process.stdout and process.stdout.read(2) == "字字"  # it streams
        os.kill(process.pid, signal.SIGINT)
        _, error = process.communicate(timeout=20)
    finally:
        process.kill()
    assert (process.returncode, error) == (130, "autoglm: cancelled\n")
    assert fake.was_stopped(fake.requests[0].id)


def test_sound_goes_along_and_what_was_heard_is_shown(fake: FakeServer, screen: Path, capsys: Output) -> None:
    command = screen.with_name("command.wav")
    command.write_bytes(b"RIFF")
    asked = ["ask", "--image", str(screen), "--audio", str(command), "--server", fake.url, "--audio-mode", "transcript"]
    assert main(asked) == 0
    assert capsys.readouterr().err.startswith("heard: 4 bytes\nstop: ")
    assert main([*asked, "--json"]) == 0
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
    assert capsys.readouterr().err.startswith("recording 0.5 s\nheard: 16044 bytes\n")
    with wave.open(io.BytesIO(inputs(fake.requests[0])["AUDIO"][0])) as file:
        assert (file.getframerate(), file.getnchannels(), file.getnframes()) == (16000, 1, 8000)


def test_what_stands_in_the_way_of_a_recording(monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    assert main(["ask", "--record", "1"]) == 2
    assert "recording needs sounddevice: pip install" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["ask"])
    assert "neither words nor --audio nor --record" in capsys.readouterr().err
