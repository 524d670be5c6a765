"""`autoglm cache`: what the weight cache holds, and how to empty it. A plug-in of the client's command `autoglm`."""

import argparse
import json
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from autoglm.config import ConfigError, load_config
from autoglm.weights.cache import Entry, WeightCache, cache_directory

FAILED = 1


def register(commands: Any) -> None:
    """Add the subcommand to an argparse parser's subcommands; its `run` takes the options, returns the exit code."""
    parser = commands.add_parser("cache", help="list or clear the quantised weights on this machine's disk")
    actions = parser.add_subparsers(required=True, metavar="list | clear")
    parts = [
        actions.add_parser("list", help="what is there, the longest unused first"),
        actions.add_parser("clear", help="delete all entries, or one"),
    ]
    for part, run in zip(parts, (_list, _clear), strict=True):
        part.add_argument("--directory", type=Path, metavar="DIR", help="the cache (default: as the server finds it)")
        part.set_defaults(run=run)
    parts[0].add_argument("--json", action="store_true", help="print one JSON list instead")
    parts[1].add_argument("key", nargs="?", help="the beginning of the entry's key")
    parts[1].add_argument("--force", action="store_true", help="also what a running server uses")


def _open(options: argparse.Namespace) -> WeightCache:
    return WeightCache(options.directory or cache_directory(load_config().weight_cache), 0)


def _list(options: argparse.Namespace) -> int:
    try:
        cache = _open(options)
    except ConfigError as error:
        return _complain(str(error))
    entries = cache.entries()
    if options.json:
        print(json.dumps([_as_json(entry) for entry in entries]))
        return 0
    for entry in entries:
        used = datetime.fromtimestamp(entry.last_use).strftime("%Y-%m-%d %H:%M")
        state = "in use" if entry.in_use else "free"
        print(f"{entry.path.name}  {entry.size / 1e9:6.2f} GB  {used}  {state:6}  {entry.checkpoint}")
        print(f"    {json.dumps(entry.settings)}")
    print(f"{len(entries)} entries, {sum(entry.size for entry in entries) / 1e9:.2f} GB in {cache.root}")
    return 0


def _clear(options: argparse.Namespace) -> int:
    try:
        cache = _open(options)
    except ConfigError as error:
        return _complain(str(error))
    chosen = [entry for entry in cache.entries() if entry.path.name.startswith(options.key or "")]
    if options.key and not chosen:
        return _complain(f"no entry {options.key} in {cache.root}")
    kept = [entry for entry in chosen if not cache.remove(entry.path, options.force)]
    freed = sum(entry.size for entry in chosen if entry not in kept)
    print(f"deleted {len(chosen) - len(kept)} entries, {freed / 1e9:.2f} GB")
    if kept:
        return _complain(f"in use: {', '.join(entry.path.name for entry in kept)} (--force deletes them all the same)")
    return 0


def _as_json(entry: Entry) -> dict[str, Any]:
    return {
        "key": entry.path.name,
        "checkpoint": entry.checkpoint,
        "settings": entry.settings,
        "bytes": entry.size,
        "last_use": entry.last_use,
        "in_use": entry.in_use,
    }


def _complain(message: str) -> int:
    print(f"autoglm: {message}", file=sys.stderr)
    return FAILED
