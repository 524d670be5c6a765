"""Creates .venv: PyTorch, the Triton server of the wheel nvidia-pytriton, and the other packages, at the versions that
constraints/ pins for its Python.

    python -m autoglm_launcher.venv [--no-server] [EXTRA ...]     create or update .venv, with these extras
    python -m autoglm_launcher.venv --missing                     print the system packages that this Python lacks

Environment: AUTOGLM_TORCH_INDEX, pip's --index-url when it installs PyTorch. Without it and without a GPU, the index of
PyTorch's CPU builds is used if it can be reached.
"""

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
import urllib.request
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

SUPPORTED = ("3.10", "3.11", "3.12")
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
GIB = 1 << 30
NEEDED_GIB = 3
NEEDED_GIB_CUDA = 10


def prepare(extras: Sequence[str] = (), *, server: bool = True) -> Path:
    """Create or update .venv unless it is up to date; returns its Python. server: with the wheel's Triton server.

    Raises LauncherError, with the problem and its remedy.
    """
    with _lock():
        inputs, installed = _read_stamp()
        wanted = sorted({*installed, *extras, *(["server"] if server else [])})
        version = _python_version()
        if inputs == _inputs_hash() and installed == wanted and version in SUPPORTED:
            return PYTHON
        _check_machine(server)
        if version not in SUPPORTED:
            _create_venv()
            version = _python_version()
        constraints = ROOT / "constraints" / f"py{version.replace('.', '')}.txt"
        torch = _pinned("torch", constraints)
        if torch != _run("from importlib import metadata; print('torch==' + metadata.version('torch').split('+')[0])"):
            index = _torch_index()
            _check_disk(NEEDED_GIB if index and not list_gpus() else NEEDED_GIB_CUDA)
            if index:  # It has other versions of the dependencies; the last step replaces them.
                _pip("installing PyTorch", [torch, "--index-url", index])
            else:
                _pip("installing PyTorch", [torch], constraints)
        if server:
            # Its dependencies are those of its Python interface, which is not used.
            _pip("installing the Triton server", ["--no-deps", _pinned("nvidia-pytriton", constraints)])
        names = ",".join(name for name in wanted if name != "server")
        project = f"{ROOT}[{names}]" if names else str(ROOT)
        _pip("installing autoglm", ["-e", project, "-e", str(ROOT / "client")], constraints)
        STAMP.write_text(json.dumps({"inputs": _inputs_hash(), "extras": wanted}))
        return PYTHON


