"""What a notebook shows of results: pictures in a grid, everything else in a line; and names that were meant."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import diffusion_align
from diffusion_align import PairRecord, Report, RewardOutput, load_adapter, load_pairs, sample
from diffusion_align.data.types import Judgement, ListRecord
from diffusion_align.guidance.judges.evaluator import load_evaluator
from diffusion_align.sampling.batch_run import Samples
from diffusion_align.sampling.steering import Steered
from diffusion_align.showing import MOST, grid_html, pil_pictures, shortened
from diffusion_align.training.engine.loop import TrainResult
from tests.data.tending.pictures import picture


def pictures_in(html: str) -> int:
    """How many there are; none of them, and nothing else, comes from elsewhere."""
    assert "http" not in html
    assert "<script" not in html
    return len(re.findall(r'src="data:image/png;base64,', html))


@pytest.mark.slow
def test_drawn_pictures_show_themselves_and_models_are_a_line(sdxl_folder: Path) -> None:
    adapter = load_adapter(sdxl_folder)
    drawn = sample(adapter, "a fox", seeds=[0, 1, 2], num_inference_steps=1)
    assert repr(drawn) == "Samples(3 pictures of 64x64, 2 denoiser calls each)"
    assert [shown.size for shown in drawn.pil()] == [(64, 64)] * 3
    assert pictures_in(drawn._repr_html_()) == 3
    assert re.fullmatch(r"Adapter\(sdxl, 64 pixels, [\d.]+ M parameters, float32 on cpu\)", repr(adapter))
    assert repr(adapter.train_lora(2)).endswith("cpu, a LoRA is trained)")
    assert repr(adapter.encode_prompts(["a", "b"])).startswith("Conditioning(embeds (2, ")


def test_pictures_are_what_tensors_say() -> None:
    tensor = torch.zeros(1, 3, 2, 2)
    tensor[0, 0, 0, 1] = 1.2
    (shown,) = pil_pictures(tensor)
    assert shown.getpixel((1, 0)) == (255, 0, 0)


def test_grids_are_cut_and_captions_are_text() -> None:
    pictures = pil_pictures(torch.zeros(MOST + 3, 3, 4, 4))
    html = grid_html(pictures, ["<img onerror=alert(1)>"] * len(pictures))
    assert pictures_in(html) == MOST
    assert "and 3 more" in html
    assert "<img onerror" not in html


RECORD = PairRecord(picture(1), picture(2), "a fox <b>in</b> the snow")
LISTED = ListRecord((picture(1), picture(2), picture(3)), Judgement(ranks=(0, 1, 1)), "a fox")


def test_pairs_and_lists_show_their_pictures() -> None:
    assert repr(RECORD) == "PairRecord(a pair: 'a fox <b>in</b> the snow', preference 1)"
    assert pictures_in(RECORD._repr_html_()) == 2
    assert "<b>in</b>" not in RECORD._repr_html_()
    assert repr(LISTED) == "ListRecord('a fox', 3 pictures, ranks [0, 1, 1])"
    assert pictures_in(LISTED._repr_html_()) == 3
    assert RECORD.pil()[0].size == RECORD.images()[0].size


def test_data_sets_show_their_first_pairs(pairs_folder: Path) -> None:
    pairs = load_pairs(pairs_folder)
    assert repr(pairs).endswith("12 pairs)")
    assert pictures_in(pairs._repr_html_()) == 8  # type: ignore[union-attr]


def test_a_report_shows_itself_without_scripts() -> None:
    report = Report("<b>Mine</b>").text("hello")
    assert repr(report) == "Report('<b>Mine</b>', 1 blocks, 0 pictures)"
    assert report._repr_html_().startswith("<iframe sandbox srcdoc=")


@pytest.mark.parametrize(
    ("value", "line"),
    [
        (RewardOutput(torch.tensor([0.0, 1.0]), {"style": torch.zeros(2)}),
         "RewardOutput(2 rewards, mean 0.5, 0 to 1; aspects: style)"),
        (TrainResult(Path("runs/x"), Path("runs/x/lora.safetensors"), 1200, None, [{"step": 1, "loss": 0.5}]),
         "TrainResult(1,200 steps, loss 0.5: runs/x/lora.safetensors)"),
        (Steered(torch.zeros(2, 3, 4, 4), torch.tensor([1.0, 2.0]), 50.0, 4.0, torch.zeros(2)),
         "Steered(2 pictures, mean reward 1.5, 50 calls each)"),
        (Samples(torch.zeros(0, 3, 8, 8), torch.zeros(0), torch.zeros(0), 0.0),
         "Samples(0 pictures of 8x8, 0 denoiser calls each)"),
    ],
)  # fmt: skip
def test_outputs_are_a_line(value: Any, line: str) -> None:
    assert repr(value) == line


def test_long_texts_are_cut() -> None:
    assert shortened("a  b\nc") == "'a b c'"
    assert len(shortened("word " * 40)) == 62


def test_names_that_were_meant_are_told() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'load_adaptor' \(did you mean 'load_adapter'\?\)"):
        _ = diffusion_align.load_adaptor
    with pytest.raises(FileNotFoundError, match=r"'scenes-sdx' not found \(did you mean 'scenes-sdxl'\?\)"):
        load_adapter("scenes-sdx")
    with pytest.raises(FileNotFoundError, match=r"'scenes-pair' not found \(did you mean 'scenes-pairs'\?\)"):
        load_pairs("scenes-pair")
    with pytest.raises(FileNotFoundError, match=r"did you mean 'scenes-sd-evaluator'"):
        load_evaluator("scene-sd-evaluator")
