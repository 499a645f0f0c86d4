"""Single files of SD3 and FLUX: recognised by their tensors; the denoiser is read, the rest is the folder's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from diffusion_align import load_adapter
from diffusion_align.adapters.families.fused_names import sd3_names
from diffusion_align.adapters.single_file import CONFIGS, recognise
from tests.adapters.families.tiny_flow import LENGTH

#: diffusers' modules outside of blocks, by their original names.
OUTSIDE = {
    "x_embedder.proj": "pos_embed.proj", "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2", "y_embedder.mlp.0":
    "time_text_embed.text_embedder.linear_1", "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
}  # fmt: skip
NORMS = {"ln_q": "norm_q", "ln_k": "norm_k"}


def original_sd3(network: Any) -> dict[str, Tensor]:
    """The weights of an SD3 transformer as Stability's checkpoints name them."""
    state, found = network.state_dict(), {}
    for theirs, ours in [*sd3_names(network).items(), *((name, (module,)) for name, module in OUTSIDE.items())]:
        for kind in ("weight", "bias"):
            found[f"{theirs}.{kind}"] = torch.cat([state[f"{name}.{kind}"] for name in ours])
    found["pos_embed"] = state["pos_embed.pos_embed"]
    last = len(network.transformer_blocks) - 1
    exchanged = {
        "final_layer.adaLN_modulation.1": "norm_out.linear",
        f"joint_blocks.{last}.context_block.adaLN_modulation.1": f"transformer_blocks.{last}.norm1_context.linear",
    }
    for theirs, name in exchanged.items():
        for kind in ("weight", "bias"):
            found[f"{theirs}.{kind}"] = torch.cat(list(reversed(state[f"{name}.{kind}"].chunk(2))))
    for i, block in enumerate(network.transformer_blocks):
        for theirs, ours in NORMS.items():
            for side, name in (("x_block.attn", f"attn.{ours}"), ("context_block.attn", f"attn.norm_added_{ours[-1]}")):
                found[f"joint_blocks.{i}.{side}.{theirs}.weight"] = state[f"transformer_blocks.{i}.{name}.weight"]
            if block.attn2 is not None:
                norm = state[f"transformer_blocks.{i}.attn2.{ours}.weight"]
                found[f"joint_blocks.{i}.x_block.attn2.{theirs}.weight"] = norm
    return {f"model.diffusion_model.{key}": value.clone() for key, value in found.items()}


def test_a_file_of_sd3_is_the_folders_model(sd3_folder: Path, tmp_path: Path) -> None:
    whole = load_adapter(sd3_folder, max_sequence_length=LENGTH)
    file = tmp_path / "sd3.safetensors"
    save_file(original_sd3(whole.network), file)
    found = load_adapter(file, config=str(sd3_folder), max_sequence_length=LENGTH)
    expected = whole.network.state_dict()
    assert found.network.state_dict().keys() == expected.keys()
    for name, weight in found.network.state_dict().items():
        assert torch.equal(weight, expected[name]), name
    with pytest.raises(ValueError, match="is of family 'sd3', but"):
        load_adapter(file, config="scenes-sdxl")


@pytest.mark.parametrize(
    ("keys", "family", "kind"),
    [
        ({"joint_blocks.0.x_block.attn.qkv.weight": (4, 4), "x_embedder.proj.weight": (4, 16, 2, 2)}, "sd3", "sd3"),
        (
            {
                "joint_blocks.0.x_block.attn.qkv.weight": (4, 4), "x_embedder.proj.weight": (4, 16, 2, 2),
                "joint_blocks.0.x_block.attn2.qkv.weight": (4, 4),
            },
            "sd3",
            "sd35-medium",
        ),
        ({"double_blocks.0.img_attn.qkv.weight": (4, 4), "img_in.weight": (4, 64)}, "flux", "flux-schnell"),
        (
            {
                "double_blocks.0.img_attn.qkv.weight": (4, 4), "img_in.weight": (4, 64),
                "guidance_in.in_layer.weight": (4, 4),
            },
            "flux",
            "flux",
        ),
    ],
)  # fmt: skip
def test_files_are_recognised_by_their_blocks(keys: dict[str, tuple[int, ...]], family: str, kind: str) -> None:
    found = recognise("file", keys, {}, lambda key: None)
    assert (found.family, found.configs) == (family, CONFIGS[kind])
