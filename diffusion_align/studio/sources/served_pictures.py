"""How a picture leaves the server: checked before it is decoded, without metadata, whole or as a thumbnail."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from diffusion_align.pictures import CorruptImageError, decoded_picture, picture_header, upright_size

#: More pixels are not decoded.
MOST_PIXELS = 64_000_000
#: Formats that are decoded at all; what scripts can be in (SVG) is none.
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "GIF", "TIFF")


@dataclass(frozen=True)
class Served:
    """A picture as it is sent."""

    content: bytes
    media_type: str


def checked_size(content: bytes, where: str) -> tuple[int, int]:
    """Width and height, from the header.

    Raises:
        CorruptImageError: another format, too many pixels, or unreadable; starts with ``where``.
    """
    check_header(content, where)
    return upright_size(content, where)


def check_header(content: bytes, where: str) -> None:
    """Raise CorruptImageError if a picture is not to be decoded, as ``checked_size``; nothing of it is decoded."""
    width, height = picture_header(content, where, FORMATS).size
    if width * height > MOST_PIXELS:
        raise CorruptImageError(f"{where} has {width}x{height} pixels: expected at most {MOST_PIXELS:,}")


def clean(contents: Sequence[bytes], wheres: Sequence[str]) -> list[Served]:
    """Pictures that are shown together, in one format and without anything but their pixels.

    JPEG stays as it is stored but for its metadata; if one of them is no upright JPEG, all are sent as PNG, so that the
    format does not tell them apart.

    Raises:
        CorruptImageError: one cannot be decoded; it is named.
    """
    for content, where in zip(contents, wheres, strict=True):
        check_header(content, where)
    stripped = [stripped_jpeg(content) for content in contents]
    if all(content is not None for content in stripped):
        for content, where in zip(contents, wheres, strict=True):
            decoded_picture(content, where)  # a torn one is an error here, not half a picture there
        return [Served(content, "image/jpeg") for content in stripped if content is not None]
    return [as_png(content, where) for content, where in zip(contents, wheres, strict=True)]


def as_png(content: bytes, where: str) -> Served:
    """The same pixels, upright and in RGB.

    Raises:
        CorruptImageError: it cannot be decoded; starts with ``where``.
    """
    check_header(content, where)
    buffer = io.BytesIO()
    picture = decoded_picture(content, where)
    Image.frombytes("RGB", picture.size, picture.tobytes()).save(buffer, "PNG", compress_level=1)
    return Served(buffer.getvalue(), "image/png")


def thumbnail(content: bytes, where: str, side: int = 256) -> Served:
    """A JPEG of at most ``side`` pixels.

    Raises:
        CorruptImageError: it cannot be decoded; starts with ``where``.
    """
    check_header(content, where)
    picture = decoded_picture(content, where)
    picture.thumbnail((side, side))
    buffer = io.BytesIO()
    Image.frombytes("RGB", picture.size, picture.tobytes()).save(buffer, "JPEG", quality=82)
    return Served(buffer.getvalue(), "image/jpeg")


def stripped_jpeg(content: bytes) -> bytes | None:
    """A JPEG without application segments and comments, pixels untouched; None for anything else, and for one that its
    metadata turn or that is not grey or YCbCr."""
    try:
        header = picture_header(content, "a picture", ("JPEG",))
    except CorruptImageError:
        return None
    if header.mode not in ("L", "RGB") or header.orientation != 1 or "jfif" not in header.info:
        return None
    if content[:2] != b"\xff\xd8":
        return None
    kept, place = [content[:2]], 2
    while place + 4 <= len(content) and content[place] == 0xFF:
        marker, length = content[place + 1], int.from_bytes(content[place + 2 : place + 4], "big")
        if marker == 0xDA:  # the scan, and all that follows
            end = content.rfind(b"\xff\xd9")
            kept.append(content[place : end + 2 if end > place else len(content)])
            return b"".join(kept)
        if not (0xE1 <= marker <= 0xEF or marker == 0xFE):  # APP0 says that colours are YCbCr
            kept.append(content[place : place + 2 + length])
        place += 2 + length
    return None
