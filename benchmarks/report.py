"""Shared by all benchmarks: command line options, rows, tables and result files.

A result file `<machine>-<benchmark>.json` has the machine, software versions, commit, date and rows. A row has the name
of the measurement, the weights' dtype (`setting`) and the value, and in the same unit the roofline or budget (`limit`)
and the figures of other engines (`peer`). `also` has further figures by label.
"""

import argparse
import json
import math
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks import peers

RESULTS = Path(__file__).parent / "results"
SETTINGS = ("int8", "bf16", "fp32")
RATES = ("requests/s", "tokens/s", "GB/s", "TOPS", "TFLOP/s")  # units in which higher is better
BRANDS = ("NVIDIA", "GeForce", "Tesla")


@dataclass(frozen=True)
class Row:
    """One measured value."""

    name: str
    setting: str
    value: float
    unit: str
    limit: float | None = None
    peer: Mapping[str, float] | None = None
    also: Mapping[str, float] = field(default_factory=dict)

    @property
    def share(self) -> float | None:
        """The fraction of the limit that is reached; 1 is optimal."""
        if self.limit is None or not self.value:
            return None
        return self.value / self.limit if self.unit in RATES else self.limit / self.value


@dataclass(frozen=True)
class Result:
    """One result file. `software` maps names to versions; `commit` is None if unknown."""

    machine: str
    software: Mapping[str, str]
    commit: str | None
    date: str
    rows: Sequence[Row]

    @classmethod
    def read(cls, path: Path) -> "Result":
        content = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**content, "rows": [Row(**row) for row in content["rows"]]})

    def write(self, path: Path) -> None:
        content = asdict(self)
        content["rows"] = [{key: value for key, value in row.items() if value != {}} for row in content["rows"]]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def make_parser(description: str | None, settings: Sequence[str] = SETTINGS) -> argparse.ArgumentParser:
    """--machine, --setting, --out and --commit."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n", 1)[0])
    parser.add_argument("--machine", default=machine_name(), help="name of this machine in results (%(default)s)")
    parser.add_argument("--setting", choices=settings, default=settings[0], help="dtype of weights (%(default)s)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", default=RESULTS, help="folder of the result file")
    parser.add_argument("--commit", default=commit(), help="commit of the code, if it is not a git checkout")
    return parser


def read_options(description: str | None, peers: bool = False) -> argparse.Namespace:
    """The options of an in-process benchmark."""
    parser = make_parser(description, SETTINGS[:2])
    parser.add_argument("--checkpoint", type=Path, required=True, help="see benchmarks.random_checkpoint")
    if peers:
        parser.add_argument("--peers", action="store_true", help="also run transformers and vLLM, if installed")
    return parser.parse_args()


def read_server_options(description: str | None) -> argparse.Namespace:
    """The options of a benchmark of a running server; `machine` and `setting` must describe that server."""
    parser = make_parser(description)
    parser.add_argument("--server", default="127.0.0.1:8001", help="gRPC address (%(default)s)")
    return parser.parse_args()


def make_row(
    options: argparse.Namespace,
    name: str,
    value: float,
    unit: str,
    limit: float = math.nan,
    also: Mapping[str, float] | None = None,
) -> Row:
    """A row of this machine and setting, rounded, with the recorded figures of peers. A `limit` of NaN means none."""
    figures = {label: rounded(figure) for label, figure in (also or {}).items()}
    bound = None if math.isnan(limit) else rounded(limit)
    peer = peers.measured(options.machine, name, options.setting)
    return Row(name, options.setting, rounded(value), unit, bound, peer, figures)


def report(options: argparse.Namespace, benchmark: str, rows: Sequence[Row]) -> Path:
    """Print rows, and write them to the benchmark's result file.

    Rows of other settings stay in the file if they were measured with the same commit and software.
    """
    for line in table(rows):
        print(line)
    result = Result(options.machine, software(), options.commit, date.today().isoformat(), rows)
    path: Path = options.out / f"{options.machine}-{benchmark}.json"
    if path.exists():
        before = Result.read(path)
        others = [row for row in before.rows if row.setting not in {row.setting for row in rows}]
        if (before.software, before.commit) == (result.software, result.commit):
            rows = sorted([*others, *rows], key=lambda row: SETTINGS.index(row.setting.split()[0]))
            result = Result(result.machine, result.software, result.commit, result.date, rows)
        elif others:
            print(f"dropped {len(others)} rows of {path} that were measured with another commit or other software")
    result.write(path)
    return path


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Lines of text."""
    width = max((len(row.name) for row in rows), default=0)
    setting = max((len(row.setting) for row in rows), default=0)
    yield f"{'':{width}} {'':{setting}} {'value':>10} {'':10} {'limit':>10} {'share':>6}"
    for row in rows:
        limit = "" if row.limit is None else f"{row.limit:.3f}"
        share = "" if row.share is None else f"{row.share:.0%}"
        line = f"{row.name:{width}} {row.setting:{setting}} {row.value:10.3f} {row.unit:10} {limit:>10} {share:>6}"
        figures = [f"{name} {value:g}" for name, value in (row.peer or {}).items()]
        figures += [f"{value:.4g} {unit}" for unit, value in row.also.items()]
        yield f"{line}  {'; '.join(figures)}".rstrip()


def software() -> dict[str, str]:
    """Versions of the installed software that affects results."""
    found = {"python": platform.python_version()}
    for package in ("torch", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["CUDA"] = torch.version.cuda
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0]
    return {**found, "driver": driver} if driver else found


def machine_name() -> str:
    """The first GPU's short name, such as h200; `cpu` without one."""
    if not torch.cuda.is_available():
        return "cpu"
    words = torch.cuda.get_device_name(0).split()
    return "-".join(word for word in words if word not in BRANDS).lower()


def commit() -> str | None:
    """The checked-out commit, with a suffix if the tree is dirty; None outside of a git checkout."""
    return _output("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*") or None


def needs_gpu() -> None:
    """Exit with status 2 without a GPU."""
    if not torch.cuda.is_available():
        print("this benchmark needs a CUDA device, and none is available", file=sys.stderr)
        raise SystemExit(2)


def rounded(value: float) -> float:
    """To four significant digits."""
    return float(f"{value:.4g}")


def _output(*command: Any) -> str:
    """The output of a command; "" if it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
