"""The command `autoglm`."""

import argparse
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from PIL import Image

from autoglm_client.client import Client, Stream
from autoglm_client.draw import draw
from autoglm_client.errors import AutoGLMError
from autoglm_client.microphone import record
from autoglm_client.result import Result
from autoglm_client.thought import ThoughtFilter

# Exit codes.
OK, FAILED, INVALID_ARGUMENTS, INTERRUPTED = 0, 1, 2, 130
# Entry points of other distributions: functions that add a subcommand, with the default `run`, to the parser's.
PLUG_INS = "autoglm.commands"
JSON_FORMATS = ("json_object", "json_schema")  # answers in these formats contain no action


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 for a valid action (or the requested JSON), 1 if the server failed or
    answered otherwise, 2 for invalid arguments."""
    options = _parse_arguments(argv)
    if hasattr(options, "run"):
        return int(options.run(options))
    try:
        images = [_read("--image", Path(name)) for name in options.image]
        clips = [_read("--audio", Path(name)) for name in options.audio]
        system = _read_text("--system", options.system) if options.system else None
        options.response_format = _response_format(options.response_format)
        screen = _screen_to_draw_on(options, images) if options.draw else None
        if options.record:
            print(f"recording {options.record:g} s", file=sys.stderr)
            clips.append(record(options.record))
    except (OSError, ValueError) as error:
        return _fail(str(error), INVALID_ARGUMENTS)
    try:
        result = _ask(options, images, clips, system)
    except AutoGLMError as error:
        return _fail(str(error), FAILED)
    except KeyboardInterrupt:
        return _fail("cancelled", INTERRUPTED)
    return _report(options, screen, result)


def _parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="autoglm", description="Ask an AutoGLM server what to do on a screen.")
    commands = parser.add_subparsers(required=True, metavar="command")
    ask = commands.add_parser("ask", help="send a screenshot and a task; print the thought and the action")
    ask.add_argument("task", nargs="?", default="", help="the task in words; optional with --audio or --record")
    ask.add_argument("--image", action="append", default=[], metavar="FILE", help="a screenshot; can be repeated")
    ask.add_argument("--audio", action="append", default=[], metavar="FILE", help="a spoken task; can be repeated")
    ask.add_argument("--record", type=float, default=0.0, metavar="SECONDS", help="record the task with the microphone")
    ask.add_argument("--audio-mode", choices=("transcript", "bridge"), help="overrides the server's mode")
    ask.add_argument("--system", type=Path, metavar="FILE", help="a file with the system prompt")
    ask.add_argument("--server", default="127.0.0.1:8001", metavar="HOST:PORT", help="gRPC address (%(default)s)")
    ask.add_argument("--max-tokens", type=int, metavar="N")
    ask.add_argument("--temperature", type=float, metavar="T", help="0: greedy decoding")
    ask.add_argument("--response-format", metavar="FORMAT", help="phone_action, json_object or a JSON file")
    ask.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help="of the request (%(default)s)")
    ask.add_argument("--draw", type=Path, metavar="FILE", help="save the last image with the action drawn on it")
    output = ask.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print one JSON object instead")
    output.add_argument("--quiet", action="store_true", help="print only the action")
    _add_plug_ins(commands)
    options = parser.parse_args(argv)
    if hasattr(options, "run"):
        return options
    if options.draw and not options.image:
        ask.error("--draw needs an --image to draw on")
    if options.timeout <= 0:
        ask.error(f"--timeout must be positive (got {options.timeout:g})")
    if options.record < 0:
        ask.error(f"--record must be positive (got {options.record:g})")
    if not (options.task or options.audio or options.record):
        ask.error("the task is missing: give it in words, with --audio or with --record")
    return options


def _add_plug_ins(commands: Any) -> None:
    found = entry_points(group=PLUG_INS)
    for plug_in in found:
        plug_in.load()(commands)
    if "cache" not in found.names:
        cache = commands.add_parser("cache", help="requires the package autoglm-triton")
        cache.add_argument("arguments", nargs=argparse.REMAINDER)
        missing = "cache requires the package autoglm-triton, which is not installed"
        cache.set_defaults(run=lambda _: _fail(missing, INVALID_ARGUMENTS))


def _read(option: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{option} must be a readable file (got {path}: {error.strerror})") from error


def _read_text(option: str, path: Path) -> str:
    try:
        return _read(option, path).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{option} must be a text file in UTF-8 (got {path})") from error


def _screen_to_draw_on(options: argparse.Namespace, images: list[bytes]) -> Image.Image:
    """Check before the request that the action can be drawn and saved."""
    target: Path = options.draw
    if _asks_for_json(options):
        raise ValueError("--draw must not be combined with JSON answers: they contain no action to draw")
    try:
        screen = Image.open(io.BytesIO(images[-1]))
        screen.load()
    except Exception as error:  # Pillow raises errors of many types
        raise ValueError(f"--draw needs a valid image file (got {options.image[-1]})") from error
    if Image.registered_extensions().get(target.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"--draw must have the extension of an image format, such as .png (got {target.name})")
    if not target.parent.is_dir():
        raise ValueError(f"--draw must be in an existing directory (got {target})")
    return screen


def _response_format(given: str | None) -> Any:
    """The value of the request's option. Raises ValueError."""
    if given is None:
        return None
    if given in ("phone_action", "json_object"):
        return {"type": given}
    try:
        return json.loads(_read_text("--response-format", Path(given)))
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"--response-format must be valid JSON (got {given}: error at {where})") from error


