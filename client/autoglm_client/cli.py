"""The command `autoglm`."""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from autoglm_client.client import Client, Stream
from autoglm_client.draw import draw
from autoglm_client.errors import AutoGLMError
from autoglm_client.images import image_bytes
from autoglm_client.result import Result
from autoglm_client.sounds import audio_bytes, record
from autoglm_client.thought import ThoughtFilter

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
# Subcommands of other distributions: functions that take the parser's subcommands, and add one with a default `run`.
PLUG_INS = "autoglm.commands"
JSON_FORMATS = ("json_object", "json_schema")  # an answer of these holds no action


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0 an action, or the JSON asked for, came, 1 the server failed or gave
    none, 2 wrong usage."""
    options = _options(argv)
    if hasattr(options, "run"):
        code: int = options.run(options)
        return code
    try:
        images = [image_bytes(Path(name)) for name in options.image]
        sounds = [audio_bytes(Path(name)) for name in options.audio]
        system = options.system.read_text("utf-8") if options.system else None
        options.response_format = _response_format(options.response_format)
        if options.draw and _asks_for_json(options):
            raise ValueError("--draw: an answer in JSON holds no action to draw")
        if options.draw:
            _check_drawing(images, options.draw)
        if options.record:
            print(f"recording {options.record:g} s", file=sys.stderr)
            sounds.append(record(options.record))
    except (OSError, ValueError) as error:
        return _complain(str(error), USAGE)
    try:
        result = _ask(options, images, sounds, system)
    except AutoGLMError as error:
        return _complain(str(error), FAILED)
    except KeyboardInterrupt:
        return _complain("cancelled", INTERRUPTED)
    return _report(options, images, result)


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="autoglm", description="Ask an AutoGLM server what to do on a screen.")
    commands = parser.add_subparsers(required=True, metavar="command")
    ask = commands.add_parser("ask", help="send a screen and a task; print the thought and the action")
    ask.add_argument("task", nargs="?", default="", help="what to do, in words; may be left out beside --audio")
    ask.add_argument("--image", action="append", default=[], metavar="FILE", help="a screenshot; may be repeated")
    ask.add_argument("--audio", action="append", default=[], metavar="FILE", help="a spoken task; may be repeated")
    ask.add_argument("--record", type=float, default=0.0, metavar="SECONDS", help="speak the task into the microphone")
    ask.add_argument("--audio-mode", choices=("transcript", "bridge"), help="how it is heard (as the server is set)")
    ask.add_argument("--system", type=Path, metavar="FILE", help="a file with the system prompt")
    ask.add_argument("--server", default="127.0.0.1:8001", metavar="HOST:PORT", help="gRPC address (%(default)s)")
    ask.add_argument("--max-tokens", type=int, metavar="N")
    ask.add_argument("--temperature", type=float, metavar="T", help="0 always takes the likeliest token")
    ask.add_argument(
        "--response-format", metavar="FORMAT", help="phone_action, json_object, or a JSON file with OpenAI's object"
    )
    ask.add_argument(
        "--timeout", type=float, default=600.0, metavar="SECONDS", help="for the whole answer (%(default)s)"
    )
    ask.add_argument("--draw", type=Path, metavar="FILE", help="save the last image with the action drawn on it")
    output = ask.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print one JSON object instead")
    output.add_argument("--quiet", action="store_true", help="print the action only")
    _add_plug_ins(commands)
    options = parser.parse_args(argv)
    if hasattr(options, "run"):
        return options
    if options.draw and not options.image:
        ask.error("--draw needs an --image to draw on")
    if options.timeout <= 0:
        ask.error("--timeout must be positive")
    if options.record < 0:
        ask.error("--record must be positive")
    if not (options.task or options.audio or options.record):
        ask.error("there is no task: neither words nor --audio nor --record")
    return options


def _add_plug_ins(commands: Any) -> None:
    found = entry_points(group=PLUG_INS)
    for plug_in in found:
        plug_in.load()(commands)
    if "cache" not in found.names:
        cache = commands.add_parser("cache", help="needs the server's own package on this machine")
        cache.add_argument("arguments", nargs=argparse.REMAINDER)
        missing = "cache: the package autoglm-triton is not installed beside this client"
        cache.set_defaults(run=lambda _: _complain(missing, USAGE))


def _check_drawing(images: list[bytes], target: Path) -> None:
    """Find out before asking that there will be nothing to draw on or no file to draw into."""
    try:
        Image.open(io.BytesIO(images[-1]))
    except UnidentifiedImageError:
        raise ValueError("--draw: the last --image is not an image file") from None
    if target.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"--draw: {target.name} has no ending of an image format, such as .png")
    if not target.parent.is_dir():
        raise ValueError(f"--draw: there is no directory {target.parent}")


def _response_format(given: str | None) -> Any:
    """The request's option for what the command line says. Raises OSError or ValueError."""
    if given is None:
        return None
    if given in ("phone_action", "json_object"):
        return {"type": given}
    try:
        return json.loads(Path(given).read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"--response-format: {given} is no JSON file: {error}") from None


