"""Tiny random SD3, FLUX and AuraFlow pipelines: every part is there, and every input of the networks matters."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

#: Width of both CLIPs, of T5, and tokens that T5 is given in tests.
WIDTH, T5_WIDTH, LENGTH = 32, 72, 16


def build_flow_vae(scale: float = 1.5305, shift: float | None = 0.0609) -> AutoencoderKL:
    """Factor 4, four channels; shift and scale are SD3's unless told."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        scaling_factor=scale,
        shift_factor=shift,
    )


def clip_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        initializer_factor=3.0,
    )


def t5(tokenizer: CLIPTokenizer) -> T5EncoderModel:
    """It reads CLIP's tokens: the pipelines do not ask what made them."""
    config = T5Config(
        vocab_size=len(tokenizer), d_model=T5_WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return T5EncoderModel(config)


def flow_scheduler(dynamic: bool, shift: float = 3.0) -> FlowMatchEulerDiscreteScheduler:
    """SD3's static shift, or FLUX dev's dynamic one."""
    return FlowMatchEulerDiscreteScheduler(shift=shift, use_dynamic_shifting=dynamic)


def sd3_transformer() -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=T5_WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )


def flux_transformer(guidance_embeds: bool = True) -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(2, 2, 4),
    )


def louder(*modules: nn.Module) -> None:
    """Spread zero-initialised biases, and let prompts weigh as much as pictures: no input can be lost unnoticed."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in modules:
            for name, parameter in module.named_parameters():
                if parameter.ndim == 1:
                    parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
                if "context_embedder" in name or "text_embedder" in name:
                    parameter *= 4


def sd3_pipeline(tokenizer: CLIPTokenizer, with_t5: bool = True) -> Any:
    torch.manual_seed(0)
    first, second = (CLIPTextModelWithProjection(clip_config(tokenizer)) for _ in range(2))
    third = t5(tokenizer) if with_t5 else None
    vae, transformer = build_flow_vae(), sd3_transformer()
    louder(vae, transformer, first, second)
    return StableDiffusion3Pipeline(
        transformer, flow_scheduler(False), vae, first, tokenizer, second, tokenizer, third,
        tokenizer if with_t5 else None,
    )  # fmt: skip


def flux_pipeline(tokenizer: CLIPTokenizer, guidance_embeds: bool = True) -> Any:
    torch.manual_seed(0)
    first, second = CLIPTextModel(clip_config(tokenizer)), t5(tokenizer)
    vae, transformer = build_flow_vae(), flux_transformer(guidance_embeds)
    louder(vae, transformer, first)
    scheduler = flow_scheduler(guidance_embeds, shift=1.0)
    return FluxPipeline(scheduler, vae, first, tokenizer, second, tokenizer, transformer)


def auraflow_transformer() -> AuraFlowTransformer2DModel:
    return AuraFlowTransformer2DModel(
        sample_size=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=T5_WIDTH,
        caption_projection_dim=16,
        pos_embed_max_size=16,
    )


def auraflow_pipeline(tokenizer: CLIPTokenizer) -> Any:
    """Latents of at most 8 x 8, as large as its table of places."""
    torch.manual_seed(0)
    config = UMT5Config(
        vocab_size=len(tokenizer), d_model=T5_WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    vae, transformer = build_flow_vae(2.0, None), auraflow_transformer()
    louder(vae, transformer)
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if ".norm1" in name:  # whose gates let attention through, all that prompts are read by
                parameter *= 8
    return AuraFlowPipeline(tokenizer, UMT5EncoderModel(config), vae, transformer, flow_scheduler(False, shift=1.73))