def _asks_for_json(options: argparse.Namespace) -> bool:
    requested = options.response_format
    return isinstance(requested, dict) and requested.get("type") in JSON_FORMATS


def _ask(options: argparse.Namespace, images: list[bytes], clips: list[bytes], system: str | None) -> Result:
    chat: dict[str, Any] = {"prompt": options.task}
    if system is not None:
        types = ["image"] * len(images) + ["audio"] * len(clips)
        parts = [*({"type": each} for each in types), *([{"type": "text", "text": options.task}] * bool(options.task))]
        chat = {"messages": [{"role": "system", "content": system}, {"role": "user", "content": parts}]}
    names = ("max_tokens", "temperature", "audio_mode", "response_format")
    sampling = {name: getattr(options, name) for name in names}
    # Leaving these blocks, by Ctrl-C as well, stops the request on the server.
    with (
        Client(options.server, timeout=options.timeout) as client,
        client.stream(images=images, audio=clips, **chat, **sampling) as stream,
    ):
        if not (options.quiet or options.json or _asks_for_json(options)):
            _print_thought(stream)
        return stream.result()


def _print_thought(stream: Stream) -> None:
    """Print the thought as it arrives, and terminate its line even if the stream fails."""
    thought = ThoughtFilter()
    printed = ""
    try:
        for piece in stream:
            print(text := thought.feed(piece.text), end="", flush=True)
            printed += text
        print(text := thought.end(), end="")
        printed += text
    finally:
        if printed:
            print(flush=True)


def _report(options: argparse.Namespace, screen: Image.Image | None, result: Result) -> int:
    action = result.action
    if options.json:
        print(json.dumps(_as_json(result), ensure_ascii=False))
    elif _asks_for_json(options):
        print(result.text)
    elif action:
        print(action)
    if not (options.quiet or options.json):
        for transcript in result.transcripts:
            print(f"transcript: {transcript}", file=sys.stderr)
        print(_timing(result), file=sys.stderr)
    if _asks_for_json(options):
        return (
            OK if result.finish_reason == "stop" else _fail(f"the answer was cut off ({result.finish_reason})", FAILED)
        )
    if not action:
        return _fail(f"the answer cannot be parsed: {result.action_error} (got {result.text[-200:]!r})", FAILED)
    if screen:
        try:
            draw(screen, action).save(options.draw)
        except OSError as error:
            reason = error.strerror or "unsupported format"
            return _fail(f"--draw must be a writable file (got {options.draw}: {reason})", INVALID_ARGUMENTS)
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
    audio = f"{usage.audio_tokens} audio, " if usage.audio_tokens else ""
    audio_ms = f"audio {usage.audio_ms:.0f}, " if result.transcripts or usage.audio_tokens else ""
    return (
        f"{result.finish_reason}: first piece {result.first_piece_seconds:.2f} s, total {result.total_seconds:.2f} s; "
        f"prompt {usage.prompt_tokens} tokens ({usage.image_tokens} image, {audio}{usage.cached_tokens} cached), "
        f"answer {usage.completion_tokens}; ms: queue {usage.queue_ms:.0f}, preprocess {usage.preprocess_ms:.0f}, "
        f"vision {usage.vision_ms:.0f}, {audio_ms}prefill {usage.prefill_ms:.0f}, decode {usage.decode_ms:.0f}"
    )


def _fail(message: str, code: int) -> int:
    print(f"autoglm: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
