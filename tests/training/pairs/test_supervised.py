"""Supervised fine-tuning: the loss against a straight line, and single pictures in loader, cache and run."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, load_dataset
from PIL import Image

from diffusion_align.data import CacheError, PairBatch, load_pictures
from diffusion_align.training.pairs.config import DPOConfig, SFTConfig
from diffusion_align.training.pairs.job import drawn_noise
from diffusion_align.training.pairs.loading import build_pair_source
from diffusion_align.training.pairs.supervised import SFTMethod
from diffusion_align.training.policy.config import TrainConfig
from diffusion_align.training.run import train

from .test_pair_loss import ByHand, double_unets, policy

COMMON: dict[str, Any] = {"per_device_train_batch_size": 4, "caption_dropout": 0.3, "dataloader_num_workers": 0}


def first_batch(config: Any, adapter: Any) -> PairBatch:
    return next(iter(build_pair_source(config, adapter)))


@pytest.fixture(scope="module")
def pictures_file(pairs_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The chosen pictures of the pairs, as a table of pictures with captions."""
    rows = load_dataset("parquet", data_files=str(pairs_folder / "train-00000-of-00001.parquet"), split="train")
    images = [row["jpg_0"] if row["label_0"] == 1 else row["jpg_1"] for row in rows]
    path = tmp_path_factory.mktemp("pictures") / "train-00000-of-00001.parquet"
    Dataset.from_dict({"image": images, "caption": rows["caption"]}).to_parquet(path)
    return path.parent


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sdxl_folder", "sd_v_folder"])
def test_the_loss_is_the_mean_error_on_the_chosen_pictures(
    family: str, pairs_folder: Path, request: pytest.FixtureRequest
) -> None:
    adapter = policy(request.getfixturevalue(family))
    config = SFTConfig(dataset=str(pairs_folder), **COMMON)
    batch = first_batch(config, adapter)
    assert batch.pixels is not None
    assert batch.pixels.shape == (1, 4, 3, 64, 64)
    pairs = first_batch(DPOConfig(dataset=str(pairs_folder), **COMMON), adapter)
    assert pairs.pixels is not None
    assert torch.equal(batch.pixels[0], pairs.pixels[0])
    assert batch.captions == pairs.captions
    hand = ByHand(adapter, pairs)
    expected = hand.error(double_unets(adapter)[0], hand.eps).chunk(2)[0].mean().item()
    method = SFTMethod(config, adapter, None, drawn_noise(config, adapter))  # type: ignore[arg-type]
    loss, metrics = method.loss(batch)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert metrics["error_chosen"].item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for n, p in adapter.trainable_parameters().items() if "lora_B" in n)


def test_pictures_with_captions_are_read_like_the_chosen_ones_of_pairs(
    pictures_file: Path, pairs_folder: Path, sdxl_folder: Path, tmp_path: Path
) -> None:
    adapter = policy(sdxl_folder)
    expected = first_batch(SFTConfig(dataset=str(pairs_folder), **COMMON), adapter)
    rows = load_pictures(pictures_file)
    with (tmp_path / "metadata.jsonl").open("w") as file:
        for i in range(len(rows)):  # type: ignore[arg-type]
            record = rows[i]  # type: ignore[index]
            assert record.rejected is None
            Image.open(io.BytesIO(record.chosen)).save(tmp_path / f"{i}.png")
            file.write(json.dumps({"image": f"{i}.png", "caption": record.caption}) + "\n")
    for dataset in (pictures_file, tmp_path):
        found = first_batch(SFTConfig(dataset=str(dataset), **COMMON), adapter)
        assert found.captions == expected.captions
        assert found.pixels is not None
        assert expected.pixels is not None
        assert torch.equal(found.pixels, expected.pixels)
    streamed = SFTConfig(dataset=str(pictures_file), streaming=True, shuffle_buffer=4, **COMMON)
    assert first_batch(streamed, adapter).size_ids.shape == (1, 4, 6)


@pytest.mark.slow
def test_single_pictures_are_read_from_a_cache_of_their_own_or_of_pairs(
    pairs_folder: Path, sdxl_folder: Path, tmp_path: Path
) -> None:
    adapter = policy(sdxl_folder)
    data: dict[str, Any] = {"dataset": str(pairs_folder), **COMMON}
    first_batch(DPOConfig(cache_dir=str(tmp_path / "pairs"), **data), adapter)
    found = [first_batch(SFTConfig(cache_dir=str(tmp_path / name), **data), adapter) for name in ("pairs", "own")]
    for batch in found:
        assert batch.posterior is not None
        assert batch.posterior[0].shape[:2] == (1, 4)
    assert torch.equal(found[0].posterior[0], found[1].posterior[0])  # type: ignore[index]
    with pytest.raises(CacheError, match=r"own holds single pictures \(of train sft\), no pairs"):
        build_pair_source(DPOConfig(cache_dir=str(tmp_path / "own"), **data), adapter)


