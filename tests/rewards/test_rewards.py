"""Published scorers: key layout, preprocessing and formula against computations by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch.nn.functional import linear, normalize
from torchvision import transforms
from transformers import BlipTextConfig, BlipVisionConfig, CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from diffusion_align.rewards import RewardScorer, load_scorer
from diffusion_align.rewards.preprocess import CLIP_MEAN, CLIP_STD, Preprocess
from diffusion_align.rewards.published.image_reward import BlipBackbone, ImageReward, published_configs
from tests import reward_checkpoints as rc

PROMPTS = ["a red star", "two small blue rings on a dark background", "a cat"]


@pytest.fixture(scope="module")
def clip_name(tmp_path_factory: pytest.TempPathFactory) -> str:
    return rc.clip_folder(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def quick_clip_name(tmp_path_factory: pytest.TempPathFactory) -> str:
    return rc.clip_folder(tmp_path_factory.mktemp("quick"), quick_gelu=True)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(3, 3, 224, 224, generator=torch.Generator().manual_seed(0))


def normalised(pixels: torch.Tensor) -> torch.Tensor:
    return (pixels - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)


def token_ids() -> torch.Tensor:
    return open_clip.SimpleTokenizer(context_length=77)(PROMPTS)


# -- each against a computation by hand --------------------------------------------------------------------------------


def test_clip_is_the_raw_cosine(clip_name: str, images: torch.Tensor, tmp_path: Path) -> None:
    weights = rc.clip_weights(0)
    expected = (
        normalize(rc.clip_image_embedding(weights, normalised(images)), dim=-1)
        * normalize(rc.clip_text_embedding(weights, token_ids()), dim=-1)
    ).sum(dim=-1)
    torch.testing.assert_close(load_scorer("clip", model=clip_name).score(images, PROMPTS).reward, expected)


@pytest.mark.parametrize("name", ["hps-v2", "hps-v2.1"])
def test_hps_is_the_cosine_of_its_own_weights(name: str, clip_name: str, images: torch.Tensor, tmp_path: Path) -> None:
    weights = rc.clip_weights(1)
    torch.save({"state_dict": weights, "epoch": 3}, tmp_path / "hps.pt")
    expected = (
        normalize(rc.clip_image_embedding(weights, normalised(images)), dim=-1)
        * normalize(rc.clip_text_embedding(weights, token_ids()), dim=-1)
    ).sum(dim=-1)
    scorer = load_scorer(name, str(tmp_path / "hps.pt"), model=clip_name)
    torch.testing.assert_close(scorer.score(images, PROMPTS).reward, expected)


def test_aesthetic_v2_is_affine_on_the_unit_embedding(
    quick_clip_name: str, images: torch.Tensor, tmp_path: Path
) -> None:
    head = rc.affine_head_weights(rc.EMBED)
    torch.save(head, tmp_path / "head.pth")
    unit = normalize(rc.clip_image_embedding(rc.clip_weights(0), normalised(images), quick_gelu=True), dim=-1)
    scorer = load_scorer("aesthetic", str(tmp_path / "head.pth"), model=quick_clip_name, pretrained=None)
    torch.testing.assert_close(scorer.score(images, PROMPTS).reward, rc.affine_head(head, unit))


def test_aesthetic_v1_is_linear(quick_clip_name: str, images: torch.Tensor, tmp_path: Path) -> None:
    head = {"weight": rc.noise(1, rc.EMBED), "bias": rc.noise(1)}
    torch.save(head, tmp_path / "head.pth")
    unit = normalize(rc.clip_image_embedding(rc.clip_weights(0), normalised(images), quick_gelu=True), dim=-1)
    scorer = load_scorer("aesthetic-v1", str(tmp_path / "head.pth"), model=quick_clip_name, pretrained=None)
    expected = linear(unit, head["weight"], head["bias"])[:, 0]
    torch.testing.assert_close(scorer.score(images, PROMPTS).reward, expected)


@pytest.fixture(scope="module")
def pickscore_folder(tokenizer: CLIPTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pickscore")
    torch.manual_seed(5)
    text = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id}  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": 224, "patch_size": 28}  # fmt: skip
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_pickscore_is_the_scaled_cosine(pickscore_folder: Path, tokenizer: CLIPTokenizer, images: torch.Tensor) -> None:
    model = CLIPModel.from_pretrained(pickscore_folder)
    ids = tokenizer(PROMPTS, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        picture = model.visual_projection(model.vision_model(pixel_values=normalised(images)).pooler_output)
        text = model.text_projection(model.text_model(input_ids=ids).pooler_output)
    cosine = (normalize(picture, dim=-1) * normalize(text, dim=-1)).sum(dim=-1)
    scorer = load_scorer("pickscore", str(pickscore_folder))
    torch.testing.assert_close(scorer.score(images, PROMPTS).reward, model.logit_scale.exp().detach() * cosine)


def test_pickscore_understands_what_transformers_4_and_5_return(
    pickscore_folder: Path, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer: Any = load_scorer("pickscore", str(pickscore_folder))
    expected = scorer.score(images, PROMPTS).reward
    for method in ("get_image_features", "get_text_features"):
        current = getattr(scorer.model, method)

        def as_tensor(current: Any = current, **inputs: Any) -> torch.Tensor:
            output = current(**inputs)
            return output if isinstance(output, torch.Tensor) else output.pooler_output

        monkeypatch.setattr(scorer.model, method, as_tensor)
    torch.testing.assert_close(scorer.score(images, PROMPTS).reward, expected)


@pytest.fixture(scope="module")
def image_reward(tokenizer: CLIPTokenizer, tmp_path_factory: pytest.TempPathFactory) -> tuple[RewardScorer, rc.Weights]:
    folder = tmp_path_factory.mktemp("image_reward")
    tokenizer.save_pretrained(folder)
    weights = rc.image_reward_weights(len(tokenizer))
    torch.save(weights, folder / "ImageReward.pt")
    vision = BlipVisionConfig(hidden_size=rc.BLIP_VISION, intermediate_size=4 * rc.BLIP_VISION, image_size=rc.BLIP_SIZE,
                              num_hidden_layers=rc.BLIP_LAYERS, num_attention_heads=rc.BLIP_HEADS,
                              patch_size=rc.BLIP_PATCH, layer_norm_eps=1e-6)  # fmt: skip
    text = BlipTextConfig(hidden_size=rc.BLIP_TEXT, intermediate_size=4 * rc.BLIP_TEXT, vocab_size=len(tokenizer),
                          num_hidden_layers=rc.BLIP_LAYERS, num_attention_heads=rc.BLIP_HEADS,
                          encoder_hidden_size=rc.BLIP_VISION)  # fmt: skip
    scorer = load_scorer("image-reward", str(folder), tokenizer=str(folder), configs=(vision, text))
    return scorer, weights


def test_image_reward_is_the_published_computation(
    image_reward: tuple[RewardScorer, rc.Weights], tokenizer: CLIPTokenizer
) -> None:
    scorer, weights = image_reward
    pixels = torch.rand(3, 3, rc.BLIP_SIZE, rc.BLIP_SIZE)
    tokens = tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    expected = rc.image_reward_by_hand(weights, normalised(pixels), tokens.input_ids, tokens.attention_mask)
    torch.testing.assert_close(scorer.score(pixels, PROMPTS).reward, expected, rtol=1e-4, atol=1e-4)


def prefpaint_weights() -> rc.Weights:
    torch.manual_seed(7)
    width = 2 * rc.EMBED
    layer = torch.nn.TransformerEncoderLayer(width, 4, 1024, batch_first=True).state_dict()
    layer = {name: value + rc.noise(*value.shape, scale=0.02) for name, value in layer.items()}
    weights = {f"clip_model.{name}": value for name, value in rc.clip_weights(2).items()}
    weights |= {f"vit_block.encoder_layer.{name}": torch.zeros_like(value) for name, value in layer.items()}
    weights |= {f"vit_block.transformer_encoder.layers.0.{name}": value for name, value in layer.items()}
    weights |= {"mlp.layers.0.weight": rc.noise(512, width), "mlp.layers.0.bias": rc.noise(512),
                "mlp.layers.2.weight": rc.noise(256, 512), "mlp.layers.2.bias": rc.noise(256)}  # fmt: skip
    last = rc.noise(1, 256)
    return weights | {"mlp.last_layer.weight": last, "mlp.last_layer_weight": last}


def prefpaint_by_hand(weights: rc.Weights, inpainted: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
    clip = {k.removeprefix("clip_model."): v for k, v in weights.items() if k.startswith("clip_model.")}
    w = {k.removeprefix("vit_block.transformer_encoder.layers.0."): v for k, v in weights.items()}
    x = torch.cat([rc.clip_image_embedding(clip, normalised(p), quick_gelu=True) for p in (inpainted, masked)], dim=-1)
    value = linear(x, w["self_attn.in_proj_weight"], w["self_attn.in_proj_bias"]).chunk(3, dim=-1)[2]
    attended = linear(
        value, w["self_attn.out_proj.weight"], w["self_attn.out_proj.bias"]
    )  # softmax over one token is 1
    x = torch.nn.functional.layer_norm(x + attended, x.shape[-1:], w["norm1.weight"], w["norm1.bias"])
    inner = linear(linear(x, w["linear1.weight"], w["linear1.bias"]).relu(), w["linear2.weight"], w["linear2.bias"])
    x = torch.nn.functional.layer_norm(x + inner, x.shape[-1:], w["norm2.weight"], w["norm2.bias"])
    for place in (0, 2):
        x = linear(x, weights[f"mlp.layers.{place}.weight"], weights[f"mlp.layers.{place}.bias"])
    return (linear(x, weights["mlp.last_layer.weight"])[:, 0] - 0.4064) / 2.3021


@pytest.mark.slow
def test_prefpaint_sees_the_inpainted_and_the_masked_picture(
    quick_clip_name: str, images: torch.Tensor, tmp_path: Path
) -> None:
    weights = prefpaint_weights()
    torch.save({f"module.{name}": value for name, value in weights.items()}, tmp_path / "reward.pt")
    sources, masks = torch.rand(3, 3, 224, 224), (torch.rand(3, 1, 224, 224) > 0.5).float()
    scorer = load_scorer("prefpaint", str(tmp_path / "reward.pt"), model=quick_clip_name, heads=4)
    reward = scorer.score(images, PROMPTS, source_images=sources, masks=masks).reward
    torch.testing.assert_close(reward, prefpaint_by_hand(weights, images, sources * (1 - masks)), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_directional_similarity(quick_clip_name: str, images: torch.Tensor) -> None:
    weights, sources = rc.clip_weights(0), torch.rand(3, 3, 224, 224)
    before = open_clip.SimpleTokenizer(context_length=77)(["a blue star", "a ring", "a dog"])

    def unit(x: torch.Tensor) -> torch.Tensor:
        return normalize(x, dim=-1)

    change = unit(rc.clip_image_embedding(weights, normalised(images), True)) - unit(
        rc.clip_image_embedding(weights, normalised(sources), True)
    )
    wanted = unit(rc.clip_text_embedding(weights, token_ids(), True)) - unit(
        rc.clip_text_embedding(weights, before, True)
    )
    expected = (unit(change) * unit(wanted)).sum(dim=-1)
    scorer = load_scorer("clip-directional", model=quick_clip_name)
    texts = ["a blue star", "a ring", "a dog"]
    reward = scorer.score(images, PROMPTS, source_images=sources, source_prompts=texts).reward
    torch.testing.assert_close(reward, expected, rtol=1e-4, atol=1e-5)
    same = scorer.score(images, PROMPTS, source_images=images, source_prompts=texts)
    assert same.reward.tolist() == [0, 0, 0]  # no change has no direction
    torch.testing.assert_close(same.aspects["image_similarity"], torch.ones(3))


# -- what holds for all ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scorers(
    clip_name: str, pickscore_folder: Path, image_reward: tuple[RewardScorer, rc.Weights]
) -> dict[str, RewardScorer]:
    return {
        "clip": load_scorer("clip", model=clip_name),
        "pickscore": load_scorer("pickscore", str(pickscore_folder)),
        "image-reward": image_reward[0],
    }


@pytest.mark.parametrize("name", ["clip", "pickscore", "image-reward"])
def test_one_picture_is_a_batch_of_one(name: str, scorers: dict[str, RewardScorer], images: torch.Tensor) -> None:
    together = scorers[name].score(images, PROMPTS).reward
    alone = scorers[name].score(images[1:2], PROMPTS[1:2]).reward
    assert alone.shape == (1,)
    assert alone.dtype == torch.float32
    torch.testing.assert_close(alone, together[1:2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["clip", "pickscore", "image-reward"])
@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_reach_the_pixels(
    name: str, recompute: bool, scorers: dict[str, RewardScorer], images: torch.Tensor
) -> None:
    scorer = scorers[name]
    pixels = (0.1 + 0.8 * images[:1, :, 50:170, 40:200].double()).requires_grad_()  # resized on the way
    scorer.gradient_checkpointing = recompute
    reward = scorer.score(pixels, PROMPTS[:1]).reward
    (gradient,) = torch.autograd.grad(reward.sum(), pixels)
    scorer.gradient_checkpointing = False
    step = 0.01 * gradient / gradient.abs().max()
    with torch.no_grad():
        ahead, behind = (scorer.score(pixels + sign * step, PROMPTS[:1]).reward for sign in (1, -1))
    assert float(2 * (gradient * step).sum()) == pytest.approx(float(ahead - behind), rel=0.1)
    assert all(parameter.grad is None for parameter in scorer.parameters())


@pytest.mark.parametrize("name", ["clip", "pickscore", "image-reward"])
def test_pictures_of_any_sizes_score_as_the_pil_pipeline_has_them(name: str, scorers: dict[str, RewardScorer]) -> None:
    scorer: Any = scorers[name]
    rng = np.random.default_rng(0)
    coarse = [rng.integers(0, 256, (6, 9, 3)), rng.integers(0, 256, (11, 7, 3)), rng.integers(0, 256, (8, 8, 3))]
    pictures = [
        Image.fromarray(pixels.astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
        for pixels, size in zip(coarse, [(360, 240), (280, 470), (512, 512)], strict=True)
    ]
    size = scorer.preprocessing.size
    pil = transforms.Compose([
        transforms.Resize(size, interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(size),
        transforms.ToTensor(),
        transforms.Normalize(CLIP_MEAN, CLIP_STD),
    ])  # fmt: skip
    with torch.no_grad():
        expected = scorer.evaluate(torch.stack([pil(picture) for picture in pictures]), PROMPTS, {}).reward
    found = scorer.score(pictures, PROMPTS).reward
    spread = float(scorer.score(torch.rand(8, 3, 64, 64), [PROMPTS[0]] * 8).reward.std() + expected.std())
    assert float((found - expected).abs().max()) < 1e-2 * spread + 1e-4


def test_hps_pads_like_its_own_pipeline() -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 45, 3), dtype=np.uint8)).resize((300, 200))
    scaled = picture.resize((224, 149), Image.Resampling.BICUBIC)
    canvas = Image.new("RGB", (224, 224))
    canvas.paste(scaled, (0, (224 - 149) // 2))
    expected = transforms.Normalize(CLIP_MEAN, CLIP_STD)(transforms.ToTensor()(canvas))
    found = Preprocess(224, "pad")(transforms.ToTensor()(picture)[None])[0]
    assert float((found - expected).abs().mean()) < 5e-3
    assert float((found - expected).abs().max()) < 0.06


@pytest.mark.slow
def test_hps_resizes_without_a_filter_for_old_scores(clip_name: str, tmp_path: Path) -> None:
    """torchvision before 0.17 resized tensors with torch's interpolation, which looks at 4 x 4 pixels."""
    torch.save({"state_dict": rc.clip_weights(1)}, tmp_path / "hps.pt")
    scorer = load_scorer("hps-v2", str(tmp_path / "hps.pt"), model=clip_name, antialias=False)
    picture = torch.rand(1, 3, 96, 144)
    side = scorer.preprocess(picture).shape[-1]
    height = round(side * 96 / 144)
    small = torch.nn.functional.interpolate(picture, (height, side), mode="bicubic").clamp(0, 1)
    above = (side - height) // 2
    padded = torch.nn.functional.pad(small, (0, 0, above, side - height - above))
    expected = transforms.Normalize(CLIP_MEAN, CLIP_STD)(padded)
    torch.testing.assert_close(scorer.preprocess(picture), expected)
    smooth = load_scorer("hps-v2", str(tmp_path / "hps.pt"), model=clip_name)
    assert (smooth.preprocess(picture) - expected).abs().mean() > 0.02


