"""Training records: a screen with several questions, as arrays of fixed size."""

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
from demo.tasks import Task, TaskSampler
from demo.tokenizer import number_ids, token_id

SEQUENCE_LENGTH = 512  # tokens: one image, then questions, which do not attend to each other
MAX_QUESTIONS = 8
MAX_ANSWER_TOKENS = 232  # of all questions of a sequence
GRIDS = ((42, 18), (38, 20))  # patches (rows, columns) of the screens, which are 20:9 and 16:9
LABELS = vocabulary.labels()
LABEL_IDS = {label: index for index, label in enumerate(LABELS)}
NO_ELEMENT = len(LABELS)  # the label of a visual token without an element
ROLES = ("nothing", "target", "title", "field", "focused")
IGNORE_INDEX = -1

Arrays = dict[str, NDArray[Any]]
Grid = tuple[int, int]


@dataclass(frozen=True)
class RecordSpec:
    """Shapes and dtypes of a record's arrays for one grid of patches."""

    grid: Grid

    def fields(self) -> dict[str, tuple[tuple[int, ...], type]]:
        num_cells = self.grid[0] * self.grid[1] // 4  # a cell is the area of a visual token
        return {
            "image": ((self.grid[0] * 14, self.grid[1] * 14, 3), np.uint8),
            "cell_label": ((num_cells,), np.int16),  # of the element drawn there; NO_ELEMENT; IGNORE_INDEX
            "cell_center": ((num_cells, 2), np.int16),  # of that element, in thousandths; IGNORE_INDEX without one
            "cell_role": ((num_cells,), np.int8),
            "ids": ((SEQUENCE_LENGTH,), np.int16),
            "positions": ((3, SEQUENCE_LENGTH), np.int16),
            "segment": ((SEQUENCE_LENGTH,), np.int8),  # 0: the common prefix; i: question i - 1; IGNORE_INDEX: padding
            "image_start": ((), np.int16),
            "answer_index": ((MAX_ANSWER_TOKENS,), np.int16),  # of the token before an answer token; 0 for padding
            "answer_token": ((MAX_ANSWER_TOKENS,), np.int16),  # IGNORE_INDEX for padding
            "answer_question": ((MAX_ANSWER_TOKENS,), np.int8),
            # Of the tokens that predict whether the target is visible, its x and its y; 0 without a tap.
            "tap_index": ((MAX_QUESTIONS, 3), np.int16),
            "tap_center": ((MAX_QUESTIONS, 2), np.int16),  # IGNORE_INDEX without a tap
            "tap_box": ((MAX_QUESTIONS, 4), np.int16),
            "tap_label": ((MAX_QUESTIONS,), np.int16),
            "action": ((MAX_QUESTIONS,), np.int8),  # index into phrases.ACTIONS; IGNORE_INDEX without a question
            "unseen": ((MAX_QUESTIONS,), np.int8),  # 1 if the target's label is held out on this kind of screen
        }

    def empty(self, count: int) -> Arrays:
        return {name: np.empty((count, *shape), dtype) for name, (shape, dtype) in self.fields().items()}


