"""Rendered text, read by a network that comes in a PyPI package."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion_align.rewards.protocol import RewardOutput, RewardScorer

_QUOTED = re.compile(r"\"([^\"]+)\"|'([^']+)'|“([^”]+)”")


class TextRenderingScorer(RewardScorer):
    """How much of the prompt's quoted text can be read in the picture, by PP-OCRv4. In [0, 1].

    1 - edit distance / length of the wanted text, at least 0; letters of either case, spaces do not count. A prompt
    without quoted text is a ValueError.
    """

    name = "ocr"

    def __init__(self) -> None:
        super().__init__()
        try:
            from rapidocr_onnxruntime import RapidOCR
        except ImportError as error:
            raise ImportError("scorer ocr needs: pip install 'diffusion-align[scorers]'") from error
        self.reader = RapidOCR()

    def evaluate(self, images: Tensor, prompts: list[str], context: dict[str, Any]) -> RewardOutput:
        rewards = []
        for image, prompt in zip(images, prompts, strict=True):
            wanted = plain("".join(first or second or third for first, second, third in _QUOTED.findall(prompt)))
            if not wanted:
                raise ValueError(f"scorer ocr: {prompt!r} has no text in quotes to look for")
            pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
            lines, _ = self.reader(np.ascontiguousarray(pixels[:, :, ::-1]))
            read = plain("".join(line[1] for line in lines or []))
            rewards.append(max(0.0, 1 - edit_distance(read, wanted) / len(wanted)))
        return RewardOutput(torch.tensor(rewards))


def plain(text: str) -> str:
    """Lower case, without white space."""
    return re.sub(r"\s+", "", text).lower()


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's."""
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, start=1):
        previous, row[0] = row[0], i
        for j, other in enumerate(b, start=1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (letter != other))
    return row[-1]


def load_ocr(name: str = "ocr") -> RewardScorer:
    """RapidOCR's PP-OCRv4."""
    return TextRenderingScorer()
