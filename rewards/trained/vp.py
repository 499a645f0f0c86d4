"""VP-Score (2404.15100): ImageReward's design with a score per aspect, trained on pairs judged in several aspects."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, logsigmoid, normalize, relu
from transformers import BlipTextConfig, BlipVisionConfig, BlipVisionModel, ResNetConfig, ResNetModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from diffusion_align.rewards.preprocess import HALF, Preprocess, in_float32
from diffusion_align.rewards.protocol import Embedder, RewardOutput

from .scorer import TrainedScorer


class ConvTower(nn.Module):
    """A small ResNet whose last feature map is read as a sequence, with learned positions: (B, 3, S, S) to (B, N, D).

    Learns from thousands of pictures, where a transformer on patches wants millions.
    """

    seeing = ("net",)

    def __init__(self, config: ResNetConfig, image_size: int) -> None:
        super().__init__()
        self.net = ResNetModel(config)
        side = image_size // (4 * 2 ** (len(config.hidden_sizes) - 1))
        self.width: int = config.hidden_sizes[-1]
        self.positions = nn.Parameter(0.02 * torch.randn(1, side * side, self.width))

    def forward(self, images: Tensor) -> Tensor:
        # Convolutions and pooling of batches are faster in this layout; the values are the same.
        features: Tensor = self.net(images.contiguous(memory_format=torch.channels_last)).last_hidden_state
        return features.flatten(2).transpose(1, 2) + self.positions


@dataclass(frozen=True)
class ObjectsConfig:
    """Of an :class:`ObjectTower`.

    Attributes:
        hidden_sizes: channels at a half, a quarter and an eighth of the side.
        kinds: number of classes of each property of an object, e.g. its shape, colour and size.
        objects: places that are kept.
    """

    hidden_sizes: tuple[int, ...] = (32, 64, 128)
    kinds: tuple[int, ...] = (6, 7, 2)
    objects: int = 6


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions and a residual."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)])
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norms[1](self.second(relu(self.norms[0](self.first(x)))))
        return relu(inner + self.skip(x))


class ObjectTower(nn.Module):
    """For small pictures: bottom-up attention (1707.07998). Residual blocks see places, eight pixels wide; the text
    then reads those that likeliest hold an object, and what the quarters of the picture look like.

    ``said`` gives each place's logits: of every kind "nothing" and its classes, then where in the place the object's
    centre is.
    """

    seeing = ("stem", "blocks", "classes")

    def __init__(self, config: ObjectsConfig, image_size: int) -> None:
        super().__init__()
        self.kinds, self.objects = list(config.kinds), config.objects
        widths = config.hidden_sizes
        self.stem = nn.Sequential(nn.Conv2d(3, widths[0], 5, 2, 2, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU())
        blocks = [ResidualBlock(widths[0], widths[0], 1)]
        for inputs, outputs in pairwise(widths):
            blocks += [ResidualBlock(inputs, outputs, 2), ResidualBlock(outputs, outputs, 1)]
        self.blocks = nn.Sequential(*blocks)
        self.width: int = widths[-1]
        self.side = image_size // 2 ** len(widths)
        self.classes = nn.Linear(self.width, sum(1 + count for count in self.kinds) + 2)
        named = sum(1 + count for count in self.kinds) + 2 * 2 * FREQUENCIES
        self.object = nn.Sequential(
            nn.Linear(named + self.width, self.width), nn.GELU(), nn.Linear(self.width, self.width)
        )
        self.quarter = nn.Linear(self.width, self.width)
        self.corners = nn.Parameter(0.02 * torch.randn(4, self.width))

    def places(self, images: Tensor) -> Tensor:
        """(B, N, D) features of every place, row by row."""
        features: Tensor = self.blocks(self.stem(images.contiguous(memory_format=torch.channels_last)))
        return features.flatten(2).transpose(1, 2)

    def said(self, places: Tensor) -> tuple[list[Tensor], Tensor]:
        """Logits (B, N, 1 + classes) of each kind, and the centre (B, N, 2) within each place, in [0, 1]."""
        *kinds, centre = self.classes(places).split([*(1 + count for count in self.kinds), 2], dim=-1)
        return kinds, centre.sigmoid()

    def forward(self, images: Tensor) -> Tensor:
        places = self.places(images)
        kinds, centre = self.said(places)
        index = torch.arange(self.side**2, device=images.device)
        corner = torch.stack([index % self.side, index // self.side], dim=-1)
        shares = [kind.softmax(dim=-1) for kind in kinds]
        described = torch.cat([*shares, waves((corner + centre) / self.side), places], dim=-1)
        best = shares[0][..., 0].topk(self.objects, dim=1, largest=False).indices
        objects = self.object(described.gather(1, best[..., None].expand(-1, -1, described.shape[-1])))
        grid = places.transpose(1, 2).unflatten(2, (self.side, self.side))
        quarters = self.quarter(adaptive_avg_pool2d(grid, 2).flatten(2).transpose(1, 2)) + self.corners
        return torch.cat([objects, quarters], dim=1)


#: Waves per coordinate: half a period over the picture, one, two, four.
FREQUENCIES = 4


def waves(xy: Tensor) -> Tensor:
    """(..., 2) coordinates in [0, 1] as sines and cosines (..., 2 * 2 * FREQUENCIES)."""
    angles = xy[..., None] * (torch.pi * 2 ** torch.arange(FREQUENCIES, device=xy.device))
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)


class PatchTower(nn.Module):
    """BLIP's vision transformer: (B, 3, S, S) to (B, N, D)."""

    seeing = ("net",)

    def __init__(self, config: BlipVisionConfig, image_size: int) -> None:
        super().__init__()
        self.net = BlipVisionModel(config)
        self.width: int = config.hidden_size

    def forward(self, images: Tensor) -> Tensor:
        states: Tensor = self.net(pixel_values=images).last_hidden_state
        return states


