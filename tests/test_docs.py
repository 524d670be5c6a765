"""The documentation is consistent with itself, the repository, the configuration and the programs' options."""

import re
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from autoglm.config import Config
from autoglm.errors import ErrorCode, RequestError
from autoglm.preprocess.sampling_params import SamplingParams
from autoglm_launcher import ROOT, arguments
from benchmarks import plot
from benchmarks.report import RESULTS
from docs.generate import generated
from gateway.app import create_app

README = ROOT / "README.md"
PAGES = [README, ROOT / "README.zh-CN.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
API, CONFIGURATION = (ROOT / "docs" / name for name in ("api.md", "configuration.md"))
BLOCK = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)]+)\)")
PATH = re.compile(r"\.?[a-z_\-]+(?:/[\w.*\-]*)+|[\w\-]+\.(?:yaml|yml|sh|md|py)")
MODELS = {"zai-org/AutoGLM-Phone-9B"}  # on Hugging Face
SCRIPT_SETS = {"AUTOGLM_CALLED_FROM"}  # not for users
BENCHMARKS, CLIENT, RUN_TESTS = (
    ROOT / name for name in ("benchmarks/report.py", "client/autoglm_client/cli.py", "run_tests.sh")
)  # where programs declare their options

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def code_spans(page: Path) -> list[str]:
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", BLOCK.sub("", text_of(page)))]


