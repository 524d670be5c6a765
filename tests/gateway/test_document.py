"""Whatever the OpenAPI document allows, and what it does not, is answered without a fault of the server."""

import subprocess
import sys
from pathlib import Path

SCHEMATHESIS = Path(sys.executable).with_name("schemathesis")


def test_no_request_makes_the_gateway_fail(gateway: str) -> None:
    command = [str(SCHEMATHESIS), "run", f"{gateway}/openapi.json", "--checks", "not_a_server_error", "--seed", "1"]
    command += ["--max-examples", "20", "--phases", "coverage,fuzzing", "--request-timeout", "20"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:]
