"""Mathematics of the online methods against independent references."""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from torch.distributions import Normal, kl_divergence

from diffusion_align.objectives.nft_loss import nft_loss, optimality
from diffusion_align.objectives.policy_gradient import clipped_policy_loss, group_advantages
from diffusion_align.objectives.trust import FeatureStatistics, TrustWeight
from diffusion_align.process import GaussianStep, Level, VariancePreserving
from diffusion_align.scenes.pretrain.denoiser import build_scheduler
from diffusion_align.training.policy.run_reward import RewardHistory


def test_log_prob_and_kl_are_those_of_torch() -> None:
    torch.manual_seed(0)
    mean, other, x = torch.randn(3, 2, 4, 4, 4).unbind(0)
    std = torch.rand(2, 1, 1, 1) + 0.1
    step = GaussianStep(mean, std)
    expected = Normal(mean, std.expand_as(mean)).log_prob(x).mean(dim=(1, 2, 3))
    assert torch.allclose(step.log_prob(x), expected, atol=1e-5)
    divergence = kl_divergence(Normal(mean, std.expand_as(mean)), Normal(other, std.expand_as(mean))).mean(
        dim=(1, 2, 3)
    )
    assert torch.allclose(step.kl(GaussianStep(other, std)), divergence, atol=1e-5)


def test_masked_log_prob_looks_at_the_hole_only() -> None:
    torch.manual_seed(0)
    x, mask = torch.randn(2, 4, 4, 4), torch.zeros(2, 1, 4, 4)
    mask[:, :, :2] = 1
    step = GaussianStep(torch.zeros_like(x), torch.full((2, 1, 1, 1), 0.5))
    assert torch.allclose(step.log_prob(x, mask), GaussianStep(step.mean[:, :, :2], step.std).log_prob(x[:, :, :2]))
    changed = x.clone()
    changed[:, :, 2:] += 100
    assert torch.equal(step.log_prob(x, mask), step.log_prob(changed, mask))


def test_a_deterministic_step_has_no_log_prob() -> None:
    step = GaussianStep(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 1, 1))
    with pytest.raises(ValueError, match="deterministic step"):
        step.log_prob(torch.zeros(1, 1, 2, 2))


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_step_is_the_schedulers(eta: float) -> None:
    scheduler = build_scheduler()
    scheduler.set_timesteps(10)
    path = VariancePreserving.from_scheduler(scheduler)
    levels = path.levels(scheduler)
    torch.manual_seed(0)
    for index in (0, 5, 9):
        t = scheduler.timesteps[index]
        x, eps, noise = torch.randn(3, 2, 4, 8, 8).unbind(0)
        now, after = levels[index].expand(2), levels[index + 1].expand(2)
        step = path.gaussian(x, now.x0(x, eps), now, after, eta)
        previous = t - 1000 // 10
        assert float(step.std[0]) ** 2 == pytest.approx(eta**2 * float(scheduler._get_variance(t, previous)), rel=1e-4)
        expected = scheduler.step(eps, t, x, eta=eta, variance_noise=noise).prev_sample
        assert torch.allclose(step.mean + step.std * noise, expected, atol=1e-5)


def test_sensitivity_is_the_derivative_of_the_mean() -> None:
    path = VariancePreserving.from_scheduler(build_scheduler())
    levels = Level.from_alpha_bar(torch.tensor([0.1, 0.4, 0.9], dtype=torch.float64))
    for now, after in ((0, 1), (1, 2)):
        eps = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        x = torch.tensor(0.7, dtype=torch.float64)
        here, there = levels[now].expand(1), levels[after].expand(1)
        step = path.gaussian(x.view(1, 1, 1, 1), here.x0(x, eps).view(1, 1, 1, 1), here, there, 1.0)
        (slope,) = torch.autograd.grad(step.mean.sum(), eps)
        expected = slope**2 / (2 * step.std.squeeze() ** 2)
        found = path.sensitivity(levels[now : now + 1], levels[after : after + 1], 1.0)
        assert float(found) == pytest.approx(float(expected), rel=1e-8)


def test_clipping_is_ppos() -> None:
    log_prob = torch.tensor([0.0, 0.5, -0.5, 0.5, -0.5], requires_grad=True)
    advantage = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0])
    loss, metrics = clipped_policy_loss(log_prob, torch.zeros(5), advantage, 0.2)
    ratio = np.exp([0.0, 0.5, -0.5, 0.5, -0.5])
    surrogate = np.minimum(advantage.numpy() * ratio, advantage.numpy() * ratio.clip(0.8, 1.2))
    assert float(loss.detach()) == pytest.approx(-surrogate.mean(), rel=1e-6)
    loss.backward()
    assert log_prob.grad is not None
    # A good sample that became likely enough, and a bad one that became unlikely enough, push no further.
    assert (log_prob.grad == 0).tolist() == [False, True, False, False, True]
    assert float(metrics["clip_fraction"]) == pytest.approx(0.8)
    weighted, _ = clipped_policy_loss(log_prob, torch.zeros(5), advantage, 0.2, torch.full((5,), 2.0))
    assert float(weighted.detach()) == pytest.approx(2 * float(loss.detach()), rel=1e-6)