def commands(page: Path) -> list[str]:
    """Code that may be a command: spans and lines of blocks."""
    return [*code_spans(page), *(line for block in BLOCK.findall(text_of(page)) for line in block.splitlines())]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to headings."""
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", text_of(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_short() -> None:
    assert len(text_of(README).splitlines()) <= 130


@pytest.mark.parametrize("page", [API, CONFIGURATION], ids=lambda page: page.name)
def test_generated_parts_are_up_to_date(page: Path) -> None:
    assert text_of(page) == generated(page.name), "run python -m docs.generate"
    assert len(generated(page.name)) > len(text_of(page).partition("<!-- generated")[0]) + 1000


@each_page
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for link in LINK.findall(BLOCK.sub("", text_of(page))):
        if re.match(r"https?://", link):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@each_page
def test_paths_in_code_font_exist(page: Path) -> None:
    folders = [page.parent, *(ROOT / name for name in ("", "autoglm", "autoglm/kernels", "autoglm/llm"))]
    for path in filter(PATH.fullmatch, code_spans(page)):
        if path not in MODELS and not path.startswith(".venv/"):
            assert any(list(folder.glob(path.replace("NAME", "*"))) for folder in folders), path


@each_page
def test_modules_in_commands_exist(page: Path) -> None:
    for command in commands(page):
        for module in re.findall(r"python -m ([a-z_.]+)", command):
            assert find_spec(module), command


def source_of(module: str) -> str:
    """The file that runs for `python -m module`."""
    spec = find_spec(module)
    assert spec and spec.origin, module
    origin = Path(spec.origin)
    return text_of(origin.with_name("__main__.py") if origin.name == "__init__.py" else origin)


@each_page
def test_options_in_commands_exist(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        arguments.parse(["--help"])
    launcher = capsys.readouterr().out
    for command in commands(page):
        if modules := re.findall(r"python -m ([a-z_.]+)", command):
            declared = source_of(modules[-1]) + text_of(BENCHMARKS)
        elif "autoglm ask" in command:
            declared = text_of(CLIENT)
        elif "run_tests.sh" in command:
            declared = text_of(RUN_TESTS)
        elif "run_autoglm_server.sh" in command:
            declared = launcher
        elif command.startswith("--"):
            declared = launcher + text_of(CLIENT) + text_of(BENCHMARKS)
        else:
            continue
        for option in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", command):
            assert option == "--help" or re.search(rf"{option}(?![\w-])", declared), command


def keys(section: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    """The section and the name of each key."""
    for key, value in section.items():
        if isinstance(value, dict):
            yield from keys(value, f"{path}.{key}".removeprefix("."))
        else:
            yield path, key


def test_every_key_of_the_configuration_is_documented() -> None:
    _, *sections = re.split(r"^### (.+)$", text_of(CONFIGURATION), flags=re.MULTILINE)
    tables = dict(zip(sections[::2], sections[1::2], strict=True))
    documented = {(name, key) for name, table in tables.items() for key in re.findall(r"^\| `(\w+)` \|", table, re.M)}
    shown = set(keys(yaml.safe_load((ROOT / "autoglm-config.yaml").read_text())))
    assert len(shown) > 50
    assert shown == documented


@each_page
def test_keys_of_the_configuration_exist(page: Path) -> None:
    for span in code_spans(page):
        section, _, rest = span.partition(".")
        if section in vars(Config()) and (key := re.fullmatch(r"([a-z_0-9.]+)(: .+)?", rest)):
            value: Any = Config()
            if not key[1].endswith(("safetensors", "py")):
                for name in (section, *key[1].split(".")):
                    assert hasattr(value, name), span
                    value = getattr(value, name)


def test_environment_variables_are_documented() -> None:
    folders = ("autoglm", "autoglm_launcher", "gateway", "client", "model_repository")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".sh")]
    files += [ROOT / "docker-compose.yml", ROOT / "run_autoglm_server.sh", ROOT / "run_tests.sh"]
    used = {name for path in files for name in re.findall(r"AUTOGLM_[A-Z_]*[A-Z]", text_of(path))}
    documented = set(re.findall(r"`(AUTOGLM_[A-Z_]+)`", text_of(CONFIGURATION)))
    assert len(used) > 10
    assert used - SCRIPT_SETS == documented
    for page in PAGES:
        assert set(re.findall(r"AUTOGLM_[A-Z_]*[A-Z]", text_of(page))) <= documented, page


def test_the_table_of_errors_is_complete(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("secret\n")
    document = create_app("127.0.0.1:1", Config(), tmp_path / "keys").openapi()
    operations = [operation for path in document["paths"].values() for operation in path.values()]
    returned = {status for operation in operations for status in operation["responses"] if status >= "400"}
    rows = re.findall(r"^\| .+ \| (.*) \| (.*) ?\|$", text_of(API).partition("## Errors")[2], re.MULTILINE)
    assert {status for cell, _ in rows for status in re.findall(r"^\d{3}$", cell)} == returned
    codes = {code for _, cell in rows for code in re.findall(r"`([A-Z_]+)`", cell)} - {"FINISH_REASON"}
    assert codes == {code.value for code in ErrorCode} - {"DEADLINE_EXCEEDED"}


def test_the_error_message_shown_is_real() -> None:
    with pytest.raises(RequestError) as error:
        SamplingParams.from_parameters({"max_tokens": -1}, {})
    assert f"```\n{error.value.message}\n```" in text_of(API)
    assert f"`{error.value.message}`" in text_of(ROOT / "CHANGELOG.md")


def test_the_readme_shows_measured_figures() -> None:
    rows, text = plot.read_rows(RESULTS, "h200"), " ".join(text_of(README).split())
    first, last = (rows[f"screenshot-{name}", "int8"] for name in ("first-token", "65"))
    assert f"takes **{plot.number(first.value)} ms** and 65 tokens take **{plot.number(last.value)} ms**" in text
    assert first.peer and last.peer and list(first.peer) == ["vLLM 0.26 INT8", "vLLM 0.26 FP8"]
    (int8, fp8), (int8_last, fp8_last) = first.peer.values(), last.peer.values()
    assert f"{int8:.0f} and {int8_last:.0f} ms in INT8, {fp8:.0f} and {fp8_last:.0f} ms in FP8" in text


def test_the_speed_of_sparse_attention_is_measured() -> None:
    rows = plot.read_rows(RESULTS, "h200")
    dense, prune, pages = (rows["sparse-decode-64", f"int8 {mode}"].value for mode in ("off", "prune 0.3", "pages 0.3"))
    text = " ".join(text_of(ROOT / "docs" / "sparse-attention.md").split())
    assert f"{dense / prune:.2f} times as fast with `prune` and {dense / pages:.2f} times with `pages`" in text
