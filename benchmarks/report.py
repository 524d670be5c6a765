"""What every benchmark has in common: its options, its rows, its table, its file.

A result is one file `<machine>-<benchmark>.json`: machine, software, commit, date and rows. A row says what was
measured (`name`), with which weights (`setting`), and beside the value what the hardware allows (`limit`) and what
others reach (`peer`), all in the same unit; `also` holds what follows from the value, each figure under its unit.
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
RATES = ("requests/s", "tokens/s", "GB/s", "TOPS", "TFLOP/s")  # units of which more is better
MAKERS = ("NVIDIA", "GeForce", "Tesla")


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
        """How much of what the hardware allows is reached, 1 being all of it."""
        if self.limit is None or not self.value:
            return None
        return self.value / self.limit if self.unit in RATES else self.limit / self.value


@dataclass(frozen=True)
class Result:
    """One file. `software` is name and version; `commit` is None where it is not known; `note` may stay empty."""

    machine: str
    software: Mapping[str, str]
    commit: str | None
    date: str
    rows: Sequence[Row]
    note: str = ""

    @classmethod
    def read(cls, path: Path) -> "Result":
        content = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**content, "rows": [Row(**row) for row in content["rows"]]})

    def write(self, path: Path) -> None:
        content = asdict(self)
        content["rows"] = [{key: value for key, value in row.items() if value != {}} for row in content["rows"]]
        if not self.note:
            del content["note"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def make_parser(description: str | None, settings: Sequence[str] = SETTINGS) -> argparse.ArgumentParser:
    """--machine, --setting, --out and --commit."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n", 1)[0])
    parser.add_argument("--machine", default=machine_name(), help="how the result names the machine (%(default)s)")
    parser.add_argument("--setting", choices=settings, default=settings[0], help="the weights (%(default)s)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", default=RESULTS, help="where the result goes")
    parser.add_argument("--commit", default=commit(), help="where the code is no git checkout: what it was taken from")
    return parser


def read_options(description: str | None, peers: bool = False) -> argparse.Namespace:
    """The options of a benchmark that loads a checkpoint itself."""
    parser = make_parser(description, SETTINGS[:2])
    parser.add_argument("--checkpoint", type=Path, required=True, help="such as benchmarks.random_checkpoint writes")
    if peers:
        parser.add_argument("--peers", action="store_true", help="measure transformers and vLLM too, if installed")
    return parser.parse_args()


def read_server_options(description: str | None) -> argparse.Namespace:
    """The options of a benchmark that asks a running server; `machine` and `setting` say what that is."""
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
    """A row of this machine and setting, with the peers' figures; `limit` NaN is none. Rounds to what can repeat."""
    figures = {name: rounded(figure) for name, figure in (also or {}).items()}
    least = None if math.isnan(limit) else rounded(limit)
    peer = peers.measured(options.machine, name, options.setting)
    return Row(name, options.setting, rounded(value), unit, least, peer, figures)


def report(options: argparse.Namespace, benchmark: str, rows: Sequence[Row]) -> Path:
    """Print rows, and write them to the benchmark's file under `--out`.

    Rows of other settings stay in the file if the same code on the same software has measured them.
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
            print(f"{len(others)} rows of {path} were measured with other code or software: they are dropped")
    result.write(path)
    return path


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Lines for a terminal."""
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
    """Versions of what computes; what is missing is left out."""
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
    """The first GPU's name in short, such as h200; `cpu` without one."""
    if not torch.cuda.is_available():
        return "cpu"
    words = torch.cuda.get_device_name(0).split()
    return "-".join(word for word in words if word not in MAKERS).lower()


def commit() -> str | None:
    """The checked-out commit, marked where files differ from it; None outside of a git checkout."""
    return _output("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*") or None


def needs_gpu() -> None:
    """End the program where there is none, with status 2."""
    if not torch.cuda.is_available():
        print("this benchmark measures kernels and needs a CUDA device; there is none", file=sys.stderr)
        raise SystemExit(2)


def rounded(value: float) -> float:
    """To four digits."""
    return float(f"{value:.4g}")


def _output(*command: Any) -> str:
    """What a command prints; nothing where it cannot be run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
