"""Where images come from: data URLs, files below one folder, and http(s) from hosts that the operator allows.

A request must not make the gateway reach what its caller cannot: names are resolved here, each address is checked, and
the connection goes to an address that was checked, so that no second look-up can lead elsewhere. Redirects are followed
one by one under the same rules.
"""

from __future__ import annotations

import asyncio
import errno
import os
import stat
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from pathlib import Path
from socket import AddressFamily
from urllib.parse import unquote, urljoin, urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult

from autoglm.config import LimitsConfig
from autoglm.errors import Exact, RequestError, invalid, shorten
from autoglm.media.image_file import decode_data_url

MAX_REDIRECTS = 3
FETCH_SECONDS = 10.0
CHUNK = 1 << 16
NAT64 = IPv6Network("64:ff9b::/96")  # the last four bytes are an IPv4 address, which a translator may reach


class Fetcher:
    """Reads the images that requests name.

    Args:
        hosts: names that may be fetched from; `.example.com` stands for all names below example.com.
        folder: the folder of which file:// URLs may name files; None: no files.
        resolver: looks names up, by default as the system does.
    """

    def __init__(
        self, limits: LimitsConfig, hosts: Sequence[str], folder: Path | None, resolver: AbstractResolver | None = None
    ) -> None:
        self._limits = limits
        self._hosts = tuple(host.lower().rstrip(".") for host in hosts)
        self._folder = folder.resolve() if folder else None
        self._resolver = resolver
        self._session: aiohttp.ClientSession | None = None

    def check_count(self, images: int) -> None:
        """Refuse a request with so many images. Raises RequestError."""
        if images > self._limits.max_images:
            raise invalid("messages", Exact(f"{images} images or more"), f"at most {self._limits.max_images}")

    async def image(self, url: str, name: str) -> bytes:
        """The file that a URL stands for. `name` is the field that holds it, for messages.

        Raises:
            RequestError: a URL that is not allowed, or that leads to no file of an allowed size.
        """
        scheme = url.partition(":")[0].lower()
        if scheme == "file":
            return await asyncio.to_thread(self._read, url, name)
        if scheme in ("http", "https"):
            try:
                return await asyncio.wait_for(self._download(url, name), FETCH_SECONDS)
            except (TimeoutError, asyncio.TimeoutError):
                raise invalid(name, url, f"what comes within {FETCH_SECONDS:g} s") from None
            except RequestError:
                raise
            except _NotPublicError:
                raise invalid(name, url, "a host of public addresses only") from None
            except (aiohttp.ClientError, OSError, ValueError) as error:
                reason = shorten(str(error) or type(error).__name__)
                raise RequestError(f"{name}: cannot be fetched ({reason})") from None
        return decode_data_url(url, self._limits, name)

    async def aclose(self) -> None:
        if self._session:
            await self._session.close()

    def _read(self, url: str, name: str) -> bytes:
        if self._folder is None:
            raise invalid(name, url, "a data URL; this server reads no files")
        try:
            parts = urlsplit(url)
            path = Path(os.path.realpath(unquote(parts.path)))
            within = parts.netloc in ("", "localhost") and path.is_relative_to(self._folder)
        except ValueError:  # half a URL, or a path with a zero byte
            within = False
        if not within:
            raise invalid(name, url, "a file below the folder of this server's images")
        try:
            with open(path, "rb", opener=_open_file) as file:
                data = file.read(self._limits.max_image_bytes + 1)
        except OSError as error:
            raise invalid(name, url, f"a file that can be read ({error.strerror})") from None
        self._check_size(data, name)
        return data

    async def _download(self, url: str, name: str) -> bytes:
        for _ in range(MAX_REDIRECTS + 1):
            self._check_host(url, name)
            async with self._connection().get(url, allow_redirects=False) as response:
                if response.status in (301, 302, 303, 307, 308) and "location" in response.headers:
                    url = urljoin(url, response.headers["location"])
                    continue
                if response.status != 200:
                    raise invalid(name, url, f"what its host has (it answered {response.status})")
                data = bytearray()
                async for chunk in response.content.iter_chunked(CHUNK):
                    data += chunk
                    self._check_size(data, name)
                return bytes(data)
        raise invalid(name, url, f"at most {MAX_REDIRECTS} redirects")

    def _check_host(self, url: str, name: str) -> None:
        try:
            parts = urlsplit(url)
            host, _ = (parts.hostname or "").lower().rstrip("."), parts.port
        except ValueError:
            raise invalid(name, url, "a URL") from None
        allowed = any(host == entry or (entry.startswith(".") and host.endswith(entry)) for entry in self._hosts)
        if parts.scheme not in ("http", "https") or not allowed or "@" in parts.netloc:
            there = ", ".join(self._hosts) or "none"
            raise invalid(name, url, f"a data URL, or http(s) of the hosts that this server fetches from ({there})")
        # A host that is an address is not looked up.
        if (address := _address(host)) is not None and not is_public(address):
            raise _NotPublicError

    def _connection(self) -> aiohttp.ClientSession:
        if self._session is None:
            resolver = _PublicOnly(self._resolver or aiohttp.ThreadedResolver())
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(resolver=resolver, use_dns_cache=False, limit=64),
                cookie_jar=aiohttp.DummyCookieJar(),
                headers={"accept-encoding": "identity", "user-agent": "autoglm-gateway"},
                auto_decompress=False,  # a few bytes must not become gigabytes
            )
        return self._session

    def _check_size(self, data: bytes | bytearray, name: str) -> None:
        if len(data) > self._limits.max_image_bytes:
            raise invalid(name, Exact("a larger file"), f"at most {self._limits.max_image_bytes} bytes per image")


class _NotPublicError(Exception):
    """A name leads to an address that is not one of the internet."""


class _PublicOnly(AbstractResolver):
    """A resolver that gives public addresses only: those that it gives are the ones connected to."""

    def __init__(self, resolver: AbstractResolver) -> None:
        self._resolver = resolver

    async def resolve(
        self, host: str, port: int = 0, family: AddressFamily = AddressFamily.AF_INET
    ) -> list[ResolveResult]:
        found = await self._resolver.resolve(host, port, family)
        if not all(is_public(ip_address(entry["host"].partition("%")[0])) for entry in found):
            raise _NotPublicError
        return found

    async def close(self) -> None:
        await self._resolver.close()


def is_public(address: IPv4Address | IPv6Address) -> bool:
    """Whether an address is one of the internet, and leads to no other kind by an IPv4 address inside it."""
    if isinstance(address, IPv6Address):
        embedded = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
        embedded += [IPv4Address(address.packed[-4:])] if address in NAT64 else []
        if not all(is_public(inner) for inner in embedded if inner is not None):
            return False
        if address.ipv4_mapped:
            return True
    return address.is_global and not address.is_multicast


def _open_file(path: str, flags: int) -> int:
    """An opener of files alone: not of a pipe, which would keep its reader waiting, nor of a link put there since."""
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a file")
    return descriptor


def _address(host: str) -> IPv4Address | IPv6Address | None:
    try:
        return ip_address(host.partition("%")[0])
    except ValueError:
        return None
