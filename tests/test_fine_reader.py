"""The reader of small pictures: where things are, captions, and pictures that are in several pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from diffusion_align.data import ComparisonExamples, Comparisons, ExampleLoader, collate_comparisons
from diffusion_align.rewards.vp import VPScore, first_of_each, sine_positions
from diffusion_align.scenes.grammar import COLORS, SHAPES, SIZES, parse_prompt, sample_scene
from diffusion_align.scenes.make_comparisons import Questions, changing_scales, judged_pictures, mirrored_prompt
from diffusion_align.scenes.make_pairs import decode_jpeg
from diffusion_align.scenes.oracle import score_image
from diffusion_align.scenes.pretrain.corpus import Corpus, corpus_scenes, load_corpus, make_corpus
from diffusion_align.scenes.pretrain.reader import ReaderLoss, places, reader_batch
from diffusion_align.scenes.render import render
from diffusion_align.scenes.vision import detect
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


def test_captioning_is_the_cross_entropy_of_every_next_token(scorer: VPScore) -> None:
    losses, images = ReaderLoss(scorer), torch.rand(2, 3, 64, 64)
    captions = ["a red star on a dark background", PROMPT]
    expected = []
    for image, ids in zip(images, scorer.tokenizer(captions)["input_ids"], strict=True):  # prefix by prefix, unpadded
        seen = scorer.reader.see([image[None]])
        for n in range(1, len(ids)):
            prefix = torch.tensor([ids[:n]])
            states = scorer.reader.read(seen, prefix, torch.ones_like(prefix), causal=True)
            expected.append(cross_entropy(losses.words(states)[0, -1:], torch.tensor([ids[n]])))
    found = losses.captioning(scorer.reader.see([images]), captions)
    torch.testing.assert_close(found, torch.stack(expected).mean(), rtol=1e-4, atol=1e-4)


def test_matching_prefers_the_right_caption(scorer: VPScore) -> None:
    losses, images = ReaderLoss(scorer), torch.rand(2, 3, 64, 64)
    captions = [["a red star on a dark background", PROMPT], [PROMPT, "two blue rings on a grey background"]]
    scores = torch.stack(
        [scorer.score(image.expand(2, -1, -1, -1), texts).aspects["prompt_following"]
         for image, texts in zip(images, captions, strict=True)]
    )  # fmt: skip
    found, right = losses.matching(scorer.reader.see([scorer.preprocess(images)]), captions)
    torch.testing.assert_close(found, -scores.log_softmax(dim=1)[:, 0].mean(), rtol=1e-4, atol=1e-4)
    assert float(right) == float((scores[:, 0] > scores[:, 1]).float().mean())


def test_readers_learn_from_right_captions_places_and_near_misses() -> None:
    rng = np.random.default_rng(0)
    scene = sample_scene(parse_prompt(PROMPT), rng)
    batch = reader_batch(Corpus(render(scene)[None], [PROMPT]), places(scene)[None], rng, 16)
    assert batch.images.shape == (16, 3, 64, 64)
    assert {each[0] for each in batch.captions} == {PROMPT, mirrored_prompt(PROMPT)}
    for image, (right, *wrong), things in zip(batch.images, batch.captions, batch.things, strict=True):
        pixels = (image.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
        assert score_image(pixels, right).correct
        assert right not in wrong
        for thing in detect(pixels).objects:
            shape, color, size = things[int(thing.y * 8) * 8 + int(thing.x * 8)].tolist()
            found = (SHAPES[shape - 1], COLORS[color - 1], SIZES[size - 1])
            assert found == (thing.shape, thing.color, thing.size)
        assert int((things > 0).sum()) == 6  # two objects, three things each


def test_the_corpus_scenes_are_those_of_its_pictures(tmp_path: Path) -> None:
    make_corpus(tmp_path, 6, seed=3, workers=1, chunk=4)
    corpus = load_corpus(tmp_path)
    scenes = corpus_scenes(6, seed=3, chunk=4)
    assert np.array_equal(corpus.images, np.stack([render(scene) for scene in scenes]))


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


class Rows:
    """Twenty examples that are their own numbers."""

    def __len__(self) -> int:
        return 20

    def sizes(self) -> list[tuple[int, int]]:
        return [(0, 0)] * 20

    def example(self, index: int, seed: int, drop_caption: bool) -> int:
        return index


def test_rows_that_stand_together_are_drawn_together() -> None:
    def drawn(seed: int, count: int = 5) -> list[int]:
        loader = ExampleLoader(Rows(), 4, lambda found, seeds: list(found), seed=seed, together=3)
        return [row for k in range(count) for row in loader.load(k)]

    epoch = drawn(0)
    assert sorted(epoch) == list(range(20))
    starts = [i for i, row in enumerate(epoch) if row % 3 == 0]
    assert all(epoch[i : i + 3] == [epoch[i], epoch[i] + 1, epoch[i] + 2] for i in starts if epoch[i] < 18)
    assert epoch != drawn(1)
    assert epoch != list(range(20))
