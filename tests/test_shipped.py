"""What comes with the package: names, ordinary folders, the cache they are assembled in, and how large it all is."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import open_clip
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

import diffusion_align
from diffusion_align import shipped
from diffusion_align.scenes.pack import put_in
from diffusion_align.shipped import CACHE_VARIABLE, MANIFEST, PACKED, RECORD, SHIPPED, asset_folder, shipped_path

ROOT = Path(__file__).parent.parent
MEBI = 2**20

#: Loads a pipeline, a scorer and an evaluator that are stored in few bits, from the package found first.
LOADS = """
import diffusion_align
from diffusers import DiffusionPipeline
print(diffusion_align.__file__)
DiffusionPipeline.from_pretrained(diffusion_align.shipped_path("scenes-uneven"))
diffusion_align.load_scorer("scenes-vp-words")
diffusion_align.load_evaluator("scenes-uneven-evaluator")
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder of the test's own."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def assets(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An asset folder of the test's own, with nothing but a card of scenes-vp."""
    monkeypatch.setattr(shipped, "ASSETS", tmp_path / "assets")
    (tmp_path / "assets" / "scenes-vp").mkdir(parents=True)
    (tmp_path / "assets" / "scenes-vp" / "README.md").write_text("a card")
    return tmp_path / "assets"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tracked files."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout: what is tracked is not known")
    folder = tmp_path_factory.mktemp("checkout")
    for name in tracked():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel, built as pip does, offline."""
    out = tmp_path_factory.mktemp("wheel")
    command = f"from setuptools.build_meta import build_wheel; print(build_wheel({str(out)!r}))"
    subprocess.run([sys.executable, "-c", command], cwd=checkout, check=True, capture_output=True)
    (built,) = out.glob("*.whl")
    return built


def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def test_the_tracked_tree_is_small_enough_to_copy(checkout: Path) -> None:
    assert sum((checkout / name).stat().st_size for name in tracked()) < 40 * MEBI


def test_the_wheel_is_small_and_works_where_it_is_installed(wheel: Path, tmp_path: Path) -> None:
    assert wheel.stat().st_size < 30 * MEBI
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), CACHE_VARIABLE: str(tmp_path / "cache")}
    ran = subprocess.run(
        [sys.executable, "-c", LOADS], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert str(tmp_path / "site") in ran.stdout


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_has_at_most_300_kilobytes(path: Path) -> None:
    assert path.stat().st_size <= 300_000


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "images").glob("*.png")), ids=lambda path: path.stem)
def test_a_picture_of_the_docs_has_at_most_150_kilobytes(path: Path) -> None:
    assert path.stat().st_size <= 150_000


@pytest.mark.parametrize("name", SHIPPED)
def test_every_name_gives_an_ordinary_folder_with_its_card(name: str) -> None:
    folder = shipped_path(name)
    assert (folder / "README.md").read_bytes() == (asset_folder(name) / "README.md").read_bytes()
    assert not [path for path in folder.rglob("*") if path.name == MANIFEST or path.name.endswith(PACKED)]


def test_shipped_path_is_exported_from_the_top() -> None:
    assert diffusion_align.shipped_path is shipped_path


@pytest.mark.parametrize("name", ["scenes-uneven", "scenes-inpaint", "scenes-sd"])
def test_a_packed_pipeline_loads_with_plain_diffusers(name: str) -> None:
    pipeline = DiffusionPipeline.from_pretrained(shipped_path(name))
    assert all(weight.isfinite().all() for weight in pipeline.unet.parameters())


def test_what_pipelines_share_is_the_same_once_assembled() -> None:
    for path in ("vae/diffusion_pytorch_model.safetensors", "text_encoder_2/model.safetensors"):
        assert (shipped_path("scenes-uneven") / path).read_bytes() == (asset_folder("scenes-sdxl") / path).read_bytes()


def test_the_packed_clip_loads_with_plain_open_clip() -> None:
    folder = f"local-dir:{shipped_path('scenes-clip')}"
    model, tokenizer = open_clip.create_model(folder), open_clip.get_tokenizer(folder)
    with torch.no_grad():
        assert model.encode_text(tokenizer(["a red star on a dark background"])).isfinite().all()


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'scenes-xl' does not come with the package: expected one of scenes-sdxl"):
        shipped_path("scenes-xl")


def test_what_is_stored_whole_is_not_copied(cache: Path) -> None:
    assert shipped_path("scenes-sdxl") == asset_folder("scenes-sdxl")
    assert not cache.exists()


