"""What every measurement of a running server has in common: its options, its table, its file."""

import argparse
import json
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any


def read_options(description: str | None) -> argparse.Namespace:
    """server (host:port), machine (how the result names it), out (a file, or None)."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n", 1)[0])
    parser.add_argument("--server", default="127.0.0.1:8001", help="gRPC address (%(default)s)")
    parser.add_argument("--machine", default="unnamed machine", help="how the result names where it was measured")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the result there too, as JSON")
    return parser.parse_args()


def report(options: argparse.Namespace, rows: Sequence[dict[str, Any]]) -> None:
    """Print rows of name, value and unit; write them where `--out` says."""
    for row in rows:
        print(f"{row['name']:36} {row['value']:10.3f} {row['unit']}")
    if options.out:
        result = {"machine": options.machine, "date": date.today().isoformat(), "rows": rows}
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
