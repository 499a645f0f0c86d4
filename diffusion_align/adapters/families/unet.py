"""What the families share whose denoiser is diffusers' ``UNet2DConditionModel``."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from diffusion_align.adapters.conditioning import Conditioning

from .family import Guidance, NetworkInputs
from .original import original_unet_names
from .understood import check_scheduler, check_understood

#: Tokens of a prompt: CLIP's.
TOKENS = 77


def guidance_embedding(scale: Tensor, width: int) -> Tensor:
    """What distilled UNets are given of the guidance scale w (LCM, 2310.04378), (B, width) float32.

    sin and cos of 1000 (w - 1) f_i, with f_i from 1 down to 1e-4 in equal ratios; an odd width ends in a zero.

    Args:
        scale: w, (B,) float32.
    """
    half = width // 2
    step = torch.tensor(10_000.0, device=scale.device).log() / (half - 1)  # float32, as the pipelines compute it
    rates = torch.exp(torch.arange(half, dtype=torch.float32, device=scale.device) * -step)
    angles = (scale.float() - 1)[:, None] * 1000 * rates
    return nn.functional.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, width % 2))


class UNetFamily:
    """Classifier-free guidance of a UNet; see :class:`~.family.Family` for what each member means."""

    network_name: str = "unet"
    network_kind: str = "UNet"
    #: diffusers' attention projections: what its own LoRA scripts train.
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    lora_prefixes: Mapping[str, tuple[str, ...]] = {
        "unet": ("lora_unet",),
        "text_encoder": ("lora_te", "lora_te1"),
        "text_encoder_2": ("lora_te2",),
    }
    scripts_name_original_blocks: bool = False
    blocks: tuple[str, ...] = ("BasicTransformerBlock", "ResnetBlock2D")
    conditioning_fields: Mapping[str, Collection[Any]] = {}
    latent_fields: Collection[str] = ("scaling_factor",)
    patch: int = 1
    overflows: bool = False
    skippable: str | None = None

    def check(self, pipeline: Any) -> None:
        check_understood(pipeline, self.conditioning_fields, self.latent_fields)

    def check_scheduler(self, scheduler: Any) -> None:
        check_scheduler(scheduler)

    def grid(self, scheduler: Any, steps: int, tokens: int) -> dict[str, Any]:
        return {}

    def tokens(self, height: int, width: int) -> int:
        return height * width

    def default_side(self, network_config: Any) -> int:
        return int(network_config["sample_size"])

    def default_length(self, network_config: Any) -> int | None:
        return None

    def guidance(self, network_config: Any) -> Guidance:
        return "cfg" if network_config.get("time_cond_proj_dim") is None else "embedded"

    def check_speed(self, attention: str, channels_last: bool) -> None:
        """A UNet has them all."""

    def compile(self, network: Any) -> None:
        network.compile_repeated_blocks()

    def call(self, network: nn.Module, inputs: NetworkInputs) -> Tensor:
        arguments, scale = self.arguments(inputs.cond), inputs.cond.guidance
        if scale is not None:
            width = extract_model_from_parallel(network).config.time_cond_proj_dim
            arguments["timestep_cond"] = guidance_embedding(scale, width).to(inputs.x_t.dtype)
        output: Tensor = network(inputs.x_t, inputs.t, **arguments).sample
        return output

    def arguments(self, cond: Conditioning) -> dict[str, Any]:
        """Keyword arguments of the UNet besides sample and timestep."""
        return {"encoder_hidden_states": cond.embeds}

    def recompute(self, network: Any, attention_only: bool) -> None:
        network.enable_gradient_checkpointing()
        if attention_only:
            for module in network.modules():
                if hasattr(module, "gradient_checkpointing") and not isinstance(module, Transformer2DModel):
                    module.gradient_checkpointing = False

    def original_names(self, network: Any) -> Mapping[str, str]:
        return original_unet_names(network)

    def fused_names(self, network: Any) -> Mapping[str, tuple[str, ...]]:
        return {}

    def other_names(self, network: Any) -> Mapping[str, tuple[str, ...]]:
        return {}

    def model_spec(self, pipeline: Any) -> dict[str, str]:
        predicted = str(pipeline.scheduler.config.prediction_type)
        side = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
        return {
            "modelspec.sai_model_spec": "1.0.0",
            "modelspec.implementation": "diffusers",
            "modelspec.prediction_type": {"v_prediction": "v"}.get(predicted, predicted),
            "modelspec.resolution": f"{side}x{side}",
        }

    def memory_inputs(self, network: Any, rows: int, side: int, length: int | None = None) -> NetworkInputs:
        dtype, config = network.dtype, network.config
        return NetworkInputs(
            torch.empty(rows, config.in_channels, side, side, dtype=dtype, device="meta"),
            torch.empty(rows, dtype=torch.long, device="meta"),
            Conditioning(torch.empty(rows, TOKENS, config.cross_attention_dim, dtype=dtype, device="meta")),
        )
