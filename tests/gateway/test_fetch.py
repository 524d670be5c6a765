"""Images from URLs: only of allowed hosts and folders, and never of internal addresses."""

import asyncio
import os
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from socket import AddressFamily
from typing import Any

import pytest
from aiohttp.abc import AbstractResolver, ResolveResult

from autoglm.config import LimitsConfig
from autoglm.errors import RequestError
from gateway import fetch
from gateway.fetch import ImageFetcher, is_public

PRIVATE = (
    "127.0.0.1", "127.8.8.8", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
    "224.0.0.1", "239.1.1.1", "255.255.255.255", "240.0.0.1", "::1", "::", "fe80::1", "fc00::1", "fd12::1", "ff02::1",
    "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "2002:7f00:1::",
    "2001:0:1:1:1:1:80ff:fffe",
)  # fmt: skip
PUBLIC = ("8.8.8.8", "1.1.1.1", "2606:4700:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808")


class Names(AbstractResolver):
    """Resolves names from a table."""

    def __init__(self, **table: str | list[str]) -> None:
        self.table = {name.replace("_", "."): [to] if isinstance(to, str) else to for name, to in table.items()}
        self.asked: list[str] = []

    async def resolve(
        self, host: str, port: int = 0, family: AddressFamily = AddressFamily.AF_INET
    ) -> list[ResolveResult]:
        self.asked.append(host)
        if host not in self.table:
            raise OSError("no such name")
        return [
            ResolveResult(hostname=host, host=to, port=port, family=AddressFamily.AF_INET, proto=0, flags=0)
            for to in self.table[host]
        ]

    async def close(self) -> None:
        pass


def image(url: str, names: Names | None = None, folder: Path | None = None, **limits: int) -> bytes:
    async def load() -> bytes:
        hosts = ("images.example", ".cdn.example", "127.0.0.1", "::1")
        fetcher = ImageFetcher(LimitsConfig(**limits), hosts, folder, names or Names())
        try:
            return await fetcher.image(url, "where")
        finally:
            await fetcher.aclose()

    return asyncio.run(load())


def refused(url: str, *arguments: Any, **options: Any) -> str:
    with pytest.raises(RequestError) as caught:
        image(url, *arguments, **options)
    assert caught.value.message.startswith("where ")
    return caught.value.message


@pytest.mark.parametrize("address", PRIVATE)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(ip_address(address))
    message = refused("http://images.example/a.png", Names(images_example=address))
    assert "public addresses" in message
    assert "public addresses" in refused("http://images.example/a.png", Names(images_example=["8.8.8.8", address]))


@pytest.mark.parametrize("address", PUBLIC)
def test_addresses_that_are_public(address: str) -> None:
    assert is_public(ip_address(address))


@pytest.mark.parametrize(
    "url",
    [
        "http://other.example/a.png", "http://images.example.evil.example/a.png", "http://evilcdn.example/a.png",
        "http://images.example@evil.example/", "http://evil.example#@images.example/", "http://user@images.example/",
        "http:///a.png", "http://", "http://[::1", "http://images.example:99999/", "ftp://images.example/a.png",
        "gopher://images.example/", "//images.example/a.png", "images.example/a.png", "", "data:,x", "http://8.8.8.8/",
        "http://127.1/", "data:text/html;base64,AAAA", "data:image/png;base64,@", "javascript:1", "file:///etc/passwd",
    ],
)  # fmt: skip
def test_urls_that_are_not_allowed(url: str) -> None:
    names = Names(images_example="127.0.0.1", evil_example="8.8.8.8")
    refused(url, names)
    assert names.asked == []


@pytest.mark.parametrize("url", ["http://127.0.0.1/", "http://[::1]/", "https://127.0.0.1:8443/x"])
def test_internal_addresses_are_refused_even_if_they_are_allowed_hosts(url: str) -> None:
    assert "public addresses" in refused(url)


