"""The known families. A new one is a file of this folder and a line here."""

from __future__ import annotations

from typing import Any

from .family import Family
from .sd import StableDiffusion
from .sdxl import StableDiffusionXL

FAMILIES: tuple[Family, ...] = (StableDiffusionXL(), StableDiffusion())


def find_family(pipeline: Any) -> Family:
    """The family of a loaded diffusers pipeline.

    Raises:
        ValueError: none matches; the message names the pipeline's class and the supported families.
    """
    for family in FAMILIES:
        if family.matches(pipeline):
            return family
    names = ", ".join(family.name for family in FAMILIES)
    raise ValueError(
        f"{type(pipeline).__name__} is not supported: expected a UNet pipeline of one of these families: {names} "
        "(Stable Diffusion 1.x/2.x, SDXL and their inpainting variants)"
    )
