"""The reader of small pictures: where things are, and pictures that are in several pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffusion_align.data import ComparisonExamples, Comparisons, ExampleLoader, collate_comparisons
from diffusion_align.rewards.vp import VPScore, first_of_each, sine_positions
from diffusion_align.scenes.grammar import COLORS, SHAPES, SIZES, parse_prompt, sample_scene
from diffusion_align.scenes.make_comparisons import Questions, changing_scales, judged_pictures, mirrored_prompt
from diffusion_align.scenes.make_pairs import decode_jpeg
from diffusion_align.scenes.oracle import score_image
from diffusion_align.scenes.pretrain.corpus import Corpus, corpus_scenes, load_corpus, make_corpus
from diffusion_align.scenes.pretrain.reader import places, places_loss, reader_batch
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


def test_places_are_learnt_by_the_cross_entropy_of_each_kind() -> None:
    torch.manual_seed(0)
    said, things = torch.randn(2, 64, 18), torch.zeros(2, 64, 3, dtype=torch.long)
    things[0, 5] = torch.tensor([1, 7, 2])
    log_p = [part.log_softmax(-1) for part in said.split([7, 8, 3], dim=-1)]
    expected = 0.0
    for kind, part in enumerate(log_p):
        weight = torch.where(things[..., kind] == 0, 0.1, 1.0)
        own = -part.gather(-1, things[..., kind : kind + 1])[..., 0]
        expected += float((weight * own).sum() / weight.sum())
    torch.testing.assert_close(float(places_loss(said, things)), expected)


def test_readers_see_scenes_and_their_mirror_images_with_what_is_where() -> None:
    rng = np.random.default_rng(0)
    scene = sample_scene(parse_prompt(PROMPT), rng)
    images, found = reader_batch(Corpus(render(scene)[None], [PROMPT]), places(scene)[None], rng, 16)
    assert images.shape == (16, 3, 64, 64)
    right = set()
    for image, things in zip(images, found, strict=True):
        pixels = (image.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
        right |= {text for text in (PROMPT, mirrored_prompt(PROMPT)) if score_image(pixels, text).correct}
        for thing in detect(pixels).objects:
            shape, color, size = things[int(thing.y * 8) * 8 + int(thing.x * 8)].tolist()
            named = (SHAPES[shape - 1], COLORS[color - 1], SIZES[size - 1])
            assert named == (thing.shape, thing.color, thing.size)
        assert int((things > 0).sum()) == 6  # two objects, three things each
    assert right == {PROMPT, mirrored_prompt(PROMPT)}


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
