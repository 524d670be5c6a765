"""Templates of tasks and answers in both languages, and the tokenizer's training corpus."""

import random

from demo import vocabulary

Forms = dict[str, tuple[str, ...]]  # by language

ACTIONS = ("Tap", "Long Press", "Double Tap", "Launch", "Swipe", "Type", "Back", "Home", "finish")

TAP: Forms = {
    "en": (
        *("tap {}", "Tap {}", 'Tap "{}"', "click {}", "Click on {}", "press {}", "Select {}", "Please tap {}."),
        "tap on the {}",
    ),
    "zh": ("点击{}", "点击“{}”", "点一下{}", "点{}", "请点击{}", "选择{}", "按一下{}", "帮我点击{}。"),
}
HOLD: dict[str, Forms] = {
    "Long Press": {
        "en": ("long press {}", "Long press {}", "press and hold {}", 'Hold "{}"'),
        "zh": ("长按{}", "长按“{}”", "按住{}", "请长按{}"),
    },
    "Double Tap": {
        "en": ("double tap {}", "Double tap {}", "double click {}", 'Tap "{}" twice'),
        "zh": ("双击{}", "双击“{}”", "连点两下{}", "请双击{}"),
    },
}
OPEN: Forms = {
    "en": (
        *("open {}", "Open {}", "Open {}.", 'Open "{}"', "Please open {}", "open the {} app", "launch {}"),
        *("Start {}", "go to {}"),
    ),
    "zh": ("打开{}", "打开“{}”", "请打开{}", "帮我打开{}", "打开{}应用", "启动{}", "进入{}", "打开一下{}。"),
}
PAGE: Forms = {
    "en": ("go to the {} page", "Go to the {} page", "show the {} page", "Open the {} page."),
    "zh": ("进入{}页面", "去{}页面", "打开{}页面", "转到{}页面。"),
}
TYPE: Forms = {
    "en": ("type {}", "Type {}", 'Type "{}"', "enter {}", "Please type {}", "input {}"),
    "zh": ("输入{}", "输入“{}”", "请输入{}", "帮我输入{}", "打字：{}"),
}
TYPE_INTO: Forms = {
    "en": ("type {} in {}", 'Type "{}" in {}', "enter {} in the {}", "Please type {} into {}"),
    "zh": ("在{1}输入{0}", "在{1}输入“{0}”", "请在{1}中输入{0}", "在{1}里填写{0}"),
}
SCROLL: dict[str, Forms] = {
    "en": {
        "down": ("scroll down", "Scroll down a bit", "swipe up", "See more below", "Scroll the page down"),
        "up": ("scroll up", "Scroll up a bit", "swipe down", "Scroll the page up", "See what is above"),
        "left": ("swipe left", "Swipe to the left", "next page", "Swipe left on the screen"),
        "right": ("swipe right", "Swipe to the right", "previous screen", "Swipe right on the screen"),
    },
    "zh": {
        "down": ("向下滚动", "往下翻", "上滑", "向下滚动页面", "看看下面的内容"),
        "up": ("向上滚动", "往上翻", "下滑", "向上滚动页面", "看看上面的内容"),
        "left": ("左滑", "向左滑动", "翻到下一屏", "往左滑"),
        "right": ("右滑", "向右滑动", "翻到上一屏", "往右滑"),
    },
}
BACK: Forms = {
    "en": ("go back", "Go back", "back", "Return to the previous page", "Please go back."),
    "zh": ("返回", "返回上一页", "后退", "回到上一页", "请返回。"),
}
HOME: Forms = {
    "en": ("go home", "Go to the home screen", "Return to the home screen", "go back to the desktop"),
    "zh": ("回到桌面", "返回桌面", "回到主屏幕", "去主屏幕"),
}
SWIPES = {
    "down": ((500, 700), (500, 300)),
    "up": ((500, 300), (500, 700)),
    "left": ((800, 500), (200, 500)),
    "right": ((200, 500), (800, 500)),
}
THOUGHTS = {
    "en": {
        "visible": '"{}" appears on the screen, tap it.',
        "launch": '"{}" is not on the screen, launch it.',
        "missing": '"{}" is not on the screen, scroll to find it.',
        "focused": '"{}" has the focus, type the text.',
        "unfocused": '"{}" needs the focus, tap it.',
        "there": '"{}" is the title of this page, done.',
        "down": "Scroll down.",
        "up": "Scroll up.",
        "left": "Swipe left.",
        "right": "Swipe right.",
        "back": "Go back.",
        "home": "Go to the home screen.",
        "Long Press": '"{}" appears on the screen, hold it.',
        "Double Tap": '"{}" appears on the screen, tap it twice.',
    },
    "zh": {
        "visible": "“{}”在屏幕上，点击它。",
        "launch": "“{}”不在屏幕上，启动它。",
        "missing": "“{}”不在屏幕上，滚动查找。",
        "focused": "“{}”已激活，输入文字。",
        "unfocused": "“{}”未激活，点击它。",
        "there": "“{}”是本页标题，已完成。",
        "down": "向下滚动。",
        "up": "向上滚动。",
        "left": "向左滑动。",
        "right": "向右滑动。",
        "back": "返回上一页。",
        "home": "回到桌面。",
        "Long Press": "“{}”在屏幕上，按住它。",
        "Double Tap": "“{}”在屏幕上，双击它。",
    },
}
ARRIVED = {"en": "Already on the {} page.", "zh": "已在{}页面。"}
SYSTEM = (
    "You are a phone agent.",
    "You are a helpful assistant.",
    "You operate a phone. Answer with one action.",
    "You are an agent that does tasks on a phone, step by step.",
    "你是一个手机操作助手。",
    "你是一个智能体，可以根据操作历史和当前状态图执行操作。",
    "今天的日期是: 2026年3月5日 星期四\n你是一个手机智能体。",
)


