"""``evaluate A B`` on folders of pictures, which needs no model."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffusion_align.cli import main, parse
from diffusion_align.commands.evaluating import picture_drawing
from diffusion_align.studio.labels.label_queue import LabelQueue
from diffusion_align.studio.labels.label_store import LabelFile
from diffusion_align.studio.labels.label_tasks import TaskSettings, begin_task
from tests.commands.evaluating.pictures import PROMPTS, SEEDS, gallery


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders: right (always what it should show), and wrong (mostly not)."""
    top = tmp_path_factory.mktemp("galleries")
    gallery(top / "right", 0)
    gallery(top / "wrong", 1, right=0.2)
    return top


@pytest.fixture(autouse=True)
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """No diffusion model may be loaded here."""

    def refuse(*arguments: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(picture_drawing, "open_contrastive", refuse)


def table(out: Path, *arguments: str) -> dict[str, Any]:
    """What table.json holds after a run that must succeed."""
    assert main(["evaluate", *arguments, "--out", str(out), "--device", "cpu"]) == 0
    found: dict[str, Any] = json.loads((out / "table.json").read_text())
    return found


def error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The error line of a run that must fail as bad input."""
    assert main(["evaluate", *arguments]) == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_two_folders_are_compared_and_everything_is_written(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sides = [str(folders / "wrong"), str(folders / "right")]
    found = table(tmp_path / "out", *sides)
    said = capsys.readouterr()
    (verdict,) = found["verdicts"]
    assert (verdict["side"], verdict["baseline"], verdict["scorer"]) == ("right", "wrong", "scenes-oracle")
    assert verdict["win_rate"]["rate"] > 0.6
    assert verdict["win_rate"]["count"] == len(PROMPTS) * len(SEEDS)
    assert found["cost"]["right"]["denoiser_calls"] is None
    assert {row["figure"] for row in found["artefacts"]["right"]} >= {"saturation", "diversity", "grid_8"}
    assert "r = 0.22" in said.out
    assert str(tmp_path / "out" / "report.html") in said.out
    assert "4 prompts x 2 seeds" in said.err
    assert "4 prompts x 2 seeds" not in said.out
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<script" not in page
    assert '<td class="best">' not in page  # of four prompts nothing is sure
    assert '<div class="cell best">' in page  # of each prompt it is
    assert "data:image/png" in page
    assert page.count('<div class="cell">') + page.count('<div class="cell best">') == 2 * len(PROMPTS)
    rows = pq.read_table(tmp_path / "out" / "details.parquet").to_pylist()
    assert len(rows) == 2 * verdict["win_rate"]["count"]
    assert set(rows[0]) == {"side", "prompt", "category", "seed", "picture", "sha256", "scenes-oracle"}


@pytest.mark.slow
def test_a_folder_against_itself_is_even_and_a_swap_turns_the_rate_round(folders: Path, tmp_path: Path) -> None:
    right, wrong = str(folders / "right"), str(folders / "wrong")
    alike = table(tmp_path / "same", right, right, "--artefact-monitor")
    (same,), (figures,) = alike["verdicts"], alike["artefacts"].values()
    assert {"high_frequency", "near_duplicates"} <= {row["figure"] for row in figures}
    assert {tuple(row["interval"]) for row in figures} == {(0.0, 0.0)}
    assert not any(row["alarm"] for row in figures)
    assert (same["win_rate"]["rate"], same["win_rate"]["ties"]) == (0.5, 8)
    (one,) = table(tmp_path / "one", f"a={right}", f"b={wrong}")["verdicts"]
    (other,) = table(tmp_path / "other", f"a={wrong}", f"b={right}")["verdicts"]
    assert other["win_rate"]["rate"] == 1 - one["win_rate"]["rate"]
    assert other["win_rate"]["interval"] == pytest.approx([1 - x for x in one["win_rate"]["interval"][::-1]], abs=1e-12)


@pytest.mark.slow
def test_the_order_of_prompts_changes_no_number(folders: Path, tmp_path: Path) -> None:
    sides = [str(folders / "right"), str(folders / "wrong")]
    tables = []
    for name, prompts in (("one", PROMPTS), ("two", PROMPTS[::-1])):
        rows = [{"prompt": prompt, "category": "many" if "two" in prompt else "one"} for prompt in prompts]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        tables.append(table(tmp_path / name, *sides, "--prompts", str(tmp_path / f"{name}.jsonl")))
    one, two = ({key: value for key, value in each.items() if key != "times"} for each in tables)
    assert one == two
    assert set(one["verdicts"][0]["categories"]) == {"one"}  # of one prompt there is no interval


@pytest.mark.slow
def test_pictures_without_a_record_need_their_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sides = [str(gallery(tmp_path / name, number, record=False)) for number, name in enumerate("ab")]
    out = ["--out", str(tmp_path / "out"), "--seeds", "2"]
    assert "give --prompts" in error(capsys, *sides, *out)
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    (tmp_path / "few.txt").write_text(PROMPTS[0])
    assert "has 8 pictures" in error(capsys, *sides, *out, "--prompts", str(tmp_path / "few.txt"))
    assert table(tmp_path / "out", *sides, "--seeds", "2", "--prompts", str(tmp_path / "p.txt"))["verdicts"]


def test_a_picture_that_cannot_be_read_is_named_with_its_side(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = gallery(tmp_path / "broken", 2)
    file = broken / "01-5.png"
    file.write_bytes(file.read_bytes()[:300])
    told = error(capsys, str(folders / "right"), f"mine={broken}", "--out", str(tmp_path / "out"))
    assert f"side mine: {file} cannot be decoded" in told
    file.unlink()
    told = error(capsys, str(folders / "right"), f"mine={broken}", "--out", str(tmp_path / "out"))
    assert "side mine: " in told
    assert repr(PROMPTS[1]) in told


@pytest.mark.slow
def test_a_folder_that_holds_an_evaluation_is_not_overwritten_by_chance(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sides, out = [str(folders / "right"), str(folders / "wrong")], ["--out", str(tmp_path)]
    first = table(tmp_path, *sides)
    assert "holds an evaluation: go on with --resume" in error(capsys, *sides, *out)
    scored = (tmp_path / "scored.jsonl").read_bytes()
    assert table(tmp_path, *sides, "--resume") == first
    assert (tmp_path / "scored.jsonl").read_bytes() == scored
    assert "with other sides" in error(capsys, *sides[::-1], *out, "--resume")
    assert table(tmp_path, *sides[::-1], "--overwrite")["baseline"] == "wrong"


@pytest.mark.slow
def test_json_is_one_object_and_nothing_else(folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sides = [str(folders / name) for name in ("right", "wrong")]
    found = table(tmp_path, *sides, f"again={folders / 'right'}", "--json")
    printed = json.loads(capsys.readouterr().out)
    assert printed.pop("out") == str(tmp_path)
    assert printed == found
    ranks = {place["name"]: place["rank"] for place in found["strengths"]["scenes-oracle"]}
    assert ranks["right"] == ranks["again"]  # equal pictures, equal places


@pytest.mark.slow
def test_people_judge_blind_and_their_labels_make_the_table(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sides = [str(folders / name) for name in ("wrong", "right")]
    assert main(["evaluate", *sides, "--judge", "people", "--out", str(tmp_path)]) == 0
    assert "the blind task is" in capsys.readouterr().err
    task, key = tmp_path / "people" / "pairs.parquet", json.loads((tmp_path / "people" / "key.json").read_text())
    content = task.read_bytes()
    for word in (b"right", b"wrong", b"diffusion-align", str(folders).encode()):
        assert word not in content
    rows = pq.read_table(task).to_pylist()
    firsts = [key[row["image_0_uid"]]["side"] for row in rows]
    assert set(firsts) == {"right", "wrong"}  # the place says nothing
    labels = []
    for number, (row, first) in enumerate(zip(rows, firsts, strict=True)):
        label = 0.5 if number == 0 else float(first == "right")
        labels.append({"image_0_uid": row["image_0_uid"], "image_1_uid": row["image_1_uid"], "label_0": label})
    assert "no labels yet" in error(capsys, *sides, "--judge", "people", "--resume", "--out", str(tmp_path))
    (tmp_path / "people" / "labels.jsonl").write_text("\n".join(map(json.dumps, labels)))
    found = table(tmp_path, *sides, "--judge", "people", "--resume")
    (verdict,) = found["verdicts"]
    assert (verdict["scorer"], verdict["win_rate"]["wins"], verdict["win_rate"]["ties"]) == ("people", 7, 1)
    assert verdict["winner"] == "right"
    assert (tmp_path / "report.html").read_text().count('<td class="best">★ right</td>') == 2
    assert verdict["difference"] is None


@pytest.mark.slow
def test_labels_of_the_studio_are_read(folders: Path, tmp_path: Path) -> None:
    sides = [str(folders / name) for name in ("wrong", "right")]
    assert main(["evaluate", *sides, "--judge", "people", "--out", str(tmp_path)]) == 0
    people = tmp_path / "people"
    key = json.loads((people / "key.json").read_text())
    task = begin_task(tmp_path / "work", TaskSettings((str(people / "pairs.parquet"),), seed=1, repeats=0.0))
    queue = LabelQueue(task, LabelFile.open(task.folder, "ada", asdict(task.settings)), "ada")
    while visits := queue.upcoming(1):
        shown = [key[str(task.units[visits[0].place].pictures[number].uid)]["side"] for number in visits[0].shown]
        queue.answer(visits[0], {"choice": "left" if shown[0] == "right" else "right"})
    assert main(["data", "export", str(tmp_path / "work"), "--out", str(people / "labels")]) == 0
    (verdict,) = table(tmp_path, *sides, "--judge", "people", "--resume")["verdicts"]
    assert (verdict["scorer"], verdict["win_rate"]["wins"], verdict["win_rate"]["rate"]) == ("people", 8, 1.0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("a", "at least two sides"),
        ("a b --baseline c", "one of a, b"),
        ("a b --resume --overwrite", "give one of them"),
        ("a b --validation-prompts x", "are for --match"),
        ("a b --match scale --sweep 3", "at least two guidance scales"),
        ("a b --seeds 0", "--seeds 0: expected at least 1"),
    ],
)
def test_flags_that_do_not_fit_each_other_are_named(flags: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(["evaluate", *flags.split()])


def test_what_a_side_cannot_be_is_named(folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    right = str(folders / "right")
    assert "unknown setting 'guidance_scal' (did you mean 'guidance_scale'?)" in error(
        capsys, "base", "base@guidance_scal=3"
    )
    assert "guidance_scale=x is wrong" in error(capsys, "base", "base@guidance_scale=x")
    assert "unknown model 'bse' (did you mean 'base'?)" in error(capsys, "bse", right)
    assert "which takes no settings" in error(capsys, "base", f"{right}@guidance_scale=3")
    assert "has one scale only" in error(capsys, "base", right, "--match", "scale")
    (tmp_path / "empty").mkdir()
    assert "holds neither a run" in error(capsys, "base", str(tmp_path / "empty"))


@pytest.mark.slow
def test_pictures_that_are_too_small_to_measure_are_compared_without(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        for file in gallery(tmp_path / name, 0).iterdir():
            picture = Image.open(file)
            picture.resize((24, 24)).save(file, pnginfo=_chunk(picture))
    given = [str(tmp_path / "a"), str(tmp_path / "b"), "--scorers", "scenes-vp"]
    assert table(tmp_path / "out", *given)["artefacts"] == {}
    told = error(capsys, *given, "--artefact-monitor", "--out", str(tmp_path / "out"), "--resume")
    assert "--artefact-monitor: side a: expected pictures of one size for each prompt, of at least 32 pixels" in told


def _chunk(picture: Image.Image) -> Any:
    from PIL.PngImagePlugin import PngInfo

    chunk = PngInfo()
    chunk.add_text("diffusion-align", str(picture.info["diffusion-align"]))
    return chunk
