"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from diffusers import StableDiffusion3Pipeline
from torch import Tensor, nn

from diffusion_align.adapters.conditioning import Conditioning

from .family import NetworkInputs
from .fused_names import sd3_names
from .transformer import CLIP_TOKENS, FlowFamily

#: Tokens that T5 is given by the pipeline.
T5_TOKENS = 256


class StableDiffusion3(FlowFamily):
    """SD3 and SD3.5: two CLIPs and T5, whose states stand one after the other; T5 may be missing (zeros). A LoRA is on
    the joint attention of pictures and text, not on the second one of SD3.5's pictures."""

    name: str = "sd3"
    pipeline = StableDiffusion3Pipeline
    pipelines: Mapping[str, type] = {"sd3": StableDiffusion3Pipeline}
    needed = ("transformer", "text_encoder", "text_encoder_2")
    text_encoder_names: tuple[str, ...] = ("text_encoder", "text_encoder_2", "text_encoder_3")
    lora_prefixes: Mapping[str, tuple[str, ...]] = {
        "transformer": ("lora_transformer", "lora_unet"),
        "text_encoder": ("lora_te1",),
        "text_encoder_2": ("lora_te2",),
        "text_encoder_3": ("lora_te3",),
    }
    blocks = ("JointTransformerBlock",)
    conditioning_fields: Mapping[str, Collection[Any]] = {"patch_size": (2,)}
    skippable: str | None = "transformer_blocks"

    def default_length(self, network_config: Any) -> int | None:
        return T5_TOKENS

    def encode(self, pipeline: Any, prompts: list[str], length: int | None = None) -> Conditioning:
        embeds, _, pooled, _ = pipeline.encode_prompt(
            prompts,
            None,
            None,
            device=pipeline.text_encoder.device,
            do_classifier_free_guidance=False,
            max_sequence_length=T5_TOKENS if length is None else length,
        )
        return Conditioning(embeds, pooled)

    def call(self, network: nn.Module, inputs: NetworkInputs) -> Tensor:
        cond = inputs.cond
        output: Tensor = network(
            hidden_states=inputs.x_t,
            timestep=1000 * inputs.t,  # float32 in every precision, as the pipeline gives it
            encoder_hidden_states=cond.embeds,
            pooled_projections=cond.pooled,
            skip_layers=list(inputs.skipped) or None,
        ).sample
        return output

    def fused_names(self, network: Any) -> Mapping[str, tuple[str, ...]]:
        return sd3_names(network)

    def architecture(self, network_config: Any) -> dict[str, str]:
        return {"modelspec.architecture": "stable-diffusion-3", "ss_base_model_version": "sd3"}

    def memory_inputs(self, network: Any, rows: int, side: int, length: int | None = None) -> NetworkInputs:
        text = self.text_inputs(network, rows, CLIP_TOKENS + (T5_TOKENS if length is None else length))
        return self.latent_inputs(network, rows, side, text)
