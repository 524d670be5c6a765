#!/usr/bin/env bash
# Installs the requirements into .venv and serves a checkpoint. Options: ./run_autoglm_server.sh --help
set -euo pipefail
export AUTOGLM_CALLED_FROM=$PWD
cd -- "$(dirname -- "${BASH_SOURCE[0]}")"
. autoglm_launcher/find_python.sh
exec "$PYTHON" -m autoglm_launcher.bootstrap "$@"
