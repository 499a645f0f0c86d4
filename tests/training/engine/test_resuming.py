"""Going on from a checkpoint with other settings: applied, or refused by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from diffusion_align.training.engine.checkpoint import MANIFEST, CheckpointError, TrainState, save_checkpoint
from diffusion_align.training.engine.config import RunConfig
from diffusion_align.training.engine.resuming import may_change, record_of, resumed_checkpoint
from diffusion_align.training.methods import METHODS, config_class
from diffusion_align.training.online.config import GRPOConfig
from diffusion_align.training.pairs.config import DPOConfig
from diffusion_align.training.run import train
from diffusion_align.training.settings import load_config


def written(config: RunConfig, folder: Path, num_processes: int = 1) -> Path:
    return save_checkpoint(folder, TrainState({}, record_of(config, num_processes)), step=3, keep=2)


@pytest.mark.slow
def test_another_learning_rate_is_applied_told_and_recorded(
    sdxl_folder: Path, pairs_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared: dict[str, Any] = {
        "model": str(sdxl_folder), "dataset": str(pairs_folder), "output_dir": str(tmp_path / "run"), "lora_rank": 2,
        "logging_steps": 1, "report_to": "none", "progress": False,
    }  # fmt: skip
    train(DPOConfig(max_steps=2, learning_rate=1e-4, **shared))
    rates = {"learning_rate": 8e-4, "lr_scheduler_type": "linear"}
    result = train(DPOConfig(max_steps=4, resume_from_checkpoint="latest", **shared, **rates))
    assert [line["learning_rate"] for line in result.history[-2:]] == pytest.approx([8e-4 / 4, 0])
    assert "learning_rate was 0.0001, is 0.0008" in capsys.readouterr().err
    assert load_config(DPOConfig, tmp_path / "run" / "config.yaml").learning_rate == 8e-4
    with pytest.raises(CheckpointError, match=r"seed was 0, is 1; beta was 5000\.0, is 7\.0"):
        train(DPOConfig(max_steps=6, resume_from_checkpoint="latest", seed=1, beta=7.0, **shared))
    assert load_config(DPOConfig, tmp_path / "run" / "config.yaml").seed == 0


@pytest.mark.parametrize(
    "changes",
    [{"seed": 1}, {"dataset": "other"}, {"beta": 1.0}, {"model": "other"}, {"loss_type": "ipo"}, {"lora_rank": 2}],
    ids=str,
)
def test_what_the_run_is_about_cannot_change(changes: dict[str, Any], tmp_path: Path) -> None:
    written(DPOConfig(), tmp_path)
    (name,) = changes
    with pytest.raises(CheckpointError, match=f"{name} was .*, is {changes[name]!r}"):
        resumed_checkpoint(DPOConfig(resume_from_checkpoint="latest", **changes), tmp_path, 1)


def test_how_it_goes_on_can(tmp_path: Path) -> None:
    checkpoint = written(DPOConfig(), tmp_path)
    changes: dict[str, Any] = {"save_steps": 7, "validation_scorer": "scenes-clip", "per_device_train_batch_size": 2}
    again = DPOConfig(resume_from_checkpoint="latest", output_dir="elsewhere", **changes)
    found, (note,) = resumed_checkpoint(again, tmp_path, 2)
    assert found == checkpoint
    assert all(f"{name} was " in note for name in changes)
    assert "output_dir" not in note
    assert resumed_checkpoint(DPOConfig(resume_from_checkpoint="latest"), tmp_path, 1) == (checkpoint, [])


def test_a_rollout_stays_with_its_processes(tmp_path: Path) -> None:
    written(GRPOConfig(), tmp_path)
    config = GRPOConfig(resume_from_checkpoint="latest")
    assert resumed_checkpoint(config, tmp_path, 1)[1] == []
    with pytest.raises(CheckpointError, match="number of processes was 1, is 2"):
        resumed_checkpoint(config, tmp_path, 2)


def test_a_checkpoint_without_a_record_is_taken_as_it_is(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path, TrainState({}, {"step": 3}), step=3, keep=2)
    assert "settings" not in json.loads((checkpoint / "state.json").read_text())
    assert (checkpoint / MANIFEST).is_file()
    assert resumed_checkpoint(DPOConfig(resume_from_checkpoint="latest", seed=5), tmp_path, 3) == (checkpoint, [])


@pytest.mark.parametrize("method", METHODS)
def test_what_may_change_are_settings(method: str) -> None:
    cls = config_class(method)
    names = {field.name for field in dataclasses.fields(cls)}
    assert may_change(cls()) <= names
    assert {"seed", "dataset"} & may_change(cls()) == set()
