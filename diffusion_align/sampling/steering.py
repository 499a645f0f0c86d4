"""Alignment at sampling time with any scorer: best of n, particles that are resampled, and reward gradients.

Each tells what it cost, so that methods are compared at equal denoiser calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffusion_align.adapters import Adapter
from diffusion_align.rewards import RewardScorer, score_in_batches
from diffusion_align.showing import MOST, grid_html, pil_pictures

from .batch_run import Samples
from .control import PLAIN, Moment, SamplingOptions, StepCallback
from .sampler import asked, sample


@dataclass(frozen=True, repr=False)
class Steered:
    """One chosen image per prompt, and what it cost.

    Attributes:
        images: (N, 3, H, W) float32 in [0, 1].
        reward: (N,) the scorer's reward of them.
        nfe, reward_calls: denoiser evaluations and scored pictures per returned image.
        choice: (N,) which candidate or particle it was.
    """

    images: Tensor
    reward: Tensor
    nfe: float
    reward_calls: float
    choice: Tensor

    def pil(self) -> list[Image.Image]:
        """The pictures as PIL has them."""
        return pil_pictures(self.images)

    def __repr__(self) -> str:
        reward = float(self.reward.mean())
        return f"Steered({len(self.images)} pictures, mean reward {reward:.4g}, {self.nfe:g} calls each)"

    def _repr_html_(self) -> str:
        shown = pil_pictures(self.images[:MOST])
        rewards = [f"reward {value:.4g}" for value in self.reward[:MOST].tolist()]
        return grid_html(shown, rewards, len(self.images))


def best_of_n(
    adapter: Adapter,
    prompts: str | Sequence[str],
    scorer: RewardScorer,
    n: int,
    *,
    seeds: Sequence[int] | None = None,
    **keywords: Any,
) -> Steered:
    """Draw ``n`` images per prompt, from seeds ``seeds[i] + 1_000_003 k``, and keep the best.

    Args:
        keywords: of :func:`~diffusion_align.sampling.sampler.sample`.
    """
    if n < 1:
        raise ValueError(f"best-of-n: n = {n}, expected at least 1")
    prompts, seeds = asked(prompts, seeds)
    repeated = [prompt for prompt in prompts for _ in range(n)]
    all_seeds = [seed + 1_000_003 * k for seed in seeds for k in range(n)]
    drawn = sample(adapter, repeated, seeds=all_seeds, **keywords)
    return keep_best(drawn, repeated, scorer, n, 0)


@torch.no_grad()
def keep_best(drawn: Samples, prompts: Sequence[str], scorer: RewardScorer, n: int, reward_calls: float) -> Steered:
    """The best of every ``n`` consecutive images by ``scorer``; ``reward_calls``: per prompt, so far."""
    reward = score_in_batches(scorer, drawn.images, prompts).reward.cpu().view(-1, n)
    choice = (reward if scorer.higher_is_better else -reward).argmax(dim=1)
    rows = torch.arange(len(choice)) * n + choice
    return Steered(drawn.images[rows], reward.gather(1, choice[:, None])[:, 0], drawn.nfe * n, reward_calls + n, choice)


def remembers(scheduler: Any) -> bool:
    """Whether a scheduler's steps depend on earlier ones: multistep solvers, PNDM, and steps of several calls."""
    memories = ("ets", "derivatives")  # PNDM's and LMS's; the solvers' is as long as their order
    orders = [getattr(scheduler.config, name, 1) for name in ("solver_order", "predictor_order")]
    return max(scheduler.order, *orders) > 1 or any(hasattr(scheduler, name) for name in memories)


