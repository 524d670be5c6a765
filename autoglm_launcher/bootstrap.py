"""Runs under the system's Python: check the options, install into .venv, and continue as the launcher inside it."""

import os
import sys
from collections.abc import Sequence

from autoglm_launcher import arguments, venv
from autoglm_launcher.console import Interrupted, LauncherError, complain, raise_on_signals


def main(argv: Sequence[str]) -> int:
    """Returns an exit code on failure only; otherwise the launcher replaces this process."""
    options = arguments.parse(argv)
    raise_on_signals()
    try:
        options.check()
        extras = [] if options.gateway_port is None else ["gateway"]
        python = sys.executable if options.tritonserver else str(venv.prepare(extras))
    except LauncherError as error:
        complain(str(error))
        return 1
    except Interrupted as interrupted:
        return interrupted.exit_code
    os.execv(python, [python, "-m", "autoglm_launcher", *argv])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
