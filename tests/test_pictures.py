"""Bytes become the picture that viewers show, at every door; masks become holes, or are refused."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngImageFile, PngInfo
from torch import Tensor

from diffusion_align.commands.generate import load_hole
from diffusion_align.commands.options import GenerateOptions, ScoreOptions
from diffusion_align.commands.score import read_items
from diffusion_align.data import ComparisonExamples, Comparisons, RatingExamples, Ratings, load_pairs
from diffusion_align.data.holes import Holes, load_holes
from diffusion_align.data.inpainting import PictureFolder
from diffusion_align.pictures import CorruptImageError, decoded_mask, decoded_picture, picture_header
from diffusion_align.rewards.preprocess import to_pixels

Pixels = NDArray[np.uint8]
SIDE = 64


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


UPPER = np.arange(SIDE)[:, None] < SIDE // 2
#: Brighter to the right, and darker below the middle: turned or mirrored it is another picture.
GREY = (np.linspace(0, 252, SIDE)[None] * np.where(UPPER, 1.0, 0.5)).astype(np.uint8)
COLOUR = np.stack([GREY, GREY.T, np.full_like(GREY, 90)], axis=2)
#: Opaque in the upper half.
ALPHA = np.where(UPPER, 255, np.zeros((1, SIDE))).astype(np.uint8)


def as_rgb(grey: Pixels) -> Pixels:
    return np.repeat(grey[..., None], 3, axis=2)


def oriented(number: int) -> bytes:
    """COLOUR as a camera stores it that was held in one of EXIF's ways."""
    stored = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[number]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = number
    return encoded(Image.fromarray(COLOUR).transpose(stored), "PNG", exif=exif)


def over_white(colour: Pixels) -> Pixels:
    return np.where(ALPHA[..., None] > 0, colour, 255).astype(np.uint8)


def with_key_colour() -> tuple[bytes, Pixels]:
    """A palette one of whose colours is transparent."""
    picture = Image.fromarray(COLOUR).quantize(16)
    expected = np.array(picture.convert("RGB"))
    expected[np.array(picture) == 3] = 255
    return encoded(picture, "PNG", transparency=3), expected


def cases() -> dict[str, tuple[bytes, Pixels, int]]:
    """Files, the picture that viewers show, and how far compression may be from it."""
    colour, grey = Image.fromarray(COLOUR), as_rgb(GREY)
    rgba = Image.fromarray(np.dstack([COLOUR, ALPHA]))
    la = Image.fromarray(np.dstack([GREY, ALPHA]), "LA")
    black = Image.new("RGB", (SIDE, SIDE))
    palette = colour.quantize(32)
    found: dict[str, tuple[bytes, Pixels, int]] = {f"EXIF {n}": (oriented(n), COLOUR, 0) for n in range(2, 9)}
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = colour.transpose(Image.Transpose.ROTATE_90)
    return found | {
        "plain png": (encoded(colour, "PNG"), COLOUR, 0),
        "EXIF in webp": (encoded(turned, "WEBP", lossless=True, exif=exif), COLOUR, 0),
        "EXIF in jpeg": (encoded(turned, "JPEG", quality=98, subsampling=0, exif=exif), COLOUR, 12),
        "broken EXIF": (encoded(colour, "PNG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"), COLOUR, 0),
        "grey": (encoded(Image.fromarray(GREY), "PNG"), grey, 0),
        "16-bit png": (encoded(Image.fromarray(GREY.astype(np.uint16) * 257), "PNG"), grey, 0),
        "16-bit tiff": (encoded(Image.fromarray(GREY.astype(np.uint16) * 257), "TIFF"), grey, 0),
        "16-bit pgm": (b"P5 64 64 65535\n" + (GREY.astype(">u2") * 257).tobytes(), grey, 0),
        "float tiff": (encoded(Image.fromarray(GREY.astype(np.float32) / 255), "TIFF"), grey, 0),
        "1 bit": (encoded(Image.fromarray(ALPHA).convert("1"), "PNG"), as_rgb(ALPHA), 0),
        "palette": (encoded(palette, "PNG"), np.array(palette.convert("RGB")), 0),
        "palette with a transparent colour": (*with_key_colour(), 0),
        "cmyk jpeg": (encoded(colour.convert("CMYK"), "JPEG", quality=98, subsampling=0), COLOUR, 12),
        "cmyk tiff": (encoded(colour.convert("CMYK"), "TIFF"), COLOUR, 1),
        "alpha": (encoded(rgba, "PNG"), over_white(COLOUR), 0),
        "alpha in webp": (encoded(rgba, "WEBP", lossless=True), over_white(COLOUR), 0),
        "grey and alpha": (encoded(la, "PNG"), over_white(grey), 0),
        "animated gif": (
            encoded(palette, "GIF", save_all=True, append_images=[black]), np.array(palette.convert("RGB")), 0,
        ),
        "animated png": (encoded(colour, "PNG", save_all=True, append_images=[black]), COLOUR, 0),
        "animated webp": (encoded(colour, "WEBP", save_all=True, append_images=[black], lossless=True), COLOUR, 0),
        "many pages": (encoded(colour, "TIFF", save_all=True, append_images=[black]), COLOUR, 0),
    }  # fmt: skip


