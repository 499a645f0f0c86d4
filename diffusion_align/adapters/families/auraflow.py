"""AuraFlow."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import isqrt
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from diffusers import AuraFlowPipeline
from torch import Tensor, nn

from diffusion_align.adapters.conditioning import Conditioning

from .family import NetworkInputs
from .transformer import FlowFamily

#: Tokens of a prompt, the pipeline's own.
TOKENS = 256
#: Side of the latents that the pipeline makes unless told, whatever ``sample_size`` says.
SIDE = 128


class AuraFlow(FlowFamily):
    """AuraFlow: one text encoder (Pile-T5), whose states are zero where a prompt is filled up; no pooled embedding, no
    mask. Its VAE is SDXL's, without a shift."""

    name: str = "auraflow"
    pipeline = AuraFlowPipeline
    pipelines: Mapping[str, type] = {}  # it reads no single files
    needed = ("transformer", "text_encoder")
    text_encoder_names: tuple[str, ...] = ("text_encoder",)
    lora_prefixes: Mapping[str, tuple[str, ...]] = {
        "transformer": ("lora_transformer", "lora_unet"),
        "text_encoder": ("lora_te",),
    }
    scripts_name_original_blocks: bool = False
    blocks = ("AuraFlowJointTransformerBlock", "AuraFlowSingleTransformerBlock")
    conditioning_fields: Mapping[str, Collection[Any]] = {"patch_size": (2,)}
    structure_fields: Collection[str] = ("num_mmdit_layers", "num_single_dit_layers")
    latent_fields: Collection[str] = ("scaling_factor",)

    def default_side(self, network_config: Any) -> int:
        return min(SIDE, self.largest_side(network_config))

    def largest_side(self, network_config: Any) -> int:
        """Side of the latents that the table of places ends at."""
        return self.patch * isqrt(network_config["pos_embed_max_size"])

    def default_length(self, network_config: Any) -> int | None:
        return TOKENS

    def encode(self, pipeline: Any, prompts: list[str], length: int | None = None) -> Conditioning:
        embeds, *_ = pipeline.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            device=pipeline.text_encoder.device,
            max_sequence_length=TOKENS if length is None else length,
        )
        return Conditioning(embeds)

    def call(self, network: nn.Module, inputs: NetworkInputs) -> Tensor:
        """As :class:`~.family.Family` says.

        Raises:
            ValueError: latents that are larger than the table of places, which diffusers would index from its end.
        """
        x, most = inputs.x_t, self.largest_side(extract_model_from_parallel(network).config)
        if max(x.shape[-2:]) > most:
            raise ValueError(
                f"latents of {x.shape[-2]} x {x.shape[-1]} are too large for this {self.name} model: expected sides of "
                f"at most {most} (pos_embed_max_size)"
            )
        output: Tensor = network(
            hidden_states=x.contiguous(),
            encoder_hidden_states=inputs.cond.embeds,
            timestep=inputs.t.to(x.dtype),  # the pipeline's own rounding
        ).sample
        return output

    def fused_names(self, network: Any) -> Mapping[str, tuple[str, ...]]:
        return {}

    def memory_inputs(self, network: Any, rows: int, side: int, length: int | None = None) -> NetworkInputs:
        width, tokens = network.config.joint_attention_dim, TOKENS if length is None else length
        text = Conditioning(torch.empty(rows, tokens, width, dtype=network.dtype, device="meta"))
        return self.latent_inputs(network, rows, side, text)
