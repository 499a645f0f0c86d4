"""Methods on the embedded world: which runs there are, what they cost, and how gains of several draws are counted."""

from __future__ import annotations

import pytest
import torch

from benchmarks.scenes import online_methods
from diffusion_align.evaluation.compare import Sampled, SamplingSettings
from diffusion_align.rewards import RewardOutput
from diffusion_align.training.settings import load_recipe


def scored(rewards: list[float]) -> Sampled:
    return Sampled(torch.zeros(len(rewards), 3, 4, 4), RewardOutput(torch.tensor(rewards)))


def test_draws_of_a_prompt_are_one_observation_of_it() -> None:
    prompts = ["a", "b", "c"] * 2
    exam = online_methods.Exam(prompts, None, SamplingSettings(), scored([0.0] * 6))
    found = online_methods.compared(exam, [scored([1.0, 2.0, -3.0, 3.0, -2.0, 6.0])], draws=2)
    assert found["oracle_gain"] == pytest.approx(7 / 6)  # means of a, b and c: 2, 0 and 1.5
    spread = torch.tensor([2.0, 0.0, 1.5]).std(correction=0)
    assert found["oracle_gain_standard_error"] == pytest.approx(spread / 3**0.5)
    assert found["win_rate"]["rate"] == pytest.approx(4 / 6)
    assert found["win_rate_by_seed"] == [pytest.approx(4 / 6)]


@pytest.mark.parametrize("model", online_methods.BASES)
@pytest.mark.parametrize("method", online_methods.METHODS)
def test_each_base_has_a_recipe_of_each_method_and_its_cost_is_known(model: str, method: str) -> None:
    config = load_recipe(online_methods.recipe_of(online_methods.BASES[model], method))
    assert config.model == model
    assert isinstance(config, online_methods.Measured)
    assert online_methods.denoiser_calls(config) > 0


def test_inpainting_is_not_measured_beside_a_flow_model(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        online_methods.main(["--model", "scenes-flow", "--trust", "none"])
    assert "--trust measures an inpainting model beside scenes-sdxl" in capsys.readouterr().err
