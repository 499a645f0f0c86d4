"""HPSv3++, and EditReward on Qwen3-VL, on tiny models in the published key layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import gelu, linear
from torchvision.transforms.v2.functional import to_pil_image
from transformers import PreTrainedTokenizerFast, Qwen2VLImageProcessor, Qwen3VLConfig, Qwen3VLModel

from diffusion_align.rewards import load_scorer
from diffusion_align.rewards.published.qwen_reading import in_patches_of_28, row_positions
from tests.rewards.qwen_models import SPECIAL, head_by_hand, random_head, random_layers
from tests.rewards.vision_language_models import byte_tokenizer

PROMPTS = ["a red star", "two small blue rings on a dark background"]
WIDTH, INNER = 32, 8


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Config, tokenizer and image processor of a tiny Qwen3-VL, and its random backbone (one token more)."""
    folder = tmp_path_factory.mktemp("qwen3")
    tokenizer = byte_tokenizer(SPECIAL, merges=[])
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessor(patch_size=16, merge_size=2, temporal_patch_size=2).save_pretrained(folder)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    config = Qwen3VLConfig(
        text_config={
            "hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 8, "vocab_size": len(tokenizer), "pad_token_id": 0,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4},
        },
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": WIDTH,
            "patch_size": 16, "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
        },
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
    )  # fmt: skip
    config.save_pretrained(folder)
    config.text_config.vocab_size += 1
    torch.manual_seed(0)
    backbone = Qwen3VLModel(config).eval()
    for parameter in backbone.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return folder, backbone


