# Sourced from the repository's root by run_autoglm_server.sh and run_tests.sh. Sets PYTHON to a Python 3.10-3.12 with
# venv and its shared library. As root on Debian and Ubuntu it installs missing packages. Where every Python is newer,
# it downloads Python 3.12 into .python/.

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

# download_python PYTHON: PYTHON is any interpreter; it installs uv, unless that is in PATH, and uv downloads Python 3.12.
download_python() {
    local command commands=() log=.python/install.log uv
    if ! uv=$(command -v uv); then
        uv=.python/uv/bin/uv
        commands=("$1 -m venv .python/uv" ".python/uv/bin/pip install -c constraints/py312.txt uv")
        "$1" -c 'import ensurepip' 2>/dev/null || add_packages python3-venv ||
            commands=("sudo apt-get install python3-venv" "${commands[@]}")
    fi
    commands+=("UV_PYTHON_INSTALL_DIR=.python UV_PYTHON_INSTALL_BIN=0 $uv python install 3.12")
    say "downloading Python 3.12 into .python/"
    mkdir -p .python
    for command in "${commands[@]}"; do
        [[ $command != sudo* ]] && eval "$command" >"$log" 2>&1 && continue
        die "no Python 3.10, 3.11 or 3.12 found, and Python 3.12 could not be downloaded (log: $log). Once the network allows it, run:
    cd $PWD$(printf '\n    %s' "${commands[@]}")"
    done
}

find_python() {
    local candidates=("${AUTOGLM_PYTHON:-}") candidate answer usable="" lacking="" unfit="" newer=""
    if [ -z "${AUTOGLM_PYTHON:-}" ]; then
        mapfile -t candidates < <(type -aP python3 python3.12 python3.11 python3.10)
        candidates+=("$HOME"/.pyenv/versions/3.1[012].*/bin/python3 "$PWD"/.python/cpython-3.12.*/bin/python3)
    fi
    for candidate in "${candidates[@]}"; do
        answer=$("$candidate" -c 'import platform; print(platform.python_version())' 2>/dev/null) || continue
        case $answer in
            3.10.* | 3.11.* | 3.12.*) ;;
            *)
                unfit="$unfit $candidate is $answer;"
                [[ $answer != 3.1[3-9].* ]] || newer=${newer:-$candidate}
                continue
                ;;
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
        # Unquoted: a list of packages.
        add_packages $lacking || die "$usable lacks packages: sudo apt-get install $lacking"
        PYTHON=$usable
    elif [ -z "${AUTOGLM_PYTHON:-}" ] && [ -z "${1:-}" ] && [ -n "$newer" ]; then
        download_python "$newer"
        find_python downloaded
    elif [ -z "${AUTOGLM_PYTHON:-}" ] && ! command -v python3 >/dev/null && add_packages python3 python3-venv; then
        find_python
    else
        die "no Python 3.10, 3.11 or 3.12 with venv and its shared library:${unfit:- none found;} install one (sudo apt-get install python3 python3-venv) or set AUTOGLM_PYTHON"
    fi
}

find_python
