"""Sample screens: `python -m demo.samples` writes demo/samples/*.png and samples.json.

An entry of samples.json is an image and a task, with either the box in which the coordinates are right (left, top,
right, bottom in thousandths of the screen) or the exact action.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from demo.fonts import require_fonts
from demo.screens import Screen, render

# file name -> seed, size in pixels, and tasks: (text, label of the target or the exact action)
SAMPLES: dict[str, tuple[int, tuple[int, int], tuple[tuple[str, str], ...]]] = {
    "launcher.png": (385, (1080, 2400), (
        ("打开设置", "设置"),
        ("帮我打开微信", "微信"),
        ("打开淘宝", 'do(action="Launch", app="淘宝")'),
        ("向左滑动", 'do(action="Swipe", start=[800,500], end=[200,500])'),
    )),
    "settings.png": (162, (1080, 2340), (
        ("tap Battery", "Battery"),
        ("Go to the Bluetooth page", 'finish(message="Already on the Bluetooth page.")'),
        ("tap on the back arrow", "icon:back"),
        ("Select Privacy", 'do(action="Swipe", start=[500,700], end=[500,300])'),
    )),
    "form.png": (34, (1080, 1920), (
        ("Type hello world in Email", 'do(action="Type", text="hello world")'),
        ("tap Save", "Save"),
        ("go back", 'do(action="Back")'),
    )),
    "search.png": (45, (1080, 2400), (
        ("输入火锅", 'do(action="Type", text="火锅")'), ("点击壁纸", "壁纸"), ("回到桌面", 'do(action="Home")'),
    )),
    "cards.png": (377, (720, 1600), (("点击购买", "购买"), ("长按抖音", "抖音"), ("打开京东", "京东"))),
    "toolbar.png": (175, (1440, 3200), (
        ("tap the heart icon", "icon:heart"), ("press the search icon", "icon:search"), ("open Settings", "Settings"),
    )),
}  # fmt: skip


def sample(name: str) -> Screen:
    """Draw a sample's screen."""
    seed, size, _ = SAMPLES[name]
    return render(seed, "test", size)


def describe(name: str, screen: Screen) -> list[dict[str, Any]]:
    """The entries of samples.json for an image."""
    boxes = {element.label: [round(value * 1000) for value in element.box] for element in screen.elements}
    return [
        {"image": name, "task": text} | ({"box": boxes[expected]} if expected in boxes else {"action": expected})
        for text, expected in SAMPLES[name][2]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo/samples"))
    out: Path = parser.parse_args().out
    require_fonts()
    out.mkdir(parents=True, exist_ok=True)
    entries: list[dict[str, Any]] = []
    for name in SAMPLES:
        screen = sample(name)
        screen.image.save(out / name, "PNG", optimize=True)
        entries += describe(name, screen)
    lines = ",\n".join("  " + json.dumps(entry, ensure_ascii=False) for entry in entries)
    (out / "samples.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    print(f"{len(SAMPLES)} screens with {len(entries)} tasks in {out}")


if __name__ == "__main__":
    main()
