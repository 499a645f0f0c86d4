"""Published judges of latents: key layouts and formulas against computations by hand, and their way into guidance."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch.nn.functional import linear, normalize
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from benchmarks.sdxl import UNET as SDXL
from diffusion_align.adapters import Adapter, Conditioning, load_adapter
from diffusion_align.guidance.dynamic import DynamicGuidance
from diffusion_align.guidance.judges.judge import check_latents, load_judge
from diffusion_align.guidance.judges.latent_clip import SCALING, build, load_latent_clip
from diffusion_align.guidance.judges.lrm import LatentRewardModel, load_lrm
from diffusion_align.guidance.judges.published_latents import PUBLISHED_LATENTS
from diffusion_align.process import log_snr
from diffusion_align.rewards.weights import load_exactly
from diffusion_align.sampling.control import SamplingOptions
from diffusion_align.sampling.sampler import sample
from tests import reward_checkpoints as rc

PROMPTS = ["a large red star on a dark background", "a green square", "two small blue rings"]
NOTHING = Conditioning(torch.zeros(3, 1, 1))


# -- Latent-CLIP -------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_towers(monkeypatch: pytest.MonkeyPatch) -> None:
    """One head of the published width, latents of 16 x 16 in patches of 4."""
    for name, value in {"VISION_WIDTH": 64, "TEXT_WIDTH": 64, "HEAD_WIDTH": 64, "SIZE": 16, "PATCH": 4}.items():
        monkeypatch.setattr(rc, name, value)


def with_sdxls_scale(folder: Path) -> Adapter:
    """The tiny model, whose latents are scaled as those that published judges know."""
    adapter = load_adapter(folder)
    adapter.vae.register_to_config(scaling_factor=SCALING)
    return adapter


def latent_clip_weights() -> rc.Weights:
    """Keys as after training with open_clip on several devices, the VAE's encoder among them."""
    weights = rc.clip_weights(0) | {"visual.conv1.weight": rc.noise(rc.VISION_WIDTH, 4, rc.PATCH, rc.PATCH)}
    published = {f"module.{key.replace('visual.', 'visual.latent_vit.')}": value for key, value in weights.items()}
    return published | {
        "module.visual.vae_encoder.conv_in.weight": rc.noise(8, 3, 3, 3),
        "module.visual.vae_quant_conv.bias": rc.noise(8),
    }


def save_latent_clip(folder: Path, weights: rc.Weights) -> Path:
    (folder / "checkpoints").mkdir(parents=True)
    content = {"epoch": 34, "name": "latent", "state_dict": weights, "best": np.float64(0.5), "count": np.int64(3)}
    torch.save(content, folder / "checkpoints" / "epoch_34.pt")
    return folder


