"""Tasks on a screen with their expected answers, in AutoGLM's format.

The answer depends on the screen. Opening something is a tap if it is visible, else a launch (of an application) or a
swipe (to find anything else). Text is typed if a field has the focus, else the field is tapped first. Going to a page
that is already open is a finish.
"""

import random
from dataclasses import dataclass

from demo import phrases, vocabulary
from demo.elements import Element
from demo.screens import Screen

GROUPS = (vocabulary.APPS, vocabulary.SETTINGS)
OPENABLE = frozenset(name for group in GROUPS for language in vocabulary.LANGUAGES for name in group[language])
# Names in lower case; made-up applications must have others.
RESERVED = frozenset(vocabulary.name_of(label, "en").lower() for label in vocabulary.labels())
KINDS = {
    "tap": 50, "hold": 5, "launch": 14, "missing": 7, "type": 16, "scroll": 6, "back": 3, "home": 3, "page": 9,
}  # fmt: skip


@dataclass(frozen=True)
class Task:
    """A user's task and the expected answer."""

    text: str
    thought: str
    action: str
    action_type: str  # one of phrases.ACTIONS
    target: Element | None = None  # of Tap, Long Press and Double Tap

    @property
    def answer(self) -> str:
        """The answer without its closing tag, which is a stop token."""
        return f"<think>{self.thought}</think><answer>{self.action}"


def _tap(text: str, element: Element, language: str, thought: str = "visible", action: str = "Tap") -> Task:
    x, y = element.center
    thought = phrases.THOUGHTS[language][thought].format(vocabulary.name_of(element.label, language))
    return Task(text, thought, f'do(action="{action}", element=[{x},{y}])', action, element)


def _swipe(text: str, thought: str, direction: str) -> Task:
    (x1, y1), (x2, y2) = phrases.SWIPES[direction]
    return Task(text, thought, f'do(action="Swipe", start=[{x1},{y1}], end=[{x2},{y2}])', "Swipe")


