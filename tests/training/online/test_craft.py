"""RAFT that keeps what every scorer likes (CRAFT)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion_align.rewards import RewardOutput
from diffusion_align.rewards.combine import Ensemble
from diffusion_align.training.engine.accelerator import build_accelerator
from diffusion_align.training.methods import build_job
from diffusion_align.training.online.config import RAFTConfig
from diffusion_align.training.online.keeping.passing import passes
from diffusion_align.training.online.raft import RAFTMethod
from tests.brightness import Brightness
from tests.training.online.short_runs import trained


class Redness(Brightness):
    name = "redness"

    def evaluate(self, images: Tensor, prompts: list[str], context: dict[str, Any]) -> RewardOutput:
        return RewardOutput(images[:, 0].mean(dim=(1, 2)) - images[:, 1].mean(dim=(1, 2)))


def config(settings: dict[str, Any], **changes: Any) -> RAFTConfig:
    own = {"num_generations": 4, "prompts_per_rollout": 4, "updates_per_picture": 2, "keep_by": "all", "max_steps": 2}
    return RAFTConfig(**{**settings, **own, "scorers": ("a", "b"), **changes})


def test_what_passes_is_above_every_threshold() -> None:
    members = torch.randn(3, 5, 2, generator=torch.Generator().manual_seed(0))
    for quantile in (None, 0.5):
        found = passes(members, quantile)
        for prompt in range(3):
            for picture in range(5):
                over = []
                for scorer in range(2):
                    own = sorted(members[prompt, :, scorer].tolist())
                    value = float(members[prompt, picture, scorer])
                    over.append(value > sum(own) / 5 if quantile is None else value >= own[2])
                assert bool(found[prompt, picture]) == all(over)


@pytest.mark.slow
def test_pictures_that_pass_are_trained_on_by_their_advantage(settings: dict[str, Any]) -> None:
    """The rest fills the last optimiser step up, and has no weight."""
    settings = config(settings, advantage_weights=True)
    scorer = Ensemble([Brightness(), Redness()], standardise="none")
    method = build_job(settings, build_accelerator(settings), None, scorer).method
    assert isinstance(method, RAFTMethod)
    whole, found = method.engine.draw(0), method.draw(0)
    assert whole.members is not None
    assert torch.allclose(whole.members.mean(dim=1), whole.reward)
    passed = passes(whole.members.view(4, 4, 2), None).flatten()
    assert len(found) == -(-2 * int(passed.sum()) // 4) * 2
    weights = {float(reward): float(weight) for reward, weight in zip(found.reward, found.trust, strict=True)}
    for reward, advantage, through in zip(whole.reward.tolist(), whole.advantage.tolist(), passed, strict=True):
        assert reward in weights or not through
        assert weights.get(reward, 0.0) == pytest.approx(max(advantage, 0.0) if through else 0.0)
    batch = next(method.batches())
    loss, metrics = method.loss(batch)
    assert 0 < float(metrics["passed"]) <= 1
    method.config = replace(settings, keep_by="reward", advantage_weights=False)
    plain, _ = method.loss(batch)
    assert loss.item() != plain.item()


@pytest.mark.slow
def test_a_run_with_two_scorers(settings: dict[str, Any]) -> None:
    settings = settings | {"num_inference_steps": 2}
    result = trained(config(settings), scorer=Ensemble([Brightness(), Redness()]))
    assert result.step == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep": 2}, "keep = 2 is for keep_by reward"),
        ({"keep_by": "reward", "keep_quantile": 0.5}, "keep_quantile = 0.5 is keep_by all's threshold"),
        ({"zero_advantage": "skip"}, "keep_by all leaves out pictures itself"),
    ],
)
def test_settings_without_effect_are_refused(changes: dict[str, Any], message: str, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        config(settings, **changes).check()
