"""Finding the fonts that screens are drawn with. They come from Debian packages; none is committed."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

from PIL import ImageFont

# file name -> Debian package
CHINESE = {
    "wqy-microhei.ttc": "fonts-wqy-microhei",
    "wqy-zenhei.ttc": "fonts-wqy-zenhei",
    "DroidSansFallbackFull.ttf": "fonts-droid-fallback",
}
LATIN = {
    "DejaVuSans.ttf": "fonts-dejavu-core",
    "LiberationSans-Regular.ttf": "fonts-liberation",
    "LiberationSans-Bold.ttf": "fonts-liberation",
    "Roboto-Regular.ttf": "fonts-roboto-unhinted",
    "Roboto-Medium.ttf": "fonts-roboto-unhinted",
    "Lato-Regular.ttf": "fonts-lato",
}
DIRECTORIES = ("/usr/share/fonts", "/usr/local/share/fonts")


class FontsMissing(RuntimeError):
    """The message names the Debian packages to install."""


@cache
def _files() -> dict[str, Path]:
    """File name -> path, over AUTOGLM_DEMO_FONTS (a directory, optional) and the system's font directories."""
    roots = [os.environ["AUTOGLM_DEMO_FONTS"]] if "AUTOGLM_DEMO_FONTS" in os.environ else list(DIRECTORIES)
    wanted = {**CHINESE, **LATIN}
    return {path.name: path for root in roots for path in sorted(Path(root).rglob("*.tt[cf]")) if path.name in wanted}


def missing_packages() -> list[str]:
    """The Debian packages whose fonts are not there, sorted; empty when every font was found."""
    return sorted({package for name, package in {**CHINESE, **LATIN}.items() if name not in _files()})


def require_fonts() -> None:
    """Raise FontsMissing, naming the apt command, unless every font is there."""
    if packages := missing_packages():
        raise FontsMissing(f"fonts are missing: apt-get install --no-install-recommends {' '.join(packages)}")


@cache
def font(name: str, pixels: int) -> ImageFont.FreeTypeFont:
    """The font of file `name` at a height of `pixels`."""
    return ImageFont.truetype(str(_files()[name]), pixels, layout_engine=ImageFont.Layout.BASIC)
