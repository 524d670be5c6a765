"""Sample clips: `python -m demo.speech.samples` writes demo/speech/samples/* and samples.json.

Held-out voices speak held-out wordings for the screens of demo/samples. An entry of samples.json is a clip with its
screen, its words, and either the box in which the coordinates are right (in thousandths) or the exact action.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from demo.fonts import require_fonts
from demo.samples import sample
from demo.speech.commands import Command
from demo.speech.evaluate import record_clip
from demo.speech.voices import Voice, require_synthesizers

FEMALE, MALE = Voice("espeak-ng", "en-gb+f4", 0.95, 0.6), Voice("flite", "rms", 1.0, 0.3)
WOMAN, MAN = Voice("espeak-ng", "cmn-latn-pinyin+Annie", 1.0, 0.5), Voice("espeak-ng", "cmn-latn-pinyin+m5", 0.9, 0.4)
# file name -> screen, command, voice, label of the target or the exact action
SAMPLES: dict[str, tuple[str, Command, Voice, str]] = {
    "battery.flac": ("settings.png", Command("tap", "en", "Battery", "please tap on {}"), FEMALE, "Battery"),
    "save.ogg": ("form.png", Command("tap", "en", "Save", "now press {}"), MALE, "Save"),
    "settings.ogg": ("toolbar.png", Command("open", "en", "Settings", "can you open {} for me"), FEMALE, "Settings"),
    "back.ogg": ("form.png", Command("back", "en", "", "go back please"), MALE, 'do(action="Back")'),
    "wechat.flac": ("launcher.png", Command("open", "zh", "微信", "请帮我打开{}"), WOMAN, "微信"),
    "buy.ogg": ("cards.png", Command("tap", "zh", "购买", "请点一下{}"), MAN, "购买"),
    "taobao.ogg": ("launcher.png", Command("open", "zh", "淘宝", "帮我启动{}"), MAN, 'do(action="Launch", app="淘宝")'),
}


def describe(name: str) -> dict[str, Any]:
    """The entry of samples.json for a clip."""
    image, command, _, expected = SAMPLES[name]
    boxes = {element.label: [round(value * 1000) for value in element.box] for element in sample(image).elements}
    answer: dict[str, Any] = {"box": boxes[expected]} if expected in boxes else {"action": expected}
    return {"audio": name, "image": image, "text": command.text} | answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo/speech/samples"))
    out: Path = parser.parse_args().out
    require_fonts()
    require_synthesizers()
    out.mkdir(parents=True, exist_ok=True)
    for seed, (name, (_, command, voice, _)) in enumerate(SAMPLES.items()):
        (out / name).write_bytes(record_clip(command, voice, seed, Path(name).suffix[1:].upper()))
    lines = ",\n".join("  " + json.dumps(describe(name), ensure_ascii=False) for name in SAMPLES)
    (out / "samples.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    print(f"{len(SAMPLES)} clips in {out}")


if __name__ == "__main__":
    main()
