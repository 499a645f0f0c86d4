"""How pictures and texts are given to Qwen-VL: the chat's format, sizes, and positions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

#: Qwen's chat format around one user message, and what older models have before it.
CHAT = "<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
#: 256 patches of 28 x 28 pixels, whatever the picture's size.
PIXELS = 256 * 28 * 28


@dataclass(frozen=True)
class Reading:
    """How pictures and texts are given to a backbone.

    Attributes:
        chat: format around one user message.
        by_rows: whether positions have the row and the column of a patch (M-RoPE), or just count tokens.
        resize: a picture (3, H, W) in [0, 1] as the image processor gets it.
        limits: options of the image processor.
    """

    chat: str
    by_rows: bool
    resize: Callable[[Tensor], Image.Image]
    limits: Mapping[str, int] = field(default_factory=dict)


def as_is(picture: Tensor) -> Image.Image:
    """The picture as it is."""
    return to_pil_image(picture.clamp(0, 1).float().cpu())


def in_patches_of_28(picture: Tensor) -> Image.Image:
    """Sides that are multiples of 28, about ``PIXELS`` pixels; the image processor then makes them multiples of 32."""
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    shown = as_is(picture)
    height, width = smart_resize(shown.height, shown.width, 28, PIXELS, PIXELS)
    return shown.resize((width, height), Image.Resampling.BICUBIC)


#: HPSv3 and EditReward on Qwen2-VL and Qwen2.5-VL: the authors give the language model no grids, in training neither.
COUNTED = Reading(SYSTEM + CHAT, False, as_is, {"min_pixels": PIXELS, "max_pixels": PIXELS})
#: EditReward on Qwen3-VL: its code leaves the size of pictures to the image processor.
WHOLE = Reading(CHAT, True, as_is)
#: HPSv3++.
TWICE = Reading(CHAT, True, in_patches_of_28)


def row_positions(image: Tensor, sides: Sequence[Sequence[int]]) -> Tensor:
    """M-RoPE's positions (3, B, L) int64 of time, row and column.

    A text token has one number three times, one more than the largest before it. A picture's tokens share the time of
    its first one, and count rows and columns from there.

    Args:
        image: (B, L) bool, tokens of pictures.
        sides: rows and columns of tokens of each picture, in the order in which the batch holds them.
    """
    positions = torch.empty(3, *image.shape, dtype=torch.long)
    left = iter(sides)
    for row, marks in enumerate(image.tolist()):
        place, at = 0, 0
        while at < len(marks):
            if not marks[at]:
                positions[:, row, at] = place
                place, at = place + 1, at + 1
                continue
            rows, columns = next(left)
            grid = torch.cartesian_prod(torch.arange(1), torch.arange(rows), torch.arange(columns)).T
            positions[:, row, at : at + rows * columns] = place + grid
            place, at = place + max(rows, columns), at + rows * columns
    return positions
