"""Supervised fine-tuning: denoise the pictures of a data set, or the chosen ones of pairs."""

from __future__ import annotations

from torch import Tensor

from diffusion_align.data.types import PairBatch

from .denoising import DenoisingMethod
from .switches.timesteps import level_weight


class SFTMethod(DenoisingMethod):
    """The denoising loss that the base was trained with, e = |output - target|^2 / values, on batches of single
    pictures (K = 1)."""

    def loss(self, batch: PairBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted mean of the pictures' errors (scalar) and its metrics (scalar tensors on the device)."""
        seeds = batch.seeds  # read on the host, before the move: asking a device for them would stall it
        batch = batch.to(self.adapter.device)
        noisy = self.noisy(batch, seeds)
        with self.autocast():
            errors = noisy.errors(self.adapter)
        weighted, level = errors * batch.weight, level_weight(self.config, self.path, noisy.t)
        loss = (weighted if level is None else weighted * level).mean()
        return loss, {"loss": loss.detach(), "error_chosen": errors.detach().mean()}
