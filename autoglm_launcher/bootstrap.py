"""What run_autoglm_server.sh starts with the system's Python: check, install, go on inside .venv."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from autoglm_launcher import arguments
from autoglm_launcher import venv as environment
from autoglm_launcher.console import Interrupted, LauncherError, complain, raise_on_signals


def main(argv: Sequence[str]) -> int:
    """Returns only on failure; else this process becomes the launcher."""
    options = arguments.parse(argv)
    raise_on_signals()
    try:
        options.check()
        extras = [] if options.gateway_port is None else ["gateway"]
        python = sys.executable if options.tritonserver else str(environment.prepare(extras))
    except LauncherError as error:
        complain(str(error))
        return 1
    except Interrupted as interrupted:
        return interrupted.exit_code
    os.execv(python, [python, "-m", "autoglm_launcher", *argv])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
