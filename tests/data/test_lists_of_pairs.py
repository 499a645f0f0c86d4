"""Ranked lists that are made of pairs: the order against every verdict, circles, and the data set that is written."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from diffusion_align.cli import main
from diffusion_align.data import load_examples
from diffusion_align.data.beyond_pairs.aggregation import Verdict, connected, contradicted, order_by, votes
from diffusion_align.data.beyond_pairs.from_pairs import MadeOf, make_lists
from diffusion_align.data.beyond_pairs.rescored import Rescoring, rescore
from diffusion_align.data.types import ListRecord

from .test_data import encoded, value, written

WINS = st.integers(2, 6).flatmap(lambda k: arrays(np.float64, (k, k), elements=st.integers(0, 2).map(float)))


def circles(wins: np.ndarray) -> bool:
    """Whether some majorities go in a circle, by trying all orders."""
    over = wins > wins.T
    orders = permutations(range(len(wins)))
    return not any(
        not any(over[later, earlier] for place, later in enumerate(order) for earlier in order[:place])
        for order in orders
    )


@given(WINS)
def test_without_a_circle_the_order_agrees_with_every_pair(wins: np.ndarray) -> None:
    np.fill_diagonal(wins, 0)
    order = order_by(wins)
    if circles(wins):
        assert order.cycles > 0
        return
    assert (order.cycles, order.open, order.against) == (0, (), 0)
    ranks = np.array(order.ranks)
    assert set(ranks.tolist()) == set(range(ranks.max() + 1))
    for better, worse in zip(*np.nonzero(wins > wins.T), strict=True):
        assert ranks[better] < ranks[worse]


@given(WINS, st.randoms(use_true_random=False))
def test_the_order_does_not_depend_on_who_comes_first(wins: np.ndarray, random: Any) -> None:
    np.fill_diagonal(wins, 0)
    places = list(range(len(wins)))
    random.shuffle(places)
    ranks, shuffled = order_by(wins).ranks, order_by(wins[np.ix_(places, places)]).ranks
    assert shuffled == tuple(ranks[place] for place in places)


@given(WINS)
def test_a_judge_leaves_nothing_open_and_every_sure_pair_as_it_is(wins: np.ndarray) -> None:
    np.fill_diagonal(wins, 0)
    before, after = order_by(wins), order_by(wins, np.arange(len(wins), dtype=float))
    assert after.open == ()
    first, second = np.array(before.ranks), np.array(after.ranks)
    assert ((first[:, None] < first) <= (second[:, None] < second)).all()
    assert all(len({after.ranks[place] for place in together}) == len(together) for together in before.open)


def test_a_circle_is_ordered_by_wins_and_then_by_the_judge() -> None:
    verdicts = [Verdict(0, 1, 1.0), Verdict(1, 2, 1.0), Verdict(2, 0, 1.0), Verdict(3, 0, 1.0), Verdict(2, 4, 1.0)]
    order = order_by(votes(5, verdicts))
    # 3 beats the circle of 0, 1, 2, which beats 4. Wins minus losses: 0 has -1, 1 has 0, 2 has +1.
    assert order.ranks == (3, 2, 1, 0, 4)
    assert (order.cycles, order.open, order.against) == (1, (), 2)
    equal = order_by(votes(3, verdicts[:3]))
    assert (equal.ranks, equal.open) == ((0, 0, 0), ((0, 1, 2),))
    assert order_by(votes(3, verdicts[:3]), np.array([0.0, 2.0, 1.0])).ranks == (2, 0, 1)


def test_the_majority_counts_and_ties_are_half_a_verdict_each() -> None:
    wins = votes(2, [Verdict(0, 1, 1.0), Verdict(0, 1, 1.0), Verdict(1, 0, 1.0), Verdict(0, 1, 0.5)])
    assert wins.tolist() == [[0, 2.5], [1.5, 0]]
    assert (order_by(wins).ranks, contradicted(wins)) == ((0, 1), 1)


def test_pictures_that_pairs_connect_are_together() -> None:
    assert connected(6, [(4, 5), (0, 2), (2, 3)]) == [[0, 2, 3], [1], [4, 5]]


# -- data sets -------------------------------------------------------------------------------------------------------


def pairs(path: Path, verdicts: list[tuple[int, int, float | None, str]], **columns: Any) -> Path:
    """Pairs of grey pictures by their values: first, second, label_0 and caption."""
    table = {
        "jpg_0": [encoded(first) for first, *_ in verdicts],
        "jpg_1": [encoded(second) for _, second, *_ in verdicts],
        "label_0": [label for *_, label, _ in verdicts],
        "caption": [caption for *_, caption in verdicts],
    }
    return written(path, table | columns)


VERDICTS: list[tuple[int, int, float | None, str]] = [
    (10, 20, 0.0, "a"), (20, 30, 0.0, "a"), (40, 30, 0.0, "a"),  # 30 over 20 over 10, and 30 over 40
    (10, 20, 1.0, "b"),  # the same pictures for another prompt
    (50, 60, 1.0, "a"),  # no picture in common with the first ones
    (1, 2, 1.0, "c"), (2, 3, 1.0, "c"), (3, 1, 1.0, "c"),  # a circle
    (7, 8, 0.5, "d"), (9, 9, 1.0, "d"), (70, 80, None, "d"), (70, 80, 1.0, " "),
]  # fmt: skip


def lists_in(folder: Path) -> list[tuple[str, dict[int, int]]]:
    """Caption and ranks by value of each list."""
    found = load_examples(folder, units=("ranked lists",))
    records = [record for _, record in found.records(found.numbers())]
    assert all(isinstance(record, ListRecord) for record in records)
    return [
        (record.caption, dict(zip(map(value, record.pictures), record.judgement.ranks, strict=True)))  # type: ignore
        for record in records
    ]


@pytest.mark.parametrize("uids", [False, True])
def test_pairs_become_lists(tmp_path: Path, uids: bool) -> None:
    names = {f"image_{side}_uid": [f"{each[3]} {each[side]}" for each in VERDICTS] for side in range(2 if uids else 0)}
    found = make_lists(MadeOf(str(pairs(tmp_path / "a.parquet", VERDICTS, **names))), tmp_path / "out")
    assert lists_in(tmp_path / "out") == [
        ("a", {10: 2, 20: 1, 30: 0, 40: 1}), ("b", {10: 0, 20: 1}), ("a", {50: 0, 60: 1}),
    ]  # fmt: skip
    assert {name: count for name, count in found.items() if count} == {
        "pairs": 12, "pairs without label": 1, "pairs without caption": 1, "pairs of a picture with itself": 1,
        "lists": 3, "lists of 4": 1, "lists of 2": 2, "lists with circles": 1,
        "lists left out, whose circles nothing breaks": 1, "lists left out, of ties alone": 1,
    }  # fmt: skip
    assert json.loads((tmp_path / "out/lists.json").read_text())["lists"] == found


def test_a_picture_that_only_has_a_name_leaves_its_list_out(tmp_path: Path) -> None:
    verdicts: list[tuple[int, int, float | None, str]] = [(10, 20, 1.0, "a"), (30, 40, 1.0, "b")]
    table = pairs(tmp_path / "a.parquet", verdicts, image_0_uid=["10", "30"], image_1_uid=["20", "40"],
                  jpg_0=[encoded(10), None])  # fmt: skip
    found = make_lists(MadeOf(str(table)), tmp_path / "out")
    assert found["lists left out, of which a picture is missing"] == 1
    assert lists_in(tmp_path / "out") == [("a", {10: 0, 20: 1})]


def test_a_judge_breaks_circles(tmp_path: Path) -> None:
    asked: list[tuple[list[int], str]] = []

    def judge(pictures: Any, caption: str) -> list[float]:
        asked.append(([value(each) for each in pictures], caption))
        return [float(value(each)) for each in pictures]

    task = MadeOf(str(pairs(tmp_path / "a.parquet", VERDICTS)), judge="brightness")
    found = make_lists(task, tmp_path / "out", judge)
    assert asked == [([1, 2, 3], "c")]
    assert ("c", {3: 0, 2: 1, 1: 2}) in lists_in(tmp_path / "out")
    assert found["lists with circles broken by the judge"] == 1
    assert found["pairs against the order of their list"] == 2


def test_an_unfinished_folder_is_made_again_and_another_one_refused(tmp_path: Path) -> None:
    source = str(pairs(tmp_path / "a.parquet", VERDICTS))
    whole = make_lists(MadeOf(source, shard_size=2), tmp_path / "out")
    assert len(list((tmp_path / "out").glob("train-*.parquet"))) == 2
    record = tmp_path / "out/lists.json"
    record.write_text(json.dumps({"task": json.loads(record.read_text())["task"]}))
    (tmp_path / "out/train-00001.parquet").unlink()
    assert make_lists(MadeOf(source, shard_size=2), tmp_path / "out") == whole
    assert Counter(caption for caption, _ in lists_in(tmp_path / "out")) == {"a": 2, "b": 1}
    (tmp_path / "out/train-00000.parquet").unlink()  # what is finished is believed
    assert make_lists(MadeOf(source, shard_size=2), tmp_path / "out") == whole
    with pytest.raises(ValueError, match="was made with another shard_size: delete it"):
        make_lists(MadeOf(source), tmp_path / "out")


def test_pairs_without_a_list_are_an_error(tmp_path: Path) -> None:
    source = pairs(tmp_path / "a.parquet", [(1, 2, 0.5, "a")])
    with pytest.raises(ValueError, match=r"no list can be made of its pairs \(1 pairs, .*1 lists left out, of ties"):
        make_lists(MadeOf(str(source)), tmp_path / "out")


def test_the_command_says_what_became_of_the_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = pairs(tmp_path / "a.parquet", VERDICTS)
    assert main(["data", "lists", str(source), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "12 pairs" in said
    assert "3 lists, " in said
    assert main(["data", "list", str(source)]) == 2
    assert "unknown data command 'list' (did you mean 'lists'?)" in capsys.readouterr().err
    assert main(["data", "lists", str(source), "--out", "x", "--checkpoint", "y"]) == 2
    assert "--checkpoint is the scorer's: add --scorer" in capsys.readouterr().err


# -- lists that are scored anew --------------------------------------------------------------------------------------


def test_lists_get_a_judge_s_scores_and_keep_their_order_beside_them(tmp_path: Path) -> None:
    make_lists(MadeOf(str(pairs(tmp_path / "a.parquet", VERDICTS))), tmp_path / "lists")
    task = Rescoring(str(tmp_path / "lists"), "train", "brightness", shard_size=2)
    found = rescore(task, lambda pictures, caption: [float(value(each)) for each in pictures], tmp_path / "out")
    # 10 < 20 < 30 and 30 over 40: six ordered pairs less the tie of 20 and 40; the others are (10, 20) and (50, 60).
    # Brightness is wrong about 40 and 30, and about both pairs.
    assert found == {"lists": 3, "ordered pairs": 7, "agreeing": pytest.approx(4 / 7), "unreadable": 0}
    assert lists_in(tmp_path / "out")[0] == ("a", {10: 3, 20: 2, 30: 1, 40: 0})
    rows = load_examples(tmp_path / "out").source.table[0]  # type: ignore[union-attr]
    assert (rows["scores"], rows["original_ranks"]) == ([10, 20, 30, 40], [2, 1, 0, 1])
    with pytest.raises(ValueError, match="was begun with another scorer"):
        rescore(replace(task, scorer="other"), lambda *_: [], tmp_path / "out")


def test_a_judge_without_a_number_is_an_error(tmp_path: Path) -> None:
    make_lists(MadeOf(str(pairs(tmp_path / "a.parquet", VERDICTS))), tmp_path / "lists")
    task = Rescoring(str(tmp_path / "lists"), "train", "nothing")
    with pytest.raises(ValueError, match=r"row 0: scorer nothing gives \[nan, nan, nan, nan\]"):
        rescore(task, lambda pictures, caption: [float("nan")] * len(pictures), tmp_path / "out")


def test_what_cannot_be_scored_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = {"image": [encoded(1)], "caption": ["a"], "label": [1]}
    thumbs = written(tmp_path / "thumbs.parquet", table)
    assert main(["data", "relabel", str(thumbs), "--scorer", "scenes-vp", "--out", str(tmp_path / "x")]) == 2
    assert "holds labelled pictures: scores say which of two" in capsys.readouterr().err
    make_lists(MadeOf(str(pairs(tmp_path / "a.parquet", VERDICTS))), tmp_path / "lists")
    line = ["data", "relabel", str(tmp_path / "lists"), "--scorer", "scenes-vp", "--out", "x", "--temperature", "1"]
    assert main(line) == 2
    assert "--temperature is for pairs" in capsys.readouterr().err
