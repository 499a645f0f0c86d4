"""Words that a picture does not show: what users mark, what a scorer says of them, and what it learns from marks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from diffusion_align.data import ComparisonExamples, Comparisons, collate_comparisons
from diffusion_align.evaluation.judging import evaluate_scorer, said_of_words, score_both
from diffusion_align.rewards import RewardOutput, load_scorer
from diffusion_align.rewards.trained.vp import VPScore, evidence, last_tokens
from diffusion_align.scenes.make.comparisons import judged_pictures
from diffusion_align.scenes.world.grammar import Scene, SceneObject, parse_prompt, sample_prompt, sample_scene
from diffusion_align.scenes.world.marks import OVERLOOKED, SLIPPED, marked_words, wrong_words
from diffusion_align.scenes.world.oracle import score_image
from diffusion_align.scenes.world.questions import Questions, near_miss_scene
from diffusion_align.scenes.world.render import render
from diffusion_align.training.run import train
from diffusion_align.training.scorers.config import RewardConfig

PROMPT = "a small red star, a white ring and a large blue cross on a dark background"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of a scene of the prompt and one of a near miss, with users' marks."""
    folder, rng, rows = tmp_path_factory.mktemp("marked"), np.random.default_rng(0), []
    for _ in range(12):
        spec = sample_prompt(rng)
        pictures = np.stack([render(sample_scene(spec, rng)), render(near_miss_scene(spec, rng))])
        rows += judged_pictures([spec.text()], pictures, 2, rng, Questions(votes=4, marks=True))
    for split in ("train", "validation"):
        Dataset.from_list(rows).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.mark.parametrize(
    ("shown", "asked", "wrong"),
    [
        ("a red star on a dark background", "a red star on a dark background", set()),
        ("a red star on a dark background", "a red ring on a grey background", {"ring", "grey"}),
        ("two red stars on a dark background", "three red stars on a dark background", {"three"}),
        ("two red stars on a dark background", "two small blue stars on a dark background", {"small", "blue"}),
        ("a red star on the left on a dark background", "a red star on the right on a dark background", {"right"}),
        (
            "a large red star left of a large blue ring on a dark background",
            "a large red star right of a small blue ring on a dark background",
            {"right", "small"},
        ),
        (PROMPT, PROMPT.replace("white ring", "white circle"), {"circle"}),
    ],
)
def test_wrong_words_are_those_that_the_picture_contradicts(shown: str, asked: str, wrong: set[str]) -> None:
    spec, rng = parse_prompt(shown), np.random.default_rng(1)
    scene = sample_scene(spec, rng)
    while any(each.size != "large" for each in scene.objects) and "small" in wrong:  # "two red stars" are of any size
        scene = sample_scene(spec, rng)
    facts = score_image(render(scene), asked).facts
    found = wrong_words(asked, facts)
    assert {word for word, bad in zip(asked.split(), found, strict=True) if bad} == wrong


@pytest.mark.slow
def test_a_picture_without_a_wrong_word_is_correct() -> None:
    rng = np.random.default_rng(0)
    for _ in range(60):
        spec = sample_prompt(rng)
        for scene in (sample_scene(spec, rng), near_miss_scene(spec, rng)):
            score = score_image(render(scene), spec.text())
            assert score.correct != any(wrong_words(spec.text(), score.facts))


def test_where_a_thing_is_cannot_be_told_if_it_is_not_there() -> None:
    scene = sample_scene(parse_prompt("a red star left of a blue ring on a dark background"), np.random.default_rng(0))
    asked = "a red star left of a blue cross on a dark background"
    facts = score_image(render(scene), asked).facts
    found = dict(zip(asked.split(), wrong_words(asked, facts), strict=True))
    assert found["cross"] is True
    assert found["left"] is None
    marks = marked_words(asked, facts, np.random.default_rng(0))
    assert [i for i, mark in enumerate(marks) if mark is None] == [asked.split().index("left")]


def test_users_overlook_some_wrong_words_and_slip_on_few_right_ones() -> None:
    facts = score_image(render(sample_scene(parse_prompt("a red star on a dark background"), np.random.default_rng(0))),
                        "a red ring on a dark background").facts  # fmt: skip
    marks = marked_words("a red ring on a dark background", facts, np.random.default_rng(0), votes=4000)
    expected = [SLIPPED, SLIPPED, 1 - OVERLOOKED, *[SLIPPED] * 4]
    np.testing.assert_allclose(marks, expected, atol=0.02)


def test_each_word_is_told_by_its_last_token(scorer: VPScore) -> None:
    prompts = ["a red star", PROMPT]
    tokens = scorer.tokenize(prompts)
    assert tokens.input_ids.tolist() == scorer.tokenizer(prompts, padding="longest").input_ids
    at = last_tokens(tokens, prompts)
    assert at.shape == (2, 16)
    assert at[0].tolist() == [1, 2, 3] + [-1] * 13
    commas = PROMPT.split().index("star,")
    assert at[1, commas] == at[1, commas - 1] + 2  # "star" and ","


