#!/usr/bin/env bash
# Installs into .venv what is missing and serves a checkpoint: ./run_autoglm_server.sh --help
set -euo pipefail
export AUTOGLM_CALLED_FROM=$PWD
cd -- "$(dirname -- "${BASH_SOURCE[0]}")"
. autoglm_launcher/find_python.sh
exec "$PYTHON" -m autoglm_launcher.bootstrap "$@"
