"""Finished runs are put among the shipped assets in few bits, and come back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusion_align import shipped
from diffusion_align.scenes.pack import put_in
from diffusion_align.shipped import CACHE_VARIABLE, MANIFEST, shipped_path


@pytest.fixture
def assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Asset and cache folders of the test's own, with nothing but a card of scenes-vp."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(shipped, "ASSETS", tmp_path / "assets")
    (tmp_path / "assets" / "scenes-vp").mkdir(parents=True)
    (tmp_path / "assets" / "scenes-vp" / "README.md").write_text("a card")
    return tmp_path / "assets"


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