def damaged_avif() -> bytes:
    """For which Pillow raises RuntimeError."""
    content = bytearray(encoded(Image.fromarray(COLOUR), "AVIF"))
    start = content.index(b"iloc")
    content[start : start + 4] = b"free"
    return bytes(content)


CASES = cases()
CORRUPT: dict[str, bytes] = {
    "empty": b"",
    "no picture": b"<html>not found</html>",
    "truncated jpeg": encoded(Image.fromarray(COLOUR), "JPEG")[:-200],
    "truncated png": encoded(Image.fromarray(COLOUR), "PNG")[:-100],
    "truncated gif": encoded(Image.fromarray(COLOUR), "GIF")[:-900],
    "damaged avif": damaged_avif(),
    "floats above 1": encoded(Image.fromarray(GREY.astype(np.float32)), "TIFF"),
    "32-bit integers": encoded(Image.fromarray(GREY.astype(np.int32)), "TIFF"),
}


# -- doors -------------------------------------------------------------------------------------------------------------

PLAIN = encoded(Image.fromarray(COLOUR), "PNG")
HOLE = np.zeros((SIDE, SIDE), np.uint8)
HOLE[:20, :10] = 255
MASK = encoded(Image.fromarray(HOLE), "PNG")


def shown(pixels: Tensor) -> Pixels:
    """(3, H, W) in [0, 1] as (H, W, 3) uint8."""
    return (pixels * 255).round().byte().permute(1, 2, 0).numpy()


def parquet(folder: Path, **columns: Any) -> str:
    Dataset.from_dict({name: [value] for name, value in columns.items()}).to_parquet(folder / "train-0.parquet")
    return str(folder)


def through_pairs(content: bytes, folder: Path) -> Pixels:
    pairs = load_pairs(parquet(folder, jpg_0=PLAIN, jpg_1=content, caption="a", label_0=0.0, label_1=1.0))
    return np.array(next(iter(pairs)).images()[0])


def through_comparisons(content: bytes, folder: Path) -> Pixels:
    judged = Comparisons(
        parquet(folder, jpg_0=PLAIN, jpg_1=content, source=PLAIN, caption="a", label_0=0.0, label_1=1.0)
    )
    return shown(ComparisonExamples(judged, lambda pixels: pixels).example(0, 0, False).images[1])


def through_sources_of_edits(content: bytes, folder: Path) -> Pixels:
    judged = Comparisons(
        parquet(folder, jpg_0=PLAIN, jpg_1=PLAIN, source=content, caption="a", label_0=0.0, label_1=1.0)
    )
    source = ComparisonExamples(judged, lambda pixels: pixels).example(0, 0, False).source
    assert source is not None
    return shown(source)


def through_ratings(content: bytes, folder: Path) -> Pixels:
    ratings = Ratings(parquet(folder, image=content, source=PLAIN, mask=MASK, score_overall=3.0))
    return shown(RatingExamples(ratings, lambda pixels: pixels).example(0, 0, False).image)


def through_a_folder(content: bytes, folder: Path) -> Pixels:
    (folder / "a.png").write_bytes(content)
    return np.array(PictureFolder(folder)[0].picture)


def through_score(content: bytes, folder: Path) -> Pixels:
    (folder / "a.png").write_bytes(content)
    (folder / "p.txt").write_text("a")
    (item,) = read_items(ScoreOptions(str(folder), ("scenes-oracle",), prompts=str(folder / "p.txt")))
    return np.array(item.picture())


def through_a_scorer(content: bytes, folder: Path) -> Pixels:
    (folder / "a.png").write_bytes(content)
    try:
        image = Image.open(folder / "a.png")
    except Exception as error:  # before the scorer sees it
        raise CorruptImageError(f"{folder}/a.png cannot be decoded") from error
    return shown(to_pixels([image], f"{folder}/a.png")[0])


def hole(folder: Path, image: bytes, mask: bytes) -> Holes:
    (folder / "a.png").write_bytes(image)
    (folder / "mask.png").write_bytes(mask)
    options = GenerateOptions(prompt="a", image=str(folder / "a.png"), mask=str(folder / "mask.png"))
    adapter: Any = SimpleNamespace(is_inpainting=True, default_resolution=SIDE)
    found = load_hole(adapter, options)
    assert found is not None
    return found


def through_generate(content: bytes, folder: Path) -> Pixels:
    return shown(hole(folder, content, MASK).pictures[0])


