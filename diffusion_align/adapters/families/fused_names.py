"""SD3's and FLUX's modules as the original checkpoints name them, several of diffusers' in one where those are fused.

LoRA files of kohya's scripts and of most trainers of FLUX go by these names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

#: Attention of a block of both models: (of the picture, of the text) of diffusers.
PICTURE, TEXT = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")


def present(network: Any, names: Iterator[tuple[str, tuple[str, ...]]]) -> dict[str, tuple[str, ...]]:
    """Those of ``names`` whose modules the network has."""
    modules = {name for name, _ in network.named_modules()}
    return {original: ours for original, ours in names if all(name in modules for name in ours)}


def sd3_names(network: Any) -> Mapping[str, tuple[str, ...]]:
    """diffusers' modules by the name in Stability's checkpoints, rows of the fused weight one after the other."""

    def names() -> Iterator[tuple[str, tuple[str, ...]]]:
        for i in range(len(network.transformer_blocks)):
            ours, theirs = f"transformer_blocks.{i}", f"joint_blocks.{i}"
            for side, attention, projections, out, feed, norm in (
                ("x_block", "attn", PICTURE, "to_out.0", "ff", "norm1"),
                ("context_block", "attn", TEXT, "to_add_out", "ff_context", "norm1_context"),
            ):
                place = f"{theirs}.{side}"
                yield f"{place}.attn.qkv", tuple(f"{ours}.{attention}.{name}" for name in projections)
                yield f"{place}.attn.proj", (f"{ours}.{attention}.{out}",)
                yield f"{place}.mlp.fc1", (f"{ours}.{feed}.net.0.proj",)
                yield f"{place}.mlp.fc2", (f"{ours}.{feed}.net.2",)
                if side == "x_block" or i + 1 < len(network.transformer_blocks):  # else scale and shift are exchanged
                    yield f"{place}.adaLN_modulation.1", (f"{ours}.{norm}.linear",)
            yield f"{theirs}.x_block.attn2.qkv", tuple(f"{ours}.attn2.{name}" for name in PICTURE)
            yield f"{theirs}.x_block.attn2.proj", (f"{ours}.attn2.to_out.0",)
        yield "context_embedder", ("context_embedder",)

    return present(network, names())


def flux_names(network: Any) -> Mapping[str, tuple[str, ...]]:
    """diffusers' modules by the name in Black Forest Labs' checkpoints, rows one after the other."""

    def names() -> Iterator[tuple[str, tuple[str, ...]]]:
        for i in range(len(network.transformer_blocks)):
            ours, theirs = f"transformer_blocks.{i}", f"double_blocks.{i}"
            for side, projections, out, feed, norm in (
                ("img", PICTURE, "to_out.0", "ff", "norm1"),
                ("txt", TEXT, "to_add_out", "ff_context", "norm1_context"),
            ):
                yield f"{theirs}.{side}_attn.qkv", tuple(f"{ours}.attn.{name}" for name in projections)
                yield f"{theirs}.{side}_attn.proj", (f"{ours}.attn.{out}",)
                yield f"{theirs}.{side}_mlp.0", (f"{ours}.{feed}.net.0.proj",)
                yield f"{theirs}.{side}_mlp.2", (f"{ours}.{feed}.net.2",)
                yield f"{theirs}.{side}_mod.lin", (f"{ours}.{norm}.linear",)
        for i in range(len(network.single_transformer_blocks)):
            ours, theirs = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
            fused = (*(f"{ours}.attn.{name}" for name in PICTURE), f"{ours}.proj_mlp")
            yield f"{theirs}.linear1", fused
            yield f"{theirs}.linear2", (f"{ours}.proj_out",)
            yield f"{theirs}.modulation.lin", (f"{ours}.norm.linear",)
        yield "img_in", ("x_embedder",)
        yield "txt_in", ("context_embedder",)
        for theirs, ours in (("time", "timestep"), ("vector", "text"), ("guidance", "guidance")):
            for layer, number in (("in", 1), ("out", 2)):
                yield f"{theirs}_in.{layer}_layer", (f"time_text_embed.{ours}_embedder.linear_{number}",)
        yield "final_layer.linear", ("proj_out",)

    return present(network, names())


def xlabs_names(network: Any) -> Mapping[str, tuple[str, ...]]:
    """diffusers' modules by the names of XLabs' trainer, whose attention processors number picture (1) and text (2)."""

    def names() -> Iterator[tuple[str, tuple[str, ...]]]:
        for i in range(len(network.transformer_blocks)):
            ours = f"transformer_blocks.{i}.attn"
            for number, projections, out in ((1, PICTURE, "to_out.0"), (2, TEXT, "to_add_out")):
                yield f"double_blocks.{i}.qkv_lora{number}", tuple(f"{ours}.{name}" for name in projections)
                yield f"double_blocks.{i}.proj_lora{number}", (f"{ours}.{out}",)
        for i in range(len(network.single_transformer_blocks)):
            ours = f"single_transformer_blocks.{i}"
            yield f"single_blocks.{i}.qkv_lora", tuple(f"{ours}.attn.{name}" for name in PICTURE)
            yield f"single_blocks.{i}.proj_lora", (f"{ours}.proj_out",)

    return present(network, names())