def test_advantages_compare_pictures_of_one_prompt() -> None:
    rewards = torch.tensor([1.0, 3.0, 10.0, 10.2])
    assert torch.allclose(group_advantages(rewards, 2), torch.tensor([-1.0, 1.0, -1.0, 1.0]))
    batch = group_advantages(rewards, 2, scale="batch")
    assert torch.allclose(batch[:2] / batch[2:], torch.tensor([10.0, 10.0]), rtol=1e-4)
    assert group_advantages(rewards, 2, scale="none").tolist() == pytest.approx([-1.0, 1.0, -0.1, 0.1], abs=1e-5)
    assert group_advantages(torch.ones(4), 4).tolist() == [0.0] * 4
    with pytest.raises(ValueError, match="groups of 3"):
        group_advantages(rewards, 3)


def test_advantages_are_flow_grpo_s() -> None:
    """Its tracker with ``global_std``: the prompt's own mean, the deviation of all rewards."""
    rewards = np.random.default_rng(0).normal(3, 2, 12)
    found = group_advantages(torch.tensor(rewards), 3, scale="global")
    expected = [(r - rewards[i // 3 * 3 :][:3].mean()) / (rewards.std() + 1e-4) for i, r in enumerate(rewards)]
    assert found.tolist() == pytest.approx(expected, rel=1e-3)


def test_advantages_are_prefpaint_s() -> None:
    """All pictures of all processes are one batch; its code divides by the sample's deviation."""
    rewards = np.random.default_rng(0).normal(3, 2, 64)
    expected = (rewards - rewards.mean()) / rewards.std(ddof=1)
    for scale in ("batch", "global"):
        found = group_advantages(torch.tensor(rewards), 1, baseline="batch", scale=scale, clip=10.0)
        assert found.tolist() == pytest.approx(expected * (64 / 63) ** 0.5, rel=1e-4)


def test_advantages_are_ddpo_s_over_the_run() -> None:
    """Its tracker: a queue of the last 16 rewards of each prompt, and the batch while there are fewer than 6."""
    rng, history = np.random.default_rng(0), RewardHistory(16, 6)
    queues: dict[str, deque[float]] = {}
    for number in range(8):
        names = [str(name) for name in rng.choice(["a", "b", "c"], 4)]
        rewards = rng.normal(3, 2, (4, 2)).astype(np.float32)
        for name, found in zip(names, rewards, strict=True):
            queues.setdefault(name, deque(maxlen=16)).extend(found.tolist())
        expected = []
        for name, found in zip(names, rewards, strict=True):
            seen = np.array(queues[name]) if len(queues[name]) >= 6 else rewards.flatten()
            expected += [(r - seen.mean()) / (seen.std() + 1e-6) for r in found]
        past = history.add(names, torch.tensor(rewards))
        advantage = group_advantages(torch.tensor(rewards).flatten(), 2, baseline="history", history=past)
        assert advantage.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)
        if number == 4:  # as after a checkpoint
            state, history = json.loads(json.dumps(history.state_dict())), RewardHistory(16, 6)
            history.load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"baseline": "past"}, "baseline = 'past': expected 'group', 'batch' or 'history'"),
        ({"baseline": "history"}, "needs history"),
        ({"scale": "all"}, "scale = 'all': expected 'group', 'batch', 'global' or 'none'"),
    ],
)
def test_unknown_ways_of_comparing_are_errors(options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        group_advantages(torch.ones(4), 2, **options)  # type: ignore[arg-type]


def test_policy_gradient_is_unbiased_on_an_analytic_diffusion() -> None:
    """A 1-D chain of DDPM steps whose denoiser is x0 = 0.5 x + theta: E[reward] and its gradient are known in closed
    form through the chain's means, and the likelihood-ratio estimate must agree with it."""
    scheduler = DDIMScheduler.from_config(build_scheduler().config, clip_sample=False)
    scheduler.set_timesteps(6)
    path = VariancePreserving.from_scheduler(scheduler)
    levels, count = Level.from_alpha_bar(path.levels(scheduler).alpha_sq.double()), 200_000

    def mean_reward(theta: torch.Tensor) -> torch.Tensor:
        mean, variance = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
        zero = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
        for index in range(6):
            now, after = levels[index].expand(1), levels[index + 1].expand(1)
            at = [path.gaussian(x, 0.5 * x + theta, now, after, 1.0) for x in (zero, zero + 1)]
            offset, slope = at[0].mean.squeeze(), (at[1].mean - at[0].mean).squeeze()
            mean, variance = offset + slope * mean, slope**2 * variance + at[0].std.squeeze() ** 2
        return mean - 0.5 * (mean**2 + variance)  # reward x - x^2 / 2

    theta = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(mean_reward(theta), theta)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 1, 1, 1, generator=generator, dtype=torch.float64)
    trained = torch.full(
        (count,), 0.2, dtype=torch.float64, requires_grad=True
    )  # one theta a sample: one gradient each
    log_prob = torch.zeros(count, dtype=torch.float64)
    for index in range(6):
        now, after = levels[index].expand(count), levels[index + 1].expand(count)
        step = path.gaussian(x, 0.5 * x + trained.view(-1, 1, 1, 1), now, after, 1.0)
        x = (step.mean + step.std * torch.randn(x.shape, generator=generator, dtype=torch.float64)).detach()
        log_prob = log_prob + step.log_prob(x)
    reward = (x - 0.5 * x**2).flatten()
    loss, metrics = clipped_policy_loss(log_prob, log_prob.detach(), reward - reward.mean(), 1e-4)
    (gradients,) = torch.autograd.grad(-loss * count, trained)
    error = float(gradients.std() / count**0.5)
    assert float(metrics["ratio"]) == 1.0
    assert float(gradients.mean()) == pytest.approx(float(expected), abs=4 * error)
    assert abs(float(expected)) > 10 * error  # the test could tell a wrong sign or factor


