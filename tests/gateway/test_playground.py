"""The playground's files over HTTP."""

import re

import httpx
import pytest

from gateway.playground import STATIC

KINDS = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
FILES = sorted(STATIC.iterdir())


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_file_has_a_type_and_can_be_cached(any_http: httpx.Client, file: object) -> None:
    path = STATIC / str(file)
    url = "/" if path.name == "index.html" else f"/{path.name}"
    whole = any_http.get(url)
    assert (whole.status_code, whole.content) == (200, path.read_bytes())
    assert whole.headers["content-type"].split(";")[0] == KINDS[path.suffix[1:]]
    assert whole.headers["x-content-type-options"] == "nosniff"
    assert whole.headers["cache-control"] == "no-cache"
    assert any_http.head(url).headers["content-length"] == str(len(whole.content))
    again = any_http.get(url, headers={"if-none-match": whole.headers["etag"]})
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", whole.headers["etag"])
    assert any_http.get(url, headers={"if-none-match": '"another"'}).status_code == 200


def test_the_page_runs_only_its_own_files(any_http: httpx.Client) -> None:
    policy = dict(
        directive.strip().split(" ", 1) for directive in any_http.get("/").headers["content-security-policy"].split(";")
    )
    assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["img-src"].split() == ["'self'", "data:", "blob:"]
    page = (STATIC / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<script>|<style|\sstyle=|\son\w+=|https?://", page)
