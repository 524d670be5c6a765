"""Sources of images: data URLs, files below one folder, and http(s) URLs of hosts that the operator allows.

A request must not make the gateway reach internal addresses (SSRF): host names are resolved here, every address is
checked, and the connection uses a checked address, so that a second lookup cannot return another one. Redirects are
followed one by one under the same rules.
"""

import asyncio
import errno
import logging
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
from autoglm.errors import RequestError, Verbatim, invalid
from autoglm.media.payload import decode_data_url

MAX_REDIRECTS = 3
FETCH_SECONDS = 10.0
CHUNK = 1 << 16
NAT64 = IPv6Network("64:ff9b::/96")  # the last four bytes are an IPv4 address, which a translator may reach
FILE_FAULTS = {
    errno.EACCES: "permission denied",
    errno.EINVAL: "not a regular file",
    errno.ENAMETOOLONG: "its name is too long",
    errno.ENOENT: "no such file",
    errno.ENOTDIR: "no such file",
}

log = logging.getLogger(__name__)


class ImageFetcher:
    """Reads images by their URLs.

    Args:
        hosts: hosts to fetch from; `.example.com` is every host below example.com.
        folder: file:// URLs may name files below it; None: no files are read.
        resolver: resolves host names; default: the system's resolver.
    """

    def __init__(
        self, limits: LimitsConfig, hosts: Sequence[str], folder: Path | None, resolver: AbstractResolver | None = None
    ) -> None:
        self._limits = limits
        self._hosts = tuple(host.lower().rstrip(".") for host in hosts)
        self._folder = folder.resolve() if folder else None
        self._resolver = resolver
        self._session: aiohttp.ClientSession | None = None

    def check_count(self, num_images: int) -> None:
        """Raise RequestError for more images than a request may have."""
        if num_images > self._limits.max_images:
            raise RequestError(
                f"messages must contain at most {self._limits.max_images} images (got {num_images} or more)"
            )

    async def image(self, url: str, name: str) -> bytes:
        """The image file at a URL. `name` is the URL's field, for error messages.

        Raises:
            RequestError: the URL is not allowed, the file cannot be read, or it is too large.
        """
        scheme = url.partition(":")[0].lower()
        if scheme == "file":
            return await asyncio.to_thread(self._read, url, name)
        if scheme in ("http", "https"):
            try:
                return await asyncio.wait_for(self._download(url, name), FETCH_SECONDS)
            except (TimeoutError, asyncio.TimeoutError):
                raise RequestError(f"{name} timed out after {FETCH_SECONDS:g} s") from None
            except RequestError:
                raise
            except _NotPublicError:
                raise invalid(name, url, "on a host with public addresses only") from None
            except (aiohttp.ClientError, OSError, ValueError) as error:
                log.info("%s could not be fetched: %r", name, error)
                reason = "no connection to its host" if isinstance(error, OSError) else "invalid HTTP response"
                raise RequestError(f"{name} could not be fetched: {reason}") from None
        return decode_data_url(url, "image", self._limits.max_image_bytes, name)

    async def aclose(self) -> None:
        if self._session:
            await self._session.close()

    def _read(self, url: str, name: str) -> bytes:
        if self._folder is None:
            raise invalid(name, url, "a data URL; this server does not read files")
        try:
            parts = urlsplit(url)
            path = Path(os.path.realpath(unquote(parts.path)))
            within = parts.netloc in ("", "localhost") and path.is_relative_to(self._folder)
        except ValueError:  # an invalid URL, or a path with a null byte
            within = False
        if not within:
            raise invalid(name, url, "a file below this server's folder of images")
        try:
            with open(path, "rb", opener=_open_file) as file:
                self._check_size(os.fstat(file.fileno()).st_size, name)
                data = file.read(self._limits.max_image_bytes + 1)
        except OSError as error:
            raise RequestError(f"{name} cannot be read: {FILE_FAULTS.get(error.errno or 0, 'I/O error')}") from None
        self._check_size(len(data), name, " or more")  # the file may have grown
        return data

    async def _download(self, url: str, name: str) -> bytes:
        for _ in range(MAX_REDIRECTS + 1):
            self._check_host(url, name)
            async with self._connection().get(url, allow_redirects=False) as response:
                if response.status in (301, 302, 303, 307, 308) and "location" in response.headers:
                    url = urljoin(url, response.headers["location"])
                    continue
                if response.status != 200:
                    raise RequestError(f"{name} could not be fetched: HTTP {response.status}")
                self._check_size(response.content_length or 0, name)
                data = bytearray()
                async for chunk in response.content.iter_chunked(CHUNK):
                    data += chunk
                    self._check_size(len(data), name, " or more")
                return bytes(data)
        raise RequestError(f"{name} could not be fetched: more than {MAX_REDIRECTS} redirects")

    def _check_host(self, url: str, name: str) -> None:
        try:
            parts = urlsplit(url)
            host, _ = (parts.hostname or "").lower().rstrip("."), parts.port
        except ValueError:
            raise invalid(name, url, "a valid URL") from None
        allowed = any(host == entry or (entry.startswith(".") and host.endswith(entry)) for entry in self._hosts)
        if parts.scheme not in ("http", "https") or not allowed or "@" in parts.netloc:
            hosts = ", ".join(self._hosts) or "none"
            raise invalid(name, url, f"a data URL or an http(s) URL of an allowed host ({hosts})")
        # An IP address is not resolved, so the resolver does not check it.
        if (address := _address(host)) is not None and not is_public(address):
            raise _NotPublicError

    def _connection(self) -> aiohttp.ClientSession:
        if self._session is None:
            resolver = _PublicOnly(self._resolver or aiohttp.ThreadedResolver())
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(resolver=resolver, use_dns_cache=False, limit=64),
                cookie_jar=aiohttp.DummyCookieJar(),
                headers={"accept-encoding": "identity", "user-agent": "autoglm-gateway"},
                auto_decompress=False,  # no decompression bombs
            )
        return self._session

    def _check_size(self, num_bytes: int, name: str, suffix: str = "") -> None:
        if num_bytes > self._limits.max_image_bytes:
            accepted = f"a file of at most {self._limits.max_image_bytes} bytes"
            raise invalid(name, Verbatim(f"{num_bytes}{suffix}"), accepted)


class _NotPublicError(Exception):
    """A host has an address that is not public."""


class _PublicOnly(AbstractResolver):
    """Resolves to public addresses only. aiohttp connects to exactly the addresses returned here."""

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
    """Whether an address, and every IPv4 address embedded in it, is globally reachable unicast."""
    if isinstance(address, IPv6Address):
        embedded = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
        embedded += [IPv4Address(address.packed[-4:])] if address in NAT64 else []
        if not all(is_public(inner) for inner in embedded if inner is not None):
            return False
        if address.ipv4_mapped:
            return True
    return address.is_global and not address.is_multicast


def _open_file(path: str, flags: int) -> int:
    """Open regular files only: reading a pipe would block, and a symlink may have been created after the check."""
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file")
    return descriptor


def _address(host: str) -> IPv4Address | IPv6Address | None:
    try:
        return ip_address(host.partition("%")[0])
    except ValueError:
        return None