class TaskSampler:
    """Draws tasks for one screen. The methods named after KINDS return None if the screen does not allow the task."""

    def __init__(self, screen: Screen, rng: random.Random) -> None:
        self.screen, self.rng = screen, rng
        self.targets = [e for e in screen.elements if e.role != "title"]
        self.fields = [e for e in screen.elements if e.role in ("field", "focused")]
        self.title = next((e for e in screen.elements if e.role == "title"), None)

    def sample(self, kind: str | None = None) -> Task | None:
        """Draw a task of a kind, which is drawn too by default; None if the screen does not allow it."""
        kind = kind or self.rng.choices(list(KINDS), list(KINDS.values()))[0]
        language = self.screen.language if self.rng.random() < 0.8 else self.rng.choice(vocabulary.LANGUAGES)
        task: Task | None = getattr(self, kind)(language)
        return task

    def _phrase(self, forms: phrases.Forms, language: str, *values: str) -> str:
        return self.rng.choice(forms[language]).format(*values)

    def _written(self, label: str, language: str) -> str:
        """A label's name as a user writes it: sometimes in lower case."""
        name = vocabulary.name_of(label, language)
        return name.lower() if self.rng.random() < 0.15 else name

    def tap(self, language: str) -> Task | None:
        if not self.targets:
            return None
        element = self.rng.choice(self.targets)
        forms = phrases.OPEN if element.label in OPENABLE and self.rng.random() < 0.5 else phrases.TAP
        return _tap(self._phrase(forms, language, self._written(element.label, language)), element, language)

    def hold(self, language: str) -> Task | None:
        """A long press or a double tap."""
        if not self.targets:
            return None
        element, action = self.rng.choice(self.targets), self.rng.choice(list(phrases.HOLD))
        text = self._phrase(phrases.HOLD[action], language, self._written(element.label, language))
        return _tap(text, element, language, action, action)

    def launch(self, language: str) -> Task | None:
        shown = {e.label for e in self.screen.elements}
        named_in = language if self.rng.random() < 0.9 else self.rng.choice(("en", "zh"))
        name = self.rng.choice(vocabulary.APPS[named_in])
        if self.rng.random() < 0.2:  # a made-up application
            name = self._words(language)
        if name in shown or (name not in OPENABLE and name.lower() in RESERVED):
            return None
        text = self._phrase(phrases.OPEN, language, self._written(name, language))
        thought = phrases.THOUGHTS[language]["launch"].format(name)
        return Task(text, thought, f'do(action="Launch", app="{name}")', "Launch")

    def missing(self, language: str) -> Task | None:
        shown = {e.label for e in self.screen.elements}
        group = self.rng.choice((vocabulary.SETTINGS, vocabulary.BUTTONS))
        name = self.rng.choice(group[language])
        if name in shown:
            return None
        forms = phrases.OPEN if group is vocabulary.SETTINGS and self.rng.random() < 0.5 else phrases.TAP
        text = self._phrase(forms, language, self._written(name, language))
        return _swipe(text, phrases.THOUGHTS[language]["missing"].format(name), "down")

    def type(self, language: str) -> Task | None:
        if not self.fields:
            return None
        focused = [e for e in self.fields if e.role == "focused"]
        words = self._words(language)
        if (focused or len(self.fields) == 1) and self.rng.random() < 0.4:
            field = (focused or self.fields)[0]
            text = self._phrase(phrases.TYPE, language, words)
        else:
            field = self.rng.choice(focused) if focused and self.rng.random() < 0.65 else self.rng.choice(self.fields)
            text = self._phrase(phrases.TYPE_INTO, language, words, self._written(field.label, language))
        if field.role != "focused":
            return _tap(text, field, language, "unfocused")
        thought = phrases.THOUGHTS[language]["focused"].format(vocabulary.name_of(field.label, language))
        return Task(text, thought, f'do(action="Type", text="{words}")', "Type")

    def _words(self, language: str) -> str:
        rng = self.rng
        kind = rng.random()
        if kind < 0.15:
            return str(rng.randrange(10 ** rng.randint(2, 8)))
        if kind < 0.25:  # random characters, to be copied token by token
            if language == "zh":
                return "".join(chr(rng.randint(0x4E00, 0x9FA5)) for _ in range(rng.randint(1, 3)))
            word = "".join(rng.choices("aaabcdeeefghiiijklmnoooprstuuvwxyz", k=rng.randint(3, 7)))
            return rng.choice((word, word.capitalize(), f"{word}@mail.com", f"{word}.{rng.randrange(100)}"))
        if language == "zh" and rng.random() < 0.85:
            return "".join(rng.sample(vocabulary.TYPED_ZH, rng.choice((1, 1, 2))))
        return " ".join(rng.sample(vocabulary.TYPED_EN, rng.choice((1, 2, 2, 3))))

    def scroll(self, language: str) -> Task | None:
        direction = self.rng.choice(list(phrases.SWIPES))
        text = self.rng.choice(phrases.SCROLL[language][direction])
        return _swipe(text, phrases.THOUGHTS[language][direction], direction)

    def back(self, language: str) -> Task | None:
        text = self.rng.choice(phrases.BACK[language])
        return Task(text, phrases.THOUGHTS[language]["back"], 'do(action="Back")', "Back")

    def home(self, language: str) -> Task | None:
        text = self.rng.choice(phrases.HOME[language])
        return Task(text, phrases.THOUGHTS[language]["home"], 'do(action="Home")', "Home")

    def page(self, language: str) -> Task | None:
        """Go to a page: a finish if it is open, else a tap."""
        if self.title and self.rng.random() < 0.65:
            name = self.title.label
            text = self._phrase(phrases.PAGE, language, self._written(name, language))
            thought = phrases.THOUGHTS[language]["there"].format(name)
            return Task(text, thought, f'finish(message="{phrases.ARRIVED[language].format(name)}")', "finish")
        plain = [e for e in self.targets if e.role == "target" and ":" not in e.label]
        if not plain:
            return None
        element = self.rng.choice(plain)
        return _tap(self._phrase(phrases.PAGE, language, self._written(element.label, language)), element, language)
