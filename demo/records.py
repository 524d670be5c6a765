"""A screen with several questions as arrays of fixed size: what training reads."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer

from autoglm.checkpoint import ImageLimits
from autoglm.vision.image_processor import smart_resize
from demo import phrases, vocabulary
from demo.elements import Split, held_out
from demo.screens import SIZES, Screen, draw_size, render
from demo.tasks import Asker, Task
from demo.tokenizer import number_ids, token_id

LENGTH = 512  # tokens of a sequence: one image, then questions that do not see each other
QUESTIONS = 8
ANSWERS = 232  # answer tokens in a sequence at the most
GRIDS = ((42, 18), (38, 20))  # patches (rows, columns) of phones' screens: 20:9 and 16:9
LABELS = vocabulary.labels()
LABEL_IDS = {label: index for index, label in enumerate(LABELS)}
NOTHING = len(LABELS)  # the label of a place without an element
ROLES = ("nothing", "target", "title", "field", "focused")
IGNORED = -1

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Layout:
    """Shapes and dtypes of a record's arrays for one grid of patches."""

    grid: tuple[int, int]

    @property
    def cells(self) -> tuple[int, int]:
        """Rows and columns of visual tokens."""
        return self.grid[0] // 2, self.grid[1] // 2

    def fields(self) -> dict[str, tuple[tuple[int, ...], type]]:
        rows, columns = self.cells
        tokens = rows * columns
        return {
            "image": ((self.grid[0] * 14, self.grid[1] * 14, 3), np.uint8),
            "cell_label": ((tokens,), np.int16),  # element drawn on each visual token; NOTHING; IGNORED
            "cell_center": ((tokens, 2), np.int16),  # thousandths; IGNORED where there is none
            "cell_role": ((tokens,), np.int8),
            "ids": ((LENGTH,), np.int16),
            "positions": ((3, LENGTH), np.int16),
            "branch": ((LENGTH,), np.int8),  # 0 for what all questions see, then 1.. ; IGNORED for padding
            "image_start": ((), np.int16),
            "answer_at": ((ANSWERS,), np.int16),  # where a token is predicted (the token before it); 0 for padding
            "answer_id": ((ANSWERS,), np.int16),  # IGNORED for padding
            "answer_question": ((ANSWERS,), np.int8),
            "tap_at": ((QUESTIONS, 3), np.int16),  # where is decided: visible or not, x, y; 0 without a tap
            "tap_center": ((QUESTIONS, 2), np.int16),  # IGNORED without a tap
            "tap_box": ((QUESTIONS, 4), np.int16),
            "tap_label": ((QUESTIONS,), np.int16),
            "kind": ((QUESTIONS,), np.int8),  # index into phrases.ACTIONS; IGNORED for none
            "unseen": ((QUESTIONS,), np.int8),  # 1 when the target's label never occurs on this kind in training
        }

    def empty(self, count: int) -> Arrays:
        return {name: np.empty((count, *shape), dtype) for name, (shape, dtype) in self.fields().items()}


