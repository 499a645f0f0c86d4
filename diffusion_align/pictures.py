"""From bytes to pixels, for every door: the picture that viewers show, or an error that names it.

- EXIF orientation is applied; of animated and many-page files the first picture is taken.
- Transparent places show ``BACKGROUND`` (white).
- 16-bit pictures are scaled to 8 bits. Floats must be in [0, 1]; integers of 32 bits have no agreed range and are
  refused, but for those that hold 16 bits (PGM).
- Whatever a decoder raises is a ``CorruptImageError``.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

#: What shows through transparent places, RGB.
BACKGROUND = (255, 255, 255)
#: Largest value of pictures with more than 8 bits; modes of Pillow.
DEEP = {"I;16": 65535, "I;16L": 65535, "I;16B": 65535, "I;16N": 65535}
#: Formats of Pillow whose header has the picture's size.
QUICK = ("JPEG", "PNG", "WEBP", "AVIF")
#: EXIF orientations that change width and height.
TURNED = (5, 6, 7, 8)
#: Files of a folder that are taken for pictures.
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff")


class CorruptImageError(ValueError):
    """An image that cannot be used: it cannot be decoded, or is no mask; the message names its row and column."""


def opened_picture(content: bytes | Path, where: str) -> Image.Image:
    """A loaded picture, upright, in its own mode and with its metadata (``info``).

    Raises:
        CorruptImageError: it cannot be decoded; starts with ``where``.
        OSError: a file that cannot be read.
    """
    data = content.read_bytes() if isinstance(content, Path) else content
    try:
        image = Image.open(io.BytesIO(data))
        _check_png(data)
        image.load()
        return _upright(image)
    except Exception as error:  # decoders raise whatever they like: RuntimeError (AVIF), struct.error, KeyError
        raise CorruptImageError(f"{where} cannot be decoded ({str(error) or type(error).__name__})") from None


@dataclass(frozen=True)
class Header:
    """What an encoded picture says before its pixels.

    Attributes:
        format: of PIL ("JPEG").
        size: (w, h) as stored, not yet turned.
        mode: of PIL ("RGB").
        info: metadata by name, as far as they stand before the pixels.
        orientation: EXIF's, as far as it stands before the pixels, too; 1 where it is upright.
    """

    format: str
    size: tuple[int, int]
    mode: str
    info: Mapping[Any, Any]
    orientation: int


def picture_header(content: bytes | Path, where: str, formats: tuple[str, ...] | None = None) -> Header:
    """The header of an encoded picture; no pixel is decoded.

    Args:
        formats: PIL's names of those that are read at all; None is every one.

    Raises:
        CorruptImageError: it cannot be read; starts with ``where``.
        OSError: a file that cannot be opened.
    """
    try:
        with Image.open(content if isinstance(content, Path) else io.BytesIO(content), formats=formats) as image:
            return Header(image.format or "", image.size, image.mode, dict(image.info), _orientation(image, False))
    except FileNotFoundError:
        raise
    except Exception as error:
        raise CorruptImageError(f"{where} cannot be decoded ({str(error) or type(error).__name__})") from None


def upright_size(content: bytes, where: str) -> tuple[int, int]:
    """PIL size (w, h) that ``decoded_picture`` would give; of the usual formats it is read from the header, so that a
    picture whose pixels are torn has a size, too.

    Raises:
        CorruptImageError: it cannot be read; starts with ``where``.
    """
    try:
        image = Image.open(io.BytesIO(content))
        if image.format not in QUICK:
            return decoded_picture(content, where).size
        return image.size[::-1] if _orientation(image) in TURNED else image.size
    except Exception as error:
        raise CorruptImageError(f"{where} cannot be decoded ({str(error) or type(error).__name__})") from None


def decoded_picture(content: bytes | Path, where: str) -> Image.Image:
    """An encoded picture in RGB, as viewers show it.

    Raises:
        CorruptImageError: it cannot be decoded, or has values without an agreed range; starts with ``where``.
    """
    return rgb_picture(opened_picture(content, where), where)


def rgb_picture(image: Image.Image, where: str) -> Image.Image:
    """A PIL picture of any mode in RGB; transparent places show ``BACKGROUND``.

    Raises:
        CorruptImageError: as ``decoded_picture``.
    """
    try:
        image.load()
        image = _upright(image)
        if image.mode == "RGB" and not image.has_transparency_data:
            return image
        if image.mode in (*DEEP, "I", "F"):
            grey = np.rint(_share(image) * 255).astype(np.uint8)
            return Image.fromarray(grey).convert("RGB")
        if not image.has_transparency_data:
            return image.convert("RGB")
        whole = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", whole.size, (*BACKGROUND, 255)), whole).convert("RGB")
    except Exception as error:
        raise CorruptImageError(f"{where} cannot be decoded ({str(error) or type(error).__name__})") from None


def bare_png(image: Image.Image) -> bytes:
    """A picture as PNG without anything else in the file; its metadata are dropped."""
    buffer = io.BytesIO()
    image.info.clear()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def decoded_mask(content: bytes | Path, where: str) -> NDArray[np.bool_]:
    """A mask (H, W), True where the picture is to be repainted.

    Of two values the brighter marks the hole, so that masks of 0 and 1 are read as those of 0 and 255; of more, what
    is brighter than half. Transparent places are not marked: white on nothing is a mask, and of one colour the opacity
    alone is.

    Raises:
        CorruptImageError: it cannot be decoded, or marks nothing or everything; starts with ``where``.
    """
    image = opened_picture(content, where)
    try:
        values = _brightness(image)
    except Exception as error:
        raise CorruptImageError(f"{where} cannot be decoded ({str(error) or type(error).__name__})") from None
    low, high = float(values.min()), float(values.max())
    two = bool(((values == low) | (values == high)).all())
    mask: NDArray[np.bool_] = values == high if two and low < high else values > 0.5
    return checked_mask(mask, where)


def checked_mask(mask: NDArray[np.bool_], where: str) -> NDArray[np.bool_]:
    """``mask`` as it is.

    Raises:
        CorruptImageError: it marks nothing or everything; starts with ``where``.
    """
    if mask.all() or not mask.any():
        marked = "everything" if mask.all() else "nothing"
        raise CorruptImageError(
            f"{where}: the mask marks {marked}; expected a picture that is white where it is to be repainted, and "
            "black elsewhere"
        )
    return mask


def _check_png(data: bytes) -> None:
    """Raise ValueError if the pixels of a PNG do not match their checksums, which Pillow passes over."""
    view, place = memoryview(data), 8
    while data.startswith(b"\x89PNG\r\n\x1a\n") and place + 12 <= len(data):
        end = place + 8 + int.from_bytes(view[place : place + 4])
        if view[place + 4 : place + 8] == b"IDAT" and zlib.crc32(view[place + 4 : end]) != int.from_bytes(
            view[end : end + 4]
        ):
            raise ValueError("a chunk of pixels does not match its checksum")
        place = end + 4


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF block says; as it is stored where that is broken, which is what viewers show then."""
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1)
        upright = image if turned == 1 else ImageOps.exif_transpose(image)
    except Exception:
        return image
    upright.format = image.format
    return upright


