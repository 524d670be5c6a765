"""python -m gateway [--triton 127.0.0.1:8001] [--port 8080]: the OpenAI-compatible front of a running server."""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import uvicorn

from autoglm.config import ConfigError, load_config
from gateway.app import create_app

KEEP_ALIVE_SECONDS = 75  # longer than load balancers keep a connection that is idle
GRACE_SECONDS = 10  # what a stop gives running requests
KEPT_MEMORY = 128 << 20  # bytes: what some twenty requests with a screenshot hold at once
LARGEST_KEPT = 32 << 20  # bytes in one piece, glibc's most


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m gateway",
        description="Serve /v1/chat/completions and the like for a running Triton server.",
        epilog="Environment: AUTOGLM_CONFIG, AUTOGLM_PRESET, AUTOGLM_OVERRIDES: settings; AUTOGLM_API_KEYS: as --keys.",
    )
    parser.add_argument("--triton", default="127.0.0.1:8001", metavar="HOST:PORT", help="its gRPC (%(default)s)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=8080, help="(default: %(default)s)")
    parser.add_argument("--keys", type=Path, metavar="FILE", help="API keys, one a line (default: none is needed)")
    options = parser.parse_args(argv)
    keys = options.keys or (Path(os.environ["AUTOGLM_API_KEYS"]) if os.environ.get("AUTOGLM_API_KEYS") else None)
    try:
        app = create_app(options.triton, load_config(), keys)
    except (ConfigError, OSError, ValueError) as error:
        print(f"gateway: {error}", file=sys.stderr)
        return 1
    keep_memory()
    uvicorn.run(
        app,
        host=options.host,
        port=options.port,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,  # nothing here depends on where a caller comes from
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    return 0


def keep_memory() -> None:
    """Let the C library keep what is freed, up to KEPT_MEMORY, for the next requests.

    It would give the buffers of a screenshot's request, several megabytes, back to the system at once, and filling new
    pages takes longer than all else that is done with them.
    """
    m_trim_threshold, m_mmap_threshold = -1, -3  # of malloc.h
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):  # glibc's
        mallopt(m_trim_threshold, KEPT_MEMORY)
        mallopt(m_mmap_threshold, LARGEST_KEPT)


if __name__ == "__main__":
    sys.exit(main())
