"""The reader of small pictures: where things are, captions, and pictures that are in several pairs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from diffusion_align.data import ComparisonExamples, Comparisons, collate_comparisons
from diffusion_align.rewards.vp import VPScore, first_of_each, sine_positions
from diffusion_align.scenes.grammar import parse_prompt, sample_scene
from diffusion_align.scenes.make_comparisons import Questions, changing_scales, judged_pictures, mirrored_prompt
from diffusion_align.scenes.make_pairs import decode_jpeg
from diffusion_align.scenes.oracle import score_image
from diffusion_align.scenes.render import render
from diffusion_align.training.config import RewardConfig
from diffusion_align.training.reward import score_both
from diffusion_align.training.scorers import find_tokenizer, reader_settings

PROMPT = "a small red star left of a large blue ring on a dark background"
ASPECTS = ["prompt_following", "aesthetic", "fidelity"]


@pytest.fixture(scope="module")
def scorer() -> VPScore:
    torch.manual_seed(0)
    tokenizer = find_tokenizer("scenes-sdxl")
    settings = reader_settings(RewardConfig(architecture="fine"), tokenizer)
    return VPScore({**settings, "aspects": ASPECTS}, tokenizer).eval()


def rows(questions: Questions, count: int = 3) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    pictures = np.stack([render(sample_scene(parse_prompt(PROMPT), rng)) for _ in range(count)])
    return judged_pictures([PROMPT], pictures, count, rng, questions)


def test_sine_positions_tell_all_places_apart() -> None:
    positions = sine_positions(8, 128)[0]
    assert positions.shape == (64, 128)
    apart = torch.cdist(positions, positions) + 10 * torch.eye(64)
    assert float(apart.min()) > 0.3
    assert torch.equal(positions[0, :64], positions[7, :64])  # one row: the same first half
    assert torch.equal(positions[0, 64:], positions[8, 64:])  # one column: the same second half


def test_the_first_of_each_number_is_found() -> None:
    numbers = torch.tensor([5, 5, 2, 7, 2])
    first, where = first_of_each(numbers)
    assert sorted(first.tolist()) == [0, 2, 3]
    assert torch.equal(numbers[first][where], numbers)


def test_caption_loss_is_the_cross_entropy_of_every_next_token(scorer: VPScore) -> None:
    images, captions = torch.rand(2, 3, 64, 64), ["a red star on a dark background", PROMPT]
    tokens = scorer.tokenizer(captions)["input_ids"]
    losses = []
    for image, ids in zip(images, tokens, strict=True):  # one prefix after the other, nothing padded
        seen = scorer.reader.see([image[None]])
        for n in range(1, len(ids)):
            prefix = torch.tensor([ids[:n]])
            states = scorer.reader.read(seen, prefix, torch.ones_like(prefix), causal=True)
            words = scorer.reader.text.embeddings.word_embeddings.weight
            losses.append(cross_entropy(states[0, -1:] @ words.T, torch.tensor([ids[n]])))
    found = scorer.caption_loss(scorer.reader.see([images]), captions)
    torch.testing.assert_close(found, torch.stack(losses).mean(), rtol=1e-4, atol=1e-4)


def test_pictures_in_several_pairs_are_scored_once_and_alike(
    scorer: VPScore, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datasets import Dataset

    Dataset.from_list(rows(Questions(near_misses=2, votes=4))).to_parquet(tmp_path / "train-00000-of-00001.parquet")
    comparisons = Comparisons(tmp_path, "train")
    examples = ComparisonExamples(comparisons, scorer.preprocess)
    seeds = list(range(len(comparisons)))  # half of the pairs are exchanged
    batch = collate_comparisons([examples.example(i, 0, False) for i in seeds], seeds)
    assert len(comparisons) == 9
    assert len(batch.pictures.unique()) == 3
    encoded, see = [], scorer.reader.see

    def counted(pictures: list[torch.Tensor]) -> torch.Tensor:
        encoded.append(len(pictures[0]))
        return see(pictures)

    monkeypatch.setattr(scorer.reader, "see", counted)
    with torch.no_grad():
        found = score_both(scorer, batch).reward
        each = scorer.evaluate(batch.images.flatten(0, 1), batch.prompts * 2, {}).reward
    torch.testing.assert_close(found, each)
    assert encoded == [3, 18]


def test_votes_are_shares_and_name_no_user() -> None:
    found = rows(Questions(votes=8))
    assert all(row["user_id"] == "" for row in found)
    labels = [row[name] for row in found for name in ("label_0", "label_0_aesthetic")]
    assert all(float(label * 16).is_integer() for label in labels)  # eighths, or halves of them for ties


def test_mirrored_pictures_fit_the_mirrored_prompt() -> None:
    assert mirrored_prompt(PROMPT) == PROMPT.replace("left", "right")
    prompts = set()
    for seed in range(8):
        rng = np.random.default_rng(seed)
        pictures = np.stack([render(sample_scene(parse_prompt(PROMPT), rng)) for _ in range(2)])
        found = judged_pictures([PROMPT], pictures, 2, rng, Questions(mirrored=True))
        prompts.add(found[0]["caption"])
        score = score_image(decode_jpeg(found[0]["jpg_0"]), found[0]["caption"])
        assert score.facts["relation"]
    assert prompts == {PROMPT, mirrored_prompt(PROMPT)}


def test_changing_scales_change_once() -> None:
    table = changing_scales(40, 10, 3)
    assert table.shape == (10, 40)
    assert ((table >= 1.25) & (table <= 10)).all()
    assert ((np.diff(table, axis=0) != 0).sum(axis=0) <= 1).all()
    assert np.array_equal(table[:, :5], changing_scales(5, 10, 3))  # a picture's schedule is its own
