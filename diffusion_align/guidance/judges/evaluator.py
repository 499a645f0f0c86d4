"""Small networks that judge noisy latents: does it become what the prompt says, is it good, would people prefer it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, normalize, silu

from diffusion_align.adapters import Conditioning
from diffusion_align.adapters.autoencoder import LatentSpace
from diffusion_align.files import load_tensors, read_object, save_tensors, sealed_folder, verify_folder, write_whole
from diffusion_align.names import hint
from diffusion_align.shipped import SHIPPED_EVALUATORS, shipped_path

from .evaluator_kinds import KINDS

#: Powers of a scale's logarithm that "value" gets as features.
SCALE_FEATURES = 3

#: Tokens, from the first word on, that say which scale suits a prompt: what is asked for, and how many.
LEADING = 3

#: Bins of log-SNR, between these, that scores are standardised in.
BINS, LOW, HIGH = 16, -6.0, 7.0


@dataclass(frozen=True)
class EvaluatorSettings:
    """Shape of a :class:`LatentEvaluator`.

    Attributes:
        latent_channels, latent_size: of the latents, e.g. 4 and 128 for SDXL at 1024 pixels.
        embed_dim, pooled_dim: widths of the prompt embeddings and of the pooled one (0: there is none).
        kinds: what it judges, of ``KINDS``.
        width: channels after the first convolution; doubled with every halving.
        features: width of the picture's and the prompt's embeddings.
        preference_loss: what the kind preference was trained with: "bradley_terry", or "thurstone", which learned the
            variance of its scores, too.
        latents: which autoencoder's latents it was trained on; None: an earlier version did not note it.
    """

    latent_channels: int
    latent_size: int
    embed_dim: int
    pooled_dim: int
    kinds: tuple[str, ...] = ("alignment", "fidelity", "preference")
    width: int = 48
    features: int = 128
    preference_loss: str = "bradley_terry"
    latents: LatentSpace | None = None

    @property
    def thurstone(self) -> bool:
        """Whether the kind preference knows the variance of its scores."""
        return self.preference_loss == "thurstone" and "preference" in self.kinds

    def to_json(self) -> dict[str, Any]:
        """As evaluator.json holds them; without what evaluators had not before it was there, unless it is used."""
        fields = asdict(self)
        if not self.thurstone:
            del fields["preference_loss"]
        if self.latents is None:
            del fields["latents"]
        return fields

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> EvaluatorSettings:
        """What ``to_json`` made.

        Raises:
            KeyError, TypeError, AttributeError: fields are missing, unknown, or no objects.
        """
        latents = fields.get("latents")
        space = None if latents is None else LatentSpace.from_json(latents)
        return cls(**{**fields, "kinds": tuple(fields["kinds"]), "latents": space})


#: Scale and floor of the variance that a Thurstone evaluator starts from, DiNa-LRM's.
VARIANCE = (2.0, 0.05)


class Block(nn.Module):
    """Depthwise and pointwise convolutions with a residual, scaled and shifted by the noise level."""

    def __init__(self, width: int, level_width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm = nn.GroupNorm(1, width)
        self.level = nn.Linear(level_width, 2 * width)
        self.widen = nn.Conv2d(width, 2 * width, 1)
        self.narrow = nn.Conv2d(2 * width, width, 1)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        scale, shift = self.level(level)[:, :, None, None].chunk(2, dim=1)
        inner = self.norm(self.depthwise(x)) * (1 + scale) + shift
        return x + self.narrow(silu(self.widen(inner)))


class LatentTower(nn.Module):
    """Noisy latents (B, C, h, w) and log-SNR (B,) to features (B, F)."""

    def __init__(self, settings: EvaluatorSettings) -> None:
        super().__init__()
        width = settings.width
        self.level = nn.Sequential(nn.Linear(16, 64), nn.SiLU())
        patch = max(2, settings.latent_size // 8)  # 8 x 8 patches whatever the picture's size
        self.stem = nn.Conv2d(settings.latent_channels, width, patch + 2, stride=patch, padding=1)
        self.blocks = nn.ModuleList([Block(width, 64), Block(2 * width, 64)])
        self.down = nn.Conv2d(width, 2 * width, 2, stride=2)
        side = (settings.latent_size // patch) // 2
        self.out = nn.Linear(2 * width * side * side, settings.features)

    def forward(self, x: Tensor, log_snr: Tensor) -> Tensor:
        frequencies = torch.arange(1, 9, device=x.device) * (torch.pi / 16)
        angles = log_snr.float().clamp(LOW, HIGH)[:, None] * frequencies
        level = self.level(torch.cat([angles.sin(), angles.cos()], dim=1))
        h = self.blocks[0](self.stem(x), level)
        h = self.blocks[1](self.down(silu(h)), level)
        features: Tensor = self.out(silu(h).flatten(1))
        return features


class PromptTower(nn.Module):
    """The denoiser's own prompt embeddings to features (B, F): one query over the tokens, then an MLP."""

    def __init__(self, settings: EvaluatorSettings) -> None:
        super().__init__()
        hidden = 2 * settings.features
        self.tokens = nn.Linear(settings.embed_dim, hidden)
        layer = nn.TransformerEncoderLayer(hidden, 4, 2 * hidden, 0.0, batch_first=True, norm_first=True)
        self.mixer = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.query = nn.Linear(hidden, 4)
        self.pooled = nn.Linear(settings.pooled_dim, hidden) if settings.pooled_dim else None
        self.out = nn.Sequential(nn.Linear(4 * hidden, hidden), nn.SiLU(), nn.Linear(hidden, settings.features))

    def forward(self, cond: Conditioning) -> Tensor:
        h = self.tokens(cond.embeds.float())
        if self.pooled is not None and cond.pooled is not None:
            h = h + self.pooled(cond.pooled.float())[:, None]
        h = self.mixer(h)
        weights = self.query(h).softmax(dim=1)
        features: Tensor = self.out(torch.einsum("bln,bld->bnd", weights, h).flatten(1))
        return features