def cell_targets(screen: Screen, cells: tuple[int, int]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Label, centre and role of each visual token, row by row: that of the element whose mark covers it most."""
    rows, columns = cells
    label = np.full((rows, columns), NOTHING, np.int16)
    center = np.full((rows, columns, 2), IGNORED, np.int16)
    role = np.zeros((rows, columns), np.int8)
    best = np.zeros((rows, columns))
    left_edges, top_edges = np.arange(columns), np.arange(rows)[:, None]
    covers = []
    for element in screen.elements:
        x1, y1, x2, y2 = (value * size for value, size in zip(element.mark, (columns, rows) * 2, strict=True))
        wide = np.clip(np.minimum(x2, left_edges + 1) - np.maximum(x1, left_edges), 0, None)
        tall = np.clip(np.minimum(y2, top_edges + 1) - np.maximum(y1, top_edges), 0, None)
        covers.append((element, wide * tall, max((x2 - x1) * (y2 - y1), 1e-6)))
        bx1, by1, bx2, by2 = (value * size for value, size in zip(element.box, (columns, rows) * 2, strict=True))
        inside = (left_edges + 1 > bx1) & (left_edges < bx2) & (top_edges + 1 > by1) & (top_edges < by2)
        label[inside] = IGNORED
        role[inside] = IGNORED
    for element, cover, area in covers:
        own = ((cover >= 0.2) | (cover >= 0.3 * area)) & (cover > best)
        best[own] = cover[own]
        label[own] = LABEL_IDS[element.label]
        center[own] = element.center
        role[own] = ROLES.index(element.role)
    return label.reshape(-1), center.reshape(-1, 2), role.reshape(-1)


class Writer:
    """Turns screens into records."""

    def __init__(self, tokenizer: Tokenizer, limits: ImageLimits) -> None:
        self.tokenizer, self.limits = tokenizer, limits
        self.image_id = token_id(tokenizer, "<|image|>")
        self.pad_id = token_id(tokenizer, "<|endoftext|>")
        self.quote_id = token_id(tokenizer, '"')
        self.number_ids = set(number_ids(tokenizer))

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text).ids
        return ids

    def write(self, arrays: Arrays, row: int, seed: int, split: Split, only_taps: bool, grid: tuple[int, int]) -> None:
        """Fill row `row` of `arrays` with the screen of `seed`, of a phone whose screens have `grid`."""
        sizes = tuple(size for size in SIZES if self._grid(size) == grid)
        screen = render(seed, split, draw_size(random.Random(f"size/{seed}"), split == "train", sizes))
        height, width = smart_resize(screen.image.height, screen.image.width, self.limits)
        cells = (grid[0] // 2, grid[1] // 2)
        arrays["image"][row] = np.asarray(screen.image.resize((width, height), Image.Resampling.BICUBIC))
        label, center, role = cell_targets(screen, cells)
        arrays["cell_label"][row], arrays["cell_center"][row], arrays["cell_role"][row] = label, center, role
        record = {name: array[row] for name, array in arrays.items() if array.ndim > 1}
        arrays["image_start"][row] = self._questions(record, screen, seed, only_taps, cells)

    def _grid(self, size: tuple[int, int]) -> tuple[int, int]:
        height, width = smart_resize(size[1], size[0], self.limits)
        return height // 14, width // 14

    def _prefix(self, rng: random.Random, cells: tuple[int, int]) -> tuple[list[int], list[NDArray[Any]], int, int]:
        """What precedes the questions: ids, positions [3, n] in parts, the next position, the image's start."""
        text = "[gMASK]<sop>"
        if rng.random() < 0.25:
            text += f"<|system|>\n{phrases.system_message(rng)}"
        if rng.random() < 0.15:
            text += _history(rng)
        before = self.encode(text + "<|user|>\n<|begin_of_image|>")
        rows, columns = cells
        start = len(before)
        places = np.arange(rows * columns)
        image = np.stack((np.zeros_like(places), places // columns, places % columns)) + start
        after = start + max(rows, columns)
        ids = before + [self.image_id] * (rows * columns) + self.encode("<|end_of_image|>")
        return ids, [np.tile(np.arange(start), (3, 1)), image, np.full((3, 1), after)], after + 1, start

    def _questions(self, record: Arrays, screen: Screen, seed: int, only_taps: bool, cells: tuple[int, int]) -> int:
        """Fill in all that concerns text; returns where the image starts."""
        rng = random.Random(f"questions/{seed}")
        ids, parts, after, image_start = self._prefix(rng, cells)
        branch = [0] * len(ids)
        for name, value in (("answer_at", 0), ("answer_id", IGNORED), ("answer_question", 0), ("tap_at", 0)):
            record[name][...] = value
        for name in ("tap_center", "tap_box", "tap_label", "kind"):
            record[name][...] = IGNORED
        record["unseen"][...] = 0
        answers = question = 0
        asker = Asker(screen, rng)
        for _ in range(4 * QUESTIONS):
            task = asker.ask("tap" if only_taps else None)
            if task is None:
                continue
            text = ("\n" if rng.random() < 0.5 else "") + task.text + phrases.surroundings(rng)
            asked = self.encode(f"{text}<|assistant|>\n")
            answer = self.encode(f"{task.answer}</answer>")
            if question == QUESTIONS or len(ids) + len(asked) + len(answer) > LENGTH or answers + len(answer) > ANSWERS:
                break
            first = len(ids) + len(asked)
            self._mark(record, question, task, answer, first, screen.kind)
            numbers = set(record["tap_at"][question, 1:]) if task.target else set()
            for offset, token in enumerate(answer):
                if first + offset - 1 not in numbers:
                    record["answer_at"][answers] = first + offset - 1
                    record["answer_id"][answers] = token
                    record["answer_question"][answers] = question
                    answers += 1
            count = len(asked) + len(answer)
            ids += asked + answer
            branch += [question + 1] * count
            parts.append(np.tile(np.arange(after, after + count), (3, 1)))
            question += 1
        padding = LENGTH - len(ids)
        record["ids"][:] = ids + [self.pad_id] * padding
        record["branch"][:] = branch + [IGNORED] * padding
        record["positions"][:] = np.concatenate([*parts, np.zeros((3, padding), np.int64)], axis=1)
        return image_start

    def _mark(self, record: Arrays, question: int, task: Task, answer: list[int], first: int, screen_kind: str) -> None:
        record["kind"][question] = phrases.ACTIONS.index(task.kind)
        if task.target is None:
            return
        element = task.target
        x_at, y_at = [first + k - 1 for k, token in enumerate(answer) if token in self.number_ids][-2:]
        name = next(n for n in spoken_both(element.label) if n in task.thought)
        # Whether it is visible is said right after the name, or after the quotation mark that English has apart.
        named = len(self.encode(f"<think>{task.thought[0]}{name}"))
        decided = first + named - (answer[named] != self.quote_id)
        record["tap_at"][question] = (decided, x_at, y_at)
        record["tap_center"][question] = element.center
        record["tap_box"][question] = [round(value * 1000) for value in element.box]
        record["tap_label"][question] = LABEL_IDS[element.label]
        record["unseen"][question] = held_out(element.label, screen_kind)


def spoken_both(label: str) -> tuple[str, ...]:
    """The names of a label in both languages."""
    return tuple(vocabulary.spoken(label, language) for language in vocabulary.LANGUAGES)


def _history(rng: random.Random) -> str:
    """Earlier turns without their images, as the real client sends them."""
    text = ""
    for _ in range(rng.choice((1, 1, 2))):
        language = rng.choice(vocabulary.LANGUAGES)
        name = rng.choice(vocabulary.APPS[language])
        x, y = rng.randrange(1000), rng.randrange(1000)
        thought = phrases.THOUGHTS[language]["visible"].format(name)
        asked = rng.choice(phrases.OPEN[language]).format(name) + phrases.surroundings(rng)
        answer = f'<think>{thought}</think><answer>do(action="Tap", element=[{x},{y}])</answer>'
        text += f"<|user|>\n{asked}<|assistant|>\n{answer}"
    return text
