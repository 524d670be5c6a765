"""Accuracy of the demo checkpoint on held-out screens.

    python -m demo.evaluate                          the library, in this process
    python -m demo.evaluate --server 127.0.0.1:8001  a running server

The screens are those of the split "test": other layouts, sizes, themes and combinations of labels than in training. One
(label, kind of screen) pair in ten never occurs in training; taps on these are also reported separately ("new pairs").
"""

import argparse
import io
import itertools
import json
import math
import random
import re
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo import phrases, tasks
from demo.backends import Backend, LibraryBackend, ServerBackend
from demo.elements import held_out
from demo.fonts import require_fonts
from demo.screens import Screen, render
from demo.tasks import Task, TaskSampler

FIRST_SEED = 50_000_000  # other screens than those of the evaluations in the training log
TAP_ACTION = re.compile(r'do\(action="(Tap|Long Press|Double Tap)", element=\[(\d{1,3}),(\d{1,3})\]\)')


@dataclass(frozen=True)
class Question:
    """A held-out task with its screen as a PNG file."""

    seed: int
    screen_kind: str
    image: bytes
    task: Task

    @property
    def is_new_pair(self) -> bool:
        return self.task.target is not None and held_out(self.task.target.label, self.screen_kind)


@dataclass(frozen=True)
class Verdict:
    right: bool
    thought_right: bool
    point: tuple[int, int] | None = None  # the coordinates of a tap
    error: float | None = None  # their distance from the target's centre, in thousandths of the screen


def questions(count: int, first_seed: int = FIRST_SEED) -> Iterator[Question]:
    """Draw `count` tasks on as many screens; half are taps, the others cycle through the other kinds."""
    others = [kind for kind in tasks.KINDS if kind != "tap"]
    drawn = 0
    for seed in range(first_seed, first_seed + 100 * count):
        if drawn == count:
            return
        rng = random.Random(f"evaluation/{seed}")
        kind = "tap" if drawn % 2 else others[drawn // 2 % len(others)]
        screen = render(seed, "test")
        task = TaskSampler(screen, rng).sample(kind)
        if task is None or (kind == "type" and task.action_type != "Type" and rng.random() < 0.6):
            continue
        drawn += 1
        yield Question(seed, screen.kind, encode_png(screen), task)


def encode_png(screen: Screen) -> bytes:
    file = io.BytesIO()
    screen.image.save(file, "PNG", compress_level=1)
    return file.getvalue()


def judge(task: Task, answer: str) -> Verdict:
    """A tap is right if it is inside its target's box, any other action if it is exactly the expected one."""
    thought, _, action = answer.partition("</think><answer>")
    thought_right = thought == f"<think>{task.thought}"
    if task.target is None:
        return Verdict(action.strip() == task.action, thought_right)
    tap = TAP_ACTION.fullmatch(action.strip())
    if not tap:
        return Verdict(False, thought_right)
    x, y = int(tap[2]), int(tap[3])
    left, top, right, bottom = (value * 1000 for value in task.target.box)
    inside = left <= x < right and top <= y < bottom
    error = math.dist((x, y), task.target.center)
    return Verdict(inside and tap[1] == task.action_type, thought_right, (x, y), error)


def answer_batch(backend: Backend, batch: Sequence[Question]) -> list[tuple[Question, str, Verdict]]:
    """Send questions concurrently; returns them with their answers and verdicts."""
    answers = backend.answer([(question.image, _prompt(question)) for question in batch])
    return [(q, answer, judge(q.task, answer)) for q, answer in zip(batch, answers, strict=True)]


def evaluate(backend: Backend, count: int, *, batch_size: int, show: int = 0) -> dict[str, Any]:
    """Report the accuracy over `count` questions by action and kind of screen; prints up to `show` wrong answers."""
    groups: dict[str, list[Verdict]] = defaultdict(list)
    begin = time.monotonic()
    remaining = questions(count)
    while batch := list(itertools.islice(remaining, batch_size)):
        for question, answer, verdict in answer_batch(backend, batch):
            groups[f"action {question.task.action_type}"].append(verdict)
            if question.task.target is not None:
                groups[f"taps on {question.screen_kind}"].append(verdict)
                groups["taps, all"].append(verdict)
                groups[f"taps, {'new' if question.is_new_pair else 'trained'} pairs"].append(verdict)
            if not verdict.right and show > 0:
                show -= 1
                print(f"seed {question.seed} ({question.screen_kind}): {question.task.text!r}")
                print(f"  expected {question.task.answer}\n  got      {answer}", flush=True)
    seconds = time.monotonic() - begin
    return {"questions": count, "seconds_per_question": round(seconds / count, 3)} | {
        name: _summary(groups[name]) for name in sorted(groups)
    }


def _prompt(question: Question) -> str:
    return question.task.text + phrases.app_context(random.Random(f"surroundings/{question.seed}"))


def _summary(verdicts: list[Verdict]) -> dict[str, Any]:
    count = len(verdicts)
    summary: dict[str, Any] = {
        "count": count,
        "right": round(sum(v.right for v in verdicts) / count, 4),
        "thought_right": round(sum(v.thought_right for v in verdicts) / count, 4),
    }
    if errors := sorted(v.error for v in verdicts if v.error is not None):
        summary["median_error"] = round(errors[len(errors) // 2], 1)
        summary["p95_error"] = round(errors[int(len(errors) * 0.95)], 1)
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=Path("demo/checkpoint"))
    parser.add_argument("--server", metavar="HOST:PORT", help="evaluate a running server over gRPC")
    parser.add_argument("--phone-action", action="store_true", help="use the response_format phone_action")
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=8, help="questions sent concurrently")
    parser.add_argument("--show", type=int, default=10, help="number of wrong answers to print")
    parser.add_argument("--out", type=Path, default=Path("demo/training/evaluation.json"))
    arguments = parser.parse_args()
    require_fonts()
    backend: Backend
    if arguments.server:
        backend = ServerBackend(arguments.server, arguments.phone_action)
    else:
        backend = LibraryBackend(arguments.checkpoint, arguments.phone_action)
    try:
        report = evaluate(backend, arguments.questions, batch_size=arguments.batch, show=arguments.show)
    finally:
        backend.close()
    setup = "served through the ensemble over gRPC" if arguments.server else "in process"
    setup += ", phone_action" if arguments.phone_action else ""
    reports = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.exists() else {}
    reports[setup] = report
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(reports, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for name, values in report.items():
        print(f"{name:28} {values}")


if __name__ == "__main__":
    main()
