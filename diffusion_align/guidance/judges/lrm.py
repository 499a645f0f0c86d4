"""LRM (2502.01051), the latent reward model of LPO: SD 1.5's or SDXL's own encoder half judges noisy latents."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import normalize

from diffusion_align.adapters import Conditioning
from diffusion_align.adapters.autoencoder import LatentSpace
from diffusion_align.process import log_snr as level_of
from diffusion_align.process.path import scaled_linear
from diffusion_align.rewards.weights import load_exactly

from .published_latents import INSTEAD, PUBLISHED_LATENTS

#: Whose tokenizers are used where the folder has none.
BASES = {"SD": "stable-diffusion-v1-5/stable-diffusion-v1-5", "SDXL": "stabilityai/stable-diffusion-xl-base-1.0"}
UNET = "diffusion_pytorch_model.safetensors"


class Encoder(nn.Module):
    """A text encoder and its tokenizer."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer

    def forward(self, prompts: Sequence[str]) -> Any:
        """transformers' output of the prompts, with the states of all layers."""
        ids = self.tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=self.tokenizer.model_max_length,
            return_tensors="pt",
        ).input_ids.to(self.model.device)
        return self.model(ids, output_hidden_states=True)


class SDPrompts(nn.Module):
    """What SD 1.5's LRM reads: the last states, and the projected state of the end token."""

    base = "SD"

    def __init__(self, encoder: Encoder, projection: nn.Linear) -> None:
        super().__init__()
        self.encoder, self.projection = encoder, projection

    def forward(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(B, L, D), and the text's embedding (B, P)."""
        output = self.encoder(prompts)
        return output.last_hidden_state, self.projection(output.pooler_output)


class SDXLPrompts(nn.Module):
    """What SDXL's LRM reads: the last but one states of both encoders, and the second one's embedding."""

    base = "SDXL"

    def __init__(self, first: Encoder, second: Encoder) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(B, L, D), and the text's embedding (B, P)."""
        outputs = self.first(prompts), self.second(prompts)
        return torch.cat([output.hidden_states[-2] for output in outputs], dim=-1), outputs[1].text_embeds


class LatentRewardModel(nn.Module):
    """exp(logit_scale) cos of a noisy latent's and a prompt's embeddings, as the kind "preference".

    A latent's embedding is a projection of the UNet's states, averaged over the picture: after each stage of the way
    down (before it is halved) and in the middle. The middle ones are guided as in classifier-free guidance.

    Args:
        unet: its way up is thrown away.
        prompts: reads prompts with the text encoders that were trained with the UNet.
        projection: of the concatenated states (4800 for SD 1.5, 3520 for SDXL), without bias.
        guidance: weight of the guidance in the middle.
    """

    kinds = ("preference",)
    clean = False
    calibrated = False
    levels: Tensor

    def __init__(
        self,
        unet: Any,
        prompts: SDPrompts | SDXLPrompts,
        projection: nn.Linear,
        logit_scale: float,
        guidance: float = 7.5,
    ) -> None:
        super().__init__()
        unet.up_blocks = nn.ModuleList()
        unet.conv_norm_out, unet.conv_out = None, None
        self.unet, self.prompts, self.projection = unet, prompts, projection
        self.scale, self.guidance = float(torch.tensor(logit_scale).exp()), guidance
        self.register_buffer("levels", level_of(scaled_linear()))

    @property
    def latents(self) -> LatentSpace:
        """Those of the model that it was made from."""
        return PUBLISHED_LATENTS[self.prompts.base]

    def check(self, x: Tensor, cond: Conditioning) -> None:
        channels, base = self.unet.config.in_channels, self.prompts.base
        if x.shape[1] != channels:
            found = tuple(x.shape[1:])
            raise ValueError(f"LRM reads {base} latents of {channels} channels, found {found}: {INSTEAD}")

    def read(self, cond: Conditioning, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        """States and embeddings of the prompts, then of the empty prompt, which LRM encodes, too."""
        count = len(prompts)
        return (*self.prompts(prompts), *(part.expand(count, *part.shape[1:]) for part in self.prompts([""])))

    def judge(self, x: Tensor, log_snr: Tensor, read: tuple[Tensor, ...], scale: Tensor) -> dict[str, Tensor]:
        embeds, pooled, null_embeds, null_pooled = read
        dtype = self.projection.weight.dtype
        t = self.timesteps(log_snr)
        states = self.stages(
            torch.cat([x, x]).to(dtype),
            torch.cat([t, t]),
            torch.cat([embeds, null_embeds]).to(dtype),
            torch.cat([pooled, null_pooled]).to(dtype),
        )
        *down, (middle, null_middle) = (part.chunk(2) for part in states)
        guided = null_middle + self.guidance * (middle - null_middle)
        picture = self.projection(torch.cat([*(given for given, _ in down), guided], dim=-1)).float()
        cosine = (normalize(picture, dim=-1) * normalize(pooled.float(), dim=-1)).sum(dim=-1)
        return {"preference": self.scale * cosine}

    def timesteps(self, log_snr: Tensor) -> Tensor:
        """The model's timesteps (B,) whose noise levels are nearest to ``log_snr`` (B,)."""
        return (self.levels.to(log_snr) - log_snr[:, None]).abs().argmin(dim=1)

    def stages(self, x: Tensor, t: Tensor, embeds: Tensor, pooled: Tensor) -> list[Tensor]:
        """The UNet's states averaged over the picture, (B, channels of the stage) each, the middle last."""
        unet = self.unet
        side = 8 * unet.config.sample_size  # pixels
        added = {"text_embeds": pooled, "time_ids": x.new_tensor([side, side, 0, 0, side, side]).expand(len(x), 6)}
        level = unet.time_embedding(unet.time_proj(t).to(x.dtype))
        more = unet.get_aug_embed(level, embeds, added)  # SD has none
        level = level if more is None else level + more
        h, found = unet.conv_in(x), []
        for block in unet.down_blocks:
            crossed = getattr(block, "has_cross_attention", False)
            h, residuals = block(h, level, encoder_hidden_states=embeds) if crossed else block(h, level)
            found.append(residuals[len(block.resnets) - 1].mean(dim=(2, 3)))
        h = unet.mid_block(h, level, encoder_hidden_states=embeds)
        return [*found, h.mean(dim=(2, 3))]


def load_lrm(path: str | Path | None = None) -> LatentRewardModel:
    """The model in folder ``path``, as published: unet/, text_encoder/, for SDXL text_encoder_2/, and state_dict.pt.

    Its tokenizers are those in tokenizer/ and tokenizer_2/ if they are there, else its base model's from the hub.

    Raises:
        FileNotFoundError: a file is missing, or a tokenizer cannot be found.
        ValueError: weights that do not fit.
    """
    folder = Path(path or "lrm")
    for name in ("unet/config.json", f"unet/{UNET}", "text_encoder", "state_dict.pt"):
        if not (folder / name).exists():
            raise FileNotFoundError(
                f"{folder / name}: no such file; expected lrm:FOLDER with unet/, text_encoder/, for SDXL "
                "text_encoder_2/, and state_dict.pt: a model of casiatao/LRM ('hf download casiatao/LRM')"
            )
    saved = read_state(folder / "state_dict.pt")
    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet"))
    load_exactly(unet, load_file(folder / "unet" / UNET), folder / "unet" / UNET)
    widths = sum(unet.config.block_out_channels) + unet.config.block_out_channels[-1]
    if saved.visual.in_features != widths:
        raise ValueError(
            f"{folder / 'state_dict.pt'}: visual_projection reads {saved.visual.in_features} features, the UNet's "
            f"stages have {widths}"
        )
    prompts = load_prompts(folder, saved.text)
    return LatentRewardModel(unet, prompts, saved.visual, saved.scale).requires_grad_(False).eval()


def load_prompts(folder: Path, projection: nn.Linear | None) -> SDPrompts | SDXLPrompts:
    """The text encoders: two of SDXL, or SD's one with its ``projection``.

    Raises:
        FileNotFoundError: neither is there.
        ValueError: the projection does not fit.
    """
    if (folder / "text_encoder_2").exists():
        return SDXLPrompts(load_encoder(folder, "", "SDXL"), load_encoder(folder, "_2", "SDXL"))
    if projection is None:
        raise FileNotFoundError(
            f"{folder / 'text_encoder_2'}: no such file, and {folder / 'state_dict.pt'} has no text_projection; "
            "expected one of them: an LRM of SDXL, or of SD 1.5"
        )
    encoder = load_encoder(folder, "", "SD")
    width = encoder.model.config.hidden_size
    if projection.in_features != width:
        raise ValueError(
            f"{folder / 'state_dict.pt'}: text_projection reads {projection.in_features} features, text_encoder has "
            f"{width}"
        )
    return SDPrompts(encoder, projection)


class State(NamedTuple):
    """What state_dict.pt holds: the projections, the text's for SD only, and the logarithm of the scale."""

    visual: nn.Linear
    text: nn.Linear | None
    scale: float


def read_state(file: Path) -> State:
    """Read state_dict.pt.

    Raises:
        ValueError: it is torn, or lacks something.
    """
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
        text = content.get("text_projection")
        visual = linear(content["visual_projection"]["weight"])
        return State(visual, None if text is None else linear(text["weight"]), float(content["logit_scale"]))
    except (AttributeError, KeyError, TypeError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{file}: expected visual_projection.weight and logit_scale ({type(error).__name__}: {error})"
        ) from None


def linear(weight: Tensor) -> nn.Linear:
    """A layer without bias."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.load_state_dict({"weight": weight})
    return layer


def load_encoder(folder: Path, suffix: str, base: str) -> Encoder:
    """The first ("") or second ("_2") text encoder with its tokenizer, else that of the model ``base``."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    kind = CLIPTextModelWithProjection if suffix else CLIPTextModel
    place = folder / f"text_encoder{suffix}"
    model, report = kind.from_pretrained(place, output_loading_info=True)
    unexpected = [key for key in report["unexpected_keys"] if not key.endswith("position_ids")]
    wrong = {"missing": report["missing_keys"], "unexpected": unexpected, "mismatched": report["mismatched_keys"]}
    found = [f"{len(keys)} {name} keys (first: {sorted(keys)[0]})" for name, keys in wrong.items() if keys]
    if found:
        raise ValueError(f"{place} does not fit {kind.__name__}: {'; '.join(found)}")
    name = f"tokenizer{suffix}"
    source = folder if (folder / name).is_dir() else BASES[base]
    try:
        tokenizer = CLIPTokenizer.from_pretrained(source, subfolder=name)
    except OSError as error:
        raise FileNotFoundError(
            f"{folder / name} is not there and cannot be fetched from {BASES[base]} ({type(error).__name__}): put "
            f"{base}'s there"
        ) from None
    return Encoder(model, tokenizer)
