"""Runs on labelled pictures and on ranked lists from files: resumed, streamed, cached, and as plans see them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from diffusion_align.adapters import Adapter
from diffusion_align.data.cache import CacheError
from diffusion_align.training.pairs.beyond_pairs.config import KTOConfig
from diffusion_align.training.pairs.beyond_pairs.lists import ListMethod
from diffusion_align.training.pairs.config import DPOConfig
from diffusion_align.training.pairs.job import drawn_noise
from diffusion_align.training.pairs.loading import build_pair_source
from diffusion_align.training.run import train
from tests.data.test_data import encoded, rows, written
from tests.data.test_labelled_pictures import folders
from tests.data.test_labelled_pictures import parquet as labelled
from tests.data.test_lists_of_pairs import VERDICTS, pairs

from .test_pair_loss import policy

#: Scores of the lists' pictures.
SCORES = ([0.3, 0.1, 0.2], [1.0, 5.0], [0.7, 0.7, 9.0, 6.0], [1.0, 2.0, 3.0])


@pytest.fixture(scope="module")
def adapter(sd_folder: Path) -> Adapter:
    return policy(sd_folder)


@pytest.fixture
def settings(sd_folder: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "model": str(sd_folder), "output_dir": str(tmp_path / "run"), "max_steps": 2, "save_steps": 1,
        "learning_rate": 1e-2, "beta": 500.0, "lora_rank": 2, "logging_steps": 1, "report_to": "none",
        "progress": False, "save_total_limit": 5, "per_device_train_batch_size": 2, "resolution": 16,
        "dataloader_num_workers": 0,
    }  # fmt: skip


def scored(path: Path) -> Path:
    images = [[encoded(40 * i + 5 * j, (32, 32)) for j in range(len(scores))] for i, scores in enumerate(SCORES)]
    pq.write_table(pa.table({"images": images, "caption": ["a", "b", "c", "d"], "scores": SCORES}), path)
    return path


def same_weights(first: Path, second: Path) -> None:
    one, other = (load_file(folder / "checkpoint-00000002/policy.safetensors") for folder in (first, second))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folders", "streamed", "cached"])
def test_a_run_on_labelled_pictures_resumes_bit_for_bit(settings: dict[str, Any], tmp_path: Path, kind: str) -> None:
    data = folders(tmp_path / "data") if kind == "folders" else labelled(tmp_path / "data.parquet")
    extra = {"streaming": kind == "streamed", "cache_dir": str(tmp_path / "cache") if kind == "cached" else None}
    config = KTOConfig(**settings | extra, dataset=str(data))
    train(config)
    middle = str(tmp_path / "run/checkpoint-00000001")
    train(replace(config, output_dir=str(tmp_path / "again"), resume_from_checkpoint=middle))
    same_weights(tmp_path / "run", tmp_path / "again")
    kept = json.loads((tmp_path / "run/data.json").read_text())
    assert (kept["unit"], kept["kinds"]["liked"]) == ("labelled pictures", 3)


@pytest.mark.slow
@pytest.mark.parametrize("cached", [False, True])
def test_a_run_on_lists_resumes_bit_for_bit(
    settings: dict[str, Any], tmp_path: Path, cached: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    config = DPOConfig(
        **settings, dataset=str(scored(tmp_path / "a.parquet")), loss_type="lair", list_size=3,
        cache_dir=str(tmp_path / "cache") if cached else None,
    )  # fmt: skip
    train(config)
    assert "data: 1 lists of 2, 2 lists of 3, 1 lists of 4" in capfd.readouterr().err
    middle = str(tmp_path / "run/checkpoint-00000001")
    train(replace(config, output_dir=str(tmp_path / "again"), resume_from_checkpoint=middle))
    same_weights(tmp_path / "run", tmp_path / "again")
    if cached:
        with pytest.raises(CacheError, match="holds ranked lists: method kto with these settings"):
            train(KTOConfig(**settings | {"overwrite_output_dir": True}, cache_dir=config.cache_dir))


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", ["lair", "plackett_luce", "dgpo", "rankdpo", "d2o"])
def test_what_fills_lists_up_changes_nothing(
    settings: dict[str, Any], adapter: Adapter, tmp_path: Path, loss_type: str
) -> None:
    config = DPOConfig(
        **settings | {"per_device_train_batch_size": 4}, dataset=str(scored(tmp_path / "a.parquet")),
        loss_type=loss_type, random_flip=False,
    )  # fmt: skip
    batch = next(iter(build_pair_source(config, adapter)))
    assert batch.mask is not None
    assert batch.rank is not None
    assert not batch.mask.all()
    method = ListMethod(config, adapter, None, drawn_noise(config, adapter))  # type: ignore[arg-type]
    together = method.loss(batch)[0].item()
    alone = []
    for i in range(4):
        own, there = batch.rows([i]), batch.mask[i]
        assert own.pixels is not None
        assert own.rank is not None
        assert own.score is not None
        own = replace(
            own, pixels=own.pixels[there], size_ids=own.size_ids[there], rank=own.rank[:, there],
            score=own.score[:, there], mask=None,
        )  # fmt: skip
        alone.append(method.loss(own)[0].item())
    assert together == pytest.approx(sum(alone) / 4, rel=1e-4)


@pytest.mark.slow
def test_lists_are_made_of_pairs_at_the_start_of_a_run(
    settings: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = DPOConfig(
        **settings, dataset=str(pairs(tmp_path / "a.parquet", VERDICTS)), loss_type="plackett_luce",
        lists_from_pairs=True,
    )  # fmt: skip
    train(config)
    out = capfd.readouterr()
    assert "1 lists left out, whose circles nothing breaks" in out.err
    assert "3 rows, 3 ranked lists used" in out.err
    middle = str(tmp_path / "run/checkpoint-00000001")
    train(replace(config, output_dir=str(tmp_path / "again"), resume_from_checkpoint=middle))
    same_weights(tmp_path / "run", tmp_path / "again")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"list_size": 3}, "list_size is for losses on lists: loss_type sigmoid takes pairs"),
        ({"lists_from_pairs": True}, "lists_from_pairs is for losses on lists"),
        ({"loss_type": "lair", "lists_from_pairs": True, "streaming": True}, "cannot be used with streaming"),
        ({"loss_type": "lair", "lists_from_pairs": True, "cache_dir": "x"}, "cannot be used with cache_dir"),
    ],
)
def test_settings_of_lists_are_refused_where_they_do_nothing(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DPOConfig(**changes).check()


def test_a_plan_counts_what_the_data_holds(tmp_path: Path, sd_folder: Path) -> None:
    lists = DPOConfig(dataset=str(scored(tmp_path / "a.parquet")), loss_type="lair", model=str(sd_folder))
    assert (lists.work().name, lists.work().trained, lists.memory_needs().rows) == ("list", 4, 4)
    assert replace(lists, list_size=3).work().trained == 3
    thumbs = KTOConfig(dataset=str(folders(tmp_path / "data")), model=str(sd_folder))
    assert (thumbs.work().name, thumbs.work().trained, thumbs.memory_needs().rows) == ("picture", 1, 1)
    table = thumbs.data_notes()[0]
    assert isinstance(table, dict)
    assert table["labelled pictures used"] == "5"
    assert (table["liked"], table["captions with both"]) == ("3", "1")
    as_pairs = written(tmp_path / "pairs.parquet", rows(4))
    for config in (replace(lists, dataset=str(as_pairs)), replace(thumbs, dataset=str(as_pairs))):
        assert (config.work().name, config.work().trained) == ("pair", 2)
    warned = KTOConfig(dataset=str(labelled(tmp_path / "b.parquet", label=[1] * 6)), model=str(sd_folder))
    assert "all 6 pictures are liked" in str(warned.data_notes()[0])
