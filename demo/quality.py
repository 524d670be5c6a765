"""Accuracy of the demo checkpoint with quantization and with sparse attention.

    python -m demo.quality [--questions 1000] [--only SETTING ...] [--out demo/training/quality.json] [--table]

Each setting is evaluated on the same held-out screens (`demo.evaluate`) through its own tritonserver. `moved` is the
mean distance of taps from those of the unquantised model, in thousandths of the screen, averaged over x and y.
"""

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
from demo.evaluate import Question, Verdict, answer_batch, questions
from demo.fonts import require_fonts

BASELINE = "unquantised"
QUANTIZED: dict[str, dict[str, Any]] = {  # setting -> its overrides of the configuration
    BASELINE: {},
    "INT8 weights": {"quantization": {"enabled": True}},
    "FP8 keys and values": {"engine": {"kv_cache_dtype": "float8"}},
    "INT8 keys and values": {"engine": {"kv_cache_dtype": "int8"}},
    "INT8 weights, FP8 keys and values": {"quantization": {"enabled": True}, "engine": {"kv_cache_dtype": "float8"}},
    "INT8 weights, INT8 keys and values": {"quantization": {"enabled": True}, "engine": {"kv_cache_dtype": "int8"}},
    "INT8 vision encoder": {"vision": {"int8": True}},
    "all in INT8": {"quantization": {"enabled": True}, "engine": {"kv_cache_dtype": "int8"}, "vision": {"int8": True}},
}
SPARSE: dict[str, dict[str, Any]] = {
    f"{mode} {ratio}": {"sparse_attention": {"mode": mode, "ratio": ratio, "min_batch": 1}}
    for mode in ("topk", "pages", "prune")
    for ratio in (0.2, 0.3, 0.4, 0.5)
}
SETTINGS = QUANTIZED | SPARSE


def evaluate(setting: str, asked: Sequence[Question], batch_size: int, config: Path) -> list[Verdict]:
    """Verdicts on all questions, answered by a server with this setting."""
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
                batches = (asked[start : start + batch_size] for start in range(0, len(asked), batch_size))
                return [verdict for batch in batches for _, _, verdict in answer_batch(backend, batch)]
            finally:
                backend.close()


def summarize(verdicts: Sequence[Verdict], baseline: Sequence[Verdict], asked: Sequence[Question]) -> dict[str, Any]:
    """Shares of right taps and right other actions, and the mean distance of taps from the baseline's."""
    taps = [v for v, question in zip(verdicts, asked, strict=True) if question.task.target is not None]
    others = [v for v, question in zip(verdicts, asked, strict=True) if question.task.target is None]
    moved = [
        (abs(a.point[0] - b.point[0]) + abs(a.point[1] - b.point[1])) / 2
        for a, b in zip(verdicts, baseline, strict=True)
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
    """Results as a Markdown table."""
    lines = ["| setting | taps inside the target | other actions | taps moved by |", "|---|---|---|---|"]
    for name, row in results.items():
        moved = "-" if name == BASELINE else f"{row['moved']:.2f} / 1000"
        lines.append(f"| {name} | {row['taps_right']:.1%} | {row['others_right']:.1%} | {moved} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=8, help="questions sent concurrently")
    parser.add_argument("--config", type=Path, default=ROOT / "autoglm-config.yaml")
    parser.add_argument("--out", type=Path, default=ROOT / "demo" / "training" / "quality.json")
    parser.add_argument("--only", nargs="+", default=list(SETTINGS), choices=list(SETTINGS), metavar="SETTING",
                        help="evaluate only these; the other results in the file remain")  # fmt: skip
    parser.add_argument("--table", action="store_true", help="only print the results in the file")
    arguments = parser.parse_args()
    results = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.exists() else {}
    if not arguments.table:
        require_fonts()
        asked = list(questions(arguments.questions))
        baseline = evaluate(BASELINE, asked, arguments.batch, arguments.config)
        for name in arguments.only:
            verdicts = baseline if name == BASELINE else evaluate(name, asked, arguments.batch, arguments.config)
            results[name] = summarize(verdicts, baseline, asked)
            print(name, results[name], flush=True)
            ordered = {name: results[name] for name in SETTINGS if name in results}
            arguments.out.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
    for settings in (QUANTIZED, SPARSE):
        print(table({name: results[name] for name in settings if name in results}), end="\n\n")


if __name__ == "__main__":
    main()