def _orientation(image: Image.Image, behind: bool = True) -> int:
    """EXIF's; ``behind``: also of a block behind the pixels, for which Pillow decodes a PNG whole."""
    try:
        exif = image.getexif() if behind else Image.Image.getexif(image)
        return int(exif.get(ExifTags.Base.Orientation, 1))
    except Exception:
        return 1


def _share(image: Image.Image) -> NDArray[np.float64]:
    """Grey values of more than 8 bits in [0, 1], (H, W)."""
    values = np.asarray(image, dtype=np.float64)
    if image.mode in DEEP or (image.mode == "I" and image.format in ("PPM", "PNG")):
        return values / 65535
    if image.mode == "I":
        raise ValueError("integers of 32 bits have no agreed range: save it with 8 or 16")
    if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
        raise ValueError(f"floats must be in [0, 1], found [{values.min():g}, {values.max():g}]")
    return values


def _brightness(image: Image.Image) -> NDArray[np.float64]:
    """How much each place of a mask is marked, (H, W); [0, 1], or any two values."""
    if image.mode in (*DEEP, "I", "F"):
        values = np.asarray(image, dtype=np.float64)
        return values if len(np.unique(values)) <= 2 else _share(image)
    if not image.has_transparency_data:
        return np.asarray(image.convert("RGB").convert("L"), dtype=np.float64) / 255
    colour, alpha = np.split(np.asarray(image.convert("RGBA"), dtype=np.float64) / 255, [3], axis=2)
    if (colour == colour[0, 0]).all() and (alpha != alpha[0, 0]).any():
        return alpha[..., 0]
    return (colour @ np.array([0.299, 0.587, 0.114])) * alpha[..., 0]
