"""Choices that are made by a hash of what they are about: the same after every restart, and told by nothing else."""

from __future__ import annotations

import hashlib
import json


def opaque(*parts: object) -> str:
    """24 hexadecimal digits that stand for ``parts`` and do not show them."""
    return hashlib.sha256(json.dumps([str(part) for part in parts]).encode()).hexdigest()[:24]


def share(*parts: object) -> float:
    """A number in [0, 1) that depends on ``parts`` alone, uniform over their values."""
    return int(opaque(*parts)[:13], 16) / 16**13


def normalised(prompt: str) -> str:
    """A prompt as it is compared: lower case, single spaces, no full stop at the end."""
    return " ".join(prompt.lower().split()).rstrip(" .")


def held_out(prompt: str, portion: float, seed: int) -> bool:
    """Whether a prompt belongs to the test split: by its hash, so before the first label and for every annotator."""
    return share("holdout", seed, normalised(prompt)) < portion
