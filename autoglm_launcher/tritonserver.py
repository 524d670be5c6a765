"""An installed tritonserver and its requirements: from the wheel nvidia-pytriton, or in a container image."""

import os
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

from autoglm_launcher.console import LauncherError

STUB = "triton_python_backend_stub"


@dataclass(frozen=True)
class Installation:
    """A tritonserver that can be started. library_path: directories for LD_LIBRARY_PATH, where stubs find libpython."""

    executable: Path
    backends: Path
    library_path: tuple[str, ...] = ()

    @classmethod
    def from_wheel(cls) -> "Installation":
        """The server in this environment's wheel nvidia-pytriton, with the stub for this Python put in place.

        Raises LauncherError if the wheel, its stub for this Python, or libpython is missing.
        """
        spec = util.find_spec("pytriton")
        if spec is None or spec.origin is None:
            raise LauncherError(
                "nvidia-pytriton is not installed: ./run_autoglm_server.sh installs it, or use --tritonserver PATH"
            )
        root = Path(spec.origin).parent / "tritonserver"
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        stub = root / "python_backend_stubs" / version / STUB
        if not stub.is_file():
            raise LauncherError(
                f"nvidia-pytriton has no backend stub for Python {version}: use Python 3.10, 3.11 or 3.12"
            )
        _copy_if_different(stub, root / "backends" / "python" / STUB)
        return cls(root / "bin" / "tritonserver", root / "backends", (str(libpython_directory()),))

    @classmethod
    def from_executable(cls, executable: Path) -> "Installation":
        """The server of a container image or another build, with its backends in ../backends."""
        executable = executable.resolve()
        backends = executable.parent.parent / "backends"
        if not os.access(executable, os.X_OK):
            raise LauncherError(f"--tritonserver must be the path of a tritonserver ({executable} is not executable)")
        if not (backends / "python").is_dir():
            raise LauncherError(f"{backends}/python is missing: this tritonserver has no Python backend")
        return cls(executable, backends)


def libpython_directory() -> Path:
    """The directory of this interpreter's shared library, which the stub links to."""
    name = sysconfig.get_config_var("INSTSONAME")
    libdir = Path(sysconfig.get_config_var("LIBDIR") or "/usr/lib")
    multiarch = sysconfig.get_config_var("MULTIARCH") or ""
    # A Python that was moved after it was built has its library next to itself, not in LIBDIR.
    for directory in (Path(sys.base_prefix) / "lib", libdir, libdir / multiarch, Path("/usr/lib") / multiarch):
        if name and ".so" in name and (directory / name).is_file():
            return directory
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    raise LauncherError(
        f"libpython{version}.so is missing: apt-get install libpython{version}, "
        "or use a Python built with --enable-shared (AUTOGLM_PYTHON=/path/to/python3)"
    )


def check_numpy() -> None:
    """Reject numpy 2, with which the server's Python backend silently reads wrong values from tensors."""
    try:
        version = metadata.version("numpy")
    except metadata.PackageNotFoundError:
        raise LauncherError("numpy is not installed: pip install 'numpy>=1.26,<2'") from None
    if int(version.split(".")[0]) >= 2:
        raise LauncherError(f"with numpy {version} the Python backend reads wrong values: pip install 'numpy>=1.26,<2'")


def _copy_if_different(source: Path, target: Path) -> None:
    if (
        target.is_file()
        and target.stat().st_size == source.stat().st_size
        and target.read_bytes() == source.read_bytes()
    ):
        return
    # Replace the file, never write to it: a running server still uses the old one.
    staged = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.copy2(source, staged)
    staged.chmod(0o755)
    staged.replace(target)
