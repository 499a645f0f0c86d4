"""Tiny vision-language models of two architectures as folders, and what they say of one picture, computed alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

#: What a tokenizer of one token a byte must know, to have "Yes" and "No" as tokens.
MERGES = [("Y", "e"), ("Ye", "s"), ("N", "o")]


def byte_tokenizer(special: list[str], merges: list[tuple[str, str]] | None = None) -> PreTrainedTokenizerFast:
    """One token a byte, and those of ``merges``; the first special token pads, the last ends."""
    merges = MERGES if merges is None else merges
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=special[0], eos_token=special[-1])


def chat(image: str) -> str:
    """A chat template in which a picture is ``image``."""
    return (
        "{% for m in messages %}<user>{% for c in m['content'] %}{% if c['type'] == 'image' %}"
        + image
        + "{% else %}{{ c['text'] }}{% endif %}{% endfor %}<end>{% endfor %}"
        "{% if add_generation_prompt %}<bot>{% endif %}"
    )


def lively(kind: Any, config: Any) -> Any:
    """A model with weights so large that answers depend on pictures and texts."""
    torch.manual_seed(0)
    model = kind(config)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


class Llava:
    """CLIP's tower, a projector, and Llama."""

    @staticmethod
    def save(folder: Path, **tokens: Any) -> Any:
        tokenizer = byte_tokenizer(["<pad>", "<image>", "<user>", "<bot>", "<end>"], **tokens)
        vision = CLIPVisionConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28,
            patch_size=14, projection_dim=16,
        )  # fmt: skip
        text = LlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=len(tokenizer),
        )  # fmt: skip
        image = tokenizer.convert_tokens_to_ids("<image>")
        model = lively(
            LlavaForConditionalGeneration,
            LlavaConfig(vision_config=vision, text_config=text, image_token_index=image),
        )
        pictures = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
        processor = LlavaProcessor(
            pictures, tokenizer, patch_size=14, vision_feature_select_strategy="default", chat_template=chat("<image>"),
            num_additional_image_tokens=1,
        )  # fmt: skip
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        return model

    @staticmethod
    def logits(folder: Path, model: Any, picture: Tensor, question: str) -> Tensor:
        """Of the answer's first token, (V,)."""
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        pixels = CLIPImageProcessor.from_pretrained(folder)(to_pil_image(picture), return_tensors="pt").pixel_values
        ids = tokenizer(f"<user>{'<image>' * 4}{question}<end><bot>", return_tensors="pt").input_ids
        inner = model.model
        seen = inner.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        embeds = inner.language_model.embed_tokens(ids)
        embeds[ids == tokenizer.convert_tokens_to_ids("<image>")] = inner.multi_modal_projector(seen)[0]
        state = inner.language_model(inputs_embeds=embeds).last_hidden_state[0, -1]
        return model.lm_head(state)


class Qwen:
    """Qwen2.5-VL: a window-attention tower, and positions with a row and a column."""

    @staticmethod
    def save(folder: Path, **tokens: Any) -> Any:
        special = ["<pad>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<user>", "<bot>",
                   "<end>"]  # fmt: skip
        tokenizer = byte_tokenizer(special, **tokens)
        ids = {token: tokenizer.convert_tokens_to_ids(token) for token in special}
        vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32,
                  "fullatt_block_indexes": [0], "window_size": 112}  # fmt: skip
        text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                "num_key_value_heads": 2, "vocab_size": len(tokenizer),
                "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}  # fmt: skip
        config = Qwen2_5_VLConfig(
            text_config=text, vision_config=vision, image_token_id=ids["<|image_pad|>"],
            video_token_id=ids["<|video_pad|>"], vision_start_token_id=ids["<|vision_start|>"],
            vision_end_token_id=ids["<|vision_end|>"],
        )  # fmt: skip
        model = lively(Qwen2_5_VLForConditionalGeneration, config)
        pictures = Qwen2VLImageProcessor(min_pixels=56 * 56, max_pixels=84 * 84)
        template = chat("<|vision_start|><|image_pad|><|vision_end|>")
        processor = Qwen2_5_VLProcessor(pictures, tokenizer, Qwen2VLVideoProcessor(), chat_template=template)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        return model

    @staticmethod
    def logits(folder: Path, model: Any, picture: Tensor, question: str) -> Tensor:
        """Of the answer's first token, (V,)."""
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        seen = Qwen2VLImageProcessor.from_pretrained(folder)(to_pil_image(picture), return_tensors="pt")
        _, rows, columns = (int(n) for n in seen["image_grid_thw"][0])
        rows, columns = rows // 2, columns // 2
        text = f"<user><|vision_start|>{'<|image_pad|>' * (rows * columns)}<|vision_end|>{question}<end><bot>"
        ids = tokenizer(text, return_tensors="pt").input_ids
        image = ids[0] == tokenizer.convert_tokens_to_ids("<|image_pad|>")
        first = int(image.nonzero()[0])
        positions = torch.arange(ids.shape[1]).expand(3, -1).clone()  # time, row, column
        grid = torch.stack([torch.zeros(rows, columns), *torch.meshgrid(
            torch.arange(rows), torch.arange(columns), indexing="ij")]).long()  # fmt: skip
        positions[:, image] = first + grid.flatten(1)
        after = first + rows * columns
        positions[:, after:] = first + max(rows, columns) + torch.arange(ids.shape[1] - after)
        inner = model.model
        embeds = inner.language_model.embed_tokens(ids)
        found = inner.visual(seen["pixel_values"], grid_thw=seen["image_grid_thw"])
        embeds[0, image] = found if isinstance(found, Tensor) else found.pooler_output
        state = inner.language_model(inputs_embeds=embeds, position_ids=positions[:, None]).last_hidden_state[0, -1]
        return model.lm_head(state)