def cell_targets(screen: Screen, cells: tuple[int, int]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Label, centre and role of each of `cells` (rows, columns): those of the element whose mark covers it most."""
    rows, columns = cells
    label = np.full((rows, columns), NO_ELEMENT, np.int16)
    center = np.full((rows, columns, 2), IGNORE_INDEX, np.int16)
    role = np.zeros((rows, columns), np.int8)
    best = np.zeros((rows, columns))
    left_edges, top_edges = np.arange(columns), np.arange(rows)[:, None]
    covers = []
    for element in screen.elements:
        x1, y1, x2, y2 = (value * size for value, size in zip(element.mark, (columns, rows) * 2, strict=True))
        wide = np.clip(np.minimum(x2, left_edges + 1) - np.maximum(x1, left_edges), 0, None)
        tall = np.clip(np.minimum(y2, top_edges + 1) - np.maximum(y1, top_edges), 0, None)
        covers.append((element, wide * tall, max((x2 - x1) * (y2 - y1), 1e-6)))
        x1, y1, x2, y2 = (value * size for value, size in zip(element.box, (columns, rows) * 2, strict=True))
        inside = (left_edges + 1 > x1) & (left_edges < x2) & (top_edges + 1 > y1) & (top_edges < y2)
        label[inside] = IGNORE_INDEX
        role[inside] = IGNORE_INDEX
    for element, cover, area in covers:
        own = ((cover >= 0.2) | (cover >= 0.3 * area)) & (cover > best)
        best[own] = cover[own]
        label[own] = LABEL_IDS[element.label]
        center[own] = element.center
        role[own] = ROLES.index(element.role)
    return label.reshape(-1), center.reshape(-1, 2), role.reshape(-1)


class RecordWriter:
    """Writes screens and questions into the arrays of records."""

    def __init__(self, tokenizer: Tokenizer, limits: ImageLimits) -> None:
        self.tokenizer, self.limits = tokenizer, limits
        self.image_id = token_id(tokenizer, "<|image|>")
        self.pad_id = token_id(tokenizer, "<|endoftext|>")
        self.quote_id = token_id(tokenizer, '"')
        self.number_ids = set(number_ids(tokenizer))

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text).ids
        return ids

    def write(self, arrays: Arrays, row: int, seed: int, split: Split, *, only_taps: bool, grid: Grid) -> None:
        """Fill row `row` of `arrays` with the screen of a seed, of one of the sizes that have this grid."""
        sizes = tuple(size for size in SIZES if self._grid(size) == grid)
        screen = render(seed, split, draw_size(random.Random(f"size/{seed}"), split == "train", sizes))
        height, width = smart_resize(screen.image.height, screen.image.width, self.limits)
        cells = (grid[0] // 2, grid[1] // 2)
        arrays["image"][row] = np.asarray(screen.image.resize((width, height), Image.Resampling.BICUBIC))
        label, center, role = cell_targets(screen, cells)
        arrays["cell_label"][row], arrays["cell_center"][row], arrays["cell_role"][row] = label, center, role
        record = {name: array[row] for name, array in arrays.items() if array.ndim > 1}
        arrays["image_start"][row] = self._write_questions(record, screen, seed, only_taps, cells)

    def _grid(self, size: tuple[int, int]) -> Grid:
        height, width = smart_resize(size[1], size[0], self.limits)
        return height // 14, width // 14

    def _prefix(self, rng: random.Random, cells: tuple[int, int]) -> tuple[list[int], list[NDArray[Any]], int, int]:
        """The tokens before the questions: ids, parts of positions [3, n], the next position, the image's start."""
        text = "[gMASK]<sop>"
        if rng.random() < 0.25:
            text += f"<|system|>\n{phrases.system_message(rng)}"
        if rng.random() < 0.15:
            text += _history(rng)
        before = self.encode(text + "<|user|>\n<|begin_of_image|>")
        rows, columns = cells
        start = len(before)
        indices = np.arange(rows * columns)
        image = np.stack((np.zeros_like(indices), indices // columns, indices % columns)) + start
        after = start + max(rows, columns)
        ids = before + [self.image_id] * (rows * columns) + self.encode("<|end_of_image|>")
        return ids, [np.tile(np.arange(start), (3, 1)), image, np.full((3, 1), after)], after + 1, start

    def _write_questions(
        self, record: Arrays, screen: Screen, seed: int, only_taps: bool, cells: tuple[int, int]
    ) -> int:
        """Fill the arrays of the text; returns the index of the first image token."""
        rng = random.Random(f"questions/{seed}")
        ids, position_parts, next_position, image_start = self._prefix(rng, cells)
        segment = [0] * len(ids)
        for name in ("answer_index", "answer_question", "tap_index", "unseen"):
            record[name][...] = 0
        for name in ("answer_token", "tap_center", "tap_box", "tap_label", "action"):
            record[name][...] = IGNORE_INDEX
        num_answer_tokens = question = 0
        sampler = TaskSampler(screen, rng)
        for _ in range(4 * MAX_QUESTIONS):
            task = sampler.sample("tap" if only_taps else None)
            if task is None:
                continue
            text = ("\n" if rng.random() < 0.5 else "") + task.text + phrases.app_context(rng)
            prompt = self.encode(f"{text}<|assistant|>\n")
            answer = self.encode(f"{task.answer}</answer>")
            count = len(prompt) + len(answer)
            fits = len(ids) + count <= SEQUENCE_LENGTH and num_answer_tokens + len(answer) <= MAX_ANSWER_TOKENS
            if question == MAX_QUESTIONS or not fits:
                break
            start = len(ids) + len(prompt)
            self._write_task(record, question, task, answer, start, screen.kind)
            coordinates = set(record["tap_index"][question, 1:]) if task.target else set()
            for index, token in enumerate(answer, start - 1):
                if index not in coordinates:
                    record["answer_index"][num_answer_tokens] = index
                    record["answer_token"][num_answer_tokens] = token
                    record["answer_question"][num_answer_tokens] = question
                    num_answer_tokens += 1
            ids += prompt + answer
            segment += [question + 1] * count
            position_parts.append(np.tile(np.arange(next_position, next_position + count), (3, 1)))
            question += 1
        padding = SEQUENCE_LENGTH - len(ids)
        record["ids"][:] = ids + [self.pad_id] * padding
        record["segment"][:] = segment + [IGNORE_INDEX] * padding
        record["positions"][:] = np.concatenate([*position_parts, np.zeros((3, padding), np.int64)], axis=1)
        return image_start

    def _write_task(self, record: Arrays, question: int, task: Task, answer: list[int], start: int, kind: str) -> None:
        """Fill the arrays of a question on a `kind` of screen; `start` is the index of its answer's first token."""
        record["action"][question] = phrases.ACTIONS.index(task.action_type)
        if task.target is None:
            return
        element = task.target
        x, y = [start + k - 1 for k, token in enumerate(answer) if token in self.number_ids][-2:]
        name = next(n for n in vocabulary.names_of(element.label) if n in task.thought)
        # The token after the name depends on the visibility; in English a separate quotation mark may come first.
        num_name_tokens = len(self.encode(f"<think>{task.thought[0]}{name}"))
        visibility = start + num_name_tokens - (answer[num_name_tokens] != self.quote_id)
        record["tap_index"][question] = (visibility, x, y)
        record["tap_center"][question] = element.center
        record["tap_box"][question] = [round(value * 1000) for value in element.box]
        record["tap_label"][question] = LABEL_IDS[element.label]
        record["unseen"][question] = held_out(element.label, kind)


def _history(rng: random.Random) -> str:
    """Earlier turns without their images, as AutoGLM's client sends them."""
    text = ""
    for _ in range(rng.choice((1, 1, 2))):
        language = rng.choice(vocabulary.LANGUAGES)
        name = rng.choice(vocabulary.APPS[language])
        x, y = rng.randrange(1000), rng.randrange(1000)
        thought = phrases.THOUGHTS[language]["visible"].format(name)
        task = rng.choice(phrases.OPEN[language]).format(name) + phrases.app_context(rng)
        answer = f'<think>{thought}</think><answer>do(action="Tap", element=[{x},{y}])</answer>'
        text += f"<|user|>\n{task}<|assistant|>\n{answer}"
    return text
