"""What the families share whose denoiser is a transformer on the path of flow matching."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from diffusion_align.adapters.conditioning import Conditioning
from diffusion_align.process import Shift

from .family import Guidance, NetworkInputs
from .understood_flow import check_flow_scheduler, check_flow_understood

#: Tokens of a prompt that CLIP reads.
CLIP_TOKENS = 77
#: What diffusers' scripts train of the attention that pictures and text share.
JOINT_ATTENTION = (
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj",
    "attn.to_add_out",
)  # fmt: skip


class FlowFamily(ABC):
    """See :class:`~.family.Family` for what each member means.

    Attributes:
        pipeline: diffusers' class.
        needed: components without which it is none of the family's.
        packed: latents that the pipeline packs into one vector of channels before the network.
        structure_fields: further fields of the denoiser's config that its own forward pass deals with.
    """

    name: str
    pipeline: type
    needed: tuple[str, ...]
    blocks: tuple[str, ...]
    network_name: str = "transformer"
    network_kind: str = "transformer"
    lora_targets: tuple[str, ...] = JOINT_ATTENTION
    scripts_name_original_blocks: bool = True
    conditioning_fields: Mapping[str, Collection[Any]] = {}
    structure_fields: Collection[str] = ()
    latent_fields: Collection[str] = ("scaling_factor", "shift_factor")
    patch: int = 2
    packed: int = 1
    overflows: bool = False
    vae_overflows: bool = True
    skippable: str | None = None
    modular: bool = False

    def matches(self, parts: Mapping[str, Any], network_config: Mapping[str, Any]) -> bool:
        there = all(parts.get(name) is not None for name in self.needed)
        return there and parts.get("_class_name") == self.pipeline.__name__

    def check(self, pipeline: Any) -> None:
        structure = self.structure_fields
        check_flow_understood(pipeline, self.conditioning_fields, self.latent_fields, self.packed, structure)

    def check_scheduler(self, scheduler: Any) -> None:
        check_flow_scheduler(scheduler)

    def grid(self, scheduler: Any, steps: int, tokens: int) -> dict[str, Any]:
        if not scheduler.config.get("use_dynamic_shifting"):
            return {}
        return {"mu": Shift.of(scheduler.config).mu(tokens)}

    def tokens(self, height: int, width: int) -> int:
        return (height // self.patch) * (width // self.patch)

    def default_side(self, network_config: Any) -> int:
        return int(network_config["sample_size"])

    def guidance(self, network_config: Any) -> Guidance:
        return "cfg"

    def size_ids(self, sizes: Tensor) -> Tensor | None:
        return None

    def recompute(self, network: Any, attention_only: bool) -> None:
        network.enable_gradient_checkpointing()  # every block is a transformer layer

    def check_speed(self, attention: str, channels_last: bool) -> None:
        if attention == "xformers":
            raise ValueError(
                "attention xformers is for UNets: transformers attend with torch's own kernels, set attention to sdpa"
            )
        if channels_last:
            raise ValueError("channels_last is for UNets, a transformer has no convolutions: set it to false")

    def compile(self, network: Any) -> None:
        for module in network.modules():
            if type(module).__name__ in self.blocks:
                module.compile()

    @abstractmethod
    def encode(self, pipeline: Any, prompts: list[str], length: int | None = None) -> Conditioning:
        """As :class:`~.family.Family` says."""

    def null(self, pipeline: Any, length: int | None = None) -> Conditioning:
        """The empty prompt, encoded."""
        return self.encode(pipeline, [""], length)

    def original_names(self, network: Any) -> Mapping[str, str]:
        return {}

    def other_names(self, network: Any) -> Mapping[str, tuple[str, ...]]:
        return {}

    def architecture(self, network_config: Any) -> dict[str, str]:
        """What ``model_spec`` says of this family alone."""
        return {"modelspec.architecture": self.name}

    def model_spec(self, pipeline: Any) -> dict[str, str]:
        config = pipeline.transformer.config
        side = self.default_side(config) * pipeline.vae_scale_factor
        return {
            "modelspec.sai_model_spec": "1.0.0",
            "modelspec.implementation": "diffusers",
            "modelspec.resolution": f"{side}x{side}",
            **self.architecture(config),
        }

    def text_inputs(self, network: Any, rows: int, tokens: int) -> Conditioning:
        """Prompts of ``tokens`` tokens on the ``meta`` device, in the network's dtype."""
        config, dtype = network.config, network.dtype
        return Conditioning(
            torch.empty(rows, tokens, config.joint_attention_dim, dtype=dtype, device="meta"),
            torch.empty(rows, config.pooled_projection_dim, dtype=dtype, device="meta"),
        )

    def latent_inputs(self, network: Any, rows: int, side: int, cond: Conditioning) -> NetworkInputs:
        """Latents of ``side`` x ``side`` on the ``meta`` device."""
        channels = network.config.in_channels // self.packed
        return NetworkInputs(
            torch.empty(rows, channels, side, side, dtype=network.dtype, device="meta"),
            torch.empty(rows, device="meta"),
            cond,
        )