def test_what_is_said_of_words_is_read_beside_the_picture(scorer: VPScore) -> None:
    images, prompts = torch.rand(2, 3, 64, 64), ["a red star", PROMPT]
    output = scorer.score(images, prompts)
    assert output.words is not None
    assert output.words.shape == (2, 16)
    assert output.words[0].isnan().tolist() == [False] * 3 + [True] * 13
    assert scorer.words is not None
    for i, prompt in enumerate(prompts):
        ids = torch.tensor([scorer.tokenizer(prompt).input_ids])
        states = scorer.reader.read(scorer.reader.see([images[i : i + 1] * 2 - 1]), ids, torch.ones_like(ids))
        alone = scorer.words(states)[0, :, 0][last_tokens(scorer.tokenize([prompt]), [prompt])[0]]
        torch.testing.assert_close(output.words[i, : len(alone)], alone, rtol=1e-4, atol=1e-5)
        p = alone.sigmoid()
        state = torch.cat([states[0, 0], torch.stack([p.sum(), (1 - p).prod()])])
        torch.testing.assert_close(output.reward[i], scorer.head(state)[0], rtol=1e-4, atol=1e-5)


def test_evidence_counts_known_words_only() -> None:
    logits, known = torch.tensor([[0.0, math.log(3), 50.0]]), torch.tensor([[True, True, False]])
    torch.testing.assert_close(evidence(logits, known), torch.tensor([[1.25, 0.125]]))


def test_outputs_of_prompts_of_other_lengths_are_joined() -> None:
    parts = [RewardOutput(torch.zeros(1), words=torch.zeros(1, width)) for width in (2, 4)]
    joined = RewardOutput.cat(parts).words
    assert joined is not None
    assert joined.isnan().tolist() == [[False, False, True, True], [False] * 4]


def test_words_cut_off_by_max_tokens_are_not_learnt_from(scorer: VPScore, pairs: Path) -> None:
    settings = {**scorer.settings(), "max_tokens": 6}
    short = VPScore(settings, scorer.tokenizer).eval()
    examples = ComparisonExamples(Comparisons(pairs), short.preprocess)
    batch = collate_comparisons([examples.example(i, 0, False) for i in range(4)], [0, 1, 2, 3])
    said, marks = said_of_words(score_both(short, batch), batch)
    assert len(said) == len(marks) == 2 * 4 * 4  # a start, an end, and four words of one token
    assert not said.isnan().any()


def test_marks_follow_exchanged_pairs(pairs: Path, scorer: VPScore) -> None:
    comparisons = Comparisons(pairs)
    assert comparisons.marked
    examples = ComparisonExamples(comparisons, scorer.preprocess)
    record = comparisons[0]
    straight = collate_comparisons([examples.example(0, 0, False)], [0]).wrong_words
    exchanged = collate_comparisons([examples.example(0, 0, False)], [1]).wrong_words
    torch.testing.assert_close(straight[:, 0], torch.tensor(record.wrong_words))
    torch.testing.assert_close(exchanged, straight.flip(0))


@pytest.mark.parametrize(
    ("marks", "message"), [([0.0], "has 1 numbers: expected one for each of"), (None, "wrong_words_0 = 2.0 is wrong")]
)
def test_broken_marks_are_named(pairs: Path, tmp_path: Path, marks: list[float] | None, message: str) -> None:
    rows: list[dict[str, Any]] = Dataset.from_parquet(str(pairs / "train-00000-of-00001.parquet")).to_list()
    rows[1]["wrong_words_0"] = [2.0] * len(rows[1]["caption"].split()) if marks is None else marks
    Dataset.from_list(rows).to_parquet(tmp_path / "train-00000-of-00001.parquet")
    with pytest.raises(ValueError, match=f"row 1: .*{message}|row 1: {message}"):
        Comparisons(tmp_path)[1]


@pytest.mark.slow
def test_a_scorer_learns_which_words_are_wrong(pairs: Path, tmp_path: Path) -> None:
    config = RewardConfig(
        scorer="vp-score", architecture="objects", dataset=str(pairs), output_dir=str(tmp_path / "run"), max_steps=40,
        per_device_train_batch_size=12, learning_rate=2e-3, word_weight=4.0, warmup_steps=5, validation_split=None,
        save_steps=100, report_to="none", progress=False,
    )  # fmt: skip
    train(config)
    trained = VPScore.from_pretrained(tmp_path / "run" / "scorer")
    assert trained.settings()["words"]
    # Its own training pairs: half would be chance.
    assert evaluate_scorer(trained, Comparisons(pairs))["accuracy/words"] > 0.7


@pytest.mark.parametrize(
    ("asked", "wrong"),
    [
        ("a large red star left of a small blue ring on a dark background", set()),
        ("a large red star left of a small white ring on a dark background", {"white"}),
        ("a large red cross left of a small blue ring on a dark background", {"cross"}),
        ("a large red star left of a large blue ring on a grey background", {"large", "grey"}),
    ],
)
def test_the_shipped_scorer_names_the_words_that_a_scene_does_not_show(asked: str, wrong: set[str]) -> None:
    objects = (
        SceneObject("star", "red", "large", 0.3, 0.45, 0.19),
        SceneObject("ring", "blue", "small", 0.75, 0.55, 0.115),
    )
    image = torch.from_numpy(render(Scene(objects, "dark"))).permute(2, 0, 1)[None].float() / 255
    said = load_scorer("scenes-vp-words").score(image, [asked]).words
    assert said is not None
    # Of what is not there no place can be told.
    words = {word for word, logit in zip(asked.split(), said[0].tolist(), strict=True) if logit > 0}
    assert words - {"left"} == wrong