Door = Callable[[bytes, Path], Pixels]
DOORS: list[Door] = [
    through_pairs, through_comparisons, through_sources_of_edits, through_ratings, through_a_folder, through_score,
    through_a_scorer, through_generate,
]  # fmt: skip


@pytest.mark.parametrize("name", sorted(CASES))
def test_the_picture_is_the_one_that_viewers_show(name: str) -> None:
    content, expected, tolerance = CASES[name]
    picture = decoded_picture(content, "x")
    assert picture.mode == "RGB"
    assert picture.size == (SIDE, SIDE)
    assert np.abs(np.array(picture, int) - expected.astype(int)).max() <= tolerance


@pytest.mark.slow
@pytest.mark.parametrize("door", DOORS)
def test_every_door_has_the_same_decoder(door: Door, tmp_path: Path) -> None:
    for i, (name, (content, _, _)) in enumerate(CASES.items()):
        folder = tmp_path / str(i)
        folder.mkdir()
        assert np.array_equal(door(content, folder), np.array(decoded_picture(content, "x"))), name


@pytest.mark.parametrize("name", sorted(CORRUPT))
def test_whatever_a_decoder_raises_is_a_corrupt_image(name: str) -> None:
    with pytest.raises(CorruptImageError, match=r"^row 3 cannot be decoded \(.+\)"):
        decoded_picture(CORRUPT[name], "row 3")


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyError("x"), OverflowError(), AssertionError(), EOFError()])
def test_so_are_errors_of_decoders_to_come(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any) -> None:
        raise error

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fail)
    with pytest.raises(CorruptImageError, match=r"^row 3 cannot be decoded \(.+\)"):
        decoded_picture(PLAIN, "row 3")


@pytest.mark.parametrize("door", DOORS)
def test_every_door_tells_corrupt_images(door: Door, tmp_path: Path) -> None:
    for i, content in enumerate(CORRUPT.values()):
        folder = tmp_path / str(i)
        folder.mkdir()
        with pytest.raises(CorruptImageError, match="cannot be decoded"):
            door(content, folder)


def test_sizes_follow_the_orientation() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decoded_picture(encoded(Image.new("RGB", (30, 20)), "JPEG", exif=exif), "x").size == (20, 30)


def test_a_header_is_read_without_the_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[PngImageFile] = []
    monkeypatch.setattr(PngImageFile, "load", lambda image: decoded.append(image))
    assert picture_header(encoded(Image.new("RGB", (30, 20)), "PNG"), "x").size == (30, 20)
    assert not decoded


def test_prompts_in_pictures_are_still_found(tmp_path: Path) -> None:
    chunk = PngInfo()
    chunk.add_text("diffusion-align", '{"prompt": "a red star"}')
    Image.fromarray(COLOUR).save(tmp_path / "a.png", pnginfo=chunk)
    (item,) = read_items(ScoreOptions(str(tmp_path), ("scenes-oracle",)))
    assert item.prompt == "a red star"


def test_there_is_one_decoder() -> None:
    root = Path(__file__).resolve().parent.parent
    files = [path for room in ("diffusion_align", "rewards", "training") for path in (root / room).rglob("*.py")]
    opening = [path.name for path in files if re.search(r"\bImage\.open\(", path.read_text())]
    assert opening == ["pictures.py"]


# -- masks -------------------------------------------------------------------------------------------------------------

MARKED = HOLE > 0


