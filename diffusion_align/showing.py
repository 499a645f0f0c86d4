"""Results as a notebook shows them: pictures in a grid, everything else in a line."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    from torch import Tensor

#: Pictures of a grid; more are counted.
MOST = 16
#: Longest side of a picture in a grid, in pixels, and the least that small ones are shown at.
LARGEST, LEAST = 384, 160


def pil_pictures(images: Tensor) -> list[Image.Image]:
    """Pictures (N, 3, H, W) in [0, 1] as PIL has them."""
    pixels = (images.detach().float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return [Image.fromarray(picture) for picture in pixels]


def grid_html(pictures: Sequence[Image.Image], captions: Sequence[str], total: int | None = None) -> str:
    """A grid of pictures with captions, which are shown as text, as HTML without scripts.

    Args:
        total: of how many these are the first ones; None: all are here.
    """
    cells = [
        f'<figure style="margin:0 8px 8px 0;display:inline-block;vertical-align:top">{_img(picture, caption)}'
        f'<figcaption style="max-width:{LEAST}px;font-size:small">{escape(caption)}</figcaption></figure>'
        for picture, caption in zip(pictures[:MOST], captions[:MOST], strict=True)
    ]
    more = (len(pictures) if total is None else total) - len(cells)
    return f"<div>{''.join(cells)}{f'<p>and {more:,} more</p>' if more > 0 else ''}</div>"


def page_html(page: str) -> str:
    """A whole page inside a notebook's."""
    style = "width:100%;height:640px;border:1px solid #8884"
    return f'<iframe sandbox srcdoc="{escape(page)}" style="{style}"></iframe>'


def shortened(text: str, most: int = 60) -> str:
    """A text in one line of at most ``most`` characters, quoted."""
    line = " ".join(text.split())
    return repr(line if len(line) <= most else f"{line[: most - 3]}...")


def _img(picture: Image.Image, caption: str) -> str:
    shown = picture.convert("RGB")
    shown.thumbnail((LARGEST, LARGEST))
    buffer = io.BytesIO()
    shown.save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    pixelated = "image-rendering:pixelated;" if max(shown.size) < LEAST else ""
    width = max(shown.width, LEAST)
    return f'<img alt="{escape(caption)}" src="data:image/png;base64,{data}" style="{pixelated}width:{width}px">'
