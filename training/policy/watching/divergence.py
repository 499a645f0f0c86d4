"""How far the policy's sampling has moved from the base's: divergence along its own pictures, by timestep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor

from diffusion_align.adapters import Adapter
from diffusion_align.data.holes import Holes
from diffusion_align.devices import fast_autocast, send
from diffusion_align.process import Path
from diffusion_align.training.engine.randomness import NOISE, STEPS, mix, normal
from diffusion_align.training.policy.guided import GuidedPolicy

from .timestep_bins import TimestepBins

#: Pictures that are drawn at once.
AT_ONCE = 8


def step_divergence(path: Path, squared: Tensor, t: Tensor) -> Tensor:
    """KL of one reverse step of the training chain, from t to t - 1, (B,) float32: sensitivity(t) x |eps - eps_ref|^2.

    Both steps are Gaussian with one variance (DDPM's), so this is exact. At t = 0 nothing is drawn, and it is 0. Flow
    matching's chain has as many steps, and |u - u_ref|^2 of the flow.

    Args:
        squared: (B,) sum of (output - reference's output)^2 over a latent, in the space of the raw outputs.
        t: (B,) timesteps.
    """
    now, after = path.at(t), path.at(path.previous(t))
    # Predictions are linear in the output: what one unit of it is in noise.
    one = torch.ones(len(t), 1, 1, 1, device=t.device)
    unit = path.moving(path.views(one, torch.zeros_like(one), t)).flatten().square()
    each = path.sensitivity(now, after, 1.0).flatten() * unit * squared.float()
    return torch.where(path.variance(now, after, 1.0).flatten() > 0, each, torch.zeros_like(each))


@dataclass
class DivergenceProbe:
    """KL(policy || base) of the sampler with DDPM's noise, along pictures that the policy draws for it.

    KL = E sum over steps of sensitivity(step) x |eps - eps_ref|^2, with both predictions under the same guidance, at
    latents that the policy came to. On data the two may agree while they differ there: this is what drifts.

    Attributes:
        prompts: one picture each; each process draws a share.
        holes: what inpainting models repaint, as many as prompts.
        size: side of the pictures in pixels.
        steps, guidance_scale, seed: of sampling.
        bins: ranges of timesteps that are also reported apart.
    """

    adapter: Adapter
    prompts: Sequence[str]
    size: int
    steps: int
    guidance_scale: float
    seed: int
    bins: TimestepBins
    holes: Holes | None = None

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        """``eval/kl`` in nats a picture, and its parts ``eval/kl/tLOW-HIGH``. Called by all processes together."""
        state, count = PartialState(), len(self.prompts)
        share = -(-count // state.num_processes)
        # Equal shares, as processes that hold parts of a network call it equally often; what is too much counts 0.
        rows = [min(share * state.process_index + i, count - 1) for i in range(share)]
        counts = torch.tensor([float(share * state.process_index + i < count) for i in range(share)])
        with fast_autocast(self.adapter.device, True):
            drawn = [self._along(rows[first : first + AT_ONCE]) for first in range(0, share, AT_ONCE)]
        divergences, times = torch.cat([part for part, _ in drawn], dim=1), drawn[0][1]
        weighted = (divergences * send(counts, divergences.device)).sum(dim=1)
        if state.num_processes > 1:
            weighted = reduce(weighted, "sum")
        each = (weighted.cpu().double() / count).tolist()
        found = {"eval/kl": sum(each)}
        if self.bins.count:
            found |= {f"eval/kl/{self.bins.name(index)}": 0.0 for index in range(self.bins.count)}
        for index, value in zip(self.bins.of(times).tolist() if self.bins.count else (), each, strict=False):
            found[f"eval/kl/{self.bins.name(index)}"] += value
        return found

    def _along(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Divergence of each step (N, B) float32 on the device, and the steps' timesteps (N,) on the CPU."""
        adapter, path = self.adapter, self.adapter.path
        policy = GuidedPolicy(adapter, self.size, self.guidance_scale)
        inpaint = None if self.holes is None else self.holes.at(list(rows)).encode(adapter)
        conditions = policy.conditions([self.prompts[row] for row in rows], inpaint)
        with adapter.reference():  # whose text encoder may be another one
            base_policy = GuidedPolicy(adapter, self.size, self.guidance_scale)
            base_conditions = base_policy.conditions([self.prompts[row] for row in rows], inpaint)
        scheduler = path.sampler(adapter.pipeline.scheduler)
        adapter.set_steps(scheduler, self.steps, self.size, self.size)
        levels = path.levels(scheduler).to(adapter.device)
        seeds = torch.tensor([mix(self.seed, row) for row in rows])
        side = self.size // adapter.vae_scale_factor
        shape = (adapter.latent_channels, side, side)
        x = send(normal(seeds, NOISE, shape), adapter.device)
        fresh = send(normal(seeds, STEPS, (len(scheduler.timesteps), *shape)), adapter.device)
        found = []
        times = path.times(scheduler)
        for step, time in enumerate(times.tolist()):
            t = torch.full((len(rows),), time, device=adapter.device, dtype=times.dtype)
            now, after = levels[step].expand(len(rows)), levels[step + 1].expand(len(rows))
            ours = policy.predict(x, t, conditions)
            with adapter.reference():
                base = base_policy.predict(x, t, base_conditions)
            squared = (path.moving(ours).float() - path.moving(base).float()).square().flatten(1).sum(dim=1)
            moves = path.sensitivity(now, after, 1.0).flatten()
            # A last step that draws nothing has no density to compare.
            noisy = path.variance(now, after, 1.0).flatten() > 0
            found.append(torch.where(noisy, moves * squared, torch.zeros_like(squared)))
            drawn = path.gaussian(x, ours.x0.float(), now, after, 1.0)
            x = drawn.mean + drawn.std * fresh[:, step]
        return torch.stack(found), path.timestep(times)
