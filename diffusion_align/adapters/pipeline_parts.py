"""What a loaded pipeline consists of, and what its configs say."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from diffusion_align.process import is_flow, set_steps
from diffusion_align.process.gate import FLOW_PREDICTION

from .families import Family, Guidance
from .parts import Part


class PipelineParts:
    """The parts of a diffusers pipeline by what they are for.

    Attributes:
        pipeline: the diffusers pipeline; usable on its own if no part is absent.
        family: what differs between models: prompts, size ids, the network's call.
        absent: parts whose configs are there without weights; what needs these raises RuntimeError.
    """

    def __init__(self, pipeline: Any, family: Family, absent: Collection[Part]) -> None:
        self.pipeline, self.family, self.absent = pipeline, family, frozenset(absent)

    @property
    def network(self) -> Any:
        """What predicts and is trained: the pipeline's denoiser."""
        return getattr(self.pipeline, self.family.network_name)

    @property
    def unet(self) -> UNet2DConditionModel:
        """``network`` of the families that have a UNet."""
        return self.pipeline.unet

    @property
    def vae(self) -> Any:
        return self.pipeline.vae

    @property
    def text_encoders(self) -> list[nn.Module]:
        found = (getattr(self.pipeline, name, None) for name in self.family.text_encoder_names)
        return [encoder for encoder in found if encoder is not None]

    @property
    def prediction_type(self) -> str:
        """What the network predicts, in diffusers' words: "epsilon", "v_prediction", "sample", "flow_prediction"."""
        scheduler = self.pipeline.scheduler
        return FLOW_PREDICTION if is_flow(scheduler) else str(scheduler.config.prediction_type)

    @property
    def embeds_guidance(self) -> bool:
        """Whether the network takes the guidance scale as an input: it was distilled (LCM, 2310.04378; FLUX dev)."""
        return self.guidance == "embedded"

    @property
    def guidance(self) -> Guidance:
        """How its pictures are guided: "cfg", "embedded", or "none"."""
        return self.family.guidance(self.network.config)

    def present(self) -> list[nn.Module]:
        """Networks that have weights, the denoiser first."""
        parts: dict[Part, list[nn.Module]] = {
            "network": [self.network], "vae": [self.vae], "text_encoders": self.text_encoders
        }  # fmt: skip
        return [module for part, modules in parts.items() if part not in self.absent for module in modules]

    def require(self, part: Part) -> None:
        """Raise RuntimeError if ``part`` has no weights."""
        if part in self.absent:
            raise RuntimeError(f"this model was loaded without its {part.replace('_', ' ')}: see load_adapter's parts")

    @property
    def device(self) -> torch.device:
        return self._first_weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the denoiser's weights; LoRA matrices are float32 beside them."""
        return self._first_weight.dtype

    @property
    def _first_weight(self) -> nn.Parameter:
        # diffusers' own ``device`` and ``dtype`` walk through the whole network: 20 ms each at SDXL's size.
        first: nn.Parameter = next(self.present()[0].parameters())
        return first

    @property
    def is_inpainting(self) -> bool:
        """Whether the network takes a mask and a masked image besides the latents."""
        return self.network.config.in_channels == 2 * self.latent_channels + 1

    @property
    def latent_channels(self) -> int:
        return self.vae.config.latent_channels

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent along each side."""
        return self.pipeline.vae_scale_factor

    @property
    def default_resolution(self) -> int:
        """Side in pixels of the images that the model was made for."""
        return self.family.default_side(self.network.config) * self.vae_scale_factor

    @property
    def side_factor(self) -> int:
        """What both sides of a picture in pixels must be divisible by."""
        return self.family.patch * self.vae_scale_factor

    def set_steps(self, scheduler: Any, steps: int, height: int, width: int) -> None:
        """``scheduler.set_timesteps(steps)`` for pictures of ``height`` x ``width`` pixels, as the pipeline calls it.

        Raises:
            ValueError: the scheduler cannot make so few or so many, or not on the pipeline's grid.
        """
        sides = height // self.vae_scale_factor, width // self.vae_scale_factor
        set_steps(scheduler, steps, **self.family.grid(scheduler, steps, self.family.tokens(*sides)))
        if is_flow(scheduler) and hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)  # else it finds its place by comparing floats
