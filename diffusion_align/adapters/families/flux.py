"""FLUX.1, dev and schnell."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from diffusers import FluxPipeline
from torch import Tensor, nn

from diffusion_align.adapters.conditioning import Conditioning

from .family import Guidance, NetworkInputs
from .fused_names import flux_names, xlabs_names
from .transformer import JOINT_ATTENTION, FlowFamily
from .understood_flow import takes

#: Tokens that T5 is given: by the pipeline, and by schnell, which was distilled with half of them.
T5_TOKENS, SCHNELL_TOKENS = 512, 256
#: The pipeline's own side of latents, whatever the network's config says.
SIDE = 128


class Flux(FlowFamily):
    """FLUX.1: T5's states and CLIP's pooled embedding; latents are packed 2 x 2; dev takes the guidance scale as an
    input, schnell takes none."""

    name: str = "flux"
    pipeline = FluxPipeline
    pipelines: Mapping[str, type] = {"flux": FluxPipeline}
    text_encoder_names: tuple[str, ...] = ("text_encoder", "text_encoder_2")
    needed = ("transformer", *text_encoder_names)
    #: diffusers' script's: also the feed-forwards of the double blocks.
    lora_targets: tuple[str, ...] = (
        *JOINT_ATTENTION, "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
    )  # fmt: skip
    lora_prefixes: Mapping[str, tuple[str, ...]] = {
        "transformer": ("lora_transformer", "lora_unet"),
        "text_encoder": ("lora_te1", "lora_te"),
        "text_encoder_2": ("lora_te3", "lora_te2"),
    }
    blocks = ("FluxTransformerBlock", "FluxSingleTransformerBlock")
    conditioning_fields: Mapping[str, Collection[Any]] = {"patch_size": (1,), "guidance_embeds": (True, False)}
    packed: int = 4
    overflows: bool = True

    def grid(self, scheduler: Any, steps: int, tokens: int) -> dict[str, Any]:
        """The pipeline's sigmas, evenly from 1 to 1 / N, which the scheduler shifts."""
        shift = super().grid(scheduler, steps, tokens)
        if scheduler.config.get("use_flow_sigmas"):
            return shift
        if not takes(scheduler, "sigmas"):
            raise ValueError(
                f"scheduler: {type(scheduler).__name__} takes no grid (sigmas), which FLUX's pipeline gives it: take "
                "FlowMatchEulerDiscreteScheduler"
            )
        return {"sigmas": np.linspace(1.0, 1 / steps, steps), **shift}

    def default_side(self, network_config: Any) -> int:
        return SIDE

    def default_length(self, network_config: Any) -> int | None:
        return T5_TOKENS if network_config.get("guidance_embeds") else SCHNELL_TOKENS

    def guidance(self, network_config: Any) -> Guidance:
        return "embedded" if network_config.get("guidance_embeds") else "none"

    def encode(self, pipeline: Any, prompts: list[str], length: int | None = None) -> Conditioning:
        embeds, pooled, _ = pipeline.encode_prompt(
            prompts,
            device=pipeline.text_encoder.device,
            max_sequence_length=length or self.default_length(pipeline.transformer.config),
        )
        return Conditioning(embeds, pooled)

    def call(self, network: nn.Module, inputs: NetworkInputs) -> Tensor:
        x, cond = inputs.x_t, inputs.cond
        batch, channels, height, width = x.shape
        ids = FluxPipeline._prepare_latent_image_ids(batch, height // 2, width // 2, x.device, torch.float32)
        output: Tensor = network(
            hidden_states=FluxPipeline._pack_latents(x.contiguous(), batch, channels, height, width),
            timestep=(1000 * inputs.t).to(x.dtype) / 1000,  # the pipeline's own rounding
            guidance=cond.guidance,
            pooled_projections=cond.pooled,
            encoder_hidden_states=cond.embeds,
            txt_ids=torch.zeros(cond.embeds.shape[1], 3, device=x.device),
            img_ids=ids,
        ).sample
        unpacked: Tensor = FluxPipeline._unpack_latents(output, height, width, 1)
        return unpacked

    def fused_names(self, network: Any) -> Mapping[str, tuple[str, ...]]:
        return flux_names(network)

    def other_names(self, network: Any) -> Mapping[str, tuple[str, ...]]:
        return xlabs_names(network)

    def architecture(self, network_config: Any) -> dict[str, str]:
        kind = "dev" if network_config.guidance_embeds else "schnell"
        return {"modelspec.architecture": f"flux-1-{kind}", "ss_base_model_version": "flux1"}

    def memory_inputs(self, network: Any, rows: int, side: int, length: int | None = None) -> NetworkInputs:
        config = network.config
        cond = self.text_inputs(network, rows, length or self.default_length(config) or T5_TOKENS)
        if config.guidance_embeds:
            cond = replace(cond, guidance=torch.empty(rows, device="meta"))
        return self.latent_inputs(network, rows, side, cond)
