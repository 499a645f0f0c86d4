"""CLIP similarity, and trained CLIPs in open_clip's layout."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from diffusion_align.files import save_tensors, sealed_folder, write_whole
from diffusion_align.rewards.preprocess import Preprocess
from diffusion_align.rewards.protocol import Embedder, RewardOutput, RewardScorer

#: Scorer name to open_clip's architecture and pretrained tag.
OPEN_CLIP = {
    "clip": ("ViT-H-14", "laion2b_s32b_b79k"),
    "clip-l": ("ViT-L-14-quickgelu", "openai"),  # "ViT-L-14" with these weights would silently use the wrong GELU
    "siglip": ("ViT-SO400M-14-SigLIP-384", "webli"),
}


OPEN_CLIP_CONFIG = "open_clip_config.json"


class CosineScorer(Embedder):
    """cos(image, text), times ``scale``. The raw cosine: CLIPScore's max(cos, 0) has no gradient where it matters."""

    differentiable = True

    def __init__(self, name: str, preprocessing: Preprocess, scale: float = 1.0) -> None:
        super().__init__()
        self.name, self.preprocessing, self.scale = name, preprocessing, scale

    def preprocess(self, images: Tensor) -> Tensor:
        return self.preprocessing(images)

    @abstractmethod
    def encode_images(self, values: Tensor) -> Tensor:
        """Embeddings (B, D) of preprocessed images, not normalised."""

    @abstractmethod
    def encode_texts(self, texts: list[str]) -> Tensor:
        """Embeddings (B, D), not normalised."""

    def embed(self, images: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor]:
        image = normalize(self.encode_images(images).float(), dim=-1)
        return image, normalize(self.encode_texts(prompts).float(), dim=-1)

    def evaluate(self, images: Tensor, prompts: list[str], context: dict[str, Any]) -> RewardOutput:
        image, text = self.embed(images, prompts)
        return RewardOutput(self.scale * (image * text).sum(dim=-1))


class OpenClipScorer(CosineScorer):
    """A CLIP of open_clip.

    Args:
        tokenizer: maps texts to ids (B, L).
        layout: content of open_clip_config.json, for ``save_pretrained``.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        tokenizer: Callable[[list[str]], Tensor],
        preprocessing: Preprocess,
        layout: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(name, preprocessing)
        self.model, self.tokenizer, self.layout = model, tokenizer, layout

    def encode_images(self, values: Tensor) -> Tensor:
        features: Tensor = self.model.encode_image(values.to(self.weight_dtype))  # type: ignore[operator]
        return features

    def encode_texts(self, texts: list[str]) -> Tensor:
        features: Tensor = self.model.encode_text(self.tokenizer(texts).to(self.device))  # type: ignore[operator]
        return features

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the folder that ``load_scorer(folder)`` and open_clip's "local-dir:FOLDER" read.

        Raises:
            ValueError: the model did not come from such a folder, so its configuration is not known.
        """
        if self.layout is None:
            raise ValueError(f"scorer {self.name} cannot be saved: it was not loaded from an open_clip folder")
        return save_open_clip(Path(folder), self.model, self.layout, getattr(self.tokenizer, "tokenizer", None))

    @property
    def weight_dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype


def save_open_clip(folder: Path, model: nn.Module, layout: dict[str, Any], tokenizer: Any) -> Path:
    """Configuration, weights and, if it is one of transformers, tokenizer."""
    with sealed_folder(folder):
        write_whole(folder / OPEN_CLIP_CONFIG, json.dumps(layout, indent=2).encode() + b"\n")
        save_tensors(folder / "open_clip_model.safetensors", model.state_dict())
        if tokenizer is not None and hasattr(tokenizer, "save_pretrained"):
            tokenizer.save_pretrained(folder)
    return folder


def build_open_clip(architecture: str, pretrained: str | None = None) -> tuple[nn.Module, Any, Preprocess]:
    """Model, tokenizer and preprocessing.

    Args:
        architecture: open_clip's name, or "local-dir:FOLDER" / "hf-hub:REPO" with config, weights and tokenizer.
        pretrained: open_clip's tag, a weights file, or None for random weights.

    Raises:
        ValueError: open_clip does not know the architecture or tag.
        FileNotFoundError: the weights are neither in the local cache nor can they be fetched.
    """
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        model = open_clip.create_model(architecture, pretrained=pretrained)
        tokenizer = open_clip.get_tokenizer(architecture)
    except (HfHubHTTPError, LocalEntryNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"CLIP {architecture} {pretrained or ''} is not in the local cache and cannot be fetched "
            f"({type(error).__name__})"
        ) from None
    except RuntimeError as error:
        if "Failed to download" in str(error):  # how open_clip wraps the errors above
            raise FileNotFoundError(
                f"CLIP {architecture} {pretrained or ''} is not in the local cache and cannot be fetched"
            ) from None
        raise ValueError(f"CLIP {architecture} {pretrained or ''}: {str(error).splitlines()[0]}") from None
    given = model.visual.preprocess_cfg
    fits = {"shortest": "crop", "longest": "pad", "squash": "squash"}
    side = given["size"][0] if isinstance(given["size"], list | tuple) else given["size"]
    fit = fits[given.get("resize_mode") or "shortest"]
    return model, tokenizer, Preprocess(side, fit, tuple(given["mean"]), tuple(given["std"]))  # type: ignore[arg-type]


def load_clip(
    name: str = "clip", checkpoint: str | None = None, model: str | None = None, pretrained: str | None = None
) -> RewardScorer:
    """CLIP similarity; another ``model`` of open_clip with its ``pretrained`` tag, or ``checkpoint``, its weights."""
    architecture, tag = (model, pretrained) if model is not None else OPEN_CLIP[name]
    if checkpoint is not None and not Path(checkpoint).is_file():
        raise FileNotFoundError(f"checkpoint {checkpoint}: no such file; expected open_clip weights of {architecture}")
    clip, tokenizer, preprocessing = build_open_clip(architecture, checkpoint or tag)
    layout = None
    if architecture.startswith("local-dir:"):
        layout = json.loads((Path(architecture.removeprefix("local-dir:")) / OPEN_CLIP_CONFIG).read_text())
    return OpenClipScorer(name, clip, tokenizer, preprocessing, layout)
