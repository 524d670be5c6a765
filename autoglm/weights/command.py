"""`autoglm cache`: lists and clears the weight cache. A plug-in of the client's command `autoglm`."""

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
    """Add the subcommand to an argparse parser. Its default `run` takes the options and returns the exit code."""
    parser = commands.add_parser("cache", help="list or clear the quantised weights on this machine's disk")
    actions = parser.add_subparsers(required=True, metavar="list | clear")
    parts = [
        actions.add_parser("list", help="list the entries, least recently used first"),
        actions.add_parser("clear", help="delete all entries, or those with a key"),
    ]
    for part, run in zip(parts, (_list, _clear), strict=True):
        part.add_argument("--directory", type=Path, metavar="DIR", help="the cache's directory (default: the server's)")
        part.set_defaults(run=run)
    parts[0].add_argument("--json", action="store_true", help="print a JSON list")
    parts[1].add_argument("key", nargs="?", help="key of the entry, or its beginning")
    parts[1].add_argument("--force", action="store_true", help="delete entries in use by a running server too")


def _open(options: argparse.Namespace) -> WeightCache:
    return WeightCache(options.directory or cache_directory(load_config().weight_cache), 0)


def _list(options: argparse.Namespace) -> int:
    try:
        cache = _open(options)
    except ConfigError as error:
        return _fail(str(error))
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
        return _fail(str(error))
    chosen = [entry for entry in cache.entries() if entry.path.name.startswith(options.key or "")]
    if options.key and not chosen:
        return _fail(f"no entry {options.key} in {cache.root}")
    in_use = [entry for entry in chosen if not cache.remove(entry.path, options.force)]
    freed = sum(entry.size for entry in chosen if entry not in in_use)
    print(f"deleted {len(chosen) - len(in_use)} entries, {freed / 1e9:.2f} GB")
    if in_use:
        return _fail(
            f"not deleted, in use: {', '.join(entry.path.name for entry in in_use)} (--force deletes them too)"
        )
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


def _fail(message: str) -> int:
    print(f"autoglm: {message}", file=sys.stderr)
    return FAILED
