"""`python -m loadtest`: run the users and print a table of latencies."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from loadtest.samples import SAMPLES

HERE = Path(__file__).resolve().parent
USERS = {"grpc": ["GrpcUser"], "http": ["HttpUser"], "both": ["GrpcUser", "HttpUser"]}


def main() -> int:
    """Run Locust without its web page; returns its exit code, which is 1 if a request failed."""
    parser = argparse.ArgumentParser(prog="loadtest", description=__doc__)
    parser.add_argument("--users", type=int, default=4, help="number of concurrent users (%(default)s)")
    parser.add_argument("--duration", type=int, default=60, metavar="SECONDS", help="of the test (%(default)s)")
    parser.add_argument("--protocol", choices=USERS, default="both", help="of the users (%(default)s)")
    parser.add_argument("--grpc-server", default="127.0.0.1:8001", metavar="HOST:PORT")
    parser.add_argument("--http-server", default="http://127.0.0.1:8000", metavar="URL")
    parser.add_argument(
        "--samples", type=Path, default=SAMPLES, metavar="DIR", help="screenshots and tasks (demo/samples)"
    )
    parser.add_argument("--max-tokens", type=int, default=256, metavar="N", help="per answer (%(default)s)")
    options = parser.parse_args()
    if not (options.samples / "samples.json").is_file():
        parser.error(f"--samples must contain samples.json (got {options.samples})")
    command = [sys.executable, "-m", "locust", "--locustfile", str(HERE / "locustfile.py"), *USERS[options.protocol]]
    command += ["--headless", "--only-summary", "--loglevel", "WARNING", "--stop-timeout", "30"]
    command += ["--users", str(options.users), "--spawn-rate", str(options.users)]
    command += ["--run-time", f"{options.duration}s", "--max-tokens", str(options.max_tokens)]
    command += ["--grpc-server", options.grpc_server, "--http-server", options.http_server]
    command += ["--samples", str(options.samples)]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    try:
        return subprocess.call(command, env=environment, stderr=subprocess.STDOUT)  # Locust prints its tables to stderr
    except KeyboardInterrupt:  # Locust receives it as well and prints its table
        return 130


if __name__ == "__main__":
    sys.exit(main())
