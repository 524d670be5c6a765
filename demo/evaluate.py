"""How often the demo checkpoint is right on screens that training never drew.

    python -m demo.evaluate                          the library, in this process
    python -m demo.evaluate --server 127.0.0.1:8001  a running server, through the whole ensemble

Held out are the seeds of the split "test", and with them layouts, sizes, themes and combinations of labels; one pair of
(label, kind of screen) in ten never occurs in training at all, and is reported on its own ("new pairs").
"""

from __future__ import annotations

import argparse
import io
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
from demo.screens import render
from demo.tasks import Asker, Task

FIRST_SEED = 50_000_000  # of this evaluation: other screens than those that training's log measures on
POINTED = re.compile(r'do\(action="(Tap|Long Press|Double Tap)", element=\[(\d{1,3}),(\d{1,3})\]\)')


@dataclass(frozen=True)
class Question:
    """One held-out task, with its screen as a PNG file."""

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
    point: tuple[int, int] | None = None  # where an answer points to, for taps
    error: float | None = None  # and how far that is from the target's centre, in thousandths of the screen


def questions(count: int, first_seed: int = FIRST_SEED) -> Iterator[Question]:
    """`count` tasks, each on a screen of its own; half are taps, the others go round the kinds."""
    others = [kind for kind in tasks.KINDS if kind != "tap"]
    made = 0
    for seed in range(first_seed, first_seed + 100 * count):
        if made == count:
            return
        rng = random.Random(f"evaluation/{seed}")
        kind = "tap" if made % 2 else others[made // 2 % len(others)]
        screen = render(seed, "test")
        task = Asker(screen, rng).ask(kind)
        if task is None or (kind == "type" and task.kind != "Type" and rng.random() < 0.6):
            continue
        file = io.BytesIO()
        screen.image.save(file, "PNG", compress_level=1)
        made += 1
        yield Question(seed, screen.kind, file.getvalue(), task)


def judge(task: Task, answer: str) -> Verdict:
    """A tap is right when it lands inside its target; everything else when it is the expected action."""
    thought, _, action = answer.partition("</think><answer>")
    thought_right = thought == f"<think>{task.thought}"
    if task.target is None:
        return Verdict(action.strip() == task.action, thought_right)
    found = POINTED.fullmatch(action.strip())
    if not found:
        return Verdict(False, thought_right)
    x, y = int(found[2]), int(found[3])
    left, top, right, bottom = (value * 1000 for value in task.target.box)
    inside = left <= x < right and top <= y < bottom
    error = math.dist((x, y), task.target.center)
    return Verdict(inside and found[1] == task.kind, thought_right, (x, y), error)


def ask(backend: Backend, asked: Sequence[Question]) -> list[tuple[Question, str, Verdict]]:
    """Questions asked together, with their answers and what these are worth."""
    answers = backend.ask([(question.image, _with_surroundings(question)) for question in asked])
    return [(q, answer, judge(q.task, answer)) for q, answer in zip(asked, answers, strict=True)]


def evaluate(backend: Backend, count: int, batch: int, show: int = 0) -> dict[str, Any]:
    """Ask `count` questions, `batch` at a time; a report by action, kind of screen and language of the screen."""
    groups: dict[str, list[Verdict]] = defaultdict(list)
    waiting: list[Question] = []
    begun = time.monotonic()

    def flush() -> None:
        nonlocal show
        for question, answer, verdict in ask(backend, waiting):
            groups[f"action {question.task.kind}"].append(verdict)
            if question.task.target is not None:
                groups[f"taps on {question.screen_kind}"].append(verdict)
                groups["taps, all"].append(verdict)
                groups[f"taps, {'new' if question.is_new_pair else 'trained'} pairs"].append(verdict)
            if not verdict.right and show > 0:
                show -= 1
                print(f"seed {question.seed} ({question.screen_kind}): {question.task.text!r}")
                print(f"  expected {question.task.answer}\n  got      {answer}", flush=True)
        waiting.clear()

    for question in questions(count):
        waiting.append(question)
        if len(waiting) == batch:
            flush()
    if waiting:
        flush()
    seconds = time.monotonic() - begun
    return {"questions": count, "seconds_per_question": round(seconds / count, 3)} | {
        name: _summary(groups[name]) for name in sorted(groups)
    }


def _with_surroundings(question: Question) -> str:
    return question.task.text + phrases.surroundings(random.Random(f"surroundings/{question.seed}"))


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
    parser.add_argument("--server", metavar="HOST:PORT", help="ask a running server over gRPC")
    parser.add_argument("--phone-action", action="store_true", help="limit answers to that response_format")
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=8, help="questions asked together")
    parser.add_argument("--show", type=int, default=10, help="print so many wrong answers")
    parser.add_argument("--out", type=Path, default=Path("demo/training/evaluation.json"))
    arguments = parser.parse_args()
    require_fonts()
    backend: Backend
    if arguments.server:
        backend = ServerBackend(arguments.server, arguments.phone_action)
    else:
        backend = LibraryBackend(arguments.checkpoint, arguments.phone_action)
    try:
        report = evaluate(backend, arguments.questions, arguments.batch, arguments.show)
    finally:
        backend.close()
    way = "served through the ensemble over gRPC" if arguments.server else "in process"
    reports = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.exists() else {}
    reports[f"{way}, phone_action" if arguments.phone_action else way] = report
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(reports, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for name, values in report.items():
        print(f"{name:28} {values}")


if __name__ == "__main__":
    main()
