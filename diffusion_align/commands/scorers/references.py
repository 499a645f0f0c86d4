"""What scorers are known to say of known pictures: numbers of their authors, and our own of what the package ships."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Reference:
    """Scores that a scorer must reproduce.

    Attributes:
        tolerance: largest difference that rounding of another device explains.
        source: where the numbers stand.
        pictures: https addresses of the authors' pictures; empty for the cards (``cards.py``).
        prompts: one for each of them.
    """

    scores: tuple[float, ...]
    tolerance: float
    source: str
    pictures: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()


IMAGE_REWARD = "0105ff13e24fd3c06db693e67678380882db9752"
OWN = "recorded with this package"
#: Scores of the cards by what comes with this package or one that it may install, and the tolerance.
CARDS = {
    "scenes-oracle": ((0.8001, 0.9367, 0.9584, 0.9171), 0.001),
    "scenes-clip": ((0.88099, 0.95043, 0.95959, 0.91786), 0.001),
    "scenes-vp": ((-0.78528, 2.46856, 2.39023, 3.52648), 0.002),
    "scenes-vp-words": ((3.08454, 6.0608, 6.84628, 7.08490), 0.002),
    "scenes-vp-inpaint": ((-1.52944, 1.86471, 4.97132, 1.42771), 0.002),
    "scenes-edit": ((0.02609, 2.70722, 0.71141, -2.55748), 0.002),
    "scenes-pal": ((-2.38272, 2.4467, 1.54128, -3.33064), 0.002),
    "nsfw": ((0.99346, 0.9999, 0.99936, 0.99826), 0.001),
    "ocr": ((1.0, 1.0, 5 / 6, 0.0), 0.001),
}

#: By the scorer's name. Of the other published scorers no author's numbers for single pictures were found.
REFERENCES: Mapping[str, Reference] = MappingProxyType(
    {
        "image-reward": Reference(
            (0.5811622738838196, 0.2745276093482971, -1.4131819009780884, -2.029569625854492),
            0.02,
            f"README of THUDM/ImageReward, {IMAGE_REWARD[:7]}",
            tuple(
                f"https://raw.githubusercontent.com/THUDM/ImageReward/{IMAGE_REWARD}/assets/images/{i}.webp"
                for i in (1, 2, 3, 4)
            ),
            ("a painting of an ocean with clouds and birds, day time, low depth field effect",) * 4,
        ),
        **{name: Reference(scores, tolerance, OWN) for name, (scores, tolerance) in CARDS.items()},
    }
)
