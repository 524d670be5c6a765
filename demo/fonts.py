"""Finds the fonts of the screens, which Debian packages provide."""

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
    """Fonts are not installed; the message has the apt-get command."""


@cache
def _files() -> dict[str, Path]:
    """File name -> path, found in the directory AUTOGLM_DEMO_FONTS or else in the system's."""
    roots = [os.environ["AUTOGLM_DEMO_FONTS"]] if "AUTOGLM_DEMO_FONTS" in os.environ else list(DIRECTORIES)
    wanted = {**CHINESE, **LATIN}
    return {path.name: path for root in roots for path in sorted(Path(root).rglob("*.tt[cf]")) if path.name in wanted}


def missing_packages() -> list[str]:
    """The packages of the missing fonts, sorted."""
    return sorted({package for name, package in {**CHINESE, **LATIN}.items() if name not in _files()})


def require_fonts() -> None:
    """Raise FontsMissing if any font is missing."""
    if packages := missing_packages():
        raise FontsMissing(f"fonts are missing: apt-get install --no-install-recommends {' '.join(packages)}")


@cache
def font(name: str, pixels: int) -> ImageFont.FreeTypeFont:
    """A font of `pixels` height."""
    return ImageFont.truetype(str(_files()[name]), pixels, layout_engine=ImageFont.Layout.BASIC)