@torch.no_grad()
def state_by_hand(folder: Path, backbone: Any, pictures: list[Image.Image], text: str) -> Tensor:
    """The state (1, D) at the reward token, of one example alone; transformers finds the positions."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|Reward|>"]})
    seen = Qwen2VLImageProcessor.from_pretrained(folder)(images=pictures, return_tensors="pt")
    message = "<|im_start|>user\n"
    for grid in seen["image_grid_thw"]:
        message += "<|vision_start|>" + "<|image_pad|>" * (int(grid.prod()) // 4) + "<|vision_end|>"
    ids = tokenizer(message + text + "<|im_end|>\n<|im_start|>assistant\n", return_tensors="pt").input_ids
    image = ids == tokenizer.convert_tokens_to_ids("<|image_pad|>")
    hidden = backbone(input_ids=ids, mm_token_type_ids=image.int(), **seen).last_hidden_state
    return hidden[ids == tokenizer.convert_tokens_to_ids("<|Reward|>")]


@torch.no_grad()
@pytest.mark.parametrize("progress", [0.0, 0.6])
def test_hps_v3_plus_conditions_its_head(progress: float, base: tuple[Path, Any], tmp_path: Path) -> None:
    folder, backbone = base
    head = random_head(1)
    condition = random_layers({"0": (INNER, 2), "2": (INNER, INNER)}, 2)
    film = random_layers({"0": (WIDTH, INNER), "2": (2 * WIDTH, WIDTH)}, 3)
    able = random_layers({"proj": (INNER, WIDTH), "pool_attn": (1, INNER), "out_proj": (1, INNER)}, 4)
    weights = {"lm_head.weight": torch.zeros(4, WIDTH)}
    weights |= {f"model.{key}": value for key, value in backbone.state_dict().items()}
    parts = {"rm_head": head, "cond_encoder": condition, "film_gen": film, "cap_encoder": able}
    weights |= {f"{name}.{key}": value for name, part in parts.items() for key, value in part.items()}
    torch.save({"model": weights}, tmp_path / "hpsv3++.pth")
    (tmp_path / "template.txt").write_text("Rate it.\nText: {text_prompt}\nRating: <|Reward|>\nEND\n")
    scorer = load_scorer(
        "hps-v3++", str(tmp_path), base=str(folder), templates=(str(tmp_path / "template.txt"),), progress=progress,
        condition_width=INNER,
    )  # fmt: skip
    images = torch.rand(2, 3, 60, 90, generator=torch.Generator().manual_seed(2))
    output = scorer.score(images, PROMPTS)
    assert output.std is not None
    for i, prompt in enumerate(PROMPTS):
        picture = to_pil_image(images[i]).resize((560, 392), Image.Resampling.BICUBIC)  # 20 x 14 patches of 28
        state = state_by_hand(folder, backbone, [picture], f"Rate it.\nText: {prompt}\nRating: <|Reward|>\nEND\n")
        inner = linear(state, able["proj.weight"], able["proj.bias"])
        capability = linear(inner, able["out_proj.weight"], able["out_proj.bias"]).sigmoid()
        given = torch.cat([capability, torch.full((1, 1), progress)], dim=1)
        given = gelu(linear(given, condition["0.weight"], condition["0.bias"]))
        given = linear(given, condition["2.weight"], condition["2.bias"])
        given = linear(given, film["0.weight"], film["0.bias"]).relu()
        gamma, beta = linear(given, film["2.weight"], film["2.bias"]).chunk(2, dim=1)
        mean, log_std = head_by_hand(head, state * (1 + gamma) + beta)[0].tolist()
        assert output.reward[i].item() == pytest.approx(mean, abs=1e-3, rel=1e-3)
        assert output.std[i].log().item() == pytest.approx(log_std, abs=1e-3, rel=1e-3)


@torch.no_grad()
def test_edit_reward_on_qwen3_leaves_sizes_to_the_image_processor(base: tuple[Path, Any], tmp_path: Path) -> None:
    folder, backbone = base
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    heads = [random_head(1), random_head(2)]
    weights = {f"model.{key}": value.clone() for key, value in backbone.state_dict().items()}
    weights |= {f"rm_heads.head_{i}.{key}": value for i, head in enumerate(heads) for key, value in head.items()}
    save_file(weights, tmp_path / "model.safetensors")
    templates = [tmp_path / "following.txt", tmp_path / "quality.txt"]
    for template in templates:
        template.write_text(f"Judge the {template.stem}: {{text_prompt}} <|Reward|>")
    scorer = load_scorer("edit-reward", str(tmp_path), templates=tuple(map(str, templates)))
    images, sources = torch.rand(2, 3, 64, 64), torch.rand(2, 3, 48, 80)
    texts = ["make it red", "remove the large star"]
    output = scorer.score(images, ["", ""], source_images=sources, instructions=texts)
    for i, text in enumerate(texts):
        pair = [to_pil_image(sources[i]), to_pil_image(images[i])]
        found = [
            head_by_hand(head, state_by_hand(folder, backbone, pair, f"Judge the {template.stem}: {text} <|Reward|>"))[
                0
            ]
            for head, template in zip(heads, templates, strict=True)
        ]
        assert output.aspects["instruction_following"][i].item() == pytest.approx(float(found[0][0]), abs=1e-4)
        assert output.aspects["visual_quality"][i].item() == pytest.approx(float(found[1][0]), abs=1e-4)


def test_positions_have_rows_and_columns() -> None:
    image = torch.tensor(
        [[False, True, True, True, True, True, True, False], [True, True, False, True, True] + 3 * [False]]
    )
    positions = row_positions(image, [(2, 3), (1, 2), (2, 1)])
    assert positions[:, 0].tolist() == [[0, 1, 1, 1, 1, 1, 1, 4], [0, 1, 1, 1, 2, 2, 2, 4], [0, 1, 2, 3, 1, 2, 3, 4]]
    assert positions[:, 1].T.tolist() == [
        [0, 0, 0], [0, 0, 1], [2, 2, 2], [3, 3, 3], [3, 4, 3], [5, 5, 5], [6, 6, 6], [7, 7, 7]
    ]  # fmt: skip


def test_pictures_are_first_made_of_patches_of_28() -> None:
    assert in_patches_of_28(torch.rand(3, 64, 64)).size == (448, 448)


def test_progress_outside_a_run_is_refused(base: tuple[Path, Any], tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "hpsv3++.pth")
    (tmp_path / "template.txt").write_text("{text_prompt} <|Reward|>")
    with pytest.raises(ValueError, match=r"progress 1.5: expected 0 \(before RL\) to 1"):
        load_scorer(
            "hps-v3++", str(tmp_path), base=str(base[0]), templates=(str(tmp_path / "template.txt"),), progress=1.5
        )
