#!/usr/bin/env bash
# Installs into .venv what the tests need and runs them; arguments go to pytest: ./run_tests.sh -k chat
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")"
. autoglm_launcher/find_python.sh
"$PYTHON" -m autoglm_launcher.venv test loadtest gateway
fonts=$(.venv/bin/python -c 'from demo.fonts import missing_packages; print(*missing_packages())')
if [ -n "$fonts" ]; then
    # Word splitting is meant: package names.
    add_packages $fonts || say "tests that draw screens are skipped; they need: sudo apt-get install $fonts"
fi
# Threads that spin while they wait make training steps up to ten times as long on cores that others use too.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
exec .venv/bin/python -m pytest "$@"