def fk_steering(
    adapter: Adapter,
    prompts: str | Sequence[str],
    scorer: RewardScorer,
    particles: int = 4,
    *,
    seeds: Sequence[int] | None = None,
    strength: float = 10.0,
    every: int = 5,
    num_inference_steps: int = 25,
    eta: float = 1.0,
    scheduler: Any = None,
    options: SamplingOptions = PLAIN,
    **keywords: Any,
) -> Steered:
    """Feynman-Kac steering (2501.06848): particles of a prompt are resampled by how much their reward has grown.

    Every ``every`` steps the x0 predictions are decoded and scored; particles are drawn again with weights
    exp(strength (r_now - r_before)) (the "difference" potential), and the best one is returned. Rewards are divided by
    the scorer's published deviation, where there is one.

    Args:
        eta: DDIM's fresh noise; without it copies of a particle would stay copies.
        scheduler: a diffusers scheduler; None is the pipeline's, for flow models its grid with DDIM-like steps.
        options: of :func:`~diffusion_align.sampling.sampler.sample`, without a callback.
        keywords: likewise.

    Raises:
        ValueError: fewer than 1 particle, a callback, or a multistep scheduler, whose memory would belong to other
            particles.
    """
    if particles < 1:
        raise ValueError(f"fk steering: particles = {particles}, expected at least 1")
    if options.callback is not None:
        raise ValueError("fk steering resamples after every step itself: options must have no callback")
    if scheduler is None and adapter.path.straight:
        scheduler = adapter.path.sampler(adapter.pipeline.scheduler)
    sampler = scheduler or adapter.pipeline.scheduler
    if remembers(sampler) or not eta:
        raise ValueError("fk steering needs a one-step scheduler with fresh noise: DDIMScheduler and eta > 0")
    prompts, seeds = asked(prompts, seeds)
    repeated = [prompt for prompt in prompts for _ in range(particles)]
    deviation = scorer.statistics[1] if scorer.statistics else 1.0
    before: dict[int, Tensor] = {}  # by prompt: rewards (particles,) at the last resampling
    scored = 0

    def resample(moment: Moment) -> Tensor | None:
        nonlocal scored
        if moment.step % every or moment.step >= num_inference_steps:
            return None
        texts = repeated[moment.rows.start : moment.rows.stop]
        images = (adapter.decode(moment.x0) / 2 + 0.5).clamp(0, 1)
        reward = scorer.score(images, texts).reward.cpu() / deviation
        reward = reward if scorer.higher_is_better else -reward
        scored += len(texts)
        chosen = []
        for start in range(0, len(texts), particles):
            group = (moment.rows.start + start) // particles
            now = reward[start : start + particles]
            gain = now - before.get(group, torch.zeros(particles))
            generator = torch.Generator().manual_seed(int(seeds[group]) * 1009 + moment.step)
            picked = torch.multinomial((strength * gain).softmax(dim=0), particles, True, generator=generator)
            before[group] = now[picked]
            chosen.append(start + picked)
        return moment.latents[torch.cat(chosen).to(moment.latents.device)]

    together = max(1, options.batch_size // particles) * particles  # particles of a prompt stay together
    drawn = sample(
        adapter,
        repeated,
        seeds=[seed + 1_000_003 * k for seed in seeds for k in range(particles)],
        num_inference_steps=num_inference_steps,
        eta=eta,
        scheduler=scheduler,
        options=replace(options, callback=resample, batch_size=together),
        **keywords,
    )
    return keep_best(drawn, repeated, scorer, particles, scored / max(len(prompts), 1))


def reward_gradient(
    adapter: Adapter, prompts: Sequence[str], scorer: RewardScorer, strength: float = 0.1, start: int = 0
) -> StepCallback:
    """A step callback that moves every x0 prediction up the scorer's gradient (2309.17400's signal, without training).

    x0 moves by ``strength`` times its deviation along the normalised gradient of the reward through the VAE (with
    activation checkpointing); the noise stays, so that the latents move by the share that x0 has in them.

    Args:
        prompts: those that ``sample`` is given.
        start: first step that is guided; early predictions are blurred and their gradients mean little.

    Raises:
        ValueError: the scorer is not differentiable.
    """
    if not scorer.differentiable:
        raise ValueError(f"reward gradients need a differentiable scorer, {scorer.name} is not")
    sign = 1.0 if scorer.higher_is_better else -1.0

    def move(moment: Moment) -> Tensor | None:
        if moment.step <= start:
            return None
        texts = list(prompts[moment.rows.start : moment.rows.stop])
        with torch.enable_grad():
            x0 = moment.x0.detach().requires_grad_()
            reward = scorer.score((adapter.decode(x0) / 2 + 0.5).clamp(0, 1), texts).reward
            (gradient,) = torch.autograd.grad(sign * reward.sum(), x0)
        norm = gradient.square().mean(dim=(1, 2, 3), keepdim=True).sqrt().clamp(min=1e-12)
        shift = strength * x0.detach().std(dim=(1, 2, 3), keepdim=True) * gradient / norm
        return moment.latents + moment.signal * shift

    return move
