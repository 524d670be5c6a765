"""What users say to the demo: intents, their wordings, and the wording that the bridge turns each into.

A command is of one language. A wording is a form between an opening and a closing; some wordings are held out: training
never hears them, though it hears their words. It also hears words that make no command, in any order, or else it would
learn sentences by heart instead of listening.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from demo import phrases, vocabulary
from demo.elements import Split
from demo.screens import Screen
from demo.tasks import OPENABLE, Asker, Task

OPENINGS = {
    "en": ("", "please ", "now ", "could you ", "can you ", "could you please "),
    "zh": ("", "请", "帮我", "现在", "请帮我"),
}
CLOSINGS = {"en": ("", " please", " for me", " now"), "zh": ("",)}
FORMS: dict[str, dict[str, tuple[str, ...]]] = {
    "en": {
        "tap": ("tap {}", "tap on {}", "click {}", "click on {}", "press {}", "select {}", "touch {}"),
        "open": ("open {}", "launch {}", "start {}"),
        "hold": ("long press {}", "long press on {}", "press and hold {}", "hold {}"),
        "double": ("double tap {}", "double tap on {}", "double click {}", "double click on {}", "tap {} twice",
                   "tap on {} twice"),
        "page": ("go to the {} page", "show the {} page", "show me the {} page", "take me to the {} page",
                 "open the {} page"),
        "down": ("scroll down", "scroll down a bit", "scroll the page down"),
        "up": ("scroll up", "scroll up a bit", "scroll the page up"),
        "left": ("swipe left", "swipe to the left", "swipe left on the screen"),
        "right": ("swipe right", "swipe to the right", "swipe right on the screen"),
        "back": ("go back", "go back to the previous page", "return to the previous page"),
        "home": ("go home", "go to the home screen", "return to the home screen"),
    },
    "zh": {
        "tap": ("点击{}", "点一下{}", "选择{}", "按一下{}"),
        "open": ("打开{}", "打开一下{}", "启动{}"),
        "hold": ("长按{}", "按住{}"),
        "double": ("双击{}", "连点两下{}"),
        "page": ("进入{}页面", "去{}页面", "打开{}页面"),
        "down": ("向下滚动", "往下翻", "向下滚动页面"),
        "up": ("向上滚动", "往上翻", "向上滚动页面"),
        "left": ("左滑", "向左滑动", "往左滑"),
        "right": ("右滑", "向右滑动", "往右滑"),
        "back": ("返回", "返回上一页", "后退", "回到上一页"),
        "home": ("回到桌面", "返回桌面", "回到主屏幕", "去主屏幕"),
    },
}  # fmt: skip
HELD_OUT: dict[str, dict[str, tuple[str, ...]]] = {
    "en": {
        "tap": ("please tap on {}", "could you click on {}", "now press {}", "please select {} for me"),
        "open": ("please launch {}", "can you open {} for me", "now start {}", "open {} please"),
        "hold": ("please long press {}", "now hold {}", "could you press and hold {}"),
        "double": ("please double click {}", "now double tap {}", "tap on {} twice"),
        "page": ("please show the {} page", "now go to the {} page", "please take me to the {} page"),
        "down": ("please scroll the page down", "scroll down please", "could you scroll down a bit"),
        "up": ("please scroll the page up", "scroll up please", "could you scroll up a bit"),
        "left": ("please swipe to the left", "swipe left please", "could you swipe left on the screen"),
        "right": ("please swipe to the right", "swipe right please", "could you swipe right on the screen"),
        "back": ("please return to the previous page", "now go back", "go back please"),
        "home": ("please go home", "now go to the home screen", "please return to the home screen"),
    },
    "zh": {
        "tap": ("请点一下{}", "帮我选择{}", "现在按一下{}"),
        "open": ("请帮我打开{}", "帮我启动{}", "现在启动{}"),
        "hold": ("请按住{}", "现在长按{}"),
        "double": ("请连点两下{}", "帮我双击{}"),
        "page": ("请打开{}页面", "帮我进入{}页面"),
        "down": ("请往下翻", "帮我向下滚动"),
        "up": ("请往上翻", "帮我向上滚动"),
        "left": ("请往左滑", "帮我向左滑动"),
        "right": ("请往右滑", "帮我向右滑动"),
        "back": ("请返回上一页", "帮我返回"),
        "home": ("请返回桌面", "帮我回到桌面"),
    },
}
# The bridge says each intent in words that the demo's language model was trained on.
PLAIN: dict[str, dict[str, str]] = {
    "en": {
        **{"tap": "Tap {}", "open": "Open {}", "hold": "press and hold {}", "double": "double tap {}"},
        **{"page": "go to the {} page", "down": "scroll down", "up": "scroll up", "left": "swipe left"},
        **{"right": "swipe right", "back": "go back", "home": "go home"},
    },
    "zh": {
        **{"tap": "点击{}", "open": "打开{}", "hold": "长按{}", "double": "双击{}", "page": "进入{}页面"},
        **{"down": "向下滚动", "up": "向上滚动", "left": "向左滑动", "right": "向右滑动", "back": "返回"},
        "home": "回到桌面",
    },
}
# Kinds of tasks (demo.tasks.KINDS) that can be said: text to type may be anything, which so small an encoder cannot.
KINDS = {"tap": 50, "hold": 6, "launch": 12, "missing": 7, "scroll": 8, "back": 3, "home": 3, "page": 9}
PICTURES = frozenset(name for shown in (*vocabulary.ICONS.values(), vocabulary.SEARCH_FIELD) for name in shown.values())
JUMBLED = 0.4
QUOTED = re.compile('["“](.+?)["”]')


@dataclass(frozen=True)
class Command:
    """Something to say. `name` is what it is about: a label as tasks name it; empty for intents without one. Words that
    make no command have no intent."""

    intent: str
    language: str
    name: str
    wording: str

    @property
    def text(self) -> str:
        """The words, which are also the right transcript: names are written as on the screen."""
        article = "the " if self.language == "en" and self.name in PICTURES else ""
        return self.wording.format(article + self.name)

    @property
    def plain(self) -> str:
        """The same in the words that the bridge uses; empty without an intent."""
        return PLAIN[self.language][self.intent].format(self.name) if self.intent else ""


@cache
def _held_out(language: str) -> re.Pattern[str]:
    held_out = (re.escape(wording).replace(r"\{\}", ".+") for of in HELD_OUT[language].values() for wording in of)
    return re.compile("|".join(held_out))


@cache
def wordings(language: str, intent: str, split: Split) -> tuple[str, ...]:
    """All ways to say something. No word stands in both the opening and the closing; those for training contain none
    that is held out."""
    if split == "test":
        return HELD_OUT[language][intent]
    ways = itertools.product(OPENINGS[language], FORMS[language][intent], CLOSINGS[language])
    said = (o + form + c for o, form, c in ways if not set(o.split()) & set(c.split()))
    return tuple(wording for wording in said if not _held_out(language).search(wording))


@cache
def names(language: str) -> tuple[str, ...]:
    """Everything that a command of a language can be about, in a fixed order."""
    spoken = dict.fromkeys(vocabulary.spoken(label, language) for label in vocabulary.labels())
    return tuple(name for name in spoken if name.isascii() == (language == "en"))


def intents(name: str) -> tuple[str, ...]:
    """Those that a name goes with: icons and the search box have no page, and only some names can be opened."""
    return ("tap", "hold", "double", *(("page",) if name not in PICTURES else ()), *_opened(name))


def _opened(name: str) -> tuple[str, ...]:
    return ("open",) if name in OPENABLE else ()


def word(intent: str, language: str, name: str, split: Split, rng: random.Random) -> Command:
    """A command in one of its wordings."""
    return Command(intent, language, name, rng.choice(wordings(language, intent, split)))


@cache
def pieces(language: str) -> tuple[str, ...]:
    """What wordings consist of: English words, and the Chinese between which names and openings stand."""
    forms = [form for of_intent in FORMS[language].values() for form in of_intent]
    texts = " {} ".join([*OPENINGS[language], *CLOSINGS[language], *forms]).replace("{}", " ")
    return tuple(dict.fromkeys(texts.split()))


def jumble(language: str, rng: random.Random) -> Command:
    """Words and names in any order, in which no held-out wording occurs."""
    while True:
        count = rng.randint(2, 7) if language == "en" else rng.randint(1, 4)
        parts = [rng.choice(names(language) if rng.random() < 0.35 else pieces(language)) for _ in range(count)]
        text = (" " if language == "en" else "").join(parts)
        if not _held_out(language).search(text):
            return Command("", language, "", text)


def commands(count: int, split: Split, seed: int) -> Iterator[Command]:
    """`count` commands without a screen: names go round, languages and wordings are drawn; one in seven has no name.
    For training, JUMBLED of them are none."""
    rng = random.Random(f"commands/{split}/{seed}")
    nameless = [intent for intent in PLAIN["en"] if "{}" not in PLAIN["en"][intent]]
    waiting: dict[str, list[str]] = {language: [] for language in vocabulary.LANGUAGES}
    for _ in range(count):
        language = rng.choice(vocabulary.LANGUAGES)
        if split == "train" and rng.random() < JUMBLED:
            yield jumble(language, rng)
            continue
        if rng.random() < 1 / 7:
            yield word(rng.choice(nameless), language, "", split, rng)
            continue
        if not waiting[language]:
            waiting[language] = rng.sample(names(language), len(names(language)))
        name = waiting[language].pop()
        chosen = rng.choice(("tap", "tap", *intents(name), *_opened(name)))
        yield word(chosen, language, name, split, rng)


def ask(screen: Screen, kind: str, rng: random.Random, split: Split) -> tuple[Command, Task] | None:
    """A command on a screen with the task it stands for; None when the screen has nothing for it, or its name is of
    another language than the screen."""
    language = screen.language
    task: Task | None = getattr(Asker(screen, rng), kind)(language)
    if task is None:
        return None
    if kind in ("back", "home"):
        return word(kind, language, "", split, rng), task
    if kind == "scroll":
        thoughts = phrases.THOUGHTS[language]
        return word(next(d for d in phrases.SWIPES if thoughts[d] == task.thought), language, "", split, rng), task
    found = QUOTED.search(task.thought)
    name = found[1] if found else ""
    if name not in names(language):
        return None
    if kind == "hold":
        intent = "hold" if task.kind == "Long Press" else "double"
    else:
        intent = {"launch": "open", "page": "page"}.get(kind) or rng.choice(("tap", *_opened(name)))
    return word(intent, language, name, split, rng), task
