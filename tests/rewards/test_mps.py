"""MPS on a small checkpoint of the published layout, beside a straight-line computation."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import layer_norm, silu
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from diffusion_align.rewards import load_scorer
from diffusion_align.rewards.preprocess import Preprocess
from diffusion_align.rewards.published.mps import MPSScorer, published_config

WIDTH, HEADS, LAYERS = 32, 2, 2
PROMPTS = ["a red star", "two small blue rings on a dark background"]
CONDITION = "blue rings"


def config(tokenizer: CLIPTokenizer) -> CLIPConfig:
    sizes: dict[str, Any] = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2,
                             "num_attention_heads": 2, "projection_dim": WIDTH}  # fmt: skip
    return CLIPConfig(
        vision_config=sizes | {"image_size": 28, "patch_size": 14},
        text_config=sizes | {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id},
        projection_dim=WIDTH,
    )


@pytest.fixture(scope="module")
def weights(tokenizer: CLIPTokenizer) -> dict[str, Tensor]:
    """MPS's keys, small; also those of buffers that older versions of transformers saved."""
    torch.manual_seed(0)
    clip = CLIPModel(config(tokenizer))
    found = {f"model.{name}": value + 0.1 * torch.randn_like(value) if value.is_floating_point() else value
             for name, value in clip.state_dict().items()}  # fmt: skip
    inner = 64 * HEADS
    for i in range(LAYERS):
        crossed, alone = f"cross_model.layers.{i}.0.fn.", f"cross_model.layers.{i}.1.fn."
        shapes = {
            crossed + "to_q": (inner, WIDTH), crossed + "to_kv": (128, WIDTH), crossed + "to_out": (WIDTH, inner),
            crossed + "ff.0": (8 * WIDTH, WIDTH), crossed + "ff.2": (WIDTH, 4 * WIDTH),
            alone + "fused_attn_ff_proj": (inner + 128 + 8 * WIDTH, WIDTH), alone + "attn_out": (WIDTH, inner),
            alone + "ff_out.1": (WIDTH, 4 * WIDTH),
        }  # fmt: skip
        found |= {f"{name}.weight": torch.randn(shape) / shape[1] ** 0.5 for name, shape in shapes.items()}
        for part in (crossed, alone):
            found[part + "norm.weight"] = 1 + 0.2 * torch.randn(WIDTH)
            found[part + "norm.bias"] = torch.zeros(WIDTH)
        found[alone + "rotary_emb.inv_freq"] = torch.ones(32)
    found["model.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    return found


def by_hand(weights: dict[str, Tensor], tokenizer: Any, pixels: Tensor, prompt: str, threshold: float) -> Tensor:
    """The published score of one normalised picture (1, 3, 28, 28) and one prompt."""
    clip = CLIPModel(config(tokenizer)).eval()
    own = {k.removeprefix("model."): v for k, v in weights.items() if k.startswith("model.")}
    clip.load_state_dict({k: v for k, v in own.items() if not k.endswith("position_ids")})

    def read(text: str) -> tuple[Tensor, Tensor]:
        ids = tokenizer(text, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
        output = clip.text_model(ids)
        return clip.text_projection(output.last_hidden_state), clip.text_projection(output.pooler_output)

    (words, text), (condition, _) = read(prompt), read(CONDITION)
    x = clip.visual_projection(clip.vision_model(pixels).last_hidden_state)
    near = torch.einsum("bid,bjd->bji", words, condition).max(dim=1, keepdim=True)[0]
    mask = torch.where(near / near.max() > threshold, 0, float("-inf"))
    assert 0 < int((mask == 0).sum()) < 77
    for i in range(LAYERS):
        w = {
            k.removeprefix(f"cross_model.layers.{i}."): v for k, v in weights.items() if f"cross_model.layers.{i}." in k
        }
        y = layer_norm(x, (WIDTH,), w["0.fn.norm.weight"], w["0.fn.norm.bias"])
        q = (y @ w["0.fn.to_q.weight"].T).unflatten(-1, (HEADS, 64)) * 64**-0.5
        k, v = (words @ w["0.fn.to_kv.weight"].T).chunk(2, dim=-1)
        chances = (torch.einsum("bnhd,bjd->bhnj", q, k) + mask[:, None]).softmax(dim=-1)
        found = torch.einsum("bhnj,bjd->bnhd", chances, v).flatten(2) @ w["0.fn.to_out.weight"].T
        value, gate = (y @ w["0.fn.ff.0.weight"].T).chunk(2, dim=-1)
        x = x + found + (silu(gate) * value) @ w["0.fn.ff.2.weight"].T
        y = layer_norm(x, (WIDTH,), w["1.fn.norm.weight"], w["1.fn.norm.bias"])
        q, k, v, inner = (y @ w["1.fn.fused_attn_ff_proj.weight"].T).split([64 * HEADS, 64, 64, 8 * WIDTH], dim=-1)
        frequencies = torch.tensor([10000 ** (-2 * j / 64) for j in range(32)])
        angles = torch.outer(torch.arange(x.shape[1]).float(), frequencies)
        q = torch.stack([turned(part, angles) for part in q.unflatten(-1, (HEADS, 64)).unbind(dim=2)], dim=2)
        chances = (torch.einsum("bnhd,bjd->bhnj", q, turned(k, angles)) / 8).softmax(dim=-1)
        found = torch.einsum("bhnj,bjd->bnhd", chances, v).flatten(2) @ w["1.fn.attn_out.weight"].T
        value, gate = inner.chunk(2, dim=-1)
        x = x + found + (silu(gate) * value) @ w["1.fn.ff_out.1.weight"].T
    picture = x[0, 0]
    return weights["model.logit_scale"].exp() * picture @ text[0] / (picture.norm() * text.norm())


def turned(x: Tensor, angles: Tensor) -> Tensor:
    """Each pair (x_j, x_{j+32}) as a complex number, times e^(i angle)."""
    numbers = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([numbers.real, numbers.imag], dim=-1)


@pytest.mark.parametrize("threshold", [0.7, 0.8])
@torch.no_grad()
def test_mps_is_the_published_computation(
    threshold: float, weights: dict[str, Tensor], tokenizer: CLIPTokenizer, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path)
    save_file(weights, tmp_path / "mps.safetensors")
    scorer = load_scorer(
        "mps", str(tmp_path / "mps.safetensors"), tokenizer=str(tmp_path), config=config(tokenizer), heads=HEADS,
        condition=CONDITION, threshold=threshold,
    )  # fmt: skip
    images = torch.rand(2, 3, 40, 28, generator=torch.Generator().manual_seed(1))
    rewards = scorer.score(images, PROMPTS).reward
    pixels = Preprocess(28)(images)
    for i, prompt in enumerate(PROMPTS):
        expected = by_hand(weights, tokenizer, pixels[i : i + 1], prompt, threshold)
        assert float(rewards[i]) == pytest.approx(float(expected), abs=1e-4)


def test_a_pickled_module_is_read_without_running_it(
    weights: dict[str, Tensor], tokenizer: CLIPTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer.save_pretrained(tmp_path)
    theirs = ModuleType("trainer.models.clip_model")
    theirs.CLIPModel = type("CLIPModel", (nn.Module,), {"__module__": theirs.__name__})  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        for name in ("trainer", "trainer.models", theirs.__name__):
            patch.setitem(sys.modules, name, theirs if name == theirs.__name__ else ModuleType(name))
        whole = theirs.CLIPModel()
        whole.model = CLIPModel(config(tokenizer))
        whole.cross_model = MPSScorer(whole.model, tokenizer, HEADS, LAYERS).cross_model
        whole.load_state_dict({k: v for k, v in weights.items() if not k.endswith(("position_ids", "inv_freq"))})
        torch.save(whole, tmp_path / "MPS_overall_checkpoint.pth")
    assert theirs.__name__ not in sys.modules
    options: dict[str, Any] = {"tokenizer": str(tmp_path), "config": config(tokenizer), "heads": HEADS}
    scorer = load_scorer("mps", str(tmp_path / "MPS_overall_checkpoint.pth"), **options)
    for name, value in scorer.state_dict().items():
        assert torch.equal(value, weights[name]), name
    (tmp_path / "other.pth").write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match=r"other.pth cannot be read"):
        load_scorer("mps", str(tmp_path / "other.pth"), **options)


def test_the_published_size_and_where_it_is() -> None:
    with torch.device("meta"):
        scorer = MPSScorer(CLIPModel(published_config()), None)
    assert sum(p.numel() for p in scorer.model.parameters()) == 986_109_441
    with pytest.raises(
        FileNotFoundError, match=r"github.com/Kwai-Kolors/MPS only: download MPS_overall_checkpoint.pth"
    ):
        load_scorer("mps")
