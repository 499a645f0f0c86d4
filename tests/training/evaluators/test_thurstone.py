"""Thurstone's loss for latent evaluators: the loss by hand, a learned variance, and calibration by timestep."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from scipy.stats import norm
from torch import Tensor

from diffusion_align.adapters import load_adapter
from diffusion_align.guidance.judges.evaluator import EvaluatorSettings, LatentEvaluator, load_evaluator
from diffusion_align.objectives.ranking import thurstone_logit, thurstone_loss
from diffusion_align.process import Level
from diffusion_align.training.evaluators.config import EvaluatorConfig
from diffusion_align.training.evaluators.method import calibration
from diffusion_align.training.run import train


def test_the_loss_is_the_probits_cross_entropy() -> None:
    difference = torch.tensor([0.3, -1.2, 2.0, 0.7], dtype=torch.float64, requires_grad=True)
    variance = torch.tensor([0.05, 0.5, 2.05, 1.0], dtype=torch.float64, requires_grad=True)
    preferred = torch.tensor([1.0, 0.0, 0.25, math.nan], dtype=torch.float64)
    expected = 0.0
    for d, v, p in list(zip(difference.tolist(), variance.tolist(), preferred.tolist(), strict=True))[:3]:
        chance = norm.cdf(d / math.sqrt(2 * v))
        expected -= p * math.log(chance) + (1 - p) * math.log(1 - chance)
    loss = thurstone_loss(thurstone_logit(difference, variance), preferred)
    assert float(loss.detach()) == pytest.approx(expected / 3, rel=1e-9)
    loss.backward()
    assert difference.grad is not None
    assert difference.grad[3] == 0
    assert torch.autograd.gradcheck(
        lambda d, v: thurstone_loss(thurstone_logit(d, v), preferred), (difference, variance)
    )
    far = thurstone_loss(torch.tensor([-40.0]), torch.tensor([1.0]))
    assert float(far) == pytest.approx(-norm.logcdf(-40), rel=1e-3)  # finite where Phi(z) is 0
    assert float(thurstone_loss(torch.tensor([1.0]), torch.tensor([math.nan]))) == 0


def test_the_noise_is_that_of_the_straight_path() -> None:
    level = Level.from_alpha_bar(0.36)
    assert level.flow_sigma() == pytest.approx(0.8 / (0.6 + 0.8))
    assert Level.from_alpha_bar(1.0).flow_sigma() == 0


def test_an_evaluator_knows_its_variance_and_older_ones_load(tmp_path: Path) -> None:
    made = LatentEvaluator(EvaluatorSettings(4, 16, 32, 0, ("preference",), 8, 16, "thurstone"))
    variance: Tensor = made.variance(torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(variance, torch.tensor([0.05, 2.05]))
    made.save_pretrained(tmp_path / "a")
    loaded = load_evaluator(tmp_path / "a")
    assert loaded.settings == made.settings
    torch.testing.assert_close(loaded.variance(torch.tensor([0.5])), made.variance(torch.tensor([0.5])))
    plain = LatentEvaluator(EvaluatorSettings(4, 16, 32, 0, ("preference",), 8, 16))
    plain.save_pretrained(tmp_path / "b")
    assert "preference_loss" not in json.loads((tmp_path / "b" / "evaluator.json").read_text())
    assert load_evaluator(tmp_path / "b").settings == plain.settings
    with pytest.raises(ValueError, match="without loss_type thurstone"):
        plain.variance(torch.tensor([0.0]))


def test_calibration_is_confidence_less_accuracy_of_each_fifth(sdxl_folder: Path) -> None:
    adapter = load_adapter(sdxl_folder)
    t = torch.tensor([0, 199, 200, 999])
    hits = torch.tensor([1.0, 0.0, math.nan, 1.0])
    found = calibration(torch.tensor([0.9, 0.7, 0.6, 0.75]), hits, t, adapter)
    assert found["0-199"] == pytest.approx(0.3)
    assert found["800-999"] == pytest.approx(-0.25)
    assert math.isnan(found["200-399"])
    assert list(found) == ["0-199", "200-399", "400-599", "600-799", "800-999"]


@pytest.mark.slow
def test_a_run_learns_the_variance_resumes_and_reports_calibration(
    sdxl_folder: Path, pairs_folder: Path, tmp_path: Path
) -> None:
    def run(out: Path, steps: int, resume: str | None = None, every: int = 0) -> tuple[dict[str, Tensor], list[dict]]:
        config = EvaluatorConfig(
            model=str(sdxl_folder), dataset=str(pairs_folder), output_dir=str(out), kinds=("preference",),
            loss_type="thurstone", max_steps=steps, per_device_train_batch_size=4, learning_rate=3e-3, width=8,
            features=16, eval_steps=every, report_to="none", progress=False, resume_from_checkpoint=resume,
        )  # fmt: skip
        result = train(config)
        assert result.weights is not None
        return load_evaluator(result.weights).state_dict(), result.history

    whole, history = run(tmp_path / "whole", 4, every=4)
    last = {name: value for line in history for name, value in line.items()}
    assert {f"eval/calibration/preference/{bin}" for bin in ("0-199", "800-999")} <= last.keys()
    assert last["variance/floor"] > 0 < last["variance/scale"]
    assert (whole["log_variance"] != torch.tensor([2.0, 0.05]).log()).all()
    run(tmp_path / "parts", 2)
    parts, _ = run(tmp_path / "parts", 4, "latest")
    for name, value in whole.items():
        assert torch.equal(value, parts[name]), name


def test_it_is_of_the_kind_preference() -> None:
    with pytest.raises(ValueError, match="loss_type thurstone is of the kind preference"):
        EvaluatorConfig(kinds=("alignment",), loss_type="thurstone").check()
