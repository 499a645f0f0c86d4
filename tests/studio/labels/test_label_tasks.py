"""What is asked next: blind sides, orders with known probabilities, tournaments, hold-out and the export."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffusion_align.cli import main
from diffusion_align.data import Comparisons, load_pairs
from diffusion_align.studio.labels.label_order import UNIFORM, interest, ordered
from diffusion_align.studio.labels.label_queue import LabelQueue, Visit
from diffusion_align.studio.labels.label_store import LabelFile, read_labels
from diffusion_align.studio.labels.label_tasks import Task, TaskSettings, begin_task, open_task
from diffusion_align.studio.labels.many_at_once import contradictions, swiss_matches, swiss_rounds
from diffusion_align.studio.labels.pickapic_export import export_labels
from diffusion_align.studio.labels.verdicts import Verdict
from diffusion_align.studio.sources.keyed import held_out, share
from diffusion_align.studio.sources.units import Picture, Unit
from tests.studio.material import picture, picture_folders, scored_table


def queue(task: Task, annotator: str = "ada") -> LabelQueue:
    return LabelQueue(task, LabelFile.open(task.folder, annotator, {"seed": task.settings.seed}), annotator)


def task_of(tmp_path: Path, count: int = 12, **settings: object) -> Task:
    source = scored_table(tmp_path / "pairs", count)
    values = {"sources": (str(source),), "seed": 3, **settings}
    return begin_task(tmp_path / "labels", TaskSettings(**values))  # type: ignore[arg-type]


def brighter(task: Task, visit: Visit) -> str:
    """The rule of the tests: file names say how bright a picture is."""
    left, right = (task.units[visit.place].pictures[number].name for number in visit.shown)
    return "left" if left > right else "right"


def test_sides_of_a_thousand_pairs_are_even_and_known_to_the_seed_alone(tmp_path: Path) -> None:
    keys = [f"pair {number}" for number in range(1000)]
    pictures = (Picture(Path("a.png"), name="a"), Picture(Path("b.png"), name="b"))
    units = tuple(Unit(key, key, pictures) for key in keys)
    settings = TaskSettings(("pairs",), seed=1)
    task = Task(tmp_path, settings, units, "", {key: place for place, key in enumerate(keys)})
    left = sum(visit.shown == (0, 1) for visit in queue(task).upcoming(1000))
    assert abs(left - 500) < 3.3 * math.sqrt(250)
    first = [visit.shown for visit in queue(task_of(tmp_path / "a", 60)).upcoming(60)]
    again = [visit.shown for visit in queue(task_of(tmp_path / "b", 60)).upcoming(60)]
    other = [visit.shown for visit in queue(task_of(tmp_path / "c", 60, seed=4)).upcoming(60)]
    assert first == again != other
    assert {(0, 1), (1, 0)} == set(first)


def test_every_pair_is_asked_once_and_some_come_back_exchanged_after_twenty_others(tmp_path: Path) -> None:
    labels = queue(task_of(tmp_path, 60, repeats=0.3))
    seen: list[Visit] = []
    while found := labels.upcoming(3):
        seen.append(found[0])
        labels.answer(found[0], {"choice": brighter(labels.task, found[0]), "ms": 700})
    counts = Counter(visit.unit for visit in seen)
    assert len(counts) == 60
    assert 3 < sum(count == 2 for count in counts.values()) < 30
    for place, visit in enumerate(seen):
        if visit.visit == 1:
            first = next(i for i, other in enumerate(seen) if other.unit == visit.unit)
            assert place - first > 20
            assert visit.shown == seen[first].shown[::-1]
    assert labels.left() == 0


def test_what_is_taken_back_is_asked_again_first_with_another_id(tmp_path: Path) -> None:
    labels = queue(task_of(tmp_path))
    first, second = labels.upcoming(2)
    for visit in (first, second):
        labels.answer(visit, {"choice": "tie"})
    labels.file.undo()
    labels.file.undo()
    again = queue(labels.task).upcoming(3)
    assert [visit.unit for visit in again[:2]] == [first.unit, second.unit]
    assert again[0].shown == first.shown
    assert not {visit.id for visit in again} & {first.id, second.id}


def test_two_annotators_share_the_work_but_for_the_overlap(tmp_path: Path) -> None:
    task = task_of(tmp_path, 60, overlap=0.2, repeats=0.0)
    people = {name: queue(task, name) for name in ("ada", "bob")}
    taken: dict[str, set[str]] = {name: set() for name in people}
    while any(people[name].upcoming(1, taken[other]) for name, other in (("ada", "bob"), ("bob", "ada"))):
        for name, other in (("ada", "bob"), ("bob", "ada")):
            for visit in people[name].upcoming(1, taken[other]):
                people[name].answer(visit, {"choice": "tie"})
                taken[name].add(visit.unit)
    common = taken["ada"] & taken["bob"]
    assert taken["ada"] | taken["bob"] == {unit.key for unit in task.units}
    assert common == {unit.key for unit in task.units if share(3, "overlap", unit.key) < 0.2}
    assert 4 <= len(common) <= 22


def test_wrong_answers_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    labels = queue(task_of(tmp_path, aspects=("light",), words=True))
    visit = labels.upcoming(1)[0]
    for given in (
        {"choice": "up"},
        {},
        {"best": 0, "worst": 2},
        {"best": 1, "worst": 1},
        {"choice": "left", "aspects": {"colour": 1}},
        {"choice": "left", "aspects": {"light": 4}},
        {"choice": "left", "wrong_words": [[0]]},
        {"choice": "left", "wrong_words": [[99], []]},
        {"choice": "left", "ms": "soon"},
    ):
        with pytest.raises(ValueError, match="expected"):
            labels.answer(visit, given)
    assert not labels.file.verdicts


def test_active_order_prefers_disagreement_and_says_with_which_probability() -> None:
    keys = [f"k{number}" for number in range(40)]
    gaps = {"one": [2.0] * 20 + [1.5] * 20, "two": [2.0] * 20 + [-1.5] * 20}
    weights = interest(keys, gaps)
    first = Counter(ordered(keys, "active", seed, "ada", gaps)[0][0] >= 20 for seed in range(400))
    chances = UNIFORM / 40 + (1 - UNIFORM) * weights / weights.sum()
    assert first[True] / 400 == pytest.approx(chances[20:].sum(), abs=0.07)
    assert chances[20:].sum() > 0.6
    turns = ordered(keys, "active", 1, "ada", gaps)
    assert sorted(place for place, _ in turns) == list(range(40))
    assert turns[0][1] == pytest.approx(chances[turns[0][0]])
    assert turns[-1][1] == pytest.approx(1.0)
    with pytest.raises(ValueError, match="at least 2 scorers"):
        ordered(keys, "active", 1, "ada", {"one": gaps["one"]})


@pytest.mark.parametrize("count", [3, 4, 5, 8])
def test_a_swiss_tournament_has_log2_rounds_no_rematch_and_the_best_wins(count: int) -> None:
    verdicts: list[Verdict] = []
    while True:
        turn, matches = swiss_matches("unit", verdicts, count, 1)
        if not matches:
            break
        a, b = matches[0]
        verdicts.append(Verdict(f"{a}{b}", "unit", 0, (b, a), "better", max(a, b), min(a, b), round=turn))
    assert max(verdict.round for verdict in verdicts) + 1 == swiss_rounds(count) == math.ceil(math.log2(count))
    assert len(verdicts) == swiss_rounds(count) * (count // 2)
    assert len({verdict.id for verdict in verdicts}) == len(verdicts)
    wins = Counter(verdict.best for verdict in verdicts)
    assert wins[count - 1] == max(wins.values())


def test_circles_are_listed() -> None:
    def beats(winner: int, loser: int) -> Verdict:
        return Verdict(f"{winner}{loser}", "u", 0, (winner, loser), "better", winner, loser)

    assert contradictions([beats(0, 1), beats(1, 2)]) == {}
    assert contradictions([beats(0, 1), beats(1, 2), beats(2, 0), beats(3, 0)]) == {"u": [[0, 1, 2]]}


def test_hold_out_is_by_the_normalised_prompt() -> None:
    assert held_out("A  red Star.", 0.5, 1) == held_out("a red star", 0.5, 1)
    held = sum(held_out(f"prompt {number}", 0.1, 7) for number in range(2000))
    assert abs(held - 200) < 3.3 * math.sqrt(180)


def test_a_hold_out_of_few_prompts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected at least 50"):
        task_of(tmp_path, 12, holdout=0.1)


def test_the_export_is_what_the_readers_read_and_byte_equal(tmp_path: Path) -> None:
    task = task_of(tmp_path, 60, holdout=0.3, repeats=0.0, aspects=("light",), words=True)
    labels = queue(task)
    choices = {}
    while found := labels.upcoming(1):
        choice = ("tie", "bad", "skip")[len(choices)] if len(choices) < 3 else brighter(task, found[0])
        choices[found[0].unit] = choice
        labels.answer(found[0], {"choice": choice, "aspects": {"light": 1}, "wrong_words": [[0], []]})
    told = export_labels(task.folder, tmp_path / "out")
    rows = {split: pq.read_table(file).to_pylist() for split, file in zip(told.rows, told.files, strict=True)}
    assert told.skipped == 1
    assert told.ties == 2
    assert sum(told.rows.values()) == 59
    assert 8 <= told.rows["test"] <= 30
    assert not {row["caption"] for row in rows["train"]} & {row["caption"] for row in rows["test"]}
    every = [row for there in rows.values() for row in there]
    source = pq.read_table(tmp_path / "pairs").to_pylist()
    uids = {row[f"jpg_{side}"]: row[f"image_{side}_uid"] for row in source for side in (0, 1)}
    assert sum(row["both_bad"] for row in every) == 1
    for row in every:
        assert row["image_0_uid"] == uids[row["jpg_0"]]  # what the source calls it, for whoever asks for labels of it
        levels = [np.asarray(picture(row[f"jpg_{side}"])).mean() for side in (0, 1)]
        if row["label_0"] != 0.5:
            assert (levels[0] > levels[1]) == (row["label_0"] == 1)
    first = Comparisons(tmp_path / "out")[0]
    assert set(first.labels) == {"overall", "light"}
    assert {max(marks, default=0) for marks in first.wrong_words} == {0.0, 1.0}
    assert load_pairs(tmp_path / "out").used == told.rows["train"] - sum(row["label_0"] == 0.5 for row in rows["train"])
    assert main(["data", "export", str(task.folder), "--format", "pickapic", "--out", str(tmp_path / "again")]) == 0
    for file in told.files:
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_a_picture_of_the_test_split_is_in_no_row_of_train(tmp_path: Path) -> None:
    file = scored_table(tmp_path / "pairs", 60) / "train-00000-of-00001.parquet"
    rows = pq.read_table(file).to_pylist()
    held = [held_out(row["caption"], 0.3, 3) for row in rows]
    rows[held.index(False)]["jpg_1"] = rows[held.index(True)]["jpg_0"]
    pq.write_table(pa.Table.from_pylist(rows), file)
    task = begin_task(tmp_path / "labels", TaskSettings((str(file.parent),), seed=3, holdout=0.3, repeats=0.0))
    labels = queue(task)
    while found := labels.upcoming(1):
        labels.answer(found[0], {"choice": "left"})
    told = export_labels(task.folder, tmp_path / "out")
    assert (told.leaking, told.rows) == (1, {"train": held.count(False) - 1, "test": held.count(True)})
    train, test = ({row[f"jpg_{i}"] for row in pq.read_table(path).to_pylist() for i in (0, 1)} for path in told.files)
    assert not train & test


def test_votes_are_merged_by_majority_or_kept_by_annotator(tmp_path: Path) -> None:
    task = task_of(tmp_path, 4, overlap=1.0, repeats=0.0)
    for name, rule in (("ada", brighter), ("bob", brighter), ("eve", lambda task, visit: "bad")):
        labels = queue(task, name)
        while found := labels.upcoming(1):
            labels.answer(found[0], {"choice": rule(task, found[0])})
    export_labels(task.folder, tmp_path / "majority")
    merged = pq.read_table(tmp_path / "majority").to_pylist()
    assert {(max(row["votes_0"], row["votes_1"]), row["user_id"]) for row in merged} == {(2.5, "majority")}
    assert {row["label_0"] for row in merged} <= {0.0, 1.0}
    assert not any(row["both_bad"] for row in merged)
    command = ["data", "export", str(task.folder), "--out", str(tmp_path / "each")]
    assert main([*command, "--merge", "annotators"]) == 0
    each = pq.read_table(tmp_path / "each").to_pylist()
    assert len(each) == 12
    assert Comparisons(tmp_path / "each").users() == ["ada", "bob", "eve"]
    assert {row["user_id"] for row in each if row["both_bad"]} == {"eve"}
    assert main([*command, "--merge", "majority"]) == 2  # is not empty
    assert main(["data", "export", str(tmp_path / "each"), "--out", str(tmp_path / "x"), "--merge", "annotators"]) == 2
    assert len(read_labels(task.folder)) == 3


def test_best_and_worst_of_a_group_are_exported_with_ranking_and_weight(tmp_path: Path) -> None:
    folders = picture_folders(tmp_path, ("a", "b", "c", "d"), 2)
    task = begin_task(tmp_path / "labels", TaskSettings(tuple(map(str, folders)), kind="best-worst", seed=1))
    assert "file name" in task.rule
    labels = queue(task)
    for visit in labels.upcoming(5):
        labels.answer(visit, {"best": visit.shown.index(3), "worst": visit.shown.index(0)})
    export_labels(task.folder, tmp_path / "out")
    rows = pq.read_table(tmp_path / "out").to_pylist()
    assert len(rows) == 2 * (2 * 4 - 3)
    assert {row["num_example_per_prompt"] for row in rows} == {5}
    assert len({row["ranking_id"] for row in rows}) == 2
    assert sum(row["implied"] for row in rows) == 2 * 4
    assert {row[f"model_{0 if row['label_0'] == 1 else 1}"] for row in rows} == {"b", "c", "d"}


def test_folders_are_matched_and_what_has_no_partner_is_listed(tmp_path: Path) -> None:
    first, second = picture_folders(tmp_path, ("a", "b"), 3)
    (second / "2.png").unlink()
    with pytest.raises(ValueError, match=r"without a partner.*a/2.png"):
        begin_task(tmp_path / "labels", TaskSettings((str(first), str(second))))
    (first / "2.png").rename(first / "9.png")
    (second / "2.png").write_bytes((first / "1.png").read_bytes())
    assert "order" in begin_task(tmp_path / "labels", TaskSettings((str(first), str(second)))).rule
    (first / "0.txt").unlink()
    (second / "0.txt").unlink()
    with pytest.raises(ValueError, match="no prompt is known"):
        begin_task(tmp_path / "others", TaskSettings((str(first), str(second))))


def test_pictures_of_one_folder_are_put_together_by_their_prompts(tmp_path: Path) -> None:
    (folder,) = picture_folders(tmp_path, ("a",), 4)
    with pytest.raises(ValueError, match=r"only pictures of their prompts: 0.png, 1.png, 2.png, 3.png: give a second"):
        begin_task(tmp_path / "labels", TaskSettings((str(folder),)))
    for number in range(4):
        (folder / f"{number}.txt").write_text(f"a star and {number // 2} rings")
    task = begin_task(tmp_path / "labels", TaskSettings((str(folder),)))
    assert [[picture.file.stem for picture in unit.pictures] for unit in task.units] == [["0", "1"], ["2", "3"]]
    assert "by their prompts" in task.rule
    with pytest.raises(ValueError, match="matched by their prompts"):
        begin_task(tmp_path / "others", TaskSettings((str(folder),), match="name"))


def test_a_task_is_opened_as_it_was_begun(tmp_path: Path) -> None:
    task = task_of(tmp_path, 12, seed=5, aspects=("light",))
    assert open_task(task.folder) == task
    with pytest.raises(ValueError, match="was begun with another order"):
        task_of(tmp_path, 12, seed=5, aspects=("light",), order="file")