def test_latent_clip_is_the_scaled_cosine_of_unscaled_clean_latents(small_towers: None, tmp_path: Path) -> None:
    published = latent_clip_weights()
    judge = load_latent_clip(save_latent_clip(tmp_path, published))
    weights = {key.removeprefix("module.").replace("latent_vit.", ""): value for key, value in published.items()}
    latents = torch.randn(3, 4, 16, 16)
    picture = rc.clip_image_embedding(weights, latents / SCALING)
    text = rc.clip_text_embedding(weights, open_clip.SimpleTokenizer(context_length=77)(PROMPTS))
    expected = weights["logit_scale"].exp() * (normalize(picture, dim=-1) * normalize(text, dim=-1)).sum(dim=-1)
    read = judge.read(NOTHING, PROMPTS)
    found = judge.judge(latents, torch.zeros(3), read, torch.ones(3))["alignment"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    larger = latents.repeat_interleave(2, 2).repeat_interleave(2, 3)  # averaged to what it was
    torch.testing.assert_close(
        judge.judge(larger, torch.zeros(3), read, torch.ones(3))["alignment"], found, rtol=1e-4, atol=1e-4
    )
    with pytest.raises(ValueError, match=r"Latent-CLIP reads SDXL latents of 4 channels and at least 16 x 16, found"):
        judge.check(torch.zeros(1, 4, 8, 8), NOTHING)


@pytest.mark.parametrize(("patch", "embed", "text", "heads"), [(8, 512, 512, 8), (4, 640, 640, 10)], ids=["b8", "b4+"])
def test_latent_clips_sizes_are_read_off_its_weights(patch: int, embed: int, text: int, heads: int) -> None:
    with torch.device("meta"):
        vision = {"image_size": 64, "patch_size": patch, "width": 768, "layers": 12}
        published = open_clip.CLIP(embed, vision, {"width": text, "heads": heads, "layers": 12})
        published.visual.conv1 = torch.nn.Conv2d(4, 768, patch, stride=patch, bias=False)
        weights = published.state_dict()
        clip, size = build(weights, "published")
    load_exactly(clip, weights, "published")
    assert size == 64
    assert clip.visual.transformer.resblocks[0].attn.num_heads == 12
    assert clip.transformer.resblocks[0].attn.num_heads == heads
    assert clip.context_length == 77


def test_a_checkpoint_of_another_layout_is_no_latent_clip(small_towers: None, tmp_path: Path) -> None:
    weights = latent_clip_weights()
    weights["module.visual.latent_vit.ln_spare.weight"] = weights.pop("module.visual.latent_vit.ln_pre.weight")
    with pytest.raises(ValueError, match=r"1 missing \(first: visual.ln_pre.weight\); 1 unexpected"):
        load_latent_clip(save_latent_clip(tmp_path / "one", weights))
    with pytest.raises(ValueError, match=r"is no Latent-CLIP: visual.latent_vit.conv1.weight is missing among 2 keys"):
        load_latent_clip(save_latent_clip(tmp_path / "two", {"a": torch.zeros(1), "b": torch.zeros(1)}))
    with pytest.raises(FileNotFoundError, match=r"expected checkpoints/epoch_34.pt of wendlerc/latent-clip"):
        load_judge(f"latent-clip:{tmp_path}")


# -- LRM ---------------------------------------------------------------------------------------------------------------


def small_unet(**more: Any) -> UNet2DConditionModel:
    torch.manual_seed(0)
    options = {
        **SDXL, "block_out_channels": (32, 64, 64), "transformer_layers_per_block": (1, 1, 2), "sample_size": 16,
        "attention_head_dim": (2, 4, 4), "cross_attention_dim": 32 + 48, "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 24 + 6 * 8, **more,
    }  # fmt: skip
    return UNet2DConditionModel(**options)


@pytest.fixture(scope="module")
def lrm_folder(tokenizer: CLIPTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lrm")
    small_unet().save_pretrained(folder / "unet")
    shared = {"vocab_size": len(tokenizer), "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
              "max_position_embeddings": 77, "eos_token_id": tokenizer.eos_token_id}  # fmt: skip
    CLIPTextModel(CLIPTextConfig(hidden_size=32, **shared)).save_pretrained(folder / "text_encoder")
    second = CLIPTextConfig(hidden_size=48, projection_dim=24, **shared)
    CLIPTextModelWithProjection(second).save_pretrained(folder / "text_encoder_2")
    for name in ("tokenizer", "tokenizer_2"):
        tokenizer.save_pretrained(folder / name)
    projection = torch.nn.Linear(32 + 64 + 64 + 64, 24, bias=False)
    torch.save({"visual_projection": projection.state_dict(), "logit_scale": 2.3}, folder / "state_dict.pt")
    return folder


@pytest.fixture(scope="module")
def sd_lrm_folder(tokenizer: CLIPTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lrm_sd")
    torch.manual_seed(0)
    UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 64, 64, 64), cross_attention_dim=32, attention_head_dim=4
    ).save_pretrained(folder / "unet")
    options = {"vocab_size": len(tokenizer), "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
               "max_position_embeddings": 77, "eos_token_id": tokenizer.eos_token_id}  # fmt: skip
    CLIPTextModel(CLIPTextConfig(hidden_size=32, **options)).save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    weights = {"visual_projection": {"weight": torch.randn(24, 32 + 64 * 4)}, "logit_scale": 2.3,
               "text_projection": {"weight": torch.randn(24, 32)}}  # fmt: skip
    torch.save(weights, folder / "state_dict.pt")
    return folder


def sd_prompt(folder: Path, ids: torch.Tensor, saved: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """SD 1.5's states and the text's embedding."""
    output = CLIPTextModel.from_pretrained(folder / "text_encoder")(ids)
    return output.last_hidden_state, linear(output.pooler_output, saved["text_projection"]["weight"])


def sdxl_prompt(folder: Path, ids: torch.Tensor, saved: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """SDXL's states and the text's embedding."""
    models = (
        CLIPTextModel.from_pretrained(folder / "text_encoder"),
        CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2"),
    )
    outputs = [model(ids, output_hidden_states=True) for model in models]
    return torch.cat([output.hidden_states[-2] for output in outputs], dim=-1), outputs[1].text_embeds


def lrm_by_hand(folder: Path, x: torch.Tensor, t: int, prompts: list[str], read: Any) -> torch.Tensor:
    """The published score, from a whole UNet whose stages are overheard."""
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    heard: list[torch.Tensor] = []
    for block in unet.down_blocks:
        last = block.attentions[-1] if hasattr(block, "attentions") else block.resnets[-1]
        last.register_forward_hook(lambda _module, _given, out: heard.append(out if torch.is_tensor(out) else out[0]))
    unet.mid_block.register_forward_hook(lambda _module, _given, out: heard.append(out))
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    saved = torch.load(folder / "state_dict.pt", weights_only=True)

    def pooled_states(texts: list[str]) -> tuple[list[torch.Tensor], torch.Tensor]:
        ids = tokenizer(
            texts, padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt"
        ).input_ids
        embeds, pooled = read(folder, ids, saved)
        heard.clear()
        sizes = torch.tensor([[128.0, 128, 0, 0, 128, 128]] * len(texts))
        unet(x, t, embeds, added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes})
        return [states.mean(dim=(2, 3)) for states in heard], pooled

    with torch.no_grad():
        states, text = pooled_states(prompts)
        nulls, _ = pooled_states([""] * len(prompts))
    states[-1] = nulls[-1] + 7.5 * (states[-1] - nulls[-1])
    picture = linear(torch.cat(states, dim=-1), saved["visual_projection"]["weight"])
    return float(np.exp(saved["logit_scale"])) * torch.cosine_similarity(picture, text, dim=-1)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "read"), [("lrm_folder", sdxl_prompt), ("sd_lrm_folder", sd_prompt)])