class LatentEvaluator(nn.Module):
    """Scores of noisy latents for prompts, one per kind, from one tower: (2509.16131, sec. 4), much smaller.

    "alignment" is the scaled cosine of the two towers (CLIP on noisy latents); "fidelity" the log-odds of a real
    against a generated picture; "preference" a Bradley-Terry score; "task" the regression of another scorer; "value" a
    Bradley-Terry score of the end of a run that continues with a given guidance scale.
    ``mean`` and ``std`` (kinds, BINS) hold each score's statistics per bin of log-SNR.
    """

    mean: Tensor
    std: Tensor
    log_variance: nn.Parameter | None
    clean = False
    calibrated = True

    def __init__(self, settings: EvaluatorSettings) -> None:
        super().__init__()
        unknown = set(settings.kinds) - set(KINDS)
        if unknown or not settings.kinds:
            raise ValueError(f"evaluator kinds {settings.kinds}: expected some of {', '.join(KINDS)}")
        self.settings, self.kinds = settings, settings.kinds
        self.picture, self.prompt = LatentTower(settings), PromptTower(settings)
        self.logit_scale = nn.Parameter(torch.tensor(2.66))  # 1 / 0.07
        width = settings.features
        inputs = {"fidelity": width, "preference": 3 * width, "task": 3 * width, "value": 3 * width}
        self.heads = nn.ModuleDict(
            {
                kind: nn.Sequential(nn.Linear(inputs[kind], 64), nn.SiLU(), nn.Linear(64, 1))
                for kind in settings.kinds
                if kind != "alignment"
            }
        )
        # Which scale suits a prompt: linear in its first words, because few pairs of every scale must teach it.
        self.scale_value = (
            nn.Linear(LEADING * settings.embed_dim, SCALE_FEATURES) if "value" in settings.kinds else None
        )
        # Logarithms of scale and floor in v = scale sigma^2 + floor.
        self.log_variance = nn.Parameter(torch.tensor(VARIANCE).log()) if settings.thurstone else None
        self.register_buffer("mean", torch.zeros(len(settings.kinds), BINS))
        self.register_buffer("std", torch.ones(len(settings.kinds), BINS))

    @property
    def latents(self) -> LatentSpace | None:
        """Which autoencoder's latents it was trained on; None: not noted."""
        return self.settings.latents

    def raw(self, picture: Tensor, prompt: Tensor, scale: Tensor) -> dict[str, Tensor]:
        """Scores (B,) by kind of picture features (B, F), of what ``text`` gives, and of guidance scales (B,)."""
        scores = {}
        prompt, leading = prompt.tensor_split([self.settings.features], dim=1)
        for kind in self.settings.kinds:
            if kind == "alignment":
                cosine = (normalize(picture, dim=-1) * normalize(prompt, dim=-1)).sum(dim=-1)
                scores[kind] = self.logit_scale.exp().clamp(max=100) * cosine
            elif kind == "fidelity":
                scores[kind] = self.heads[kind](picture)[:, 0]
            else:
                scores[kind] = self.heads[kind](torch.cat([picture, prompt, picture * prompt], dim=-1))[:, 0]
            if kind == "value":
                scores[kind] = scores[kind] + self.suits(leading, scale)
        return {kind: score.float() for kind, score in scores.items()}

    def suits(self, leading: Tensor, scale: Tensor) -> Tensor:
        """The part of the value (B,) that depends on the scale: how well it suits prompts with these leading tokens."""
        assert self.scale_value is not None
        weights: Tensor = self.scale_value(leading)
        return (weights * scale_features(scale).to(weights)).sum(dim=-1)

    def variance(self, flow_sigma: Tensor) -> Tensor:
        """Variance (B,) of the preference scores at noise sigma (B,) of the straight path (DiNa-LRM, 2602.11146).

        Raises:
            ValueError: it was not trained by the Thurstone loss.
        """
        if self.log_variance is None:
            raise ValueError("this evaluator was trained without loss_type thurstone: its scores have no variance")
        scale, floor = self.log_variance.exp()
        return scale * flow_sigma.square() + floor

    def forward(self, x: Tensor, log_snr: Tensor, cond: Conditioning) -> tuple[Tensor, Tensor]:
        """Features of M latents (M, C, h, w) at ``log_snr`` (M,), (M, F), and of N prompts (``text``)."""
        return self.picture(x, log_snr), self.text(cond)

    def text(self, cond: Conditioning) -> Tensor:
        """Features of the prompts (B, F), for "value" followed by their normalised leading tokens, (B, F + L)."""
        features = self.prompt(cond)
        if self.scale_value is None:
            return features
        leading = cond.embeds[:, 1 : 1 + LEADING].flatten(1).float()
        return torch.cat([features, layer_norm(leading, leading.shape[1:]).to(features)], dim=1)

    def scores(self, x: Tensor, log_snr: Tensor, cond: Conditioning, scale: Tensor) -> dict[str, Tensor]:
        """Standardised scores (B,) by kind of latents (B, C, h, w) at ``log_snr`` (B,) for their prompts, if the run
        continues with the guidance ``scale`` (B,)."""
        picture, prompt = self(x, log_snr, cond)
        return self.standardised(self.raw(picture, prompt, scale), log_snr)

    def read(self, cond: Conditioning, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        """The prompts' features, from the denoiser's own embeddings."""
        return (self.text(cond),)

    def judge(self, x: Tensor, log_snr: Tensor, read: tuple[Tensor, ...], scale: Tensor) -> dict[str, Tensor]:
        """``scores`` for prompts that were ``read`` before; of the value only the part that depends on the scale.

        The candidates' pictures differ by less than the error of their own part.
        """
        # The tower is most of the work, and of "value" alone nothing asks it.
        scores = {} if self.kinds == ("value",) else self.raw(self.picture(x, log_snr), read[0], scale)
        if "value" in self.kinds:
            scores["value"] = self.suits(read[0][:, self.settings.features :], scale).float()
        return self.standardised(scores, log_snr)

    def check(self, x: Tensor, cond: Conditioning) -> None:
        """Whether it can judge these latents and prompts.

        Raises:
            ValueError: it was trained for another model.
        """
        settings = self.settings
        pooled = 0 if cond.pooled is None else cond.pooled.shape[-1]
        found = (x.shape[1], x.shape[-1], cond.embeds.shape[-1], pooled)
        expected = (settings.latent_channels, settings.latent_size, settings.embed_dim, settings.pooled_dim)
        if found != expected or x.shape[-1] != x.shape[-2]:
            raise ValueError(
                f"evaluator was trained for latents and prompts of (channels, size, embedding, pooled) {expected}, "
                f"this model has {found}: train one with 'diffusion-align train evaluator'"
            )

    def standardised(self, scores: dict[str, Tensor], log_snr: Tensor) -> dict[str, Tensor]:
        """z-scores with the statistics of the noise level."""
        bins = level_bin(log_snr)
        return {
            kind: (scores[kind] - self.mean[i, bins]) / self.std[i, bins] for i, kind in enumerate(self.settings.kinds)
        }

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write evaluator.json and model.safetensors; returns the folder."""
        with sealed_folder(Path(folder)) as place:
            write_whole(place / "evaluator.json", json.dumps(self.settings.to_json(), indent=2).encode() + b"\n")
            save_tensors(place / "model.safetensors", self.state_dict())
        return place

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> LatentEvaluator:
        """Read what ``save_pretrained`` wrote.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: weights that do not fit the settings, or a file that has changed since it was written.
        """
        folder = Path(folder)
        verify_folder(folder)
        for name in ("evaluator.json", "model.safetensors"):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder / name}: no such file; expected the folder of a trained evaluator")
        settings = read_object(folder / "evaluator.json")
        try:
            evaluator = cls(EvaluatorSettings.from_json(settings))
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{folder / 'evaluator.json'}: no settings of an evaluator ({error})") from None
        weights = {k: v.float() for k, v in load_tensors(folder / "model.safetensors").items()}
        try:
            evaluator.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(f"{folder / 'model.safetensors'} does not fit evaluator.json: {error}") from None
        return evaluator.requires_grad_(False).eval()


def scale_features(scale: Tensor) -> Tensor:
    """(B, SCALE_FEATURES) powers of log(scale) of (B,)."""
    level = scale.clamp(min=1).log()
    return torch.stack([level**power for power in range(1, SCALE_FEATURES + 1)], dim=1)


def level_bin(log_snr: Tensor) -> Tensor:
    """Bin of each level, int64 in [0, BINS)."""
    return ((log_snr - LOW) / (HIGH - LOW) * BINS).long().clamp(0, BINS - 1)


def load_evaluator(name: str | Path) -> LatentEvaluator:
    """A shipped evaluator, or the folder of a trained one or of the run that trained it.

    Raises:
        FileNotFoundError, ValueError: there is none, or it cannot be read.
    """
    if name in SHIPPED_EVALUATORS:
        return LatentEvaluator.from_pretrained(shipped_path(str(name)))
    if not Path(name).is_dir():
        raise FileNotFoundError(
            f"evaluator {str(name)!r}{hint(str(name), SHIPPED_EVALUATORS)}: "
            "expected a folder that 'train evaluator' wrote, or one of "
            f"{', '.join(SHIPPED_EVALUATORS)}, latent-clip, latent-clip:PATH, lrm:FOLDER"
        )
    inner = Path(name) / "evaluator"
    return LatentEvaluator.from_pretrained(inner if inner.is_dir() else name)
