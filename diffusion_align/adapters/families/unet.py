"""What the families share whose denoiser is diffusers' ``UNet2DConditionModel``."""

from __future__ import annotations

from typing import Any, Literal

import torch
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from diffusion_align.adapters.conditioning import Conditioning

from .family import NetworkInputs

#: Tokens of a prompt: CLIP's.
TOKENS = 77


class UNetFamily:
    """Classifier-free guidance of a UNet; see :class:`~.family.Family` for what each member means."""

    guidance: Literal["cfg", "embedded", "none"] = "cfg"
    network_name: str = "unet"
    #: diffusers' attention projections: what its own LoRA scripts train.
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    blocks: tuple[str, ...] = ("BasicTransformerBlock", "ResnetBlock2D")

    def call(self, network: nn.Module, inputs: NetworkInputs) -> Tensor:
        output: Tensor = network(inputs.x_t, inputs.t, **self.arguments(inputs.cond)).sample
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

    def memory_inputs(self, network: Any, rows: int, side: int) -> NetworkInputs:
        dtype, config = network.dtype, network.config
        return NetworkInputs(
            torch.empty(rows, config.in_channels, side, side, dtype=dtype, device="meta"),
            torch.empty(rows, dtype=torch.long, device="meta"),
            Conditioning(torch.empty(rows, TOKENS, config.cross_attention_dim, dtype=dtype, device="meta")),
        )
