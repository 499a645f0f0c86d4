"""The figures of a set of pictures, prompt by prompt, and what a change of each of them means."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from .further_figures import Further
from .picture_measures import (
    BRIGHT,
    DARK,
    check_pictures,
    colour_entropy,
    edge_density,
    lab,
    layout_features,
    luma,
    near_duplicates,
    saturation,
    seed_distance,
    spectrum_peaks,
)

#: Pictures that are measured at once: large ones take some hundred MB each as spectra.
CHUNK = 8


@dataclass(frozen=True)
class Rule:
    """When a figure's change is worth an alarm.

    Attributes:
        says: what the figure is, in words.
        least: smallest change that counts, however sure it is; in the figure's unit, or a share of the base's.
        side: which changes count.
        relative: ``least`` is a share.
    """

    says: str
    least: float
    side: Literal["up", "down", "both"] = "both"
    relative: bool = False


#: When a change of each figure is worth an alarm.
RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "stipple": Rule("peak of the spectrum at 2 pixels, dB", 1.0, "up"),
        "grid_4": Rule("peak of the spectrum at 4 pixels, dB", 1.0, "up"),
        "grid_8": Rule("peak of the spectrum at 8 pixels, the VAE's grid, dB", 1.0, "up"),
        "dark": Rule("share of pixels below 0.05", 0.01, "up"),
        "bright": Rule("share of pixels above 0.95", 0.01, "up"),
        "saturation": Rule("mean saturation", 0.02),
        "green_red": Rule("mean a*, green to red", 1.0),
        "blue_yellow": Rule("mean b*, blue to yellow", 1.0),
        "edges": Rule("share of edge pixels", 0.01),
        "colour_entropy": Rule("entropy of colours, bits", 0.1),
        "diversity": Rule("distance between pictures of one prompt", 0.15, "down", relative=True),
        "high_frequency": Rule("energy from a quarter of a cycle a pixel on, dB of the whole", 1.0),
        "blockiness": Rule("jumps between blocks of 8 pixels, dB over other changes", 1.0, "up"),
        "brisque": Rule("BRISQUE, from 0 (natural) to 100 (distorted)", 5.0),
        "near_duplicates": Rule("share of pictures that nearly another one is", 0.05, "up"),
    }
)


@dataclass(frozen=True)
class Figures:
    """Figures of a set of pictures, each (P,) float64: means over the pictures of each prompt.

    ``RULES`` says what each is. ``diversity`` is None where there is one picture a prompt; the last four are None
    unless they were asked for, BRISQUE also where its files are not installed.
    """

    stipple: Tensor
    grid_4: Tensor
    grid_8: Tensor
    dark: Tensor
    bright: Tensor
    saturation: Tensor
    green_red: Tensor
    blue_yellow: Tensor
    edges: Tensor
    colour_entropy: Tensor
    diversity: Tensor | None = None
    high_frequency: Tensor | None = None
    blockiness: Tensor | None = None
    brisque: Tensor | None = None
    near_duplicates: Tensor | None = None

    @property
    def prompts(self) -> int:
        """How many prompts there are."""
        return len(self.stipple)

    def columns(self) -> dict[str, Tensor]:
        """The figures that there are, by name, each (P,)."""
        return {part.name: value for part in fields(self) if (value := getattr(self, part.name)) is not None}

    def means(self) -> dict[str, float]:
        """Mean of each figure over the prompts."""
        return {name: float(values.mean()) for name, values in self.columns().items()}

    def at(self, prompts: Tensor) -> Figures:
        """Of the prompts with these numbers, (n,) int64, each as often as it is there."""
        return Figures(**{name: values[prompts] for name, values in self.columns().items()})


@torch.no_grad()
def measure(
    images: Tensor,
    seeds_per_prompt: int = 1,
    features: Callable[[Tensor], Tensor] = layout_features,
    further: Further | None = None,
) -> Figures:
    """The figures of pictures (P K, 3, H, W) in [0, 1], the K pictures of a prompt side by side.

    Args:
        seeds_per_prompt: K.
        features: pictures (n, 3, H, W) to (n, D), whose distances are the diversity; e.g. of CLIP.
        further: measures the last four figures; None leaves them out.

    Raises:
        ValueError: no pictures, smaller than 32 pixels, or not a multiple of K of them.
    """
    check_pictures(images)
    if seeds_per_prompt < 1 or len(images) % seeds_per_prompt:
        raise ValueError(f"seeds_per_prompt = {seeds_per_prompt}: {len(images)} pictures are no multiple of it")

    found: dict[str, list[Tensor]] = {}
    described: list[Tensor] = []
    hashes: list[int] = []
    for chunk in images.split(CHUNK):
        chunk = chunk.clamp(0, 1) if chunk.dtype == torch.float64 else chunk.float().clamp(0, 1)
        for name, values in picture_figures(chunk).items():
            found.setdefault(name, []).append(values.double().cpu())
        if further is not None:
            figures, marks = further.measure(chunk)
            hashes += marks
            for name, values in figures.items():
                found.setdefault(name, []).append(values.double().cpu())
        if seeds_per_prompt > 1:
            described.append(features(chunk).double().cpu())
    means = {name: torch.cat(parts).view(-1, seeds_per_prompt).mean(dim=1) for name, parts in found.items()}
    diversity = seed_distance(torch.cat(described), seeds_per_prompt) if described else None
    copies = near_duplicates(hashes, seeds_per_prompt) if hashes else None
    return Figures(**means, diversity=diversity, near_duplicates=copies)


def picture_figures(images: Tensor) -> dict[str, Tensor]:
    """Figures of each of some pictures (n, 3, H, W), each (n,) on their device; no diversity, which takes several."""
    bright = luma(images)
    stipple, grid_4, grid_8 = spectrum_peaks(bright).unbind(dim=1)
    _, green_red, blue_yellow = lab(images).mean(dim=(2, 3)).unbind(dim=1)
    return {
        "stipple": stipple,
        "grid_4": grid_4,
        "grid_8": grid_8,
        "dark": (bright < DARK).double().mean(dim=(1, 2)),
        "bright": (bright > BRIGHT).double().mean(dim=(1, 2)),
        "saturation": saturation(images),
        "green_red": green_red,
        "blue_yellow": blue_yellow,
        "edges": edge_density(bright),
        "colour_entropy": colour_entropy(images),
    }
