"""How often the demo does what it is told by voices and in words that training never heard.

    python -m demo.speech.evaluate                          the library, in this process
    python -m demo.speech.evaluate --server 127.0.0.1:8001  a running server, through the whole ensemble

Screens are those of the split "test" (demo.evaluate); each command is spoken by a held-out voice in a held-out wording,
and heard in a room with noise. What counts is the action: a tap must land inside its target.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import soundfile
import torch

from autoglm.audio.speech import Mode
from demo.elements import Split
from demo.evaluate import judge
from demo.fonts import require_fonts
from demo.screens import render
from demo.speech.backends import Reply, SpeechBackend, SpeechLibrary, SpeechServer
from demo.speech.commands import KINDS, Command, ask
from demo.speech.measures import error_rates
from demo.speech.rooms import listen
from demo.speech.voices import RATE, Voice, draw, require_synthesizers, speak
from demo.tasks import Task

FIRST_SEED = 70_000_000
LEVEL = 0.1  # root mean square of a clip in a file


@dataclass(frozen=True)
class Spoken:
    """One held-out command with its screen as a PNG file and its sound as a FLAC file."""

    task: Task
    command: Command
    voice: Voice
    image: bytes
    sound: bytes


def record(command: Command, voice: Voice, seed: int, kind: str = "FLAC") -> bytes:
    """A sound file of a command as some microphone in some room takes it; `kind` is one of soundfile's formats."""
    samples = torch.from_numpy(speak(command.text, voice).astype(np.float32) / 32768)
    generator = torch.Generator().manual_seed(seed)
    heard = listen(samples[None], torch.tensor([len(samples)]), generator, 1.0)
    sound = (heard.clips[0, : int(heard.lengths[0])] * LEVEL).clamp(-1, 1)
    file = io.BytesIO()
    soundfile.write(file, sound.numpy(), RATE, format=kind)
    return file.getvalue()


def question(split: Split, seed: int) -> Spoken | None:
    """A spoken command on the screen of `seed`: half are taps, the others go round the kinds. None where the screen has
    nothing for it."""
    rng = random.Random(f"speech/{split}/{seed}")
    others = [kind for kind in KINDS if kind != "tap"]
    screen = render(seed, "test")
    asked = ask(screen, "tap" if seed % 2 else others[seed // 2 % len(others)], rng, split)
    if asked is None:
        return None
    command, task = asked
    voice = draw(command.language, split, rng)
    file = io.BytesIO()
    screen.image.save(file, "PNG", compress_level=1)
    return Spoken(task, command, voice, file.getvalue(), record(command, voice, seed))


def questions(count: int, split: Split, workers: int) -> list[Spoken]:
    """The first `count` that there are. Forks: call it before the device is touched."""
    made: list[Spoken] = []
    seed = FIRST_SEED
    with multiprocessing.get_context("fork").Pool(workers, torch.set_num_threads, (1,)) as pool:
        while len(made) < count:
            seeds = range(seed, seed + 8 * workers)
            made += [spoken for spoken in pool.map(partial(question, split), seeds, chunksize=1) if spoken]
            seed = seeds.stop
    return made[:count]


def report(asked: Sequence[Spoken], replies: Sequence[Reply], mode: Mode) -> dict[str, Any]:
    """Shares of right actions, of all and by group; for transcripts also their error rates."""
    groups: dict[str, list[bool]] = {}
    for spoken, reply in zip(asked, replies, strict=True):
        right = judge(spoken.task, reply.answer).right
        names = ["taps"] if spoken.task.target is not None else ["other actions"]
        for name in ("all", *names, *(f"{names[0]} {key}" for key in (spoken.command.language, spoken.voice.program))):
            groups.setdefault(name, []).append(right)
    found: dict[str, Any] = {
        name: {"count": len(rights), "right": round(sum(rights) / len(rights), 4)}
        for name, rights in sorted(groups.items())
    }
    if mode == "transcript":
        for speakers in ("all voices", "espeak-ng", "flite"):
            heard = [
                (spoken.command, reply.transcript)
                for spoken, reply in zip(asked, replies, strict=True)
                if speakers in ("all voices", spoken.voice.program)
            ]
            found[f"error rate, {speakers}"] = {name: round(rate, 4) for name, rate in error_rates(heard).items()}
    return found


def evaluate(backend: SpeechBackend, asked: Sequence[Spoken], batch: int, show: int) -> dict[str, Any]:
    """Mode -> report; prints up to `show` wrong ones of each."""
    found: dict[str, Any] = {}
    for mode in get_args(Mode):
        replies: list[Reply] = []
        for start in range(0, len(asked), batch):
            replies += backend.hear([(s.image, s.sound) for s in asked[start : start + batch]], mode)
        found[mode] = report(asked, replies, mode)
        wrong = [(s, r) for s, r in zip(asked, replies, strict=True) if not judge(s.task, r.answer).right]
        for spoken, reply in wrong[:show]:
            print(f"{mode}: {spoken.command.text!r} by {spoken.voice}, heard as {reply.transcript!r}")
            print(f"  expected {spoken.task.answer}\n  got      {reply.answer}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=Path("demo/checkpoint"))
    parser.add_argument("--speech", type=Path, default=Path("demo/speech"), help="holds encoder/ and bridge/")
    parser.add_argument("--server", metavar="HOST:PORT", help="ask a running server over gRPC")
    parser.add_argument("--questions", type=int, default=600)
    parser.add_argument("--batch", type=int, default=8, help="questions asked together")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that draw and render")
    parser.add_argument("--split", choices=get_args(Split), default="test", help="of voices and wordings")
    parser.add_argument("--show", type=int, default=10, help="print so many wrong answers of each mode")
    parser.add_argument("--out", type=Path, default=Path("demo/training/speech_evaluation.json"))
    arguments = parser.parse_args()
    require_fonts()
    require_synthesizers()
    asked = questions(arguments.questions, arguments.split, arguments.workers)
    backend: SpeechBackend
    if arguments.server:
        backend = SpeechServer(arguments.server)
    else:
        backend = SpeechLibrary(arguments.checkpoint, arguments.speech)
    try:
        found = evaluate(backend, asked, arguments.batch, arguments.show)
    finally:
        backend.close()
    way = "served through the ensemble over gRPC" if arguments.server else "in process"
    way += "" if arguments.split == "test" else ", voices and wordings of training"
    reports = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.exists() else {}
    reports[way] = found
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(reports, indent=1) + "\n", encoding="utf-8")
    for mode, groups in found.items():
        for name, values in groups.items():
            print(f"{mode:11} {name:26} {values}")


if __name__ == "__main__":
    main()
