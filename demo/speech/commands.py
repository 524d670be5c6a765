"""Spoken commands: intents, their wordings, and the plain wording that the bridge outputs for each.

A wording is an opening, a form and a closing. Some wordings are held out from training, which has all of their words.
Training also has random sequences of words; without them the model memorizes sentences.
"""

import itertools
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from demo import phrases, vocabulary
from demo.elements import Split
from demo.screens import Screen
from demo.tasks import OPENABLE, Task, TaskSampler

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
# The bridge's output for each intent, in words that the demo's language model was trained on.
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
# Kinds of tasks (demo.tasks.KINDS) that can be spoken. The encoder's vocabulary is too small for text to type.
KINDS = ("tap", "hold", "launch", "missing", "scroll", "back", "home", "page")
ICON_NAMES = frozenset(n for group in (*vocabulary.ICONS.values(), vocabulary.SEARCH_FIELD) for n in group.values())
RANDOM_SHARE = 0.4  # of the training commands
QUOTED = re.compile('["“](.+?)["”]')


@dataclass(frozen=True)
class Command:
    """A command in one wording. Random words have no intent (""); the name is that of the target, if there is one."""

    intent: str
    language: str
    name: str
    wording: str

    @property
    def text(self) -> str:
        """The words, which are also the reference transcript."""
        article = "the " if self.language == "en" and self.name in ICON_NAMES else ""
        return self.wording.format(article + self.name)

    @property
    def plain(self) -> str:
        """The plain wording; "" without an intent."""
        return PLAIN[self.language][self.intent].format(self.name) if self.intent else ""


@cache
def _held_out(language: str) -> re.Pattern[str]:
    held_out = (re.escape(wording).replace(r"\{\}", ".+") for held in HELD_OUT[language].values() for wording in held)
    return re.compile("|".join(held_out))


@cache
def wordings(language: str, intent: str, split: Split) -> tuple[str, ...]:
    """All wordings of an intent. Those of training contain no held-out wording; no opening and closing share a word."""
    if split == "test":
        return HELD_OUT[language][intent]
    triples = itertools.product(OPENINGS[language], FORMS[language][intent], CLOSINGS[language])
    composed = (o + form + c for o, form, c in triples if not set(o.split()) & set(c.split()))
    return tuple(wording for wording in composed if not _held_out(language).search(wording))


@cache
def names(language: str) -> tuple[str, ...]:
    """The names of all targets of commands, in a fixed order."""
    found = dict.fromkeys(vocabulary.name_of(label, language) for label in vocabulary.labels())
    return tuple(name for name in found if name.isascii() == (language == "en"))


def intents(name: str) -> tuple[str, ...]:
    """The intents that a name allows: icons and the search box have no page, and only some names can be opened."""
    return ("tap", "hold", "double", *(("page",) if name not in ICON_NAMES else ()), *_open_intent(name))


def _open_intent(name: str) -> tuple[str, ...]:
    return ("open",) if name in OPENABLE else ()


def draw_wording(intent: str, language: str, name: str, split: Split, rng: random.Random) -> Command:
    """A command in a random wording."""
    return Command(intent, language, name, rng.choice(wordings(language, intent, split)))


@cache
def wording_words(language: str) -> tuple[str, ...]:
    """The parts of wordings: English words, or Chinese texts between the names."""
    forms = [form for intent_forms in FORMS[language].values() for form in intent_forms]
    texts = " {} ".join([*OPENINGS[language], *CLOSINGS[language], *forms]).replace("{}", " ")
    return tuple(dict.fromkeys(texts.split()))


def draw_random_words(language: str, rng: random.Random) -> Command:
    """Words and names in random order, without held-out wordings."""
    while True:
        count = rng.randint(2, 7) if language == "en" else rng.randint(1, 4)
        parts = [rng.choice(names(language) if rng.random() < 0.35 else wording_words(language)) for _ in range(count)]
        text = (" " if language == "en" else "").join(parts)
        if not _held_out(language).search(text):
            return Command("", language, "", text)


def commands(count: int, split: Split, seed: int) -> Iterator[Command]:
    """Draw commands without a screen: names cycle in random order, and one command in seven has no name. For training,
    RANDOM_SHARE of them are random words."""
    rng = random.Random(f"commands/{split}/{seed}")
    nameless = [intent for intent in PLAIN["en"] if "{}" not in PLAIN["en"][intent]]
    remaining: dict[str, list[str]] = {language: [] for language in vocabulary.LANGUAGES}
    for _ in range(count):
        language = rng.choice(vocabulary.LANGUAGES)
        if split == "train" and rng.random() < RANDOM_SHARE:
            yield draw_random_words(language, rng)
            continue
        if rng.random() < 1 / 7:
            yield draw_wording(rng.choice(nameless), language, "", split, rng)
            continue
        if not remaining[language]:
            remaining[language] = rng.sample(names(language), len(names(language)))
        name = remaining[language].pop()
        intent = rng.choice(("tap", "tap", *intents(name), *_open_intent(name)))
        yield draw_wording(intent, language, name, split, rng)


def draw_command(screen: Screen, kind: str, rng: random.Random, split: Split) -> tuple[Command, Task] | None:
    """Draw a task of a kind and its command; None if the screen does not allow it, or its name is not in the screen's
    language."""
    language = screen.language
    task: Task | None = getattr(TaskSampler(screen, rng), kind)(language)
    if task is None:
        return None
    if kind in ("back", "home"):
        return draw_wording(kind, language, "", split, rng), task
    if kind == "scroll":
        thoughts = phrases.THOUGHTS[language]
        direction = next(d for d in phrases.SWIPES if thoughts[d] == task.thought)
        return draw_wording(direction, language, "", split, rng), task
    quoted = QUOTED.search(task.thought)
    name = quoted[1] if quoted else ""
    if name not in names(language):
        return None
    if kind == "hold":
        intent = "hold" if task.action_type == "Long Press" else "double"
    else:
        intent = {"launch": "open", "page": "page"}.get(kind) or rng.choice(("tap", *_open_intent(name)))
    return draw_wording(intent, language, name, split, rng), task
