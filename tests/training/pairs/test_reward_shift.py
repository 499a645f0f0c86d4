"""The running means of rewards that kto, bco_pair and bco compare with, beside a plain sum over the batches."""

from __future__ import annotations

from dataclasses import replace
from math import exp, log1p, nan
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from diffusion_align.objectives import PairStats, preference_loss
from diffusion_align.training.engine.checkpoint import list_checkpoints
from diffusion_align.training.engine.loop import TrainResult
from diffusion_align.training.pairs.beyond_pairs.config import KTOConfig
from diffusion_align.training.pairs.config import DPOConfig
from diffusion_align.training.pairs.reward_shift import RewardShift
from diffusion_align.training.run import train
from tests.processes import TwoProcesses

REWARDS = ("rewards/chosen", "rewards/rejected")


def build_config(model: Path, pairs: Path, folder: Path) -> DPOConfig:
    return DPOConfig(
        model=str(model),
        dataset=str(pairs),
        output_dir=str(folder / "run"),
        loss_type="bco_pair",
        max_steps=4,
        learning_rate=1e-3,
        beta=500.0,
        lora_rank=4,
        logging_steps=1,
        save_steps=2,
        report_to="none",
        progress=False,
    )


@pytest.fixture
def config(sdxl_folder: Path, pairs_folder: Path, tmp_path: Path) -> DPOConfig:
    return build_config(sdxl_folder, pairs_folder, tmp_path)


@pytest.fixture(scope="module")
def straight(sdxl_folder: Path, pairs_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """A run with bco_pair."""
    return train(build_config(sdxl_folder, pairs_folder, tmp_path_factory.mktemp("straight")))


def sig(x: float) -> float:
    return 1 / (1 + exp(-x))


def by_hand(loss_type: str, chosen: float, rejected: float, shift: float) -> float:
    """The loss of one pair with the rewards ``chosen`` and ``rejected``."""
    if loss_type == "bco_pair":
        return log1p(exp(shift - chosen)) + log1p(exp(rejected - shift))
    z = max(0.0, shift)
    return 0.5 * ((1 - sig(chosen - z)) + (1 - sig(z - rejected)))


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", ["bco_pair", "kto"])
def test_each_loss_is_compared_with_the_mean_of_all_batches_so_far(
    loss_type: Any, config: DPOConfig, straight: TrainResult
) -> None:
    run = straight if loss_type == config.loss_type else train(replace(config, loss_type=loss_type))
    history = run.history
    means: list[float] = []
    for line in history:
        chosen, rejected = (line[name] for name in REWARDS)
        means.append((chosen + rejected) / 2)
        expected = by_hand(loss_type, chosen, rejected, sum(means) / len(means))
        assert line["loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_with_one_pair_bco_is_not_a_loss_on_the_difference_alone(straight: TrainResult) -> None:
    apart = [abs(line["loss"] - 2 * log1p(exp(-line["margin"] / 2))) for line in straight.history[1:]]
    assert max(apart) > 1e-5  # with a mean of the batch alone: rounding, 1e-7


@pytest.mark.slow
def test_a_resumed_run_goes_on_with_the_same_mean(config: DPOConfig, straight: TrainResult) -> None:
    middle = str(straight.output_dir / "checkpoint-00000002")
    resumed = train(replace(config, resume_from_checkpoint=middle))
    assert [line["loss"] for line in resumed.history] == [line["loss"] for line in straight.history[2:]]
    assert shift_of(config.output_dir) == shift_of(straight.output_dir)


def shift_of(folder: str | Path) -> tuple[float, int]:
    state = load_file(list_checkpoints(Path(folder))[-1] / "method.safetensors")
    return state["shift.mean"].item(), int(state["shift.count"])


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", ["bco_pair", "kto"])
def test_two_processes_have_the_mean_of_one_with_both_s_pairs(
    loss_type: Any, config: DPOConfig, two_processes: TwoProcesses, tmp_path: Path
) -> None:
    config = replace(config, loss_type=loss_type, max_steps=3)
    two_processes.train(replace(config, output_dir=str(tmp_path / "two")))
    train(replace(config, per_device_train_batch_size=2))
    (two, count), (one, _) = shift_of(tmp_path / "two"), shift_of(config.output_dir)
    assert (count, two) == (3, pytest.approx(one, rel=1e-3))


@pytest.mark.slow
def test_two_processes_have_the_means_by_label_of_one_with_both_s_pairs(
    config: DPOConfig, two_processes: TwoProcesses, tmp_path: Path
) -> None:
    shared = ("model", "dataset", "learning_rate", "beta", "lora_rank", "report_to", "progress", "logging_steps")
    kto = KTOConfig(output_dir=str(tmp_path / "one"), max_steps=2, **{name: getattr(config, name) for name in shared})
    two_processes.train(replace(kto, output_dir=str(tmp_path / "two")))
    train(replace(kto, per_device_train_batch_size=2))
    two, one = (load_file(tmp_path / name / "checkpoint-00000002/method.safetensors") for name in ("two", "one"))
    assert torch.equal(two["labels.counts"], one["labels.counts"])
    torch.testing.assert_close(two["labels.sums"], one["labels.sums"], rtol=1e-3, atol=1e-4)


def test_a_batch_that_is_not_finite_is_left_out() -> None:
    shift = RewardShift("cpu")
    found = [shift.update(torch.tensor(value)).item() for value in (nan, 1.0, nan, 3.0)]
    assert found == [0.0, 1.0, 1.0, 2.0]


def test_a_checkpoint_without_a_mean_begins_anew() -> None:
    shift = RewardShift("cpu")
    shift.load_state_dict({"batches_read": 3})
    assert shift.update(torch.tensor(2.0)).item() == 2.0


def test_a_loss_without_a_shift_refuses_one() -> None:
    errors = torch.ones(2)
    with pytest.raises(ValueError, match="'ipo' takes no shift: kto, bco_pair do"):
        preference_loss("ipo", PairStats(errors, errors, errors, errors), beta=1.0, shift=torch.zeros(()))
