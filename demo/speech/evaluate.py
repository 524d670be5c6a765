"""Accuracy of the demo on commands by held-out voices in held-out wordings.

    python -m demo.speech.evaluate                          the library, in this process
    python -m demo.speech.evaluate --server 127.0.0.1:8001  a running server

The screens are those of the split "test", as in demo.evaluate. Clips are augmented with a room and noise. The action
must be right: a tap must be inside its target's box.
"""

import argparse
import io
import json
import multiprocessing
import os
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import soundfile
import torch

from autoglm.config import AudioMode
from demo.elements import Split
from demo.evaluate import encode_png, judge
from demo.fonts import require_fonts
from demo.screens import render
from demo.speech.backends import Reply, SpeechBackend, SpeechLibraryBackend, SpeechServerBackend
from demo.speech.commands import KINDS, Command, draw_command
from demo.speech.measures import error_rates
from demo.speech.rooms import augment
from demo.speech.voices import RATE, Voice, draw_voice, require_synthesizers, speak
from demo.tasks import Task

FIRST_SEED = 70_000_000
LEVEL = 0.1  # root mean square of the samples in a file


@dataclass(frozen=True)
class SpokenQuestion:
    """A command with its screen as a PNG file and its clip as a FLAC file."""

    task: Task
    command: Command
    voice: Voice
    image: bytes
    clip: bytes


def record_clip(command: Command, voice: Voice, seed: int, file_format: str = "FLAC") -> bytes:
    """An augmented clip of a command, as a file in one of soundfile's formats."""
    samples = torch.from_numpy(speak(command.text, voice).astype(np.float32) / 32768)
    generator = torch.Generator().manual_seed(seed)
    batch = augment(samples[None], torch.tensor([len(samples)]), generator, 1.0)
    samples = (batch.samples[0, : int(batch.lengths[0])] * LEVEL).clamp(-1, 1)
    file = io.BytesIO()
    soundfile.write(file, samples.numpy(), RATE, format=file_format)
    return file.getvalue()


def draw_question(split: Split, seed: int) -> SpokenQuestion | None:
    """A command on the screen of a seed: half are taps, the others cycle through the kinds. None if the screen does not
    allow it."""
    rng = random.Random(f"speech/{split}/{seed}")
    others = [kind for kind in KINDS if kind != "tap"]
    screen = render(seed, "test")
    drawn = draw_command(screen, "tap" if seed % 2 else others[seed // 2 % len(others)], rng, split)
    if drawn is None:
        return None
    command, task = drawn
    voice = draw_voice(command.language, split, rng)
    return SpokenQuestion(task, command, voice, encode_png(screen), record_clip(command, voice, seed))


def questions(count: int, split: Split, workers: int) -> list[SpokenQuestion]:
    """Draw `count` questions in forked processes; call it before CUDA is used."""
    drawn: list[SpokenQuestion] = []
    seed = FIRST_SEED
    with multiprocessing.get_context("fork").Pool(workers, torch.set_num_threads, (1,)) as pool:
        while len(drawn) < count:
            seeds = range(seed, seed + 8 * workers)
            drawn += [question for question in pool.map(partial(draw_question, split), seeds, chunksize=1) if question]
            seed = seeds.stop
    return drawn[:count]


def report(asked: Sequence[SpokenQuestion], replies: Sequence[Reply], mode: AudioMode) -> dict[str, Any]:
    """Shares of right actions by group, and in mode transcript the error rates."""
    groups: dict[str, list[bool]] = defaultdict(list)
    for question, reply in zip(asked, replies, strict=True):
        kind = "taps" if question.task.target is not None else "other actions"
        for name in ("all", kind, f"{kind} {question.command.language}", f"{kind} {question.voice.program}"):
            groups[name].append(judge(question.task, reply.answer).right)
    results: dict[str, Any] = {
        name: {"count": len(rights), "right": round(sum(rights) / len(rights), 4)}
        for name, rights in sorted(groups.items())
    }
    if mode == "transcript":
        for speakers in ("all voices", "espeak-ng", "flite"):
            transcripts = [
                (question.command, reply.transcript)
                for question, reply in zip(asked, replies, strict=True)
                if speakers in ("all voices", question.voice.program)
            ]
            rates = error_rates(transcripts)
            results[f"error rate, {speakers}"] = {language: round(rate, 4) for language, rate in rates.items()}
    return results


def evaluate(backend: SpeechBackend, asked: Sequence[SpokenQuestion], *, batch_size: int, show: int) -> dict[str, Any]:
    """Mode -> report; prints up to `show` wrong answers per mode."""
    reports: dict[str, Any] = {}
    for mode in get_args(AudioMode):
        replies: list[Reply] = []
        for start in range(0, len(asked), batch_size):
            replies += backend.answer_clips([(q.image, q.clip) for q in asked[start : start + batch_size]], mode)
        reports[mode] = report(asked, replies, mode)
        wrong = [(q, r) for q, r in zip(asked, replies, strict=True) if not judge(q.task, r.answer).right]
        for question, reply in wrong[:show]:
            print(f"{mode}: {question.command.text!r} by {question.voice}, transcript {reply.transcript!r}")
            print(f"  expected {question.task.answer}\n  got      {reply.answer}", flush=True)
    return reports


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=Path("demo/checkpoint"))
    parser.add_argument("--speech", type=Path, default=Path("demo/speech"), help="directory of encoder/ and bridge/")
    parser.add_argument("--server", metavar="HOST:PORT", help="evaluate a running server over gRPC")
    parser.add_argument("--questions", type=int, default=600)
    parser.add_argument("--batch", type=int, default=8, help="questions sent concurrently")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="processes that draw screens and synthesize clips"
    )
    parser.add_argument("--split", choices=get_args(Split), default="test", help="of voices and wordings")
    parser.add_argument("--show", type=int, default=10, help="number of wrong answers per mode to print")
    parser.add_argument("--out", type=Path, default=Path("demo/training/speech_evaluation.json"))
    arguments = parser.parse_args()
    require_fonts()
    require_synthesizers()
    asked = questions(arguments.questions, arguments.split, arguments.workers)
    backend: SpeechBackend
    if arguments.server:
        backend = SpeechServerBackend(arguments.server)
    else:
        backend = SpeechLibraryBackend(arguments.checkpoint, arguments.speech)
    try:
        results = evaluate(backend, asked, batch_size=arguments.batch, show=arguments.show)
    finally:
        backend.close()
    setup = "served through the ensemble over gRPC" if arguments.server else "in process"
    setup += "" if arguments.split == "test" else ", voices and wordings of training"
    reports = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.exists() else {}
    reports[setup] = results
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(reports, indent=1) + "\n", encoding="utf-8")
    for mode, groups in results.items():
        for name, values in groups.items():
            print(f"{mode:11} {name:26} {values}")


if __name__ == "__main__":
    main()