def masks() -> dict[str, bytes]:
    """The same hole as different tools save it."""
    ones = (HOLE // 255).astype(np.uint8)
    white = np.full((SIDE, SIDE, 3), 255, np.uint8)
    palette = Image.fromarray(ones, "P")
    palette.putpalette([0, 0, 0, 128, 0, 0])  # PASCAL VOC's first class
    inverse = Image.fromarray((1 - ones).astype(np.uint8), "P")
    inverse.putpalette([255, 255, 255, 0, 0, 0])
    soft = np.where(np.roll(MARKED, 1, axis=1) & ~MARKED, 60, HOLE).astype(np.uint8)
    return {
        "0 and 255": MASK,
        "0 and 1": encoded(Image.fromarray(ones), "PNG"),
        "rgb of 0 and 1": encoded(Image.fromarray(as_rgb(ones)), "PNG"),
        "0 and 128": encoded(Image.fromarray(ones * 100), "PNG"),
        "1 bit": encoded(Image.fromarray(HOLE).convert("1"), "PNG"),
        "rgb": encoded(Image.fromarray(as_rgb(HOLE)), "PNG"),
        "jpeg": encoded(Image.fromarray(HOLE), "JPEG", quality=95),
        "16 bits": encoded(Image.fromarray(HOLE.astype(np.uint16) * 257), "PNG"),
        "16 bits of 0 and 1": encoded(Image.fromarray(ones.astype(np.uint16)), "PNG"),
        "32 bits of 0 and 1": encoded(Image.fromarray(ones.astype(np.int32)), "TIFF"),
        "floats": encoded(Image.fromarray(ones.astype(np.float32)), "TIFF"),
        "class palette": encoded(palette, "PNG"),
        "palette that begins with white": encoded(inverse, "PNG"),
        "white, with alpha": encoded(Image.fromarray(np.dstack([white, HOLE])), "PNG"),
        "black, with alpha": encoded(Image.fromarray(np.dstack([white * 0, HOLE])), "PNG"),
        "white strokes on nothing": encoded(Image.fromarray(np.dstack([as_rgb(HOLE), HOLE])), "PNG"),
        "black and white, opaque": encoded(Image.fromarray(np.dstack([as_rgb(HOLE), white[..., :1]])), "PNG"),
        "grey, with alpha": encoded(Image.fromarray(np.dstack([white[..., :1], HOLE]), "LA"), "PNG"),
        "soft edge": encoded(Image.fromarray(soft), "PNG"),
    }  # fmt: skip


def mask_of_generate(content: bytes, folder: Path) -> NDArray[np.bool_]:
    return hole(folder, PLAIN, content).masks[0, 0].numpy() > 0.5


def mask_of_a_folder(content: bytes, folder: Path) -> NDArray[np.bool_]:
    (folder / "a.png").write_bytes(PLAIN)
    (folder / "mask.png").write_bytes(content)
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "mask": "mask.png"}')
    return load_holes(PictureFolder(folder), [0], [1], SIDE, ("box",)).masks[0, 0].numpy() > 0.5


def mask_of_ratings(content: bytes, folder: Path) -> NDArray[np.bool_]:
    white = encoded(Image.new("RGB", (SIDE, SIDE), (255, 255, 255)), "PNG")
    ratings = Ratings(parquet(folder, image=white, source=white, mask=content, score_overall=3.0))
    left = RatingExamples(ratings, lambda pixels: pixels).example(0, 0, False).left
    return left.numpy()[0] < 0.5


MASK_DOORS = [mask_of_generate, mask_of_a_folder, mask_of_ratings]


@pytest.mark.parametrize("name", sorted(masks()))
def test_masks_mark_the_hole(name: str) -> None:
    found = decoded_mask(masks()[name], "x")
    assert (found == MARKED).mean() > (0.995 if name == "jpeg" else 0.9999)


@pytest.mark.slow
@pytest.mark.parametrize("door", MASK_DOORS)
def test_every_door_reads_masks_alike(door: Callable[[bytes, Path], NDArray[np.bool_]], tmp_path: Path) -> None:
    for i, (name, content) in enumerate(masks().items()):
        folder = tmp_path / str(i)
        folder.mkdir()
        assert np.array_equal(door(content, folder), decoded_mask(content, "x")), name


@pytest.mark.parametrize("door", MASK_DOORS)
@pytest.mark.parametrize(("value", "marks"), [(0, "nothing"), (1, "nothing"), (255, "everything")])
def test_masks_that_mark_nothing_or_everything_are_refused(
    door: Callable[[bytes, Path], Any], value: int, marks: str, tmp_path: Path
) -> None:
    for kind in ("L", "RGB"):
        content = encoded(Image.new("L", (SIDE, SIDE), value).convert(kind), "PNG")
        with pytest.raises(CorruptImageError, match=f"mask.*marks {marks}"):
            door(content, tmp_path)


@pytest.mark.parametrize("alpha", [0, 255])
def test_so_are_white_ones_that_are_opaque_or_transparent_everywhere(alpha: int) -> None:
    content = encoded(Image.new("RGBA", (SIDE, SIDE), (255, 255, 255, alpha)), "PNG")
    with pytest.raises(CorruptImageError, match="marks everything" if alpha else "marks nothing"):
        decoded_mask(content, "x")


def test_a_hole_that_the_crop_cuts_off_is_refused(tmp_path: Path) -> None:
    wide = np.zeros((SIDE, 3 * SIDE), np.uint8)
    wide[:, :10] = 255
    picture = encoded(Image.new("RGB", (3 * SIDE, SIDE)), "PNG")
    with pytest.raises(CorruptImageError, match="cropped to 64 x 64 pixels: the mask marks nothing"):
        hole(tmp_path, picture, encoded(Image.fromarray(wide), "PNG"))


def test_a_mask_of_another_size_is_refused(tmp_path: Path) -> None:
    small = encoded(Image.fromarray(HOLE).resize((32, 32), 0), "PNG")
    with pytest.raises(CorruptImageError, match=r"mask\.png: the mask has 32 x 32 pixels, its picture a\.png 64 x 64"):
        mask_of_a_folder(small, tmp_path)
