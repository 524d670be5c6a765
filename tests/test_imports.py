"""Imports stay light: the engine loads no media libraries, the scheduler no torch; only serving knows Triton."""

import subprocess
import sys
from pathlib import Path

import pytest

LIBRARY = Path(__file__).parents[1] / "autoglm"
MEDIA = (
    "jinja2", "soundfile", "soxr", "PIL", "zlib_ng", "autoglm.preprocess.chat", "autoglm.audio", "autoglm.vision",
)  # fmt: skip


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("autoglm.llm.engine", MEDIA),
        ("autoglm.llm.scheduler", ("torch", *MEDIA)),
        ("autoglm.llm.block_pool", ("torch", *MEDIA)),
        ("autoglm.llm.block_hash", ("torch", *MEDIA)),
        ("autoglm.llm.stop", ("torch", *MEDIA)),
        ("autoglm.preprocess.sampling_params", ("torch", *MEDIA)),
    ],
)
def test_imports_stay_light(module: str, unwanted: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print(*[name for name in {unwanted!r} if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == []


def test_only_serving_knows_triton_server() -> None:
    mentions = [
        path.relative_to(LIBRARY).as_posix()
        for path in LIBRARY.rglob("*.py")
        if any(name in path.read_text(encoding="utf-8") for name in ("pb_utils", "tritonclient"))
    ]
    assert mentions
    assert all(path.startswith("serving/") for path in mentions)