def test_lrm_is_the_scaled_cosine_of_guided_stages(name: str, read: Any, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    judge = load_lrm(folder)
    x = torch.randn(3, 4, 16, 16)
    table = DDPMScheduler(1000, 0.00085, 0.012, "scaled_linear").alphas_cumprod
    for t in (0, 400, 999):
        level = log_snr(table[t]).expand(3)
        assert judge.timesteps(level).tolist() == [t] * 3
        with torch.no_grad():
            found = judge.judge(x, level, judge.read(NOTHING, PROMPTS), torch.ones(len(x)))["preference"]
        torch.testing.assert_close(found, lrm_by_hand(folder, x, t, PROMPTS, read), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"LRM reads SD(XL)? latents of 4 channels, found"):
        judge.check(torch.zeros(1, 16, 8, 8), NOTHING)


@pytest.mark.slow
def test_lrm_refuses_the_other_models_latents(lrm_folder: Path, sd_lrm_folder: Path) -> None:
    judges = {"SDXL": load_lrm(lrm_folder), "SD": load_lrm(sd_lrm_folder)}
    for base, judge in judges.items():
        for found, space in PUBLISHED_LATENTS.items():
            refused = pytest.raises(ValueError, match=r"another autoencoder \(its scale is 0\.1.*: train an evaluator")
            with nullcontext() if found == base else refused:
                check_latents(judge, lambda space=space: space)  # type: ignore[misc]


def test_latent_clip_refuses_sds_latents(small_towers: None, tmp_path: Path) -> None:
    judge = load_latent_clip(save_latent_clip(tmp_path, latent_clip_weights()))
    check_latents(judge, lambda: PUBLISHED_LATENTS["SDXL"])
    with pytest.raises(ValueError, match=r"its scale is 0.13025, this model's 0.18215"):
        check_latents(judge, lambda: PUBLISHED_LATENTS["SD"])


def test_a_broken_lrm_of_sd_is_named(sd_lrm_folder: Path, tmp_path: Path) -> None:
    saved = torch.load(sd_lrm_folder / "state_dict.pt", weights_only=True)
    narrow = {"text_projection": {"weight": torch.zeros(24, 7)}}
    spoilt: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"text_projection": None}, FileNotFoundError, "has no text_projection; expected one of them"),
        (narrow, ValueError, "text_projection reads 7 features, text_encoder has 32"),
    ]
    for place, (change, error, message) in enumerate(spoilt):
        folder = Path(shutil.copytree(sd_lrm_folder, tmp_path / str(place)))
        kept = {name: value for name, value in (saved | change).items() if value is not None}
        torch.save(kept, folder / "state_dict.pt")
        with pytest.raises(error, match=message):
            load_lrm(folder)


def stage_widths(unet: dict[str, Any], embeds: int) -> list[int]:
    """Channels of the stages of a UNet without weights."""
    with torch.device("meta"):
        model = UNet2DConditionModel(**unet)
    judge = LatentRewardModel(model, torch.nn.Identity(), torch.nn.Linear(1, 1), 1.0)  # type: ignore[arg-type]
    with torch.device("meta"):
        latents, t = torch.empty(1, 4, 64, 64), torch.empty(1, dtype=torch.long)
        stages = judge.stages(latents, t, torch.empty(1, 77, embeds), torch.empty(1, 1280))
    return [states.shape[1] for states in stages]


