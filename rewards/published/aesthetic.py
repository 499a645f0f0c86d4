"""LAION's aesthetic predictors: an affine head on the normalised image embedding of OpenAI's CLIP L/14."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import normalize

from diffusion_align.rewards.catalogue import AESTHETIC_V1, AESTHETIC_V2
from diffusion_align.rewards.preprocess import Preprocess, in_float32
from diffusion_align.rewards.protocol import RewardOutput, RewardScorer
from diffusion_align.rewards.weights import find_file, load_exactly, read_weights

from .clip import build_open_clip

V2_SHA256 = "21dd590f3ccd"


class AffineHead(nn.Module):
    """768-1024-128-64-16-1 without activations (dropout only, so affine when it scores); also ImageReward's head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = [width, 1024, 128, 64, 16, 1]
        rates = [0.2, 0.2, 0.1, None, None]
        layers: list[nn.Module] = []
        for i, rate in enumerate(rates):
            layers.append(nn.Linear(sizes[i], sizes[i + 1]))
            layers += [] if rate is None else [nn.Dropout(rate)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width) to (B,)."""
        scores: Tensor = self.layers(x)
        return scores.squeeze(-1)


class LinearHead(nn.Linear):
    """The first version: one linear layer."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width) to (B,)."""
        return super().forward(x).squeeze(-1)


class AestheticScorer(RewardScorer):
    """Predicted rating of a picture, about 1 to 10 (5.85 on average on Pick-a-Pic); prompts are not used."""

    differentiable = True

    def __init__(self, name: str, clip: nn.Module, head: nn.Module, preprocessing: Preprocess) -> None:
        super().__init__()
        self.name, self.clip, self.head, self.preprocessing = name, clip, head, preprocessing

    def preprocess(self, images: Tensor) -> Tensor:
        return self.preprocessing(images)

    def evaluate(self, images: Tensor, prompts: list[str], context: dict[str, Any]) -> RewardOutput:
        dtype = next(self.clip.parameters()).dtype
        embedding = normalize(self.clip.encode_image(images.to(dtype)).float(), dim=-1)  # type: ignore[operator]
        with in_float32(embedding):
            return RewardOutput(self.head(embedding))


def load_aesthetic(
    name: str = "aesthetic",
    checkpoint: str | None = None,
    model: str = "ViT-L-14-quickgelu",
    pretrained: str | None = "openai",
) -> RewardScorer:
    """The aesthetic predictor v2 ("aesthetic": sac+logos+ava1-l14-linearMSE.pth) or v1 ("aesthetic-v1")."""
    clip, _, preprocessing = build_open_clip(model, pretrained)
    width = int(clip.visual.output_dim)  # type: ignore[union-attr, arg-type]
    if name == "aesthetic-v1":
        path = find_file(checkpoint, AESTHETIC_V1, "sa_0_4_vit_l_14_linear.pth")
        head: nn.Module = LinearHead(width)
    else:
        path = find_file(checkpoint, AESTHETIC_V2, "sac+logos+ava1-l14-linearMSE.pth", V2_SHA256)
        head = AffineHead(width)
    load_exactly(head, read_weights(path), path)
    return AestheticScorer(name, clip, head, preprocessing)
