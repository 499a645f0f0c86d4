"""Policy gradient on flow models: ratios of all kinds of noise, the noise budget, windows, and guidance by an input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion_align.adapters import load_adapter
from diffusion_align.training.engine.accelerator import build_accelerator
from diffusion_align.training.methods import build_job
from diffusion_align.training.online.config import GRPOConfig
from diffusion_align.training.online.stepping.noisy_steps import NoisySteps
from tests.brightness import Brightness
from tests.training.online.flow.flow_runs import flow_settings, loaded, method_of
from tests.training.online.short_runs import ROLLOUTS, trained

#: Published noise levels by kind; of ddim, eta.
LEVELS: dict[Any, float] = {"ddim": 0.7, "cps": 0.8, "precise": 1.0, "flow-sde": 0.7, "dance": 0.3}
#: Sampling steps; SD3's grid of ten ends with 0.4649, 0.2780, 0.0089, 0.
STEPS = 10


def config_of(folder: Path, tmp_path: Path, kind: Any = "ddim", **changes: Any) -> GRPOConfig:
    level = {"eta": LEVELS[kind]} if kind == "ddim" else {"noise_level": LEVELS[kind]}
    own = {"num_inference_steps": STEPS, "train_steps": 2, "noise_kind": kind}
    return GRPOConfig(**{**flow_settings(folder, tmp_path), **ROLLOUTS, **own, **level, **changes})


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(LEVELS))
def test_on_policy_the_ratio_is_one(kind: str, sd3_folder: Path, tmp_path: Path) -> None:
    """Two null-guided branches, one batch drawn before any update and one after the first."""
    method = method_of(config_of(sd3_folder, tmp_path, kind, kl_beta=0.1))
    batches = method.batches()  # the self-test raises where sampler and update differ by more than 1e-4
    for batch in (next(batches), next(batches)):
        rows = torch.arange(len(batch.column))
        assert batch.rollout.trajectory is not None
        found = method.log_prob(batch)[0].detach()
        old = batch.rollout.trajectory.old_log_prob[rows, batch.column]
        assert float((found - old).abs().max()) <= (1e-4 if batch.on_policy else 0)
        _, metrics = method.loss(batch)
        assert (float(metrics["ratio"]), float(metrics["clip_fraction"]), float(metrics["kl"])) == (1, 0, 0)


@pytest.mark.slow
def test_no_step_leaves_more_noise_than_its_level_has(sd3_folder: Path, tmp_path: Path) -> None:
    """Flow-GRPO's last but one step would leave 27 times as much, and there is nothing to learn in what keeps it."""
    adapter = loaded(config_of(sd3_folder, tmp_path))
    x0, eps = torch.zeros(1, 4, 4, 4), torch.ones(1, 4, 4, 4)
    for kind in LEVELS:
        scheduler = adapter.path.sampler(adapter.pipeline.scheduler, kind)
        adapter.set_steps(scheduler, STEPS, 16, 16)
        sampling = NoisySteps.of(config_of(sd3_folder, tmp_path, kind), adapter, scheduler, 0.0, 1.0)
        assert sampling.noisy.tolist() == sampling.drawing.tolist() == list(range(8))
        assert [eta > 0 for eta in sampling.etas] == [True] * 8 + [False] * 2
        for step, eta in enumerate(sampling.etas[:-1]):
            x = sampling.levels[step].expand(1).noise(x0, eps)
            drawn = sampling.gaussian(x, x0, torch.tensor([step]), eta)
            total = float((drawn.mean[0, 0, 0, 0] ** 2 + drawn.std.flatten()[0] ** 2).sqrt())
            assert 0.999 < total / float(sampling.levels.sigma[step + 1]) < 1.25


@pytest.mark.slow
def test_too_many_steps_are_refused_with_what_to_do(sd3_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train_steps = 9: only 8 of .* noise_kind flow-sde leaves more than 1.25"):
        method_of(config_of(sd3_folder, tmp_path, "flow-sde", train_steps=9, per_device_train_batch_size=36))
    with pytest.raises(ValueError, match=r"min_timestep is for models with timesteps.*set min_time"):
        method_of(config_of(sd3_folder, tmp_path, min_timestep=5))


@pytest.mark.slow
def test_a_window_draws_noise_nowhere_else_and_shares_what_comes_before(sd3_folder: Path, tmp_path: Path) -> None:
    window = {"stochastic_steps": "window", "train_steps": 3, "rollout_batch_size": 2, "per_device_train_batch_size": 6}
    method = method_of(config_of(sd3_folder, tmp_path, "cps", num_inference_steps=8, **window))
    number = next(n for n in range(20) if int(method.choose_steps(n)[0][0, 0]) == 2)
    steps, etas = method.choose_steps(number)
    assert steps.tolist() == [[2, 3, 4]] * 4
    assert [eta > 0 for eta in etas] == [False, False, True, True, True, False, False, False]
    assert method.copies(etas) == [2, 2, 2, 1, 1, 1, 1, 1]
    rollout = method.draw(number)
    assert rollout.trajectory is not None
    before = rollout.trajectory.before[:, 0]
    assert torch.equal(before[0], before[1])
    assert not torch.equal(before[0], before[2])
    assert not torch.equal(rollout.trajectory.after[0, 0], rollout.trajectory.after[1, 0])
    # Two branches for each picture, but in the first three steps for each prompt.
    assert method.engine.nfe == 2 * (3 / 2 + 5)


@pytest.mark.slow
def test_guidance_by_an_input_takes_one_branch(flux_folder: Path, tmp_path: Path) -> None:
    method = method_of(config_of(flux_folder, tmp_path, "flow-sde", guidance_scale=3.5, shared_noise=False))
    batch = next(method.batches())
    assert method.engine.nfe == STEPS
    conditions = method.policy.conditions(batch.rollout.prompts, None)
    assert conditions.guidance is not None
    assert conditions.guidance.tolist() == [3.5] * 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("folder", "kind", "changes"),
    [
        ("sd3_folder", "flow-sde", {"kl_beta": 0.01}),
        ("flux_folder", "cps", {"fused_rollouts": True, "per_device_train_batch_size": 8, "kl_beta": 0.01}),
    ],
)
def test_a_run_moves_the_weights(
    folder: str, kind: str, changes: dict[str, Any], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    config = config_of(request.getfixturevalue(folder), tmp_path, kind, **changes)
    adapter = loaded(config)
    result = trained(config, adapter)
    assert result.step == 2
    assert all(line["grad_norm"] > 0 for line in result.history)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise_kind": "cps"}, "noise_kind cps needs noise_level, e.g. cps 0.8"),
        ({"noise_level": 0.7}, "noise_level = 0.7 is not for noise_kind ddim: set eta instead"),
        ({"noise_kind": "cps", "noise_level": 0.8, "eta": 0.5}, "eta = 0.5 is for noise_kind ddim"),
    ],
)
def test_levels_of_other_kinds_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GRPOConfig(**changes).check()


@pytest.mark.slow
def test_models_with_timesteps_draw_by_ddim(sdxl_folder: Path, tmp_path: Path) -> None:
    config = config_of(sdxl_folder, tmp_path, "cps")
    with pytest.raises(ValueError, match="noise_kind cps: this model draws its own pictures by DDIM, expected ddim"):
        build_job(config, build_accelerator(config), load_adapter(config.model), Brightness())