def test_ties_have_no_chosen_picture_and_doubted_verdicts_the_likelier_one(tmp_path: Path) -> None:
    for name in "ab":
        Image.new("RGB", (64, 64), {"a": "red", "b": "blue"}[name]).save(tmp_path / f"{name}.png")
    rows = [{"chosen": "a.png", "rejected": "b.png", "caption": f"{p}", "preference": p} for p in (0.5, 0.9, 0.2)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    pictures: Any = load_pictures(tmp_path)
    assert pictures.counts["ties"] == 1
    shown = [record.images()[0].getpixel((0, 0)) for record in (pictures[0], pictures[1])]
    assert shown == [(255, 0, 0), (0, 0, 255)]


def test_a_table_without_pictures_is_told_what_is_missing(tmp_path: Path) -> None:
    Dataset.from_dict({"image": [b"x"], "text": ["a ring"]}).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"column 'caption' is missing.*Expected single pictures' image, caption"):
        load_pictures(tmp_path / "train.parquet")


@pytest.mark.slow
def test_a_run_is_the_first_stage_of_another(pairs_folder: Path, sdxl_folder: Path, tmp_path: Path) -> None:
    run: dict[str, Any] = {
        "model": str(sdxl_folder), "dataset": str(pairs_folder), "per_device_train_batch_size": 2, "max_steps": 2,
        "report_to": "none", "progress": False, "save_steps": 1, "logging_steps": 1,
    }  # fmt: skip
    (tmp_path / "prompts.txt").write_text("\n".join(f"a star, {number}" for number in range(12)))
    first = train(SFTConfig(output_dir=str(tmp_path / "sft"), learning_rate=1e-2, eval_steps=2,
                            validation_prompts=str(tmp_path / "prompts.txt"), artefact_monitor=True,
                            validation_inference_steps=2, **run))  # fmt: skip
    assert first.step == 2
    losses = [line["loss"] for line in first.history if "loss" in line]
    start, end = [line for line in first.history if "artefact/blockiness_low" in line]
    assert start["artefact/edges_low"] == start["artefact/edges_high"] == 0 != end["artefact/edges_high"]
    assert end["alarm/artefacts"] == 0  # of one validation, whatever it showed
    assert "eval/picture_saturation" not in end
    assert (tmp_path / "sft" / "samples" / "step-000002.png").is_file()
    resumed = train(SFTConfig(output_dir=str(tmp_path / "again"), learning_rate=1e-2, **run | {
        "resume_from_checkpoint": str(tmp_path / "sft" / "checkpoint-00000001"),
    }))  # fmt: skip
    assert resumed.history[-1]["loss"] == losses[-1]
    second = train(DPOConfig(output_dir=str(tmp_path / "dpo"), init_weights=str(tmp_path / "sft"), **run))
    assert second.history[0]["margin"] == pytest.approx(0, abs=1e-6)
    plain = train(DPOConfig(output_dir=str(tmp_path / "plain"), **run))
    assert second.history[0]["error_chosen"] != plain.history[0]["error_chosen"]


@pytest.mark.slow
def test_all_weights_can_be_tuned(pairs_folder: Path, sd_folder: Path, tmp_path: Path) -> None:
    config = SFTConfig(
        model=str(sd_folder), dataset=str(pairs_folder), full_finetuning=True, max_steps=1, report_to="none",
        progress=False, per_device_train_batch_size=2, output_dir=str(tmp_path),
    )  # fmt: skip
    assert train(config).weights is not None


@pytest.mark.slow
def test_the_plan_counts_pictures_and_one_row_for_each(pairs_folder: Path, sdxl_folder: Path) -> None:
    def notes(cls: type[TrainConfig]) -> Any:
        return cls(model=str(sdxl_folder), dataset=str(pairs_folder)).plan()  # type: ignore[call-arg]

    alone, pairs = notes(SFTConfig), notes(DPOConfig)
    assert alone.sections["data"]["pictures used"] == "12"
    assert pairs.sections["data"]["pairs used"] == "12"
    kept = [float(each.sections["memory"]["activations"].split()[0]) for each in (alone, pairs)]
    assert kept[0] < 0.6 * kept[1]