TOWERS: dict[str, tuple[Callable[[Any, int], Any], Callable[..., Any]]] = {
    "resnet": (ConvTower, ResNetConfig),
    "objects": (ObjectTower, ObjectsConfig),
    "blip": (PatchTower, BlipVisionConfig),
}


class PictureReader(nn.Module):
    """A text read beside ``pictures`` pictures: the first token's state of BLIP's text encoder.

    Args:
        settings: "vision_type" (key of ``TOWERS``), "vision" and "text" (of their transformers configs), "image_size".
        pictures: how many pictures are seen at once (1; 2 for before and after an edit).
    """

    def __init__(self, settings: dict[str, Any], pictures: int = 1) -> None:
        super().__init__()
        tower, config = TOWERS[settings["vision_type"]]
        self.vision = tower(config(**settings["vision"]), settings["image_size"])
        # It reads and writes nothing: BLIP's own ids, of another vocabulary, would only be warned of.
        unused = dict.fromkeys(("bos_token_id", "eos_token_id", "sep_token_id"))
        text = BlipTextConfig(**{**unused, **settings["text"]}, encoder_hidden_size=self.vision.width)
        self.text = BlipTextModel(text, add_pooling_layer=False)
        self.roles = nn.Parameter(0.02 * torch.randn(pictures, self.vision.width))
        self.width: int = text.hidden_size
        self.frozen = False

    def freeze_vision(self) -> None:
        """Keep what sees the picture as it is, statistics of its normalisation included, whatever is trained."""
        self.frozen = True
        self.train(self.training)
        for name in self.vision.seeing:
            getattr(self.vision, name).requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.frozen:
            for name in self.vision.seeing:
                getattr(self.vision, name).eval()
        return self

    def read_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The first token's state of a text read alone, (B, D)."""
        states: Tensor = self.text(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return states[:, 0]

    def see(self, pictures: list[Tensor]) -> Tensor:
        """Preprocessed pictures, each (B, 3, S, S), as one sequence (B, N, D)."""
        tokens = self.vision(torch.cat(pictures)).chunk(len(pictures))
        return torch.cat([part + role for part, role in zip(tokens, self.roles, strict=True)], dim=1)

    def read(self, seen: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """States (B, L, D) of texts read beside what was seen."""
        states: Tensor = self.text(
            input_ids=input_ids,
            attention_mask=attention_mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device),
        ).last_hidden_state
        return states

    def forward(self, pictures: list[Tensor], input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Preprocessed pictures, each (B, 3, S, S), and a text's ids and mask (B, L) to (B, D)."""
        return self.read(self.see(pictures), input_ids, attention_mask)[:, 0]


def first_of_each(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Positions (U,) at which each distinct one of ``numbers`` (B,) first stands, and which of them each is, (B,)."""
    distinct, where = numbers.unique(return_inverse=True)
    positions = torch.arange(len(numbers), device=numbers.device)
    first = positions.new_full((len(distinct),), len(numbers)).scatter_reduce(0, where, positions, "amin")
    return first, where


def last_tokens(tokens: Any, prompts: list[str]) -> Tensor:
    """(B, W) int64: where the last token of each word of ``prompts`` stands; -1 where there is none."""
    found = torch.full((len(prompts), max(len(prompt.split()) for prompt in prompts)), -1)
    for i in range(len(prompts)):
        for position, word in enumerate(tokens.word_ids(i)):
            if word is not None:
                found[i, word] = position
    return found


#: Numbers that ``evidence`` gives.
EVIDENCE = 2


def evidence(logits: Tensor, known: Tensor) -> Tensor:
    """(B, 2): the expected number of words that are not shown, and the probability that all are, from each word's
    log-odds of not being shown (B, W); words that are not ``known`` do not count."""
    wrong = (logits.sigmoid() * known).sum(dim=1)
    none = (logsigmoid(-logits) * known).sum(dim=1).exp()
    return torch.stack([wrong, none], dim=1)


#: Width of the contrastive branch's embeddings.
EMBEDDING = 128


def head(width: int, outputs: int) -> nn.Sequential:
    """A small MLP."""
    return nn.Sequential(nn.Linear(width, 256), nn.GELU(), nn.Dropout(0.1), nn.Linear(256, outputs))


class VPScore(TrainedScorer, Embedder):
    """An overall score and one per aspect, all logits: P(a over b) = sigmoid(score_a - score_b).

    Args:
        settings: of :class:`PictureReader`, and "aspects" (names), "max_tokens", "words" (whether it says of each word
            if it is shown, and judges by that, too; default: no).
        tokenizer: of transformers; a fast one, if ``words``.
    """

    kind = "vp-score"
    name = "vp-score"
    differentiable = True

    def __init__(self, settings: dict[str, Any], tokenizer: Any) -> None:
        super().__init__()
        self._settings, self.tokenizer = settings, tokenizer
        self.reader = PictureReader(settings)
        self.aspects: list[str] = list(settings["aspects"])
        self.words = nn.Linear(self.reader.width, 1) if settings.get("words") else None
        self.head = head(self.reader.width + (0 if self.words is None else EVIDENCE), 1 + len(self.aspects))
        self.image_projection = nn.Linear(self.reader.vision.width, EMBEDDING)
        self.text_projection = nn.Linear(self.reader.width, EMBEDDING)
        self.logit_scale = nn.Parameter(torch.tensor(2.66))  # 1 / 0.07
        self.preprocessing = Preprocess(settings["image_size"], "crop", HALF, HALF)

    def preprocess(self, images: Tensor) -> Tensor:
        return self.preprocessing(images)

    def tokenize(self, prompts: list[str]) -> Any:
        """Token ids and mask (B, max_tokens); with ``words`` (B, L), as long as the longest prompt."""
        return self.tokenizer(
            prompts if self.words is None else [prompt.split() for prompt in prompts],
            padding="max_length" if self.words is None else "longest",
            truncation=True,
            max_length=self._settings["max_tokens"],
            return_tensors="pt",
            is_split_into_words=self.words is not None,
        ).to(self.device)

    def contrastive_branch(self) -> nn.ParameterList:
        """Weights that only ``embed_apart`` and the contrastive loss use."""
        projections = (self.image_projection, self.text_projection)
        return nn.ParameterList([*(each for part in projections for each in part.parameters()), self.logit_scale])

    def embed_apart(self, images: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Unit embeddings (B, E) of preprocessed images and of prompts, each seen alone (BLIP's contrastive branch)."""
        tokens = self.tokenize(prompts)
        picture = self.image_projection(self.reader.vision(images).mean(dim=1))
        text = self.text_projection(self.reader.read_text(tokens.input_ids, tokens.attention_mask))
        return normalize(picture.float(), dim=-1), normalize(text.float(), dim=-1)

    def embed(self, images: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Of each image read beside its prompt, and of the prompt read alone."""
        tokens = self.tokenize(prompts)
        state = self.reader([images], tokens.input_ids, tokens.attention_mask).float()
        text = self.reader.read_text(tokens.input_ids, tokens.attention_mask).float()
        return normalize(state, dim=-1), normalize(text, dim=-1)

    def evaluate(self, images: Tensor, prompts: list[str], context: dict[str, Any]) -> RewardOutput:
        """``context["pictures"]`` (B,), where given, are equal numbers for equal images: each is encoded once."""
        tokens = self.tokenize(prompts)
        if "pictures" in context:
            first, where = first_of_each(context["pictures"])
            seen = self.reader.see([images[first]])[where]
        else:
            seen = self.reader.see([images])
        states = self.reader.read(seen, tokens.input_ids, tokens.attention_mask).float()
        state, words = states[:, 0], None
        with in_float32(state):
            if self.words is not None:
                at = last_tokens(tokens, prompts).to(states.device)
                logits = self.words(states).squeeze(-1).gather(1, at.clamp(min=0))
                words = logits.masked_fill(at < 0, math.nan)
                state = torch.cat([state, evidence(logits, at >= 0)], dim=1)
            features = self.head[:-1](state)
            scores = self.head[-1](features)
        aspects = {name: scores[:, 1 + i] for i, name in enumerate(self.aspects)}
        return RewardOutput(scores[:, 0], aspects, features=features, words=words)

    def settings(self) -> dict[str, Any]:
        return self._settings

    @classmethod
    def build(cls, settings: dict[str, Any], folder: Path) -> Self:
        from transformers import AutoTokenizer

        return cls(settings, AutoTokenizer.from_pretrained(folder))

    def save_extras(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)