@pytest.mark.parametrize("damage", ["missing", "torn", "no record", "torn record"])
def test_a_damaged_folder_is_assembled_again(cache: Path, damage: str) -> None:
    folder = shipped_path("scenes-sd")
    part = folder / ("vae/diffusion_pytorch_model.safetensors" if damage in ("missing", "torn") else RECORD)
    whole = part.read_bytes()
    if damage.startswith("torn"):
        part.write_bytes(whole[: len(whole) // 2])
    else:
        part.unlink()
    assert shipped_path("scenes-sd") == folder
    assert part.read_bytes() == whole


def test_a_complete_folder_is_not_written_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shipped_path("scenes-sd")

    def refuse(path: Path, content: bytes) -> None:
        raise AssertionError(f"{path} was written")

    monkeypatch.setattr(shipped, "write_whole", refuse)
    assert shipped_path("scenes-sd") == folder


def test_processes_that_assemble_at_once_all_get_whole_folders(cache: Path) -> None:
    code = "from diffusion_align.shipped import *; p = shipped_path('scenes-sd'); assert is_complete(p); print(p)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    runs = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    assert len({run.communicate()[0] for run in runs}) == 1
    assert [run.returncode for run in runs] == [0, 0, 0]
    (folder,) = (cache / "shipped").iterdir()
    assert not list(folder.rglob(".*"))


def test_a_cache_that_cannot_be_written_is_named_with_its_variable(cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    with pytest.raises(OSError, match=rf"{cache}.* cannot be written .*environment variable {CACHE_VARIABLE}"):
        shipped_path("scenes-sd")


def finished_run(folder: Path, seed: int = 0) -> Path:
    """What a training run leaves: float32 weights, float64 statistics, and a text file."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    weights = {"w": torch.randn(64, 64, generator=generator), "bias": torch.randn(64, generator=generator)}
    save_file(weights, folder / "model.safetensors")
    save_file(
        {"covariance": torch.randn(64, 64, generator=generator, dtype=torch.float64)}, folder / "trust.safetensors"
    )
    (folder / "tokenizer.json").write_text("a word\n" * 1000)
    return folder


def test_a_packed_run_comes_back_close_with_its_statistics_exact(assets: Path, tmp_path: Path) -> None:
    source = finished_run(tmp_path / "run")
    put_in(source, "scenes-vp")
    before, after = load_file(source / "model.safetensors"), load_file(shipped_path("scenes-vp") / "model.safetensors")
    assert torch.equal(after["bias"], before["bias"].half())
    assert (after["w"].float() - before["w"]).abs().max() < before["w"].abs().max() / 63
    trust = "trust.safetensors"
    assert (shipped_path("scenes-vp") / trust).read_bytes() == (source / trust).read_bytes()


def test_packing_keeps_the_card_and_drops_old_files(assets: Path, tmp_path: Path) -> None:
    (assets / "scenes-vp" / "old.json").write_text("{}")
    put_in(finished_run(tmp_path / "run"), "scenes-vp")
    assert (shipped_path("scenes-vp") / "README.md").read_text() == "a card"
    assert not (shipped_path("scenes-vp") / "old.json").exists()


def test_a_fine_tuned_run_is_a_difference_and_shares_equal_files(assets: Path, tmp_path: Path) -> None:
    put_in(finished_run(tmp_path / "run"), "scenes-vp")
    child = finished_run(tmp_path / "child", seed=1)
    base = load_file(shipped_path("scenes-vp") / "model.safetensors")
    save_file({**base, "w": base["w"].float() + 0.01}, child / "model.safetensors")
    put_in(child, "scenes-vp-inpaint", parent="scenes-vp")
    manifest = json.loads((assets / "scenes-vp-inpaint" / MANIFEST).read_text())
    assert manifest == {
        "shared": {"tokenizer.json": "scenes-vp/tokenizer.json"},
        "packed": {"model.safetensors": "scenes-vp/model.safetensors"},
    }
    after = load_file(shipped_path("scenes-vp-inpaint") / "model.safetensors")["w"].float()
    assert (after - base["w"].float() - 0.01).abs().max() < 2e-3


def test_another_parent_gives_another_folder(assets: Path, tmp_path: Path) -> None:
    put_in(finished_run(tmp_path / "run"), "scenes-vp")
    put_in(finished_run(tmp_path / "child", seed=1), "scenes-vp-inpaint", parent="scenes-vp")
    first = shipped_path("scenes-vp-inpaint")
    put_in(finished_run(tmp_path / "other", seed=2), "scenes-vp")
    assert shipped_path("scenes-vp-inpaint") != first


def test_a_shared_file_that_is_gone_is_named(assets: Path, tmp_path: Path) -> None:
    put_in(finished_run(tmp_path / "run"), "scenes-vp")
    put_in(finished_run(tmp_path / "child", seed=1), "scenes-vp-inpaint")
    (assets / "scenes-vp" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"scenes-vp: has no tokenizer\.json, which another asset shares"):
        shipped_path("scenes-vp-inpaint")


def test_torn_packed_weights_are_named(assets: Path, tmp_path: Path) -> None:
    stored = put_in(finished_run(tmp_path / "run"), "scenes-vp") / "model.safetensors.packed"
    stored.write_bytes(stored.read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"model\.safetensors\.packed: cannot be read"):
        shipped_path("scenes-vp")


def test_an_asset_is_not_packed_from_itself(assets: Path) -> None:
    with pytest.raises(ValueError, match="scenes-vp: an asset cannot be packed from itself"):
        put_in(assets / "scenes-vp", "scenes-vp")