def test_data_urls() -> None:
    assert image("data:image/png;base64,AAEC") == b"\0\1\2"
    assert "at most 2 bytes" in refused("data:image/png;base64," + "A" * 100, max_image_bytes=2)


class Site(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/"))
            self.end_headers()
            return
        self.send_response(200 if self.path != "/missing" else 404)
        if self.path == "/known.png":
            self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b"x" * 1000)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A web site. Only the address 127.0.0.1 counts as public."""
    monkeypatch.setattr(fetch, "is_public", lambda address: str(address) == "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://images.example:{server.server_port}"
        server.shutdown()


def test_hosts_that_are_allowed(site: str) -> None:
    names = Names(images_example="127.0.0.1", a_cdn_example="127.0.0.1", inside_cdn_example="10.0.0.1")
    port = site.rpartition(":")[2]
    assert image(f"{site}/a.png", names) == b"x" * 1000
    assert image(f"{site}/to/http://a.cdn.example:{port}/b.png", names) == b"x" * 1000
    assert image(f"{site}/to//to/{site}/b.png", names) == b"x" * 1000
    assert refused(f"{site}/missing", names) == "where could not be fetched: HTTP 404"
    too_large = "where must be a file of at most 999 bytes (got {})"
    assert refused(f"{site}/known.png", names, max_image_bytes=999) == too_large.format(1000)
    assert refused(f"{site}/a.png", names, max_image_bytes=999) == too_large.format("1000 or more")
    assert "public addresses" in refused(f"{site}/to/http://inside.cdn.example:{port}/", names)
    assert "other.example" in refused(f"{site}/to/http://other.example:{port}/", names)
    assert "data URL" in refused(f"{site}/to/file:///etc/passwd", names)
    assert "redirects" in refused(f"{site}{'/to/' * 4}{site}/a.png".replace("/to//to/", "/to/" + "/to/"), names)
    assert refused("http://b.cdn.example/", names) == "where could not be fetched: no connection to its host"


def test_a_host_that_does_not_speak_http(site: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(b"SSH-2.0-x\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        message = refused(f"http://images.example:{server.getsockname()[1]}/", Names(images_example="127.0.0.1"))
    assert message == "where could not be fetched: invalid HTTP response"


def test_a_host_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "FETCH_SECONDS", 0.2)

    class Slow(Names):
        async def resolve(self, *arguments: Any) -> list[ResolveResult]:
            await asyncio.sleep(5)
            return []

    assert refused("http://images.example/", Slow()) == "where timed out after 0.2 s"


def test_files(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    (folder / "below").mkdir(parents=True)
    (folder / "below" / "a b.png").write_bytes(b"inside")
    (tmp_path / "secret.png").write_bytes(b"outside")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "fine.png").symlink_to(folder / "below" / "a b.png")
    os.mkfifo(folder / "pipe.png")
    assert image(f"file://{folder}/below/a%20b.png", folder=folder) == b"inside"
    assert image(f"file://localhost{folder}/fine.png", folder=folder) == b"inside"
    for path in (
        f"{folder}/link.png", f"{folder}/../secret.png", f"{folder}/%2e%2e/secret.png", f"{tmp_path}/secret.png",
        f"{folder}/missing.png", f"{folder}/pipe.png", f"{folder}/below", f"{folder}", f"{folder}/%00",
        f"{folder}images/x", "//images.example/a", "[", "/etc/passwd", f"{folder}/{'a' * 300}",
    ):  # fmt: skip
        refused(f"file://{path}", folder=folder)
    too_large = refused(f"file://{folder}/fine.png", folder=folder, max_image_bytes=3)
    assert too_large == "where must be a file of at most 3 bytes (got 6)"
    assert "does not read files" in refused(f"file://{folder}/fine.png")
    for path, reason in (
        ("missing.png", "no such file"),
        ("pipe.png", "not a regular file"),
        ("below", "not a regular file"),
    ):
        assert refused(f"file://{folder}/{path}", folder=folder) == f"where cannot be read: {reason}"
