"""HPSv3 and EditReward on tiny Qwen-VL models in the published key layout."""

from __future__ import annotations

from math import exp, sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torchvision.transforms.v2.functional import to_pil_image
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLModel,
    Qwen2VLConfig,
    Qwen2VLImageProcessor,
    Qwen2VLModel,
)

from diffusion_align.rewards import load_scorer
from tests.rewards.qwen_models import SPECIAL, head_by_hand, published, random_head

TEXT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
}  # fmt: skip
PROMPTS = ["a red star", "two small blue rings on a dark background"]


def base_folder(folder: Path, newer: bool) -> tuple[Path, Any]:
    """Config, byte tokenizer and image processor of a tiny base model, and its random backbone (one token more)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|endoftext|>", eos_token="<|im_end|>")
    fast.save_pretrained(folder)
    Qwen2VLImageProcessor(patch_size=14, merge_size=2, temporal_patch_size=2).save_pretrained(folder)
    ids = {token: fast.convert_tokens_to_ids(token) for token in SPECIAL}
    tokens = {"image_token_id": ids["<|image_pad|>"], "video_token_id": ids["<|video_pad|>"],
              "vision_start_token_id": ids["<|vision_start|>"],
              "vision_end_token_id": ids["<|vision_end|>"]}  # fmt: skip
    text = TEXT | {"vocab_size": len(fast), "bos_token_id": 0, "eos_token_id": 0}
    if newer:
        vision: dict[str, Any] = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2,
                                  "out_hidden_size": 32, "fullatt_block_indexes": [0], "window_size": 112}  # fmt: skip
        config: Any = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens)
    else:
        vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
        config = Qwen2VLConfig(text_config=text, vision_config=vision, **tokens)
    config.save_pretrained(folder)
    config.text_config.vocab_size += 1
    torch.manual_seed(0)
    backbone = (Qwen2_5_VLModel if newer else Qwen2VLModel)(config).eval()
    for parameter in backbone.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return folder, backbone


def state_by_hand(folder: Path, backbone: Any, pictures: list[torch.Tensor], text: str) -> torch.Tensor:
    """The state at the reward token of one example alone, (1, D)."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|Reward|>"]})
    processor = Qwen2VLImageProcessor.from_pretrained(folder)
    seen = processor(
        images=[to_pil_image(p) for p in pictures], min_pixels=200704, max_pixels=200704, return_tensors="pt"
    )
    message = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    for grid in seen["image_grid_thw"]:
        message += "<|vision_start|>" + "<|image_pad|>" * (int(grid.prod()) // 4) + "<|vision_end|>"
    message += text + "<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(message, return_tensors="pt").input_ids
    with torch.no_grad():
        embeds = backbone.language_model.embed_tokens(ids)
        picture = backbone.visual(seen["pixel_values"], grid_thw=seen["image_grid_thw"])
        picture = picture if isinstance(picture, torch.Tensor) else picture.pooler_output
        image_token = tokenizer.convert_tokens_to_ids("<|image_pad|>")
        embeds[ids == image_token] = picture
        positions = torch.arange(ids.shape[1]).view(1, 1, -1).expand(3, 1, -1)  # tokens are counted, pictures' too
        hidden = backbone.language_model(inputs_embeds=embeds, position_ids=positions).last_hidden_state
    return hidden[ids == tokenizer.convert_tokens_to_ids("<|Reward|>")]


def test_hps_v3_reads_its_head_at_the_reward_token(tmp_path: Path) -> None:
    base, backbone = base_folder(tmp_path / "base", newer=False)
    head = random_head(1)
    (tmp_path / "weights").mkdir()
    save_file(published(backbone, {"rm_head": head}), tmp_path / "weights" / "HPSv3.safetensors")
    (tmp_path / "template.txt").write_text("Rate it.\nText: {text_prompt}\nRating: <|Reward|>\nEND\n")
    scorer = load_scorer(
        "hps-v3", str(tmp_path / "weights"), base=str(base), templates=(str(tmp_path / "template.txt"),)
    )
    images = torch.rand(2, 3, 60, 90, generator=torch.Generator().manual_seed(2))
    output = scorer.score(images, PROMPTS)
    for i, prompt in enumerate(PROMPTS):
        state = state_by_hand(base, backbone, [images[i]], f"Rate it.\nText: {prompt}\nRating: <|Reward|>\nEND\n")
        mean, log_std = head_by_hand(head, state)[0]
        assert float(output.reward[i]) == pytest.approx(float(mean), abs=1e-4)
        assert output.std is not None
        assert float(output.std[i]) == pytest.approx(float(log_std.exp()), rel=1e-3)


FUSED = {
    "mean": lambda head: (sum(m for m, _ in head) / 2, exp(sum(s for _, s in head) / 2)),
    "min": lambda head: (min(m for m, _ in head), exp(min(s for _, s in head))),
    "sum": lambda head: (sum(m for m, _ in head), sqrt(sum(exp(s) ** 2 for _, s in head))),
}


@pytest.mark.slow
@pytest.mark.parametrize("fusion", FUSED)
def test_edit_reward_reads_two_heads_in_two_passes(fusion: str, tmp_path: Path) -> None:
    folder, backbone = base_folder(tmp_path / "edit", newer=True)
    heads = {"rm_heads.head_0": random_head(1), "rm_heads.head_1": random_head(2)}
    save_file(published(backbone, heads), folder / "model.safetensors")
    templates = []
    for name in ("following", "quality"):
        (tmp_path / f"{name}.txt").write_text(f"Judge the {name}: {{text_prompt}} <|Reward|>")
        templates.append(str(tmp_path / f"{name}.txt"))
    scorer = load_scorer("edit-reward", str(folder), templates=templates, fusion=fusion)
    images, sources = torch.rand(2, 3, 64, 64), torch.rand(2, 3, 48, 80)
    texts = ["make it red", "remove the large star"]
    output = scorer.score(images, ["", ""], source_images=sources, instructions=texts)
    for i, text in enumerate(texts):
        found = []
        for name, head in zip(("following", "quality"), heads.values(), strict=True):
            state = state_by_hand(folder, backbone, [sources[i], images[i]], f"Judge the {name}: {text} <|Reward|>")
            found.append(head_by_hand(head, state)[0].tolist())
        reward, std = FUSED[fusion](found)
        assert output.aspects["instruction_following"][i].item() == pytest.approx(found[0][0], abs=1e-4)
        assert output.aspects["visual_quality"][i].item() == pytest.approx(found[1][0], abs=1e-4)
        assert output.reward[i].item() == pytest.approx(reward, abs=1e-4)
        assert output.std is not None
        assert output.std[i].item() == pytest.approx(std, rel=1e-3)


def test_templates_are_asked_for_and_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"edit-reward needs templates, 2 text file\(s\) .*; found 0"):
        load_scorer("edit-reward", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"no .safetensors files: download MizzenAI/HPSv3"):
        load_scorer("hps-v3", str(tmp_path), templates=("a.txt",))
