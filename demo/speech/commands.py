"""What users say to the demo: intents, their wordings, and the wording that the bridge turns each into.

A command is of one language. Some wordings are held out: training never hears them, though it hears their words.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from demo import phrases, vocabulary
from demo.elements import Split
from demo.screens import Screen
from demo.tasks import OPENABLE, Asker, Task

Wordings = tuple[tuple[str, ...], tuple[str, ...]]  # for training, held out

WORDINGS: dict[str, dict[str, Wordings]] = {
    "en": {
        "tap": (
            (
                *("tap {}", "tap on {}", "please tap {}", "click {}", "click on {}", "press {}", "please press {}"),
                *("select {}", "touch {}", "could you tap {}", "now tap on {}", "can you select {} for me"),
            ),
            ("please tap on {}", "could you click on {}", "now press {}", "please select {} for me"),
        ),
        "open": (
            (
                *("open {}", "please open {}", "launch {}", "start {}", "could you open {}", "open {} for me"),
                *("now open {}", "can you start {} please"),
            ),
            ("please launch {}", "can you open {} for me", "now start {}", "open {} please"),
        ),
        "hold": (
            (
                *("long press {}", "press and hold {}", "hold {}", "please hold {}", "long press on {} for me"),
                *("now press and hold {}", "could you long press {}"),
            ),
            ("please long press {}", "now hold {}", "could you press and hold {}"),
        ),
        "double": (
            (
                *("double tap {}", "double click {}", "tap {} twice", "please double tap {}", "double click on {}"),
                *("could you tap {} twice", "now double click {}"),
            ),
            ("please double click {}", "now double tap {}", "tap on {} twice"),
        ),
        "page": (
            (
                *("go to the {} page", "show the {} page", "open the {} page", "please go to the {} page"),
                *("show me the {} page", "now take me to the {} page"),
            ),
            ("please show the {} page", "now go to the {} page", "please take me to the {} page"),
        ),
        "down": (
            ("scroll down", "scroll down a bit", "please scroll down", "scroll the page down", "now scroll down"),
            ("please scroll the page down", "scroll down please", "could you scroll down a bit"),
        ),
        "up": (
            ("scroll up", "scroll up a bit", "please scroll up", "scroll the page up", "now scroll up"),
            ("please scroll the page up", "scroll up please", "could you scroll up a bit"),
        ),
        "left": (
            ("swipe left", "swipe to the left", "please swipe left", "swipe left on the screen", "now swipe left"),
            ("please swipe to the left", "swipe left please", "could you swipe left on the screen"),
        ),
        "right": (
            ("swipe right", "swipe to the right", "please swipe right", "swipe right on the screen", "now swipe right"),
            ("please swipe to the right", "swipe right please", "could you swipe right on the screen"),
        ),
        "back": (
            ("go back", "please go back", "return to the previous page", "go back to the previous page"),
            ("please return to the previous page", "now go back", "go back please"),
        ),
        "home": (
            ("go home", "go to the home screen", "return to the home screen", "please go to the home screen"),
            ("please go home", "now go to the home screen", "please return to the home screen"),
        ),
    },
    "zh": {
        "tap": (
            (
                *("点击{}", "点一下{}", "请点击{}", "选择{}", "按一下{}", "帮我点击{}", "请选择{}", "帮我点一下{}"),
                "现在点击{}",
            ),
            ("请点一下{}", "帮我选择{}", "现在按一下{}"),
        ),
        "open": (
            ("打开{}", "请打开{}", "帮我打开{}", "启动{}", "打开一下{}", "现在打开{}", "请启动{}"),
            ("请帮我打开{}", "帮我启动{}", "现在启动{}"),
        ),
        "hold": (("长按{}", "按住{}", "请长按{}", "帮我长按{}", "现在按住{}"), ("请按住{}", "现在长按{}")),
        "double": (("双击{}", "连点两下{}", "请双击{}", "帮我连点两下{}"), ("请连点两下{}", "帮我双击{}")),
        "page": (
            ("进入{}页面", "去{}页面", "打开{}页面", "请进入{}页面", "帮我打开{}页面"),
            ("请打开{}页面", "帮我进入{}页面"),
        ),
        "down": (("向下滚动", "往下翻", "请向下滚动", "向下滚动页面", "帮我往下翻"), ("请往下翻", "帮我向下滚动")),
        "up": (("向上滚动", "往上翻", "请向上滚动", "向上滚动页面", "帮我往上翻"), ("请往上翻", "帮我向上滚动")),
        "left": (("左滑", "向左滑动", "往左滑", "请向左滑动", "帮我左滑"), ("请往左滑", "帮我向左滑动")),
        "right": (("右滑", "向右滑动", "往右滑", "请向右滑动", "帮我右滑"), ("请往右滑", "帮我向右滑动")),
        "back": (("返回", "返回上一页", "后退", "请返回", "回到上一页", "帮我后退"), ("请返回上一页", "帮我返回")),
        "home": (("回到桌面", "返回桌面", "回到主屏幕", "请回到桌面", "去主屏幕"), ("请返回桌面", "帮我回到桌面")),
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
QUOTED = re.compile('["“](.+?)["”]')


@dataclass(frozen=True)
class Command:
    """Something to say. `name` is what it is about: a label as tasks name it; empty for intents without one."""

    intent: str
    language: str
    name: str
    split: Split
    wording: int

    @property
    def text(self) -> str:
        """The words, which are also the right transcript: names are written as on the screen."""
        article = "the " if self.language == "en" and self.name in PICTURES else ""
        return WORDINGS[self.language][self.intent][self.split == "test"][self.wording].format(article + self.name)

    @property
    def plain(self) -> str:
        """The same in the words that the bridge uses."""
        return PLAIN[self.language][self.intent].format(self.name)


def names(language: str) -> list[str]:
    """Everything that a command of a language can be about, in a fixed order."""
    spoken = dict.fromkeys(vocabulary.spoken(label, language) for label in vocabulary.labels())
    return [name for name in spoken if name.isascii() == (language == "en")]


def intents(name: str) -> tuple[str, ...]:
    """Those that a name goes with: icons and the search box have no page, and only some names can be opened."""
    return ("tap", "hold", "double", *(("page",) if name not in PICTURES else ()), *_opened(name))


def _opened(name: str) -> tuple[str, ...]:
    return ("open",) if name in OPENABLE else ()


def word(intent: str, language: str, name: str, split: Split, rng: random.Random) -> Command:
    """A command in one of its wordings."""
    return Command(intent, language, name, split, rng.randrange(len(WORDINGS[language][intent][split == "test"])))


def commands(count: int, split: Split, seed: int) -> Iterator[Command]:
    """`count` commands without a screen: names go round, languages and wordings are drawn; one in seven has no name."""
    rng = random.Random(f"commands/{split}/{seed}")
    nameless = [intent for intent in PLAIN["en"] if "{}" not in PLAIN["en"][intent]]
    waiting: dict[str, list[str]] = {language: [] for language in vocabulary.LANGUAGES}
    for _ in range(count):
        language = rng.choice(vocabulary.LANGUAGES)
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
