"""Prompts whose pictures all get the same reward, and policy gradient on all sampling steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from diffusion_align.adapters import load_adapter
from diffusion_align.objectives.policy_gradient import group_advantages
from diffusion_align.rewards import RewardOutput
from diffusion_align.training.engine.protocols import RunInterrupted
from diffusion_align.training.online.config import GRPOConfig
from diffusion_align.training.online.grpo import GRPOMethod
from diffusion_align.training.online.rollout import RolloutEngine
from diffusion_align.training.settings import validated
from tests.brightness import Brightness

from .short_runs import PROMPTS, build, trained


class Partial(Brightness):
    """Likes all pictures of some prompts equally well."""

    def __init__(self, *equal: str) -> None:
        super().__init__()
        self.equal = equal

    def evaluate(self, images: Tensor, prompts: list[str], context: dict[str, Any]) -> RewardOutput:
        output = super().evaluate(images, prompts, context)
        same = torch.tensor([prompt in self.equal for prompt in prompts])
        return replace(output, reward=torch.where(same, torch.tensor(20.3), output.reward))


def test_equal_rewards_have_advantages_of_exactly_zero() -> None:
    rewards = torch.cat([torch.full((7,), 20.3), torch.arange(7.0)])
    assert torch.full((7,), 20.3).mean() != 20.3  # or the test would see nothing
    for scale in ("group", "batch", "global", "none"):
        found = group_advantages(rewards, 7, scale=scale).view(2, 7)
        assert not found[0].any()
        assert found[1].any()


@pytest.mark.slow
def test_what_is_left_out_is_filled_up_to_whole_optimiser_steps(settings: dict[str, Any]) -> None:
    """flow_grpo: samples without advantage are dropped, but for as many as an even share of batches needs."""
    adapter = load_adapter(settings["model"]).train_lora(rank=4)
    own = {"num_generations": 2, "prompts_per_rollout": 4, "train_steps": 2, "num_inference_steps": 2}

    def engine(batch: int) -> RolloutEngine:
        config: Any = build("grpo", settings, zero_advantage="skip", **own, per_device_train_batch_size=batch)
        return RolloutEngine(config, adapter, Accelerator(cpu=True), Partial(PROMPTS[1]))

    drawn = engine(4).draw(0)
    assert drawn.flat is not None
    assert drawn.flat.tolist() == [0.25] * 8
    assert sorted(set(engine(4).teaching(drawn, 4).prompts)) == sorted({*PROMPTS} - {PROMPTS[1]})

    def left(batch: int, *without: int) -> list[int]:
        """Which of four prompts are trained on, when those have no advantage; a prompt has four training items."""
        advantage = torch.tensor([[0.0, 0.0] if i in without else [0.5, -0.5] for i in range(4)]).flatten()
        rows = engine(batch).teaching(replace(drawn, advantage=advantage, group=torch.arange(8)), items=4).group
        assert (rows[1::2] - rows[::2]).tolist() == [1] * (len(rows) // 2)  # whole prompts
        return [row // 2 for row in rows[::2].tolist()]

    assert left(4) == [0, 1, 2, 3]
    assert left(4, 1, 2) == [0, 3]  # a step takes the items of one prompt
    assert left(8, 1) == [0, 1, 2, 3]  # of two: three prompts are filled up to four
    assert left(8, 0, 1, 2) == [0, 3]  # one to two, by the first of the others
    assert left(4, 0, 1, 2, 3) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["grpo", pytest.param("nft", marks=pytest.mark.slow), pytest.param("raft", marks=pytest.mark.slow)]
)
def test_a_run_trains_on_the_prompts_that_teach(name: str, settings: dict[str, Any]) -> None:
    own: dict[str, Any] = {"num_inference_steps": 2, "zero_advantage": "skip", "max_steps": 3}
    config = build(name, settings, **own)
    history = trained(config, scorer=Partial(*PROMPTS[:2])).history
    assert [row["step"] for row in history] == [1, 2, 3]
    assert all(0 <= row["zero_advantage"] < 1 for row in history)
    assert any(row["zero_advantage"] > 0 for row in history)
    # Equal pictures would have the reward 20.3, bright ones at most 1: a rollout of which half is skipped shows none.
    assert min(row["reward"] for row in history) < 1


@pytest.mark.slow
def test_without_the_filter_they_are_counted(settings: dict[str, Any]) -> None:
    history = trained(build("grpo", settings, max_steps=2, num_inference_steps=2), scorer=Partial(*PROMPTS)).history
    assert [row["zero_advantage"] for row in history] == [1.0, 1.0]


@pytest.mark.slow
def test_a_reward_that_never_differs_stops_the_run(settings: dict[str, Any]) -> None:
    config = build("raft", settings, zero_advantage="skip", num_inference_steps=1, prompts_per_rollout=1)
    with pytest.raises(RunInterrupted, match="zero_advantage skip: 20 rollouts in a row"):
        trained(config, scorer=Partial(*PROMPTS))


@pytest.mark.slow
def test_all_steps_with_noise_are_trained_on(settings: dict[str, Any]) -> None:
    own = {"train_steps": "all", "per_device_train_batch_size": 4, "num_inference_steps": 5, "min_timestep": 200}
    config: Any = build("grpo", settings, **own)
    adapter, accelerator = load_adapter(settings["model"]).train_lora(rank=4), Accelerator(cpu=True)
    method = GRPOMethod(config, adapter, RolloutEngine(config, adapter, accelerator, Brightness()), accelerator)
    steps, _ = method.choose_steps(0)
    assert method.scheduler.timesteps.tolist()[3:] == [201, 1]
    assert method.train_steps == len(method.sampling.noisy) == 4
    assert [sorted(row) for row in steps.tolist()] == [method.sampling.noisy.tolist()] * 4
    seen = [(int(p), int(c)) for batch, _ in zip(method.batches(), range(4), strict=False)
            for p, c in zip(batch.picture, batch.column, strict=True)]  # fmt: skip
    assert sorted(seen) == [(picture, column) for picture in range(4) for column in range(4)]
    with pytest.raises(ValueError, match="a rollout has 16 training items, an optimiser step takes 3"):
        GRPOMethod(replace(config, per_device_train_batch_size=3), adapter, method.engine, accelerator)


@pytest.mark.slow
def test_all_steps_run_fused_too(settings: dict[str, Any]) -> None:
    own = {"train_steps": "all", "per_device_train_batch_size": 16, "fused_rollouts": True, "max_steps": 1}
    assert trained(build("grpo", settings, **own)).step == 1


@pytest.mark.slow
def test_the_plan_says_that_the_model_decides(settings: dict[str, Any], tmp_path: Path) -> None:
    config: Any = build("grpo", settings, train_steps="all", num_inference_steps=10)
    assert config.plan().sections["rollouts"]["training items"].startswith("at most 40 a rollout")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"zero_advantage": "skip", "fused_rollouts": True}, "fused_rollouts keeps the graph of all pictures"),
        ({"train_steps": "al"}, "train_steps = 'al' is wrong"),
        ({"train_steps": 0}, "train_steps = 0 is wrong"),
    ],
)
def test_settings_that_do_not_fit_are_one_error(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validated(GRPOConfig, values, "recipe")
