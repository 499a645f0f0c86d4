"""``diffusion-align cache``, ``cache verify`` and ``cache gc``, and what runs make of a cache."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from diffusion_align.adapters import Adapter, load_adapter
from diffusion_align.cli import main
from diffusion_align.data import CacheError
from diffusion_align.training.pairs.config import DPOConfig
from diffusion_align.training.pairs.loading import build_pair_source
from tests.processes import TwoProcesses


@pytest.fixture(scope="module")
def adapter(sdxl_folder: Path) -> Adapter:
    return load_adapter(sdxl_folder)


@pytest.fixture
def data(pairs_folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(pairs_folder, tmp_path / "data"))


@pytest.fixture
def flags(sdxl_folder: Path, data: Path, tmp_path: Path) -> list[str]:
    return ["--model", str(sdxl_folder), "--dataset", str(data), "--cache-dir", str(tmp_path / "cache")]


def first_captions(adapter: Adapter, data: Path, tmp_path: Path, **settings: Any) -> list[str | None]:
    config = DPOConfig(dataset=str(data), cache_dir=str(tmp_path / "cache"), output_dir=str(tmp_path), **settings)
    return next(iter(build_pair_source(config, adapter))).captions


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
def test_a_cache_is_made_checked_and_tidied(
    streaming: bool,
    flags: list[str],
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No table is copied on the way."""
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("an Arrow copy"))
    cache = tmp_path / "cache"
    assert main(["cache", *flags, "--max-pairs", "8", *(["--streaming"] if streaming else [])]) == 0
    said = capsys.readouterr().out
    assert "to encode: " in said
    assert f"{cache}: 8 pairs" in said
    assert main(["cache", "verify", str(cache), "--data"]) == 0
    assert "rows and pictures of its data set are right" in capsys.readouterr().out
    moved = data.rename(tmp_path / "moved")
    assert main(["cache", "verify", str(cache), "--data"]) == 2
    assert main(["cache", "verify", str(cache), "--data", "--dataset", str(moved)]) == 0
    capsys.readouterr()

    torn = cache / "images-00000.safetensors"
    (cache / "images-00007.safetensors").write_bytes(b"of another data set")
    assert main(["cache", "gc", str(cache), "--dry-run"]) == 0
    assert "1 files, 19 bytes would be removed" in capsys.readouterr().out
    assert main(["cache", "gc", str(cache)]) == 0
    assert "1 files, 19 bytes removed" in capsys.readouterr().out
    torn.write_bytes(torn.read_bytes()[:-1])
    assert main(["cache", "verify", str(cache)]) == 1
    assert f"WRONG {torn} has " in capsys.readouterr().out


def test_folders_without_a_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for word in ("verify", "gc"):
        assert main(["cache", word, str(tmp_path)]) == 2
        assert "manifest.json is missing" in capsys.readouterr().err
        assert main(["cache", word, str(tmp_path / "nowhere")]) == 2
        assert "there is no such folder" in capsys.readouterr().err
    assert main(["cache", "check"]) == 2
    assert "expected 'cache' with settings, 'cache verify DIR' or 'cache gc DIR'" in capsys.readouterr().err


def test_a_run_refuses_a_cache_of_other_pairs(adapter: Adapter, data: Path, tmp_path: Path) -> None:
    expected = first_captions(adapter, data, tmp_path, max_pairs=6)
    assert first_captions(adapter, data, tmp_path, max_pairs=6) == expected
    for other in ({"max_pairs": 5}, {"max_pairs": 6, "seed": 1}, {"max_pairs": 6, "pair_selection": "first"}):
        with pytest.raises(CacheError, match=r"holds other data than .* rows: 6 then, [56] now"):
            first_captions(adapter, data, tmp_path, **other)


def test_a_cache_may_outlive_its_data_set(adapter: Adapter, data: Path, tmp_path: Path) -> None:
    expected = first_captions(adapter, data, tmp_path)
    data.rename(tmp_path / "gone")
    with pytest.warns(UserWarning, match="is used without comparing it with its data set: data set .* not found"):
        assert first_captions(adapter, data, tmp_path) == expected
    with pytest.raises(FileNotFoundError, match="not found"):
        first_captions(adapter, data, tmp_path, max_pairs=5)


@pytest.mark.slow
def test_two_commands_make_one_cache(flags: list[str], two_processes: TwoProcesses, tmp_path: Path) -> None:
    first, second = two_processes.command("cache", *flags)
    assert main(["cache", "verify", str(tmp_path / "cache"), "--data"]) == 0
    assert "pairs," in first
    assert "pairs," not in second
    assert main(["cache", *flags, "--cache-dir", str(tmp_path / "alone")]) == 0
    together, alone = (
        {file.name: file.read_bytes() for file in (tmp_path / name).glob("*.safetensors")}
        for name in ("cache", "alone")
    )
    assert together == alone
