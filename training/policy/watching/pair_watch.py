"""Where in time pairs go wrong: displacement, entanglement and divergence by timestep, from what a step has anyway."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_align.objectives.list_stats import ListStats
from diffusion_align.objectives.one_signature import best_of, means_where
from diffusion_align.objectives.pair_stats import PairStats
from diffusion_align.process import Path
from diffusion_align.training.engine.metrics import Metrics

from .divergence import step_divergence
from .timestep_bins import TimestepBins


@dataclass(frozen=True)
class PairWatch:
    """Figures of a batch of pairs, lists or labelled pictures that means over all timesteps hide.

    Attributes:
        path: what the noisy latents follow.
        bins: ranges of timesteps.
    """

    path: Path
    bins: TimestepBins

    @torch.no_grad()
    def __call__(self, t: Tensor, stats: PairStats, beta: float, values: int) -> Metrics:
        """Metrics by timestep, as NAME/tLOW-HIGH, and ``kappa_above_1``, the share of pairs with that.

        - ``chosen_error_up``: share of pairs whose chosen picture is predicted worse than by the reference.
        - ``reward_chosen``, ``reward_rejected``: r = beta / 2 (e_ref - e).
        - ``kappa`` = q / e_w with q = mean d_w d_l (d: output - target). Under -c (g_w - g_l) the chosen error rises
          where <g_w, g_l> > |g_w|^2, in the output's space where kappa > 1 (2410.13828).
        - ``kl_data``: divergence of the reverse step at t on noisy data, in nats, over both pictures; times the number
          of timesteps in a bin it is what the bin adds to the divergence of the whole chain.

        Args:
            t: (B,) timesteps of the pairs.
            stats: errors (B,); what it lacks is left out.
            beta: of the loss.
            values: C h w of a latent.
        """
        found: dict[str, Tensor] = {}
        if stats.has_reference:
            found["chosen_error_up"] = (stats.s_w < 0).float()
            found["reward_chosen"], found["reward_rejected"] = 0.5 * beta * stats.s_w, 0.5 * beta * stats.s_l
        whole: dict[str, Tensor] = {}
        if stats.overlap is not None:
            found["kappa"] = stats.overlap / stats.chosen.detach()
            whole["kappa_above_1"] = (found["kappa"] > 1).float().mean()  # its median is, where this is above a half
        if stats.moved is not None:
            found["kl_data"] = step_divergence(self.path, stats.moved.mean(dim=0) * values, t)
        return whole | self.bins.means(self.path.timestep(t), found)

    @torch.no_grad()
    def of_lists(self, t: Tensor, stats: ListStats, rank: Tensor, beta: float, values: int) -> Metrics:
        """The same of lists: the chosen are a list's best pictures, the rejected its worst; without ``kappa``.

        Args:
            t: (B,) timesteps of the lists.
            stats: errors (B, K).
            rank: (B, K), the best picture's is the lowest.
            beta, values: as for pairs.
        """
        r, present = 0.5 * beta * stats.s, stats.present
        best, worst = best_of(rank, present), best_of(-rank, present)
        found = {
            "chosen_error_up": means_where((r < 0).to(r), best),
            "reward_chosen": means_where(r, best),
            "reward_rejected": means_where(r, worst),
        }
        if stats.moved is not None:
            found["kl_data"] = step_divergence(self.path, means_where(stats.moved, present) * values, t)
        return self.bins.means(self.path.timestep(t), found)

    @torch.no_grad()
    def of_labelled(self, t: Tensor, stats: ListStats, label: Tensor, beta: float, values: int) -> Metrics:
        """The same of single pictures: the chosen are the liked ones; without ``kappa``.

        Args:
            t: (B,) timesteps of the pictures.
            stats: errors (B, 1).
            label: (B,), +1 or -1.
            beta, values: as for pairs.
        """
        r, at = 0.5 * beta * stats.s.squeeze(1), self.path.timestep(t)
        liked = {"chosen_error_up": (r < 0).to(r), "reward_chosen": r}
        found = self.bins.means(at, liked, label > 0) | self.bins.means(at, {"reward_rejected": r}, label <= 0)
        if stats.moved is not None:
            kl = step_divergence(self.path, stats.moved.squeeze(1) * values, t)
            found |= self.bins.means(at, {"kl_data": kl})
        return found