def _asks_for_json(options: argparse.Namespace) -> bool:
    wanted = options.response_format
    return isinstance(wanted, dict) and wanted.get("type") in JSON_FORMATS


def _ask(options: argparse.Namespace, images: list[bytes], sounds: list[bytes], system: str | None) -> Result:
    question: dict[str, Any] = {"prompt": options.task}
    if system is not None:
        kinds = ["image"] * len(images) + ["audio"] * len(sounds)
        parts = [*({"type": kind} for kind in kinds), *([{"type": "text", "text": options.task}] * bool(options.task))]
        question = {"messages": [{"role": "system", "content": system}, {"role": "user", "content": parts}]}
    sampling = {
        "max_tokens": options.max_tokens,
        "temperature": options.temperature,
        "audio_mode": options.audio_mode,
        "response_format": options.response_format,
    }
    # Leaving these blocks, also by Ctrl-C, stops the request on the server.
    with (
        Client(options.server, timeout=options.timeout) as client,
        client.stream(images=images, audio=sounds, **question, **sampling) as stream,
    ):
        if not (options.quiet or options.json or _asks_for_json(options)):
            _show_thought(stream)
        return stream.result()


def _show_thought(stream: Stream) -> None:
    """Print the thought as it comes, and end its line however the stream ends."""
    shown = ThoughtFilter()
    begun = False
    try:
        for piece in stream:
            text = shown.feed(piece.text)
            begun = begun or bool(text)
            print(text, end="", flush=True)
        text = shown.end()
        begun = begun or bool(text)
        print(text, end="")
    finally:
        if begun:
            print(flush=True)


def _report(options: argparse.Namespace, images: list[bytes], result: Result) -> int:
    action = result.action
    if options.json:
        print(json.dumps(_as_json(result), ensure_ascii=False))
    elif _asks_for_json(options):
        print(result.text)
    elif action:
        print(action)
    if not (options.quiet or options.json):
        for transcript in result.transcripts:
            print(f"heard: {transcript}", file=sys.stderr)
        print(_timing(result), file=sys.stderr)
    if _asks_for_json(options):
        return OK if result.finish_reason == "stop" else _complain(f"ended early: {result.finish_reason}", FAILED)
    if not action:
        return _complain(f"the answer holds no action ({result.action_error}): {result.text[-200:]!r}", FAILED)
    if options.draw:
        try:
            draw(Image.open(io.BytesIO(images[-1])), action).save(options.draw)
        except OSError as error:
            return _complain(f"--draw: {error}", USAGE)
    return OK


def _as_json(result: Result) -> dict[str, Any]:
    action = result.action
    return {
        "thought": result.thought,
        "action": {"name": action.NAME, **action.arguments()} if action else None,
        "text": result.text,
        "transcripts": result.transcripts,
        "finish_reason": result.finish_reason,
        "usage": asdict(result.usage),
        "first_piece_seconds": round(result.first_piece_seconds, 4),
        "total_seconds": round(result.total_seconds, 4),
    }


def _timing(result: Result) -> str:
    usage = result.usage
    heard = f"{usage.audio_tokens} audio, " if usage.audio_tokens else ""
    tokens = f"{usage.image_tokens} image, {heard}{usage.cached_tokens} cached"
    listening = f"audio {usage.audio_ms:.0f}, " if result.transcripts or usage.audio_tokens else ""
    return (
        f"{result.finish_reason}: first piece {result.first_piece_seconds:.2f} s, total {result.total_seconds:.2f} s; "
        f"prompt {usage.prompt_tokens} tokens ({tokens}), "
        f"answer {usage.completion_tokens}; ms: queue {usage.queue_ms:.0f}, preprocess {usage.preprocess_ms:.0f}, "
        f"vision {usage.vision_ms:.0f}, {listening}prefill {usage.prefill_ms:.0f}, decode {usage.decode_ms:.0f}"
    )


def _complain(message: str, code: int) -> int:
    print(f"autoglm: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
