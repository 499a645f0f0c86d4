"""Pictures to try a scorer with, drawn without chance: the same bytes on every machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from diffusion_align.scenes.world.grammar import Scene, SceneObject
from diffusion_align.scenes.world.render import render

#: Side of the pictures for scorers of the embedded world, and for those of the real one.
SCENE_SIZE, LARGE_SIZE = 64, 512

SCENES = {
    "a large red star on a dark background": Scene((SceneObject("star", "red", "large", 0.5, 0.48, 0.19),), "dark"),
    "two small blue rings on a dark background": Scene(
        (
            SceneObject("ring", "blue", "small", 0.28, 0.4, 0.115),
            SceneObject("ring", "blue", "small", 0.7, 0.62, 0.115),
        ),
        "dark",
        0.3,
    ),
    "a small green square left of a large orange circle on a light background": Scene(
        (
            SceneObject("square", "green", "small", 0.22, 0.5, 0.115),
            SceneObject("circle", "orange", "large", 0.68, 0.5, 0.19),
        ),
        "light",
        0.6,
    ),
    "a large white cross on a grey background": Scene(
        (SceneObject("cross", "white", "large", 0.45, 0.55, 0.19),), "grey", 0.8
    ),
}
#: What the signs say, and what is asked for: right, right, one letter off, something else.
SIGNS = {"OPEN": "open", "Main Street": "Main Street", "COFEE": "coffee", "EXIT": "bakery"}


@dataclass(frozen=True)
class Cards:
    """Four pictures with their prompts.

    Attributes:
        images: (4, 3, H, W) float in [0, 1].
        context: what a scorer may need beside them, by name; a source picture is the next card's.
    """

    images: Tensor
    prompts: list[str]
    context: dict[str, Any] = field(default_factory=dict)


def scene_cards(size: int) -> Cards:
    """The scenes at ``size`` pixels."""
    images = torch.stack([torch.from_numpy(render(scene, size)) for scene in SCENES.values()])
    images = images.permute(0, 3, 1, 2).float() / 255
    prompts = list(SCENES)
    masks = torch.zeros(len(images), 1, size, size)
    masks[..., : size // 2] = 1
    context = {
        "source_images": images.roll(-1, dims=0),
        "source_prompts": rotated(prompts),
        "instructions": [f"change it to {prompt}" for prompt in prompts],
        "masks": masks,
    }
    return Cards(images, prompts, context)


def sign_cards() -> Cards:
    """Signs with a word or two, for scorers that read."""
    font = ImageFont.load_default(64)
    pictures = []
    for text in SIGNS:
        picture = Image.new("RGB", (LARGE_SIZE, LARGE_SIZE // 2), "white")
        ImageDraw.Draw(picture).text((LARGE_SIZE // 2, LARGE_SIZE // 4), text, "black", font, anchor="mm")
        pictures.append(torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8))
    images = torch.stack(pictures).view(len(SIGNS), LARGE_SIZE // 2, LARGE_SIZE, 3).permute(0, 3, 1, 2).float() / 255
    return Cards(images, [f'a sign that says "{asked}"' for asked in SIGNS.values()])


def rotated(texts: Sequence[str]) -> list[str]:
    """Each card gets the next one's text."""
    return [*texts[1:], texts[0]]


def mismatched(cards: Cards) -> Cards:
    """The pictures with each other's prompts and instructions."""
    context = dict(cards.context)
    if "instructions" in context:
        context["instructions"] = rotated(context["instructions"])
    return Cards(cards.images, rotated(cards.prompts), context)
