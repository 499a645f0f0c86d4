"""The UNet's modules as the original checkpoints of CompVis and Stability name them."""

from __future__ import annotations

from typing import Any

from torch import nn

#: diffusers' names and the original ones, outside the blocks.
OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
#: The same inside a residual block.
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def original_unet_names(unet: Any) -> dict[str, str]:
    """The original name of every module that has weights, by its name in ``UNet2DConditionModel``."""
    blocks = block_names(unet)
    names = {}
    for name, module in unet.named_modules():
        owner = next((block for block in blocks if name.startswith(block + ".") or name == block), None)
        if owner is not None:
            inner = name[len(owner) + 1 :]
            inner = RESNET.get(inner, inner) if ".resnets." in owner else inner
            names[name] = ".".join(part for part in (blocks[owner], inner) if part)
        elif name in OUTSIDE and not isinstance(module, nn.Identity):
            names[name] = OUTSIDE[name]
    return names


def block_names(unet: Any) -> dict[str, str]:
    """Residual blocks, transformers and samplers: the original numbers every place of the way down and up."""
    names: dict[str, str] = {}
    place = 1  # 0 is conv_in
    for i, block in enumerate(unet.down_blocks):
        for j in range(len(block.resnets)):
            names |= place_names(f"down_blocks.{i}", block, j, f"input_blocks.{place}")
            place += 1
        if block.downsamplers is not None:
            names[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{place}.0.op"
            place += 1
    middle = unet.mid_block
    if middle is not None:
        for j in range(len(middle.resnets)):
            names[f"mid_block.resnets.{j}"] = f"middle_block.{2 * j}"
        for j in range(len(middle.attentions)):
            names[f"mid_block.attentions.{j}"] = f"middle_block.{2 * j + 1}"
    place = 0
    for i, block in enumerate(unet.up_blocks):
        for j in range(len(block.resnets)):
            names |= place_names(f"up_blocks.{i}", block, j, f"output_blocks.{place}")
            place += 1
        if block.upsamplers is not None:
            within = 2 if hasattr(block, "attentions") else 1
            names[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{place - 1}.{within}.conv"
    return names


def place_names(ours: str, block: Any, index: int, theirs: str) -> dict[str, str]:
    """The residual block of one place and, where there is one, its transformer."""
    names = {f"{ours}.resnets.{index}": f"{theirs}.0"}
    if hasattr(block, "attentions"):
        names[f"{ours}.attentions.{index}"] = f"{theirs}.1"
    return names