def system_message(rng: random.Random) -> str:
    """A system message from SYSTEM, or random words."""
    if rng.random() < 0.6:
        return rng.choice(SYSTEM)
    if rng.random() < 0.5:
        return " ".join(rng.choices(vocabulary.CLUTTER_EN, k=rng.randint(4, 60))) + "."
    return "".join(rng.choices(vocabulary.CLUTTER_ZH, k=rng.randint(6, 60))) + "。"


def app_context(rng: random.Random) -> str:
    """The current app as AutoGLM's client appends it to a task, or nothing."""
    if rng.random() < 0.6:
        return ""
    language = rng.choice(vocabulary.LANGUAGES)
    app = "System Home" if rng.random() < 0.3 else rng.choice(vocabulary.APPS[language])
    return f'\n\n{{"current_app": "{app}"}}'


def corpus() -> list[str]:
    """The fragments of all texts, split at labels so that no merge crosses a label's boundary."""
    pieces: list[str] = []
    for label in vocabulary.labels():
        for language in vocabulary.LANGUAGES:
            name = vocabulary.name_of(label, language)
            pieces += [name] * 40 + [f" {name}"] * 40 + [name.lower(), f" {name.lower()}"] * 20
    forms: list[str] = [*SYSTEM, '\n\n{"current_app": "', '"}', "System Home", "** Screen Info **\n\n{"]
    for language in vocabulary.LANGUAGES:
        for table in (TAP, *HOLD.values(), OPEN, PAGE, TYPE, TYPE_INTO, BACK, HOME):
            forms += table[language]
        forms += [form for direction in SCROLL[language].values() for form in direction]
        forms += [*THOUGHTS[language].values(), ARRIVED[language]] * 20
    forms += 20 * [f'do(action="{name}", element=[' for name in ACTIONS]
    forms += 20 * ['")', "])", '", app="', '", text="', '", start=[', "], end=[", 'finish(message="', '"', "“", "”"]
    for form in forms:
        for piece in form.replace("{0}", "{}").replace("{1}", "{}").split("{}"):
            pieces += [piece] * 20
    for words in (vocabulary.TYPED_EN, vocabulary.TYPED_ZH):
        for word in words:
            pieces += [word, f" {word}"] * 4
    pieces += list(vocabulary.CLUTTER_ZH) * 2
    return pieces
