"""What 8 bits cost: the demo checkpoint's accuracy with INT8 weights and with 8-bit keys and values, each served.

    python -m demo.quality [--questions 1000] [--out demo/training/quality.json] [--table]

Every setting gets a tritonserver of its own and the same held-out screens (`demo.evaluate`). `moved` is how far a tap
lies from where the unquantised model puts it, in thousandths of the screen, x and y averaged, over the taps that both
answer with a point.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from autoglm_launcher.server import ROOT, TritonServer
from demo.backends import ServerBackend
from demo.evaluate import Question, Verdict, ask, questions
from demo.fonts import require_fonts

SETTINGS: dict[str, tuple[bool, str]] = {  # INT8 weights, keys and values
    "unquantised": (False, "auto"),
    "INT8 weights": (True, "auto"),
    "FP8 keys and values": (False, "float8"),
    "INT8 keys and values": (False, "int8"),
    "INT8 weights, FP8 keys and values": (True, "float8"),
    "INT8 weights, INT8 keys and values": (True, "int8"),
}
FIRST = "unquantised"


def serve(setting: str, asked: Sequence[Question], batch: int, config: Path) -> list[Verdict]:
    """Verdicts on all questions, from a server of this setting."""
    int8, cache = SETTINGS[setting]
    overrides = {"quantization": {"enabled": int8}, "engine": {"kv_cache_dtype": cache}}
    with tempfile.TemporaryDirectory() as folder:
        server = TritonServer(
            checkpoint=ROOT / "demo" / "checkpoint",
            config=config,
            log_path=Path(folder) / "server.log",
            environment={"AUTOGLM_OVERRIDES": json.dumps(overrides), "AUTOGLM_CACHE": folder},
        )
        with server:
            backend = ServerBackend(server.grpc_url)
            try:
                parts = (asked[start : start + batch] for start in range(0, len(asked), batch))
                return [verdict for part in parts for _, _, verdict in ask(backend, part)]
            finally:
                backend.close()


def summarise(verdicts: Sequence[Verdict], plain: Sequence[Verdict], asked: Sequence[Question]) -> dict[str, Any]:
    """Shares of right taps and of right other actions, and how far taps moved on average."""
    taps = [v for v, question in zip(verdicts, asked, strict=True) if question.task.target is not None]
    others = [v for v, question in zip(verdicts, asked, strict=True) if question.task.target is None]
    moved = [
        (abs(a.point[0] - b.point[0]) + abs(a.point[1] - b.point[1])) / 2
        for a, b in zip(verdicts, plain, strict=True)
        if a.point and b.point
    ]
    return {
        "taps": len(taps),
        "taps_right": round(statistics.mean(v.right for v in taps), 4),
        "others": len(others),
        "others_right": round(statistics.mean(v.right for v in others), 4),
        "moved": round(statistics.mean(moved), 3),
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    """The results in Markdown."""
    lines = ["| setting | taps inside the target | other actions | taps moved by |", "|---|---|---|---|"]
    for name, row in results.items():
        moved = "-" if name == FIRST else f"{row['moved']:.2f} / 1000"
        lines.append(f"| {name} | {row['taps_right']:.1%} | {row['others_right']:.1%} | {moved} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=8, help="questions asked together")
    parser.add_argument("--config", type=Path, default=ROOT / "autoglm-config.yaml")
    parser.add_argument("--out", type=Path, default=ROOT / "demo" / "training" / "quality.json")
    parser.add_argument("--table", action="store_true", help="only print what an earlier run has written")
    arguments = parser.parse_args()
    if not arguments.table:
        require_fonts()
        asked = list(questions(arguments.questions))
        verdicts: dict[str, list[Verdict]] = {}
        for name in SETTINGS:
            verdicts[name] = serve(name, asked, arguments.batch, arguments.config)
            print(name, summarise(verdicts[name], verdicts[FIRST], asked), flush=True)
        results = {name: summarise(found, verdicts[FIRST], asked) for name, found in verdicts.items()}
        arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(json.loads(arguments.out.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