def test_nft_pulls_to_good_and_away_from_bad() -> None:
    torch.manual_seed(0)
    old, target = torch.randn(2, 1, 3, 3), torch.randn(2, 1, 3, 3)
    for optimal, sign in ((1.0, 1), (0.0, -1)):
        output = old.clone().requires_grad_()
        loss, metrics = nft_loss(output, old, target, torch.full((2,), optimal), beta=0.5)
        (gradient,) = torch.autograd.grad(loss, output)
        scale = (old - target).abs().mean(dim=(1, 2, 3), keepdim=True)
        assert torch.allclose(gradient, sign * 2 * (old - target) / (9 * 2 * scale), atol=1e-6)
        assert float(metrics["distance_to_old"]) == 0
    output = old.clone().requires_grad_()
    loss, _ = nft_loss(output, old, target, torch.full((2,), 0.5), beta=0.5)
    (gradient,) = torch.autograd.grad(loss, output)
    assert torch.allclose(gradient, torch.zeros_like(gradient), atol=1e-7)
    assert optimality(torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0]), 2.0).tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]


@pytest.mark.slow
def test_trust_follows_the_distance_to_the_training_features() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(4000, 8, generator=generator)
    scales = torch.linspace(0.2, 4, 500)
    held_out = (torch.randn(500, 2, 8, generator=generator) * scales[:, None, None]).float()
    statistics = FeatureStatistics.measure(features, held_out, 0.1 + 0.05 * scales)
    distance = statistics.mahalanobis(features)
    direct = (features - features.mean(0)).double()
    covariance = direct.T @ direct / len(direct)
    expected = torch.einsum("nf,fg,ng->n", direct, covariance.inverse(), direct).sqrt()
    assert torch.allclose(distance, expected, rtol=0.02)
    trust = TrustWeight("mahalanobis", statistics)
    near, far = trust(torch.zeros(1, 8)), trust(20 * torch.ones(1, 8))
    assert near > 1 > far > 0
    published = TrustWeight("prefpaint", statistics)
    gram = features.double().T @ features.double() + 0.01 * torch.eye(8)
    probe = torch.stack([torch.zeros(8), 1e5 * torch.ones(8)])
    boundary = (probe.double() @ gram.inverse()).norm(dim=1)
    assert torch.allclose(published(probe).double(), (-0.05 * boundary + 0.7).exp().clamp(1, 2.21), rtol=1e-5)
    assert published(probe)[0] == pytest.approx(2.0138, abs=1e-3)


def test_errors_that_do_not_grow_with_distance_fall_back_to_the_linear_bound() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1000, 4, generator=generator)
    held_out = torch.randn(200, 2, 4, generator=generator)
    distance = FeatureStatistics.measure(features).mahalanobis(held_out.flatten(0, 1)).view(200, 2).mean(1)
    statistics = FeatureStatistics.measure(features, held_out, 1 / (1 + distance))
    a, b, mean = statistics.error_line.tolist()
    assert a == 0
    assert b == pytest.approx(mean / float(distance.mean()))


def test_statistics_survive_a_file(tmp_path: Path) -> None:
    statistics = FeatureStatistics.measure(torch.randn(50, 4))
    path = tmp_path / "trust.safetensors"
    statistics.save(path)
    again = FeatureStatistics.load(path)
    probe = torch.randn(3, 4)
    assert torch.equal(statistics.mahalanobis(probe), again.mahalanobis(probe))