def missing_packages() -> list[str]:
    """Debian packages that this interpreter lacks: to create .venv, for the server's Python backend, and for GPUs.

    Raises LauncherError if no package helps, as for a Python built from source without its shared library.
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
    if list_gpus():  # Triton, the language, compiles the C code that launches its kernels
        if not any(shutil.which(compiler) for compiler in (os.environ.get("CC") or "gcc", "clang")):
            packages.append("gcc")
        if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
            packages.append(f"libpython{version}-dev")
    return packages


def _check_machine(server: bool) -> None:
    if ".".join(platform.python_version_tuple()[:2]) not in SUPPORTED:
        raise LauncherError(f"the server requires Python 3.10, 3.11 or 3.12 (got {platform.python_version()})")
    if server and (sys.platform, platform.machine()) not in (("linux", "x86_64"), ("linux", "aarch64")):
        raise LauncherError(
            f"the Triton server requires Linux on x86_64 or aarch64 (got {sys.platform} {platform.machine()})"
        )
    if packages := missing_packages():
        raise LauncherError(f"{sys.executable} lacks {' '.join(packages)}: apt-get install {' '.join(packages)}")


def _torch_index() -> str:
    """pip's --index-url for PyTorch; empty for pip's own. The CPU builds are gigabytes smaller than the CUDA builds."""
    index = os.environ.get("AUTOGLM_TORCH_INDEX")
    if index is not None or list_gpus():
        return index or ""
    try:
        with urllib.request.urlopen(f"{CPU_INDEX}/torch/", timeout=10):
            return CPU_INDEX
    except OSError:
        say(f"{CPU_INDEX} cannot be reached: installing PyTorch from pip's own index, where it may be the CUDA build")
        return ""


def _check_disk(needed: int) -> None:
    free = shutil.disk_usage(ROOT).free / GIB
    if free < needed:
        raise LauncherError(f"installing requires about {needed} GiB at {ROOT} (free: {free:.1f} GiB)")


def _create_venv() -> None:
    progress = Progress(f"creating .venv with Python {platform.python_version()}")
    if VENV.exists():
        shutil.rmtree(VENV)
    created = subprocess.run([sys.executable, "-m", "venv", str(VENV)], capture_output=True, text=True)
    if created.returncode:
        shutil.rmtree(VENV, ignore_errors=True)
        raise LauncherError(f"python -m venv failed: {_last_line(created.stderr or created.stdout)}")
    progress.done()


def _pip(task: str, arguments: Sequence[str], constraints: Path | None = None) -> None:
    """Run pip install with its output in the log, and show its last line as progress."""
    progress = Progress(task)
    # In the environment, constraints also hold for the isolated builds of the projects.
    pins = dict.fromkeys(("PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT"), constraints.as_uri()) if constraints else {}
    with LOG.open("ab") as out:
        begin = out.tell()
        command = [str(PYTHON), "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar=off", *arguments]
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **pins}
        )
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
                f"{task} failed: the disk is full; free space at {ROOT} and in {os.environ.get('TMPDIR', '/tmp')}"
            )
        if re.search("connection broken by|No route to host|Temporary failure in name resolution", written):
            raise LauncherError(
                f"{task} failed: pip cannot reach a package index; check network and proxy (log: {LOG})"
            )
        errors = [line for line in written.splitlines() if line.startswith("ERROR:")]
        reason = errors[-1].removeprefix("ERROR: ") if errors else _last_line(written)
        raise LauncherError(f"{task} failed: {reason} (log: {LOG})")
    progress.done()


def _pinned(name: str, constraints: Path) -> str:
    """The requirement name==version of a constraints file."""
    found = re.search(rf"^{name}==.+$", constraints.read_text(), re.MULTILINE)
    if found is None:
        raise LauncherError(f"{constraints} does not pin {name}: run constraints/update.sh")
    return found[0]


def _inputs_hash() -> str:
    """A hash of the requirements, and of the names of the packages that the installed project makes importable."""
    digest = hashlib.sha256()
    for path in (ROOT / "pyproject.toml", ROOT / "client" / "pyproject.toml", *sorted(ROOT.glob("constraints/*.txt"))):
        digest.update(path.read_bytes())
    digest.update(" ".join(sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))).encode())
    return digest.hexdigest()


def _read_stamp() -> tuple[str, list[str]]:
    """The inputs hash and the extras of the last completed installation into .venv; empty if there was none."""
    try:
        stamp = json.loads(STAMP.read_text())
        return str(stamp["inputs"]), [str(extra) for extra in stamp["extras"]]
    except (OSError, ValueError, LookupError, TypeError):
        return "", []


def _python_version() -> str:
    """The version of .venv's Python, such as 3.11; empty if it or its pip does not work."""
    return _run("import sys, pip; print('%d.%d' % sys.version_info[:2])")


def _run(code: str) -> str:
    """The output of code that .venv's Python runs; empty if it fails."""
    try:
        ran = subprocess.run([str(PYTHON), "-c", code], capture_output=True, text=True)
    except OSError:
        return ""
    return ran.stdout.strip() if ran.returncode == 0 else ""


def _log_since(offset: int) -> str:
    with LOG.open("rb") as log:
        log.seek(offset)
        return log.read().decode(errors="replace")


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


@contextmanager
def _lock() -> Iterator[None]:
    """Only one process at a time may install into .venv."""
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
    parser = argparse.ArgumentParser(prog="python -m autoglm_launcher.venv", description="Create or update .venv.")
    parser.add_argument("extras", nargs="*", help="extras of pyproject.toml, such as test")
    parser.add_argument("--no-server", action="store_true", help="without the Triton server of the wheel")
    parser.add_argument("--missing", action="store_true", help="print the system packages that this Python lacks")
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
