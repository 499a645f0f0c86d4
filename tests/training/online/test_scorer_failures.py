"""A scorer that fails stops a run, which then goes on as if nothing had happened."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from diffusion_align.rewards import RewardOutput
from diffusion_align.rewards.combine import Ensemble
from diffusion_align.rewards.watched import ScorerError
from diffusion_align.training.engine.checkpoint import list_checkpoints
from diffusion_align.training.engine.protocols import RunInterrupted
from tests.brightness import Brightness
from tests.training.online.short_runs import build, trained, weights


class Broken(Brightness):
    """Goes wrong at one call: by itself the third, on the first batch of the second rollout."""

    name = "broken"

    def __init__(self, how: str, at: int = 3) -> None:
        super().__init__()
        self.how, self.at, self.calls = how, at, 0

    def evaluate(self, images: Tensor, prompts: list[str], context: dict[str, Any]) -> RewardOutput:
        self.calls += 1
        output = super().evaluate(images, prompts, context)
        if self.calls < self.at:
            return output
        if self.how == "raises":
            raise KeyError("no such thing")
        if self.how == "hangs":
            threading.Event().wait(60)
        return RewardOutput(output.reward * float("nan"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "message"), [("raises", "KeyError"), ("nan", "gave nan for picture 0"), ("hangs", "no answer within 3 s")]
)
def test_a_scorer_that_fails_stops_the_run_and_loses_nothing(how: str, message: str, settings: dict[str, Any]) -> None:
    own: dict[str, Any] = {"num_inference_steps": 2, "max_steps": 2, "updates_per_picture": 1, "save_steps": 100}
    config = build("nft", {**settings, **own}, scorer_timeout=3)
    with pytest.raises(ScorerError, match=f"scorer broken .*{message}") as raised:
        trained(config, scorer=Broken(how))
    saved = Path(config.output_dir) / "failed_batch.safetensors"
    assert str(saved) in str(raised.value)
    assert load_file(saved)["images"].shape == (3, 3, 64, 64)
    assert [path.name for path in list_checkpoints(Path(config.output_dir))] == ["checkpoint-00000001"]
    assert trained(replace(config, resume_from_checkpoint="latest")).step == 2


#: Settings, and the call at which the scorer fails: in the midst of the second step's rollouts or batches.
FAILURES: dict[str, tuple[str, dict[str, Any], int]] = {
    "nft": ("nft", {"updates_per_picture": 1, "old_decay_growth": 0.3}, 4),
    "grpo": ("grpo", {"per_device_train_batch_size": 8}, 4),
    "fused": ("grpo", {"fused_rollouts": True, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}, 8),
    "draft": ("draft", {"gradient_accumulation_steps": 2, "gradient_steps": 1}, 4),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", FAILURES)
def test_a_run_whose_scorer_failed_goes_on_bit_for_bit(case: str, settings: dict[str, Any], tmp_path: Path) -> None:
    name, changes, at = FAILURES[case]
    config = build(name, {**settings, "num_inference_steps": 2, "max_steps": 2}, save_steps=100, **changes)
    with pytest.raises(RunInterrupted, match="scorer ensemble failed: KeyError"):
        trained(config, scorer=Ensemble([Broken("raises", at), Brightness()]))
    assert [path.name for path in list_checkpoints(Path(config.output_dir))] == ["checkpoint-00000001"]
    resumed = trained(replace(config, resume_from_checkpoint="latest"), scorer=Ensemble([Brightness(), Brightness()]))
    other = replace(config, output_dir=str(tmp_path / "whole"))
    whole = weights(trained(other, scorer=Ensemble([Brightness(), Brightness()])).output_dir)
    assert all(torch.equal(tensor, whole[key]) for key, tensor in weights(resumed.output_dir).items())
