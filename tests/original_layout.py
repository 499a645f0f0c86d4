"""Diffusers pipelines as single files in the layout of CompVis and Stability, by renaming their tensors."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

#: (diffusers, original)
RESNET = [
    ("norm1.", "in_layers.0."), ("conv1.", "in_layers.2."), ("time_emb_proj.", "emb_layers.1."),
    ("norm2.", "out_layers.0."), ("conv2.", "out_layers.3."), ("conv_shortcut.", "skip_connection."),
]  # fmt: skip
VAE = [
    (r"encoder\.down_blocks\.(\d+)\.resnets\.", r"encoder.down.\1.block."),
    (r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample."),
    (r"mid_block\.resnets\.0", "mid.block_1"), (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0", "mid.attn_1"), ("conv_shortcut", "nin_shortcut"), ("conv_norm_out", "norm_out"),
    ("group_norm", "norm"), (r"to_([qkv])\.", r"\1."), (r"to_out\.0", "proj_out"),
]  # fmt: skip
OPEN_CLIP = [
    ("encoder.layers", "transformer.resblocks"), ("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"),
    ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"), ("self_attn", "attn"), ("final_layer_norm", "ln_final"),
    ("embeddings.token_embedding", "token_embedding"),
    ("embeddings.position_embedding.weight", "positional_embedding"),
]  # fmt: skip


def unet_parts(config: Any) -> Iterator[tuple[str, str]]:
    """Beginnings of names, (diffusers, original)."""
    yield from [
        ("time_embedding.linear_1.", "time_embed.0."), ("time_embedding.linear_2.", "time_embed.2."),
        ("add_embedding.linear_1.", "label_emb.0.0."), ("add_embedding.linear_2.", "label_emb.0.2."),
        ("conv_in.", "input_blocks.0.0."), ("conv_norm_out.", "out.0."), ("conv_out.", "out.2."),
        ("mid_block.resnets.0.", "middle_block.0."), ("mid_block.attentions.0.", "middle_block.1."),
        ("mid_block.resnets.1.", "middle_block.2."),
    ]  # fmt: skip
    levels, layers = len(config.block_out_channels), config.layers_per_block
    place = 0
    for level in range(levels):
        for layer in range(layers):
            place += 1
            yield f"down_blocks.{level}.resnets.{layer}.", f"input_blocks.{place}.0."
            yield f"down_blocks.{level}.attentions.{layer}.", f"input_blocks.{place}.1."
        if level < levels - 1:
            place += 1
            yield f"down_blocks.{level}.downsamplers.0.conv.", f"input_blocks.{place}.0.op."
    place = -1
    for level in range(levels):
        attends = "Attn" in config.up_block_types[level]
        for layer in range(layers + 1):
            place += 1
            yield f"up_blocks.{level}.resnets.{layer}.", f"output_blocks.{place}.0."
            yield f"up_blocks.{level}.attentions.{layer}.", f"output_blocks.{place}.1."
        if level < levels - 1:
            yield f"up_blocks.{level}.upsamplers.0.conv.", f"output_blocks.{place}.{1 + attends}.conv."


def unet_tensors(unet: Any) -> dict[str, Tensor]:
    parts, found = list(unet_parts(unet.config)), {}
    for name, tensor in unet.state_dict().items():
        ours, theirs = next(pair for pair in parts if name.startswith(pair[0]))
        rest = name.removeprefix(ours)
        if ".resnets." in ours:
            a, b = next(pair for pair in RESNET if rest.startswith(pair[0]))
            rest = b + rest.removeprefix(a)
        found[f"model.diffusion_model.{theirs}{rest}"] = tensor
    return found


def vae_tensors(vae: Any) -> dict[str, Tensor]:
    found, last = {}, len(vae.config.block_out_channels) - 1

    def upwards(match: re.Match[str]) -> str:
        return f"up.{last - int(match[1])}.{'block' if match[2] == 'resnets' else 'upsample'}"

    for name, tensor in vae.state_dict().items():
        attends = "attentions" in name and tensor.ndim == 2
        name = re.sub(r"up_blocks\.(\d+)\.(resnets|upsamplers\.0)", upwards, name)
        for ours, theirs in VAE:
            name = re.sub(ours, theirs, name)
        found[f"first_stage_model.{name}"] = tensor[:, :, None, None] if attends else tensor
    return found


def clip_tensors(prefix: str, encoder: nn.Module) -> dict[str, Tensor]:
    """transformers' own names, as in files of SD 1.x and of SDXL's first encoder."""
    state = encoder.state_dict()
    return {f"{prefix}text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in state.items()}


def open_clip_tensors(prefix: str, encoder: nn.Module) -> dict[str, Tensor]:
    """OpenCLIP's names, as in files of SD 2.x and of SDXL's second encoder."""
    state = {name.removeprefix("text_model."): tensor for name, tensor in encoder.state_dict().items()}
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        match = re.fullmatch(r"(.*\.self_attn\.)([qkv])_proj\.(\w+)", name)
        if match is not None and match[2] != "q":
            continue
        if match is not None:
            tensor = torch.cat([state[f"{match[1]}{part}_proj.{match[3]}"] for part in "qkv"])
            name = f"{match[1]}in_proj_{match[3]}"
        if name == "text_projection.weight":
            name, tensor = "text_projection", tensor.T
        for ours, theirs in OPEN_CLIP:
            name = name.replace(ours, theirs)
        found[prefix + name] = tensor
    return found


def original_tensors(pipeline: Any, second: bool = False) -> dict[str, Tensor]:
    """All tensors of a pipeline under their original names.

    Args:
        second: SD's text encoder is OpenCLIP's, as in SD 2.x.
    """
    first, other = pipeline.text_encoder, getattr(pipeline, "text_encoder_2", None)
    if other is not None:
        texts = clip_tensors("conditioner.embedders.0.transformer.", first)
        texts |= open_clip_tensors("conditioner.embedders.1.model.", other)
    elif second:
        texts = open_clip_tensors("cond_stage_model.model.", first)
    else:
        texts = clip_tensors("cond_stage_model.transformer.", first)
    return unet_tensors(pipeline.unet) | vae_tensors(pipeline.vae) | texts


def write_single_file(
    path: Path, pipeline: Any, second: bool = False, markers: Sequence[str] = (), metadata: dict[str, str] | None = None
) -> Path:
    """The pipeline as one file, with empty tensors named ``markers``."""
    tensors = original_tensors(pipeline, second) | {marker: torch.zeros(1) for marker in markers}
    save_file({name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}, path, metadata)
    return path
