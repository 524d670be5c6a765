"""python -m gateway [--triton 127.0.0.1:8001] [--port 8080]: the OpenAI-compatible gateway to a running server."""

import argparse
import ctypes
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import uvicorn

from autoglm.config import ConfigError, load_config
from gateway.app import create_app

KEEP_ALIVE_SECONDS = 75  # longer than load balancers keep idle connections
GRACE_SECONDS = 10  # for running requests at shutdown
TRIM_THRESHOLD = 128 << 20  # bytes: about twenty concurrent requests with a screenshot
MMAP_THRESHOLD = 32 << 20  # bytes: glibc's maximum


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m gateway",
        description="Serve OpenAI's HTTP API in front of a running Triton server.",
        epilog="Environment: AUTOGLM_CONFIG, AUTOGLM_PRESET and AUTOGLM_OVERRIDES select the configuration; "
        "AUTOGLM_API_KEYS is the default of --keys.",
    )
    parser.add_argument(
        "--triton", default="127.0.0.1:8001", metavar="HOST:PORT", help="Triton's gRPC address (default: %(default)s)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8080, help="port to listen on (default: %(default)s)")
    parser.add_argument(
        "--keys", type=Path, metavar="FILE", help="file of API keys, one per line (default: no key required)"
    )
    options = parser.parse_args(argv)
    keys = options.keys or (Path(os.environ["AUTOGLM_API_KEYS"]) if os.environ.get("AUTOGLM_API_KEYS") else None)
    try:
        app = create_app(options.triton, load_config(), keys)
    except (ConfigError, OSError, ValueError) as error:
        print(f"gateway: {error}", file=sys.stderr)
        return 1
    retain_freed_memory()
    uvicorn.run(
        app,
        host=options.host,
        port=options.port,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,  # the caller's address is not used
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    return 0


def retain_freed_memory() -> None:
    """Let glibc retain freed memory, up to TRIM_THRESHOLD, for the next requests.

    By default it returns the buffers of a screenshot (several megabytes) to the system at once, and page faults on new
    buffers cost more than everything else that is done with them.
    """
    m_trim_threshold, m_mmap_threshold = -1, -3  # from malloc.h
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):  # glibc only
        mallopt(m_trim_threshold, TRIM_THRESHOLD)
        mallopt(m_mmap_threshold, MMAP_THRESHOLD)


if __name__ == "__main__":
    sys.exit(main())
