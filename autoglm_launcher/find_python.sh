# Sourced by run_autoglm_server.sh and run_tests.sh from the repository's root. Sets PYTHON to an interpreter that can run the
# server: Python 3.10-3.12 with venv and its shared library. As root on Debian and Ubuntu it adds what is missing.

say() { printf 'autoglm: %s\n' "$*"; }
die() { printf 'autoglm: error: %s\n' "$*" >&2; exit 1; }

add_packages() {
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || return 1
    say "installing system packages: $*"
    local log
    log=$(mktemp)
    if ! { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$@"; } >"$log" 2>&1; then
        say "apt-get failed: $(grep '^E:' "$log" | tail -n 1) (log: $log)"
        return 1
    fi
    rm -f "$log"
}

find_python() {
    local candidates=("${AUTOGLM_PYTHON:-}") candidate answer usable="" lacking="" unfit=""
    if [ -z "${AUTOGLM_PYTHON:-}" ]; then
        candidates=(python3 python3.12 python3.11 python3.10 /usr/bin/python3 "$HOME"/.pyenv/versions/3.1[012].*/bin/python3)
    fi
    for candidate in "${candidates[@]}"; do
        answer=$("$candidate" -c 'import platform; print(platform.python_version())' 2>/dev/null) || continue
        case $answer in
            3.10.* | 3.11.* | 3.12.*) ;;
            *) unfit="$unfit $candidate is $answer;"; continue ;;
        esac
        if answer=$("$candidate" -m autoglm_launcher.venv --missing 2>&1); then
            PYTHON=$candidate
            return
        elif [ $? = 1 ]; then
            usable=${usable:-$candidate} lacking=${lacking:-$answer}
        else
            unfit="$unfit ${answer#autoglm: error: };"
        fi
    done
    if [ -n "$lacking" ]; then
        # Word splitting is meant: package names.
        add_packages $lacking || die "$usable lacks packages: sudo apt-get install $lacking"
        PYTHON=$usable
    elif ! command -v python3 >/dev/null && [ -z "${AUTOGLM_PYTHON:-}" ] && add_packages python3 python3-venv; then
        find_python
    else
        die "no Python 3.10, 3.11 or 3.12 with venv and its shared library:${unfit:- none found;} install one (sudo apt-get install python3 python3-venv) or set AUTOGLM_PYTHON"
    fi
}

find_python