@pytest.mark.slow
def test_the_stages_of_sd_have_4800_channels() -> None:
    widths = stage_widths({"cross_attention_dim": 768, "sample_size": 64}, 768)
    assert widths == [320, 640, 1280, 1280, 1280]
    assert sum(widths) == 4800


@pytest.mark.slow
def test_the_stages_of_sdxl_have_3520_channels() -> None:
    assert stage_widths(SDXL, 2048) == [320, 640, 1280, 1280]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (
            lambda folder: (folder / "state_dict.pt").unlink(),
            FileNotFoundError,
            "state_dict.pt: no such file",
        ),
        (
            lambda folder: torch.save({"logit_scale": 1.0}, folder / "state_dict.pt"),
            ValueError,
            "state_dict.pt: expected visual_projection.weight and logit_scale",
        ),
        (
            lambda folder: small_unet(in_channels=9).save_pretrained(folder / "unet", safe_serialization=True),
            None,
            "",
        ),
        (
            lambda folder: torch.save(
                {"visual_projection": {"weight": torch.zeros(24, 100)}, "logit_scale": 1.0}, folder / "state_dict.pt"
            ),
            ValueError,
            "visual_projection reads 100 features, the UNet's stages have 224",
        ),
        (
            lambda folder: CLIPTextModel(CLIPTextConfig(hidden_size=8, num_hidden_layers=1)).save_pretrained(
                folder / "text_encoder_2"
            ),
            ValueError,
            "text_encoder_2 does not fit CLIPTextModelWithProjection: 1 missing keys",
        ),
    ],
)
def test_a_broken_lrm_folder_is_named(
    spoil: Any, error: type[Exception] | None, message: str, lrm_folder: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(lrm_folder, tmp_path / "lrm"))
    spoil(folder)
    if error is None:
        with pytest.raises(ValueError, match="LRM reads SDXL latents of 9 channels"):
            load_lrm(folder).check(torch.zeros(1, 4, 8, 8), NOTHING)
        return
    with pytest.raises(error, match=message):
        load_judge(f"lrm:{folder}")


# -- in guidance -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_published_judge_chooses_scales(
    small_towers: None, lrm_folder: Path, sdxl_folder: Path, tmp_path: Path
) -> None:
    adapter = with_sdxls_scale(sdxl_folder)
    names = {"alignment": f"latent-clip:{save_latent_clip(tmp_path, latent_clip_weights())}",
             "preference": f"lrm:{lrm_folder}"}  # fmt: skip
    for kind, name in names.items():
        guider = DynamicGuidance(name, (kind,), candidates=(1.0, 3.0, 9.0))
        two = SamplingOptions(batch_size=2)
        drawn = sample(adapter, PROMPTS, num_inference_steps=3, guidance=guider, seeds=[1, 2, 3], options=two)
        assert drawn.nfe == 6
        for record in drawn.records:
            scores = np.array(record["scores"][kind])
            assert (scores.std(axis=1) > 0).all()
            assert record["scales"] == [(1.0, 3.0, 9.0)[k] for k in scores.argmax(axis=1)]


@pytest.mark.slow
def test_latent_clip_is_shown_predictions_of_clean_latents(
    small_towers: None, sdxl_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = load_latent_clip(save_latent_clip(tmp_path, latent_clip_weights()))
    shown: list[torch.Tensor] = []
    predicted: list[torch.Tensor] = []

    def watched(x: torch.Tensor, level: torch.Tensor, read: Any, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        shown.append(x)
        return {"alignment": torch.zeros(len(x))}

    monkeypatch.setattr(judge, "judge", watched)
    guider = DynamicGuidance("given", ("alignment",), candidates=(3.0,))
    guider.use(judge, [])
    sample(
        with_sdxls_scale(sdxl_folder), PROMPTS, num_inference_steps=3, guidance=guider, seeds=[1, 2, 3],
        options=SamplingOptions(callback=lambda moment: predicted.append(moment.x0)),
    )  # fmt: skip
    for one, two in zip(shown, predicted, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_published_judge_says_what_it_cannot_do(small_towers: None, sdxl_folder: Path, tmp_path: Path) -> None:
    adapter = with_sdxls_scale(sdxl_folder)
    name = f"latent-clip:{save_latent_clip(tmp_path, latent_clip_weights())}"
    with pytest.raises(ValueError, match="evaluator judges alignment, not preference"):
        sample(adapter, PROMPTS, num_inference_steps=2, guidance=DynamicGuidance(name), seeds=[1, 2, 3])
    guider = DynamicGuidance(name, ("alignment",), normalise="population")
    with pytest.raises(ValueError, match="has no statistics: set normalise to candidates"):
        sample(adapter, PROMPTS, num_inference_steps=2, guidance=guider, seeds=[1, 2, 3])
