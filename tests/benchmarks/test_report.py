"""Result files, tables, the chart, and the figures in the documentation."""

import argparse
from pathlib import Path

import pytest

from benchmarks import decode, plot
from benchmarks.report import RESULTS, Result, Row, make_row, report, table


def rows(*values: float, setting: str = "int8") -> list[Row]:
    return [Row(f"decode-{i}", setting, value, "ms", 2.0, {"vLLM": 4.8}) for i, value in enumerate(values)]


def test_share_of_the_limit() -> None:
    assert Row("a", "int8", 4.0, "ms", 2.0).share == 0.5
    assert Row("a", "int8", 3.5, "requests/s", 7.0).share == 0.5
    assert Row("a", "int8", 3.5, "ms").share is None


def test_results_are_read_as_written(options: argparse.Namespace) -> None:
    written = [*rows(1.5, 2.5), Row("other", "int8", 1, "s", also={"GB/s": 3.0})]
    path = report(options, "decode", written)
    assert path == options.out / "h200-decode.json"
    assert Result.read(path).rows == written


def test_settings_share_a_file(options: argparse.Namespace) -> None:
    report(options, "decode", rows(1, 2, setting="bf16"))
    report(options, "decode", rows(1, 2))
    path = report(options, "decode", rows(3))
    assert [(row.name, row.setting, row.value) for row in Result.read(path).rows] == [
        ("decode-0", "int8", 3),
        ("decode-0", "bf16", 1),
        ("decode-1", "bf16", 2),
    ]


def test_rows_of_another_commit_are_dropped(options: argparse.Namespace, capsys: pytest.CaptureFixture[str]) -> None:
    options.commit = "a"
    report(options, "decode", rows(1, 2, setting="bf16"))
    options.commit = "b"
    path = report(options, "decode", rows(3))
    assert [row.setting for row in Result.read(path).rows] == ["int8"]
    assert "dropped" in capsys.readouterr().out


def test_make_row(options: argparse.Namespace) -> None:
    row = make_row(options, "decode-1", 2.345678, "ms", 1.95123, {"GB/s": 3741.23})
    assert (row.value, row.limit, row.also) == (2.346, 1.951, {"GB/s": 3741})
    assert row.peer == {"vLLM 0.26 INT8": 4.81, "vLLM 0.26 FP8": 4.34}
    options.machine = "another"
    assert make_row(options, "decode-1", 2, "ms").peer is None
    assert make_row(options, "decode-1", 2, "ms").limit is None


def test_table_shows_share_and_peers() -> None:
    head, line = table(rows(4.0))
    assert head.split() == ["value", "limit", "share"]
    assert line.split() == ["decode-0", "int8", "4.000", "ms", "2.000", "50%", "vLLM", "4.8"]


def test_union_of_intervals() -> None:
    assert decode.union([(5, 6), (0, 2), (1, 3), (3, 4)]) == [(0, 4), (5, 6)]
    assert list(decode.within([(0, 1), (2, 3), (4, 5), (9, 10)], 0.1, 0.9)) == [(2, 3), (4, 5)]


def test_committed_results_are_valid() -> None:
    for path in RESULTS.glob("*.json"):
        result = Result.read(path)
        assert result.rows
        assert len({(row.name, row.setting) for row in result.rows}) == len(result.rows), path


def documented_rows() -> dict[tuple[str, str], Row]:
    rows = [Row(name, "int8", 2.5, "ms", 2.0, {"vLLM INT8": 4.8}) for name in plot.TITLES]
    rows.append(Row("decode-1", "bf16", 123.4, "ms"))
    return {(row.name, row.setting): row for row in rows}


def test_markdown_table() -> None:
    lines = list(plot.table(documented_rows()))
    assert lines[2] == "| time per output token, batch 1 | int8 | **2.5 ms** | vLLM INT8 4.8 | 2 | 80% |"
    assert lines[3] == "| time per output token, batch 1 | bf16 | **123 ms** |  |  |  |"
    assert len(lines) == 2 + len(plot.TITLES) + 1


def test_chart(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    paths = tmp_path / "one.svg", tmp_path / "two.svg"
    for path in paths:
        plot.save(documented_rows(), "h200", path)
    text = paths[0].read_text()
    assert text == paths[1].read_text()
    assert "<title>Benchmarks on h200</title>" in text
    assert 'role="img"' in text
    assert "time per output token, batch 1" in text


def test_documentation_has_the_table(documentation: str) -> None:
    assert "\n".join(plot.table(plot.read_rows(RESULTS, "h200"))) in documentation


def test_documentation_has_the_overhead_of_gateway_and_grammars(documentation: str) -> None:
    rows = plot.read_rows(RESULTS, "h200")
    for name, shown in (
        ("text-first-token-alone-added", "{:.2f} ms to the first token of a text"),
        ("screenshot-first-token-alone-added", "{:.1f} ms to that of a screenshot"),
    ):
        assert shown.format(rows[name, "int8"].value) in documentation
    assert 4 < rows["text-first-token-16-added", "int8"].value < 10
    assert all(rows[f"{kind}-token-16-added", "int8"].value < 0.005 for kind in ("text", "screenshot"))
    assert f"{rows['constrained-16', 'int8'].also['% over unconstrained']:.1f}% to a step of 16" in documentation
