"""Every importer on a small set in its true layout, and archives that mean harm."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffusion_align.data import load_pairs
from diffusion_align.data.comparisons import Comparisons
from diffusion_align.data.importers.known_formats import FORMATS, find_format
from diffusion_align.data.importers.pickapic_files import Import, import_pairs
from diffusion_align.data.importers.places import Place, UnsafeArchiveError, safe_name
from diffusion_align.data.tending.exported import export_pairs

from .pictures import picture

Rows = list[dict[str, Any]]


def put(folder: Path, name: str, content: bytes | str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def table(folder: Path, name: str, rows: Rows) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / name)


def imported(source: Path, out: Path, **more: Any) -> Rows:
    """The rows that an import writes."""
    import_pairs(Import(str(source), **more), out)
    split = more.get("split", "train")
    return [row for file in sorted(out.glob(f"{split}-*.parquet")) for row in pq.read_table(file).to_pylist()]


def hpdv2(folder: Path) -> None:
    rows = [
        {"human_preference": [0, 1], "prompt": "a fox", "file_path": ["1.jpg", "2.jpg"], "user_hash": "u1"},
        {"human_preference": [1, 0], "prompt": "a cat", "file_path": ["3.jpg", "1.jpg"], "user_hash": "u2"},
    ]
    put(folder, "train.json", json.dumps(rows))
    for number in (1, 2, 3):
        put(folder, f"train/{number}.jpg", picture(number, "JPEG"))


def hpdv3(folder: Path) -> None:
    rows = [
        {"prompt": "a fox", "path1": "images/uuid1/a.jpg", "path2": "images/uuid1/b.jpg", "confidence": 0.9,
         "choice_dist": [9, 1], "model1": "flux", "model2": "sd2"},
        {"prompt": "a cat", "path1": "images/c.jpg", "path2": "images/uuid1/a.jpg", "confidence": None,
         "choice_dist": None, "model1": "kolors", "model2": "flux"},
    ]  # fmt: skip
    put(folder, "train.json", json.dumps(rows))
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for number, name in enumerate(("images/uuid1/a.jpg", "images/uuid1/b.jpg", "images/c.jpg")):
            content = picture(number, "JPEG")
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    whole = buffer.getvalue()
    for number, start in enumerate(range(0, len(whole), 1000)):  # cat images.tar.gz.* | gunzip | tar -xv
        put(folder, f"images.tar.gz.{number:03d}", whole[start : start + 1000])


def rapidata(folder: Path) -> None:
    rows = [
        {"image1": {"bytes": picture(1), "path": "1.png"}, "image2": {"bytes": picture(2), "path": "2.png"},
         "prompt": "a fox", "model1": "flux", "model2": "sd3", "votes_image1": votes, "votes_image2": 4}
        for votes in (12, 4, 0)
    ]  # fmt: skip
    table(folder / "data", "train-00000-of-00001.parquet", rows)


def image_preferences(folder: Path) -> None:
    address = "https://huggingface.co/datasets/x/open-image-preferences-v1/resolve/main"
    shown = (
        f'<div class="prompt"><strong>Prompt:</strong> a fox</div><img src="{address}/image_simplified_sd/7.jpg">'
        f'<img src="{address}/image_simplified_dev/7.jpg">'
    )
    row = {
        "images": shown, "model_1": "sd3.5", "model_2": "flux-dev",
        "preference.responses": ["image_2", "both_bad", "image_1"], "preference.responses.users": ["a", "b", "c"],
        "preference.responses.status": ["submitted", "submitted", "discarded"],
    }  # fmt: skip
    table(folder / "data", "train-00000-of-00001.parquet", [row])
    put(folder, "image_simplified_sd/7.jpg", picture(1, "JPEG"))
    put(folder, "image_simplified_dev/7.jpg", picture(2, "JPEG"))


def imagerewarddb(folder: Path) -> None:
    rows = [
        {"image_path": f"images/train/train_1/{number}.webp", "prompt_id": "p1", "prompt": "a fox", "rank": rank,
         "overall_rating": 5} for number, rank in ((1, 2), (2, 1), (3, 2))
    ]  # fmt: skip
    table(folder, "metadata-train.parquet", rows)
    put(folder, "ImageRewardDB.py", "raise SystemExit('a loading script must never be run')")
    (folder / "images/train").mkdir(parents=True)
    with zipfile.ZipFile(folder / "images/train/train_1.zip", "w") as archive:
        for number in (1, 2, 3):
            archive.writestr(f"{number}.webp", picture(number, "WEBP"))


def invoke(folder: Path) -> None:
    rows = [
        {"prompt": "a fox", "image_0": "1.png", "image_1": "2.png", "prefer_0": first, "prefer_1": second}
        for first, second in ((False, True), (True, True), (False, False))
    ]
    put(folder, "metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    for number in (1, 2):
        put(folder, f"{number}.png", picture(number))


def folders(better: str, worse: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        for number, name in enumerate(("a", "inner/b")):
            put(folder, f"{better}/{name}.png", picture(2 * number))
            put(folder, f"{worse}/{name}.jpg", picture(2 * number + 1, "JPEG"))
            put(folder, f"{better}/{name}.txt", f"a fox {number}\n")

    return make


def suffixes(folder: Path) -> None:
    put(folder, "a_w.png", picture(1))
    put(folder, "a_l.png", picture(2))
    put(folder, "a.txt", "a fox")


def pickapic(folder: Path) -> None:
    rows = [
        {"jpg_0": picture(1, "JPEG"), "jpg_1": picture(2, "JPEG"), "caption": "a fox", "label_0": label,
         "label_1": 1 - label, "has_label": True, "image_0_uid": "x", "image_1_uid": "y", "user_id": 7,
         "ranking_id": 3, "num_example_per_prompt": 2, "model_0": "m", "model_1": "n"} for label in (1.0, 0.5)
    ]  # fmt: skip
    table(folder, "train-00000-of-00001.parquet", rows)


LAYOUTS: dict[str, tuple[Callable[[Path], None], list[float | None]]] = {
    "pickapic": (pickapic, [1.0, 0.5]),
    "hpdv2": (hpdv2, [0.0, 1.0]),
    "hpdv3": (hpdv3, [1.0, 1.0]),
    "rapidata": (rapidata, [1.0, 0.5, 0.0]),
    "image-preferences": (image_preferences, [0.0, 0.5]),
    "imagerewarddb": (imagerewarddb, [0.0, 0.5, 1.0]),
    "invoke": (invoke, [0.0, 0.5, None]),
    "w-l": (folders("w", "l"), [1.0, 1.0]),
    "chosen-rejected": (folders("chosen", "rejected"), [1.0, 1.0]),
    "suffixes": (suffixes, [1.0]),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_set_in_its_true_layout_is_recognised_and_read(name: str, tmp_path: Path) -> None:
    make, labels = LAYOUTS[name]
    make(tmp_path / "set")
    assert find_format(tmp_path / "set") == name
    rows = imported(tmp_path / "set", tmp_path / "out")
    assert [row["label_0"] for row in rows] == labels
    assert all(row["caption"].startswith("a ") for row in rows)
    assert load_pairs(tmp_path / "out", keep_ties=True).used == sum(label is not None for label in labels)
    assert len(Comparisons(tmp_path / "out")) == sum(label is not None for label in labels)
    assert not (tmp_path / "out" / ".unpacked").exists()


def test_what_a_set_says_beside_the_verdict_is_kept(tmp_path: Path) -> None:
    for name in ("pickapic", "hpdv2", "hpdv3", "rapidata", "image-preferences", "imagerewarddb"):
        LAYOUTS[name][0](tmp_path / name)
    made = [name for name in LAYOUTS if (tmp_path / name).is_dir()]
    first = {name: imported(tmp_path / name, tmp_path / "out" / name)[0] for name in made}
    kept = {"user_id": "7", "ranking_id": "3", "image_0_uid": "x", "model_1": "n"}
    assert first["pickapic"] | kept == first["pickapic"]
    assert first["hpdv2"]["user_id"] == "u1"
    assert first["hpdv2"]["jpg_0"] == picture(1, "JPEG")
    assert (first["hpdv3"]["confidence"], first["hpdv3"]["model_0"]) == (0.9, "flux")
    assert first["hpdv3"]["jpg_1"] == picture(1, "JPEG")
    assert (first["rapidata"]["votes_0"], first["rapidata"]["votes_1"]) == (12, 4)
    assert (first["image-preferences"]["user_id"], first["image-preferences"]["num_example_per_prompt"]) == ("a", 2)
    assert first["image-preferences"]["jpg_0"] == picture(1, "JPEG")
    assert (first["imagerewarddb"]["ranking_id"], first["imagerewarddb"]["num_example_per_prompt"]) == ("p1", 3)


def test_votes_become_soft_labels_where_that_is_asked_for(tmp_path: Path) -> None:
    rapidata(tmp_path / "set")
    imported(tmp_path / "set", tmp_path / "out", soft_labels=True)
    pairs = load_pairs(tmp_path / "out")
    assert [pairs[i].preference for i in range(2)] == [0.75, 1.0]
    hpdv2(tmp_path / "other")
    with pytest.raises(ValueError, match="--soft-labels are shares of votes, which hpdv2 does not have"):
        imported(tmp_path / "other", tmp_path / "out2", soft_labels=True)


def test_the_direction_of_ranks_must_be_confirmed(tmp_path: Path) -> None:
    people = [{"rank": [0, 2, 1], "user_hash": "u"}, {"rank": [1, 1, 0], "user_hash": "v"}]
    row = {"prompt": "a fox", "image_path": ["1.jpg", "2.jpg", "3.jpg"], "rank": [1, 2, 0], "raw_annotations": people}
    put(tmp_path / "set", "test.json", json.dumps([row]))
    for number in (1, 2, 3):
        put(tmp_path / "set", f"test/{number}.jpg", picture(number, "JPEG"))
    with pytest.raises(ValueError, match=r"'a fox': 1.jpg is 1, 2.jpg is 2, 3.jpg is 0\nLook at these pictures"):
        imported(tmp_path / "set", tmp_path / "out", split="test")
    rows = imported(tmp_path / "set", tmp_path / "low", split="test", rank_best="lowest")
    assert [row["label_0"] for row in rows] == [1.0, 1.0, 0.0, 0.5, 0.0, 0.0]
    assert [row["user_id"] for row in rows] == ["u"] * 3 + ["v"] * 3
    assert {row["num_example_per_prompt"] for row in rows} == {6}
    rows = imported(tmp_path / "set", tmp_path / "high", split="test", rank_best="highest")
    assert [row["label_0"] for row in rows] == [0.0, 0.0, 1.0, 0.5, 1.0, 1.0]


def test_a_picture_without_partner_is_named(tmp_path: Path) -> None:
    folders("w", "l")(tmp_path / "set")
    put(tmp_path / "set", "w/alone.png", picture(9))
    with pytest.raises(ValueError, match=r"without a partner of the same name: w/alone.png"):
        imported(tmp_path / "set", tmp_path / "out")


def test_missing_pictures_are_named_or_counted(tmp_path: Path) -> None:
    hpdv2(tmp_path / "set")
    (tmp_path / "set/train/2.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"train.json, row 0: picture 2.jpg is neither in .* --max-missing N"):
        imported(tmp_path / "set", tmp_path / "out")
    assert len(imported(tmp_path / "set", tmp_path / "out2", max_missing=1)) == 1
    assert json.loads((tmp_path / "out2/import.json").read_text())["pairs"]["without picture"] == 1


@pytest.mark.parametrize("name", ["../evil.jpg", "/etc/passwd", "a/../../b.jpg", "C:\\evil.jpg", "..\\evil.jpg", ""])
def test_paths_that_lead_out_are_refused(name: str) -> None:
    with pytest.raises(UnsafeArchiveError, match="leads out of its folder"):
        safe_name(name, "row 0")


@pytest.mark.parametrize("kind", ["climbs", "link", "hard link", "device"])
def test_tar_archives_that_mean_harm_are_refused(kind: str, tmp_path: Path) -> None:
    hpdv3(tmp_path / "set")
    for part in (tmp_path / "set").glob("images.tar.gz.*"):
        part.unlink()
    member = tarfile.TarInfo("../../evil.jpg" if kind == "climbs" else "images/uuid1/a.jpg")
    member.type = {"link": tarfile.SYMTYPE, "hard link": tarfile.LNKTYPE, "device": tarfile.CHRTYPE}.get(
        kind, tarfile.REGTYPE
    )
    member.linkname = "/etc/passwd"
    with tarfile.open(tmp_path / "set/images.tar", "w") as archive:
        archive.addfile(member, io.BytesIO())
    with pytest.raises(UnsafeArchiveError, match=r"images.tar"):
        imported(tmp_path / "set", tmp_path / "out")
    assert not (tmp_path / "evil.jpg").exists()
    assert not (tmp_path / "out" / ".unpacked").exists()


@pytest.mark.parametrize("kind", ["climbs", "link"])
def test_zip_archives_that_mean_harm_are_refused(kind: str, tmp_path: Path) -> None:
    imagerewarddb(tmp_path / "set")
    member = zipfile.ZipInfo("../../evil.webp" if kind == "climbs" else "1.webp")
    member.external_attr = (0o120777 if kind == "link" else 0o100644) << 16
    with zipfile.ZipFile(tmp_path / "set/images/train/train_1.zip", "w") as archive:
        archive.writestr(member, "/etc/passwd")
    with pytest.raises(UnsafeArchiveError, match=r"train_1.zip"):
        imported(tmp_path / "set", tmp_path / "out")
    assert not (tmp_path / "evil.webp").exists()


def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    secret = put(tmp_path, "secret.png", picture(1))
    (tmp_path / "set").mkdir()
    (tmp_path / "set/a.png").symlink_to(secret)
    with pytest.raises(UnsafeArchiveError, match="is a link out of"):
        Place(tmp_path / "set", tmp_path / "scratch").read("a.png", "row 0")


def test_an_import_that_is_done_is_not_done_again_and_another_one_is_refused(tmp_path: Path) -> None:
    hpdv2(tmp_path / "set")
    found = import_pairs(Import(str(tmp_path / "set"), shard_size=1), tmp_path / "out")
    assert found["pairs"] == 2
    assert len(list((tmp_path / "out").glob("train-*.parquet"))) == 2
    written = [path.stat().st_mtime_ns for path in (tmp_path / "out").glob("train-*.parquet")]
    assert import_pairs(Import(str(tmp_path / "set"), shard_size=1), tmp_path / "out") == found
    assert [path.stat().st_mtime_ns for path in (tmp_path / "out").glob("train-*.parquet")] == written
    with pytest.raises(ValueError, match="made with another limit"):
        import_pairs(Import(str(tmp_path / "set"), shard_size=1, limit=1), tmp_path / "out")


@pytest.mark.parametrize("name", ["pickapic", "w-l", "chosen-rejected", "metadata"])
def test_exports_come_back_as_they_were(name: str, tmp_path: Path) -> None:
    pickapic(tmp_path / "set")
    counts = export_pairs(tmp_path / "set", "train", name, tmp_path / "out")
    ties = name in ("pickapic", "metadata")
    assert counts["pairs"] == (2 if ties else 1)
    assert counts.get("ties", 0) == (0 if ties else 1)
    folder = tmp_path / "out"
    if name in ("w-l", "chosen-rejected"):
        folder = tmp_path / "again"
        imported(tmp_path / "out", folder)
    before, after = load_pairs(tmp_path / "set", keep_ties=ties), load_pairs(folder, keep_ties=ties)
    assert after.used == before.used
    for i in range(before.used):
        assert (after[i].chosen, after[i].rejected) == (before[i].chosen, before[i].rejected)
        assert (after[i].caption, after[i].preference) == (before[i].caption, before[i].preference)
