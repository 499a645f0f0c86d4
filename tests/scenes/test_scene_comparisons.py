"""Judged pairs of the embedded world: who judges, and pictures with mistakes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pyarrow.parquet import read_table

from diffusion_align.scenes.make.comparisons import imperfect_rows, main, preference_probability, rejudged_rows
from diffusion_align.scenes.make.pairs import POPULATIONS, judge, split_file
from diffusion_align.scenes.world.grammar import parse_prompt
from diffusion_align.scenes.world.imperfect import bent, imperfect_picture, loose_scene, merged
from diffusion_align.scenes.world.oracle import OracleScore, score_image
from diffusion_align.scenes.world.questions import Questions, near_miss
from diffusion_align.scenes.world.render import render

PROMPT = "a large red star left of a small blue ring on a dark background"


def scored(following: float, aesthetic: float, fidelity: float) -> OracleScore:
    return OracleScore(following, aesthetic, fidelity, 0.0, False, {})


@pytest.mark.parametrize("population", list(POPULATIONS))
def test_everyone_judges_as_often_as_their_share(population: str) -> None:
    users = POPULATIONS[population]
    assert sum(user.share for user in users.values()) == pytest.approx(1)
    rng = np.random.default_rng(0)
    names = [judge(scored(1, 1, 1), scored(0, 0, 0), rng, population).user for _ in range(2000)]
    for name, user in users.items():
        assert names.count(name) / 2000 == pytest.approx(user.share, abs=0.04)


def test_bayes_probability_is_the_mean_of_many_verdicts() -> None:
    first, second = scored(0.5, 0.62, 0.9), scored(0.5, 0.6, 0.92)
    for population in POPULATIONS:
        rng = np.random.default_rng(1)
        labels = np.array([judge(first, second, rng, population).label_0 for _ in range(4000)])
        win, tie = preference_probability(first, second, population)
        assert (labels == 0.5).mean() == pytest.approx(tie, abs=0.03)
        assert (labels == 1).mean() == pytest.approx(win, abs=0.03)


def test_opposed_users_disagree_where_similar_ones_agree() -> None:
    pretty, plain = scored(0.5, 0.9, 0.9), scored(0.5, 0.4, 0.9)
    assert preference_probability(pretty, plain, "similar")[0] > 0.95
    assert 0.3 < preference_probability(pretty, plain, "opposed")[0] < 0.8


def test_imperfect_pictures_are_sometimes_right_and_often_not() -> None:
    rng = np.random.default_rng(2)
    spec = parse_prompt(PROMPT)
    scores = [score_image(imperfect_picture(spec, near_miss(spec, rng), rng), PROMPT) for _ in range(24)]
    assert 0 < sum(score.correct for score in scores) < 20
    assert len({score.prompt_following for score in scores}) > 4


def test_bending_and_merging_keep_shape_and_background() -> None:
    rng = np.random.default_rng(3)
    spec = parse_prompt(PROMPT)
    one, two = render(loose_scene(spec, rng)), render(loose_scene(spec, rng))
    assert bent(one, 1.0, rng).shape == merged(one, two, rng).shape == (64, 64, 3)
    assert not np.array_equal(bent(one, 1.0, rng), one)
    assert np.array_equal(merged(one, one, rng), one)


def test_rejudging_keeps_pictures_and_changes_who_judges() -> None:
    rows = imperfect_rows([PROMPT], per_prompt=3, seed=4, questions=Questions(rejudged=2))
    assert len(rows) == 3 + 2
    assert {row["user_id"] for row in rows} <= set(POPULATIONS["similar"])
    again = rejudged_rows(rows, "opposed", 5)
    assert [(row["jpg_0"], row["jpg_1"], row["caption"]) for row in again] == [
        (row["jpg_0"], row["jpg_1"], row["caption"]) for row in rows
    ]
    assert {row["user_id"] for row in again} <= set(POPULATIONS["opposed"])


@pytest.mark.slow
def test_prompts_of_another_folders_held_out_pairs_can_be_spared(tmp_path: Path) -> None:
    def captions(folder: str, split: str, *options: str) -> set[str]:
        main(["imperfect", str(tmp_path / folder), *options])
        return set(read_table(split_file(tmp_path / folder, split))["caption"].to_pylist())

    held_out = captions("judged", "validation", "--train", "1", "--held-out", "6", "--seed", "5")
    more = ("--train", "6", "--held-out", "0", "--seed", "6")  # the seed of the other folder's validation
    assert captions("more", "train", *more) & held_out
    assert not captions("spared", "train", *more, "--spare", str(tmp_path / "judged")) & held_out
    assert not split_file(tmp_path / "spared", "test").exists()
