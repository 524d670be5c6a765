"""Making .venv: Python packages, PyTorch, and the Triton server of the wheel nvidia-pytriton.

    python -m autoglm_launcher.venv [--no-server] [EXTRA ...]     make or update .venv, with these extras
    python -m autoglm_launcher.venv --missing                     name the system packages this Python lacks

Environment: AUTOGLM_TORCH_INDEX, an index for pip's --index-url when it installs PyTorch (the CPU builds, for example).
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import util
from pathlib import Path

from autoglm_launcher import ROOT
from autoglm_launcher.console import Interrupted, LauncherError, Progress, complain, raise_on_signals, say
from autoglm_launcher.gpus import list_gpus
from autoglm_launcher.tritonserver import libpython_directory

VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "autoglm-installed.json"
LOG = VENV / "install.log"

# One exact version, within the range of pyproject.toml: a resolver that is free to choose may swap the build
# that is there (CPU or CUDA) for another of several gigabytes.
TORCH = "torch==2.13.0"
GIB = 1 << 30
NEEDED_GIB = 3
NEEDED_GIB_CUDA = 10


def prepare(extras: Sequence[str] = (), *, server: bool = True) -> Path:
    """Make .venv ready, or find it ready; returns its Python. server: with the Triton server of the wheel.

    Raises LauncherError, with what is missing and what to do.
    """
    with _only_one():
        inputs, present = _read_stamp()
        wanted = sorted({*present, *extras, *(["server"] if server else [])})
        if inputs == _inputs_hash() and present == wanted and _works(PYTHON):
            return PYTHON
        _check_machine(server)
        if not _works(PYTHON):
            _make_venv()
        if not _has_module(PYTHON, "torch"):
            _check_disk()
            index = os.environ.get("AUTOGLM_TORCH_INDEX")
            if server and not index and not list_gpus():
                say("no GPU found: AUTOGLM_TORCH_INDEX may name an index of CPU builds, which are gigabytes smaller")
            _pip("installing PyTorch", [TORCH, *(["--index-url", index] if index else [])])
        if server:
            # Its own dependencies would bring numpy 2 and what only its Python interface needs.
            _pip("installing the Triton server", ["--no-deps", _server_requirement()])
        names = ",".join(name for name in wanted if name != "server")
        _pip("installing autoglm", ["-e", f"{ROOT}[{names}]" if names else str(ROOT), "-e", str(ROOT / "client")])
        STAMP.write_text(json.dumps({"inputs": _inputs_hash(), "extras": wanted}))
        return PYTHON


def missing_packages() -> list[str]:
    """Debian packages that this interpreter lacks for making .venv, for the server's Python backend, and for GPUs.

    Raises LauncherError when no package can help, as with a Python built without its shared library.
    """
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    packages = []
    if util.find_spec("venv") is None or util.find_spec("ensurepip") is None:
        packages.append(f"python{version}-venv")
    try:
        libpython_directory()
    except LauncherError:
        packages.append(f"libpython{version}")
    if packages and sys.base_prefix != "/usr":
        raise LauncherError(f"{sys.executable} was built without {' and '.join(packages)}")
    if list_gpus():  # kernels are launched by a little C, which is compiled when they are first used
        if not any(shutil.which(compiler) for compiler in (os.environ.get("CC") or "gcc", "clang")):
            packages.append("gcc")
        if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
            packages.append(f"libpython{version}-dev")
    return packages


def _check_machine(server: bool) -> None:
    if not (3, 10) <= sys.version_info[:2] <= (3, 12):
        raise LauncherError(f"this is Python {platform.python_version()}: the server needs Python 3.10, 3.11 or 3.12")
    if server and (sys.platform, platform.machine()) not in (("linux", "x86_64"), ("linux", "aarch64")):
        raise LauncherError(
            f"no Triton server for {sys.platform} {platform.machine()}: it needs Linux on x86_64 or aarch64"
        )
    if packages := missing_packages():
        raise LauncherError(f"{sys.executable} lacks {' '.join(packages)}: apt-get install {' '.join(packages)}")


def _check_disk() -> None:
    needed = NEEDED_GIB_CUDA if list_gpus() else NEEDED_GIB
    free = shutil.disk_usage(ROOT).free / GIB
    if free < needed:
        raise LauncherError(f"{free:.1f} GiB are free at {ROOT}: installing needs about {needed} GiB, make room")


def _make_venv() -> None:
    progress = Progress(f"making .venv with Python {platform.python_version()}")
    if VENV.exists():
        shutil.rmtree(VENV)
    made = subprocess.run([sys.executable, "-m", "venv", str(VENV)], capture_output=True, text=True)
    if made.returncode:
        shutil.rmtree(VENV, ignore_errors=True)
        raise LauncherError(f"python -m venv failed: {_last_line(made.stderr or made.stdout)}")
    progress.done()


def _pip(what: str, arguments: Sequence[str]) -> None:
    """Run pip install, its output in the log; show what it does."""
    progress = Progress(what)
    with LOG.open("ab") as out:
        begin = out.tell()
        command = [str(PYTHON), "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar=off", *arguments]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)
    try:
        while process.poll() is None:
            progress.show(_last_line(re.sub(r"^WARNING: .*", "", _log_since(begin), flags=re.MULTILINE)))
            try:
                process.wait(0.5)
            except subprocess.TimeoutExpired:
                continue
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    if process.returncode:
        written = _log_since(begin)
        if "No space left on device" in written:
            raise LauncherError(
                f"{what} failed, the disk is full: make room at {ROOT} and in {os.environ.get('TMPDIR', '/tmp')}"
            )
        if re.search("connection broken by|No route to host|Temporary failure in name resolution", written):
            raise LauncherError(f"{what} failed, pip reaches no package index: check network and proxy (log: {LOG})")
        errors = [line for line in written.splitlines() if line.startswith("ERROR:")]
        reason = errors[-1].removeprefix("ERROR: ") if errors else _last_line(written)
        raise LauncherError(f"{what} failed: {reason} (log: {LOG})")
    progress.done()


def _server_requirement() -> str:
    found = re.search(r'"(nvidia-pytriton==[^"]+)"', (ROOT / "pyproject.toml").read_text())
    if found is None:
        raise LauncherError("pyproject.toml pins no nvidia-pytriton: its extra 'server' must")
    return found[1]


def _inputs_hash() -> str:
    """Changes when anything changes that decides what is installed, or a new package must become importable."""
    digest = hashlib.sha256(TORCH.encode())
    for path in (ROOT / "pyproject.toml", ROOT / "client" / "pyproject.toml"):
        digest.update(path.read_bytes())
    digest.update(" ".join(sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))).encode())
    return digest.hexdigest()


def _read_stamp() -> tuple[str, list[str]]:
    """The hash of what .venv was made from and the extras in it; empty when it was never finished."""
    try:
        stamp = json.loads(STAMP.read_text())
        return str(stamp["inputs"]), [str(extra) for extra in stamp["extras"]]
    except (OSError, ValueError, LookupError, TypeError):
        return "", []


def _works(python: Path) -> bool:
    code = "import sys, pip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))"
    try:
        return subprocess.run([str(python), "-c", code], capture_output=True).returncode == 0
    except OSError:
        return False


def _has_module(python: Path, name: str) -> bool:
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({name!r}) is None)"
    return subprocess.run([str(python), "-c", code], capture_output=True).returncode == 0


def _log_since(offset: int) -> str:
    with LOG.open("rb") as log:
        log.seek(offset)
        return log.read().decode(errors="replace")


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


@contextmanager
def _only_one() -> Iterator[None]:
    """Two commands started together must not install into one .venv at once."""
    handle = os.open(ROOT, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another installation into .venv")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m autoglm_launcher.venv", description="Make .venv.")
    parser.add_argument("extras", nargs="*", help="extras of pyproject.toml, such as test")
    parser.add_argument("--no-server", action="store_true", help="without the Triton server of the wheel")
    parser.add_argument("--missing", action="store_true", help="name the system packages this Python lacks")
    options = parser.parse_args(argv)
    raise_on_signals()
    try:
        if options.missing:
            packages = missing_packages()
            print(" ".join(packages))
            return 1 if packages else 0
        prepare(options.extras, server=not options.no_server)
    except LauncherError as error:
        complain(str(error))
        return 2
    except Interrupted as interrupted:
        return interrupted.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
