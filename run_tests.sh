#!/usr/bin/env bash
# Installs the tests' requirements into .venv and runs import-linter and the tests.
#   ./run_tests.sh              everything
#   ./run_tests.sh --fast       without the tests that start a tritonserver or a browser
#   ./run_tests.sh --coverage   everything, and prints the branch coverage of the product
# Other arguments go to pytest; where they select tests (./run_tests.sh -k chat), import-linter is skipped.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")"
arguments=() lint=1
for argument; do
    case $argument in
        --fast)  # a process on each core, which must not start a thread on each core
            export OMP_NUM_THREADS=1
            arguments+=(-m "not tritonserver and not browser" -n auto --dist worksteal)
            ;;
        --coverage) arguments+=(--cov) ;;
        -k* | -m* | [!-]*) lint="" arguments+=("$argument") ;;
        *) arguments+=("$argument") ;;
    esac
done
. autoglm_launcher/find_python.sh
"$PYTHON" -m autoglm_launcher.venv test loadtest gateway
fonts=$(.venv/bin/python -c 'from demo.fonts import missing_packages; print(*missing_packages())')
if [ -n "$fonts" ]; then
    # Unquoted: a list of packages.
    add_packages $fonts || say "tests that render screens are skipped; they need: sudo apt-get install $fonts"
fi
# Threads that spin while they wait make training steps up to ten times slower when other processes use the same cores.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
[ -z "$lint" ] || .venv/bin/lint-imports --no-logo
exec .venv/bin/python -m pytest ${arguments[@]+"${arguments[@]}"}