def test_crop_is_that_of_the_clip_processor() -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 45, 3), dtype=np.uint8)).resize((300, 200))
    expected = CLIPImageProcessor(resample=Image.Resampling.BICUBIC)(picture, return_tensors="pt").pixel_values[0]
    found = Preprocess(224)(transforms.ToTensor()(picture)[None])[0]
    assert float((found - expected).abs().mean()) < 5e-3


def test_heads_stay_in_float32_under_autocast(
    image_reward: tuple[RewardScorer, rc.Weights], images: torch.Tensor
) -> None:
    scorer = image_reward[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        reward = scorer.score(images, PROMPTS).reward
    assert reward.dtype == torch.float32
    exact = scorer.score(images, PROMPTS).reward
    assert float((reward - exact).abs().max()) < 0.1 * float(exact.abs().max())
    assert len(set((reward * 2**8 % 1).tolist())) > 1  # more digits than bfloat16 has


# -- full size, without weights ----------------------------------------------------------------------------------------


def test_full_sizes_without_weights() -> None:
    with torch.device("meta"):
        large = open_clip.create_model("ViT-H-14", pretrained=None, device="meta")
        quick = open_clip.create_model("ViT-L-14-quickgelu", pretrained=None, device="meta")
        blip = BlipBackbone(*published_configs())
    count = {name: sum(p.numel() for p in m.parameters()) for name, m in (("H", large), ("L", quick), ("blip", blip))}
    assert count["H"] == 986_109_441
    assert count["L"] == 427_616_513
    # BLIP's ViT-L/16 at 224 pixels; 12 BERT layers whose cross-attention reads 1,024-wide tokens; 30,524 tokens.
    assert sum(p.numel() for p in blip.vision.parameters()) == 303_301_632
    assert blip.text.embeddings.word_embeddings.weight.shape == (30524, 768)
    assert blip.text.encoder.layer[11].crossattention.self.key.weight.shape == (768, 1024)
    assert ImageReward.statistics == (0.0, 1.0)
