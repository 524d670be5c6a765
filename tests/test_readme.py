"""README.zh-CN.md corresponds to README.md: the same commands, names, links, figures and tables in every section."""

import re
from collections import Counter
from itertools import zip_longest
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENGLISH, CHINESE = (
    (ROOT / name).read_text(encoding="utf-8").replace(f"]({other})", "]")
    for name, other in (("README.md", "README.zh-CN.md"), ("README.zh-CN.md", "README.md"))
)
BLOCK = re.compile(r"```.*?```", re.DOTALL)


def sections(text: str) -> list[str]:
    return re.split(r"^## ", BLOCK.sub("", text), flags=re.MULTILINE)


def rows(section: str) -> list[str]:
    return [line for line in section.splitlines() if line.startswith("|")]


def figures(text: str) -> Counter[str]:
    """Numbers, with or without a space between thousands."""
    return Counter(re.findall(r"\d+(?:[.,]\d+)*", re.sub(r"(?<=\d) (?=\d{3}\b)", "", text)))


def test_code_blocks_are_the_same() -> None:
    assert BLOCK.findall(CHINESE) == BLOCK.findall(ENGLISH)


def test_sections_have_the_same_names_links_and_figures() -> None:
    assert len(sections(CHINESE)) == len(sections(ENGLISH)) > 5
    for ours, theirs in zip_longest(sections(CHINESE), sections(ENGLISH)):
        title = theirs.partition("\n")[0]
        code = [set(re.findall(r"`([^`]+)`", re.sub(r"\s+", " ", section))) for section in (ours, theirs)]
        assert code[0] == code[1], (title, code[0] ^ code[1])
        links = [re.findall(r"\]\(([^)]+)\)", section) for section in (ours, theirs)]
        assert links[0] == links[1], title
        assert figures(ours) == figures(theirs), (
            title,
            figures(ours) - figures(theirs),
            figures(theirs) - figures(ours),
        )


def test_tables_have_the_same_rows() -> None:
    for ours, theirs in zip_longest(rows(CHINESE), rows(ENGLISH)):
        assert figures(ours) == figures(theirs), (ours, theirs)
        assert ours.count("|") == theirs.count("|"), ours
