"""The reader of small pictures: objects that the text reads, and pictures that are in several pairs."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffusion_align.data import ComparisonExamples, Comparisons, ExampleLoader, collate_comparisons
from diffusion_align.evaluation.judging import score_both
from diffusion_align.rewards import load_scorer
from diffusion_align.rewards.trained.vp import ObjectTower, VPScore, first_of_each
from diffusion_align.scenes.make.comparisons import changing_scales, imperfect_rows, judged_pictures
from diffusion_align.scenes.make.pairs import decode_jpeg
from diffusion_align.scenes.pretrain.corpus import corpus_scenes, load_corpus, make_corpus
from diffusion_align.scenes.pretrain.reader import (
    COLOR,
    UNTOLD,
    Pictures,
    places,
    places_loss,
    reader_batch,
    recolour,
    seen_pictures,
    train_reader,
)
from diffusion_align.scenes.world.grammar import COLORS, SHAPES, SIZES, parse_prompt, sample_scene
from diffusion_align.scenes.world.oracle import score_image
from diffusion_align.scenes.world.questions import Questions, mirrored_prompt
from diffusion_align.scenes.world.render import render
from diffusion_align.scenes.world.vision import detect
from diffusion_align.training.scorers.building import build_scorer
from diffusion_align.training.scorers.config import RewardConfig

PROMPT = "a small red star left of a large blue ring on a dark background"


def rows(questions: Questions, count: int = 3) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    pictures = np.stack([render(sample_scene(parse_prompt(PROMPT), rng)) for _ in range(count)])
    return judged_pictures([PROMPT], pictures, count, rng, questions)


def test_the_text_reads_the_places_that_likeliest_hold_an_object(scorer: VPScore) -> None:
    tower, images = scorer.reader.vision, torch.rand(2, 3, 64, 64)
    assert isinstance(tower, ObjectTower)
    places, read = tower.places(images), tower(images)
    (shapes, colors, sizes), centre = tower.said(places)
    assert read.shape == (2, 6 + 4, 128)
    for picture in range(2):
        empty = shapes[picture].softmax(-1)[:, 0]
        for token, place in zip(read[picture], empty.argsort()[:6].tolist(), strict=False):
            x, y = ((torch.tensor([place % 8, place // 8]) + centre[picture, place]) / 8).tolist()
            angles = [[math.pi * 2**k * value for k in range(4)] for value in (x, y)]
            wave = [f(angle) for of in angles for f in (math.sin, math.cos) for angle in of]
            shares = [kind[picture, place].softmax(-1) for kind in (shapes, colors, sizes)]
            described = torch.cat([*shares, torch.tensor(wave), places[picture, place]])
            torch.testing.assert_close(token, tower.object(described), rtol=1e-4, atol=1e-4)
    last_quarter = places[:, [row * 8 + column for row in range(4, 8) for column in range(4, 8)]].mean(dim=1)
    torch.testing.assert_close(read[:, -1], tower.quarter(last_quarter) + tower.corners[3], rtol=1e-4, atol=1e-5)


def test_the_first_of_each_number_is_found() -> None:
    numbers = torch.tensor([5, 5, 2, 7, 2])
    first, where = first_of_each(numbers)
    assert sorted(first.tolist()) == [0, 2, 3]
    assert torch.equal(numbers[first][where], numbers)


def test_places_are_learnt_by_the_cross_entropy_of_each_kind_and_by_where_centres_are() -> None:
    torch.manual_seed(0)
    kinds, centre, things = [torch.randn(2, 64, n) for n in (7, 8, 3)], torch.rand(2, 64, 2), torch.zeros(2, 64, 5)
    things[0, 5] = torch.tensor([1, 7, 2, 0.25, 0.5])
    expected = 10 * ((centre[0, 5] - torch.tensor([0.25, 0.5])) ** 2).mean()
    for i, part in enumerate(kinds):
        weight = torch.where(things[..., i] == 0, 0.1, 1.0)
        own = -part.log_softmax(-1).gather(-1, things[..., i : i + 1].long())[..., 0]
        expected += (weight * own).sum() / weight.sum()
    torch.testing.assert_close(places_loss(kinds, centre, things), expected)


def test_readers_see_scenes_and_their_mirror_images_with_what_is_where() -> None:
    rng = np.random.default_rng(0)
    scene = sample_scene(parse_prompt(PROMPT), rng)
    images, found = reader_batch(Pictures(render(scene)[None], places(scene.objects)[None]), rng, 16)
    assert images.shape == (16, 3, 64, 64)
    lefts = set()
    for image, things in zip(images, found, strict=True):
        assert int((things[:, 0] > 0).sum()) == 2
        pixels = (image.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
        seen = {thing.color: thing for thing in detect(pixels).objects}
        for place in things[:, 0].nonzero()[:, 0].tolist():
            shape, color, size = (int(value) for value in things[place, :3])
            x, y = ((torch.tensor([place % 8, place // 8]) + things[place, 3:]) / 8).tolist()
            assert (SHAPES[shape - 1], SIZES[size - 1]) == (("star", "small") if color == 1 else ("ring", "large"))
            assert abs(seen[COLORS[color - 1]].x - x) < 0.06  # blemished pictures are bent by some pixels
            assert abs(seen[COLORS[color - 1]].y - y) < 0.06
        lefts.add(seen["red"].x < seen["blue"].x)
    assert lefts == {True, False}


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


def test_frozen_vision_neither_learns_nor_adapts_its_statistics(scorer: VPScore) -> None:
    torch.manual_seed(0)
    fresh = VPScore(scorer.settings(), scorer.tokenizer)
    fresh.reader.freeze_vision()
    fresh.train()
    before = {name: value.clone() for name, value in fresh.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in fresh.parameters() if p.requires_grad], 0.1)
    fresh.evaluate(torch.rand(4, 3, 64, 64), [PROMPT] * 4, {}).reward.square().sum().backward()
    optimizer.step()
    changed = {name for name, value in fresh.state_dict().items() if not torch.equal(value, before[name])}
    assert not any(
        name.startswith(f"reader.vision.{part}.") for name in changed for part in ("stem", "blocks", "classes")
    )
    assert any(name.startswith("reader.vision.object.") for name in changed)
    assert any(name.startswith("reader.text.") for name in changed)


def test_only_readers_of_pictures_have_vision_to_freeze() -> None:
    config = RewardConfig(scorer="clip", dataset="scenes-pairs", freeze_vision=True)
    with pytest.raises(ValueError, match="freeze_vision: expected a vp-score to train, found clip"):
        build_scorer(config, Comparisons("scenes-pairs"))


def test_relations_are_asked_about_right_objects() -> None:
    rows = imperfect_rows([PROMPT], 4, 3, Questions(near_misses=2, votes=4, marks=True, relations=True))
    asked = {row["caption"] for row in rows}
    relations = {parse_prompt(text).relation for text in asked}
    assert len(asked) == len(relations) == 3
    assert "left of" in relations
    assert len(rows) == 3 * 6
    for row in rows:
        facts = score_image(decode_jpeg(row["jpg_0"]), row["caption"]).facts
        assert all(right for name, right in facts.items() if name.endswith((" shape", " color")))
    place = PROMPT.split().index("left")
    marks = [row["wrong_words_0"][place] for row in rows if row["caption"] == PROMPT]
    assert None not in marks


def test_there_are_three_other_relations() -> None:
    with pytest.raises(ValueError, match="near_misses = 4: there are 3 other relations"):
        Questions(near_misses=4, relations=True)


def test_people_say_what_they_see_in_pictures_but_not_what_has_no_shape_or_is_held_out() -> None:
    blob = replace(detect(render(sample_scene(parse_prompt(PROMPT), np.random.default_rng(0)))).objects[0], shape=None)
    star = replace(blob, shape="star", color="green", size="small", x=0.3, y=1.0)
    found = places([replace(blob, x=0.8, y=0.55), star])
    told = {int(n): found[n].tolist() for n in found[:, 0].nonzero()[:, 0]}
    assert told[4 * 8 + 6][:3] == [-1, -1, -1]
    assert told[7 * 8 + 2][:3] == [-1, 1 + COLORS.index("green"), 1]
    kinds, centre = [torch.randn(1, 64, n) for n in (7, 8, 3)], torch.rand(1, 64, 2)
    loss = places_loss(kinds, centre, found[None])
    kinds[0][0, 7 * 8 + 2] += torch.randn(7)
    assert places_loss(kinds, centre, found[None]) == loss
    kinds[1][0, 7 * 8 + 2, 0] += 1
    assert places_loss(kinds, centre, found[None]) != loss


def test_recoloured_pictures_keep_their_shapes_and_nobody_says_their_colours() -> None:
    scene = sample_scene(parse_prompt(PROMPT), np.random.default_rng(0))
    images = torch.from_numpy(render(scene)).permute(2, 0, 1)[None].float() / 255
    things, turned = places(scene.objects)[None], images.clone()
    recolour(turned, changed := things.clone(), np.random.default_rng(0))
    assert not torch.allclose(turned, images, atol=0.1)
    torch.testing.assert_close(turned.amax(1), images.amax(1), atol=1e-5, rtol=0)  # HSV's value stays
    there = things[..., 0] > 0
    assert (changed[..., COLOR][there] == UNTOLD).all()
    assert (changed[..., COLOR][~there] == 0).all()
    assert torch.equal(changed[..., [0, 2, 3, 4]], things[..., [0, 2, 3, 4]])


@pytest.mark.slow
def test_a_reader_goes_on_with_a_models_pictures_and_only_its_tower_changes(scorer: VPScore, tmp_path: Path) -> None:
    from datasets import Dataset

    Dataset.from_list(rows(Questions())).to_parquet(tmp_path / "train-00000-of-00001.parquet")
    seen = seen_pictures([tmp_path])
    assert len(seen.images) == 3
    scene = sample_scene(parse_prompt(PROMPT), np.random.default_rng(0))
    rendered = Pictures(render(scene)[None], places(scene.objects)[None])
    train_reader(deepcopy(scorer), rendered, tmp_path / "out", 0.01, seen, batch_size=16)
    before, after = scorer.state_dict(), load_scorer(tmp_path / "out").state_dict()
    changed = {name for name, value in after.items() if not value.equal(before[name])}
    assert {name.split(".")[2] for name in changed} == {"stem", "blocks", "classes"}
    with pytest.raises(ValueError, match="architecture 'objects'"):
        train_reader(load_scorer("scenes-clip"), rendered, tmp_path / "out", 1.0)
