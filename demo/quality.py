"""What 8 bits and sparse attention cost: the demo checkpoint's accuracy under such settings, each served.

    python -m demo.quality [--questions 1000] [--only SETTING ...] [--out demo/training/quality.json] [--table]

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

from autoglm_launcher import ROOT
from autoglm_launcher.server import TritonServer
from demo.backends import ServerBackend
from demo.evaluate import Question, Verdict, ask, questions
from demo.fonts import require_fonts

FIRST = "unquantised"
SMALLER: dict[str, dict[str, Any]] = {  # what the configuration says instead
    FIRST: {},
    "INT8 weights": {"quantization": {"enabled": True}},
    "FP8 keys and values": {"engine": {"kv_cache_dtype": "float8"}},
    "INT8 keys and values": {"engine": {"kv_cache_dtype": "int8"}},
    "INT8 weights, FP8 keys and values": {
        "quantization": {"enabled": True},
        "engine": {"kv_cache_dtype": "float8"},
    },
    "INT8 weights, INT8 keys and values": {
        "quantization": {"enabled": True},
        "engine": {"kv_cache_dtype": "int8"},
    },
    "INT8 vision encoder": {"vision": {"int8": True}},
    "all in INT8": {
        "quantization": {"enabled": True},
        "engine": {"kv_cache_dtype": "int8"},
        "vision": {"int8": True},
    },
}
SPARSE: dict[str, dict[str, Any]] = {
    f"{mode} {ratio}": {"sparse_attention": {"mode": mode, "ratio": ratio, "min_batch": 1}}
    for mode in ("topk", "pages", "snap", "prune")
    for ratio in (0.2, 0.3, 0.4, 0.5)
}
SETTINGS = SMALLER | SPARSE


def serve(setting: str, asked: Sequence[Question], batch: int, config: Path) -> list[Verdict]:
    """Verdicts on all questions, from a server of this setting."""
    overrides = {"quantization": {"enabled": False}, **SETTINGS[setting]}
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
    """Some of the results in Markdown."""
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
    parser.add_argument("--only", nargs="+", default=list(SETTINGS), choices=list(SETTINGS), metavar="SETTING",
                        help="measure these; what the file says of others stays")  # fmt: skip
    parser.add_argument("--table", action="store_true", help="only print what an earlier run has written")
    arguments = parser.parse_args()
    results = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.exists() else {}
    if not arguments.table:
        require_fonts()
        asked = list(questions(arguments.questions))
        plain = serve(FIRST, asked, arguments.batch, arguments.config)
        for name in arguments.only:
            verdicts = plain if name == FIRST else serve(name, asked, arguments.batch, arguments.config)
            results[name] = summarise(verdicts, plain, asked)
            print(name, results[name], flush=True)
            ordered = {name: results[name] for name in SETTINGS if name in results}
            arguments.out.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
    for settings in (SMALLER, SPARSE):
        print(table({name: results[name] for name in settings if name in results}), end="\n\n")


if __name__ == "__main__":
    main()
