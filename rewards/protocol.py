"""The protocol every scorer follows."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .preprocess import to_pixels

#: A batch (B, 3, H, W) float in [0, 1], or B pictures of any sizes: PIL, or tensors (3, H, W).
Images: TypeAlias = Tensor | Sequence[Image.Image] | Sequence[Tensor]

#: What a scorer may need beside images and prompts.
CONTEXT: Mapping[str, str] = {
    "source_images": "the images before the edit, like images",
    "source_prompts": "B prompts that describe the source images",
    "instructions": "B edit instructions",
    "masks": "(B, 1, H, W), 1 where the image was inpainted",
    "users": "B user names or numbers",
}


@dataclass(frozen=True, repr=False)
class RewardOutput:
    """Scores of a batch of images.

    Attributes:
        reward: (B,) float32, the scorer's overall score.
        aspects: named parts of it, each (B,) float32.
        std: (B,) float32, how unsure the scorer is, in units of ``reward``; None when it does not say.
        features: (B, F) float32, what the reward is a linear function of; None when the scorer does not show it.
        words: (B, W) float32, log-odds that a word of the prompt (split at spaces) is *not* shown, NaN beyond its last
            one; None when the scorer does not say.
        members: (B, M) float32, the rewards of an ensemble's members, made comparable; None of other scorers.
    """

    reward: Tensor
    aspects: dict[str, Tensor] = field(default_factory=dict)
    std: Tensor | None = None
    features: Tensor | None = None
    words: Tensor | None = None
    members: Tensor | None = None

    def __repr__(self) -> str:
        told = f"{len(self.reward)} rewards"
        if len(self.reward):
            low, mean, high = (float(value) for value in (self.reward.min(), self.reward.mean(), self.reward.max()))
            told += f", mean {mean:.4g}, {low:.4g} to {high:.4g}"
        aspects = f"; aspects: {', '.join(self.aspects)}" if self.aspects else ""
        return f"RewardOutput({told}{aspects})"

    def __getitem__(self, rows: Tensor) -> RewardOutput:
        """The outputs at ``rows`` (N,) int64."""
        return RewardOutput(
            self.reward[rows],
            {name: values[rows] for name, values in self.aspects.items()},
            None if self.std is None else self.std[rows],
            None if self.features is None else self.features[rows],
            None if self.words is None else self.words[rows],
            None if self.members is None else self.members[rows],
        )

    @classmethod
    def cat(cls, outputs: Sequence[RewardOutput]) -> RewardOutput:
        """Outputs of consecutive batches as one."""
        stds = [output.std for output in outputs if output.std is not None]
        features = [output.features for output in outputs if output.features is not None]
        words = [output.words for output in outputs if output.words is not None]
        members = [output.members for output in outputs if output.members is not None]
        return cls(
            torch.cat([output.reward for output in outputs]),
            {name: torch.cat([output.aspects[name] for output in outputs]) for name in outputs[0].aspects},
            torch.cat(stds) if len(stds) == len(outputs) else None,
            torch.cat(features) if len(features) == len(outputs) else None,
            torch.cat(padded(words)) if len(words) == len(outputs) else None,
            torch.cat(members) if len(members) == len(outputs) else None,
        )


def padded(tables: Sequence[Tensor]) -> list[Tensor]:
    """Tables (B, W) of numbers per word, made equally wide with NaN."""
    width = max((table.shape[1] for table in tables), default=0)
    return [torch.nn.functional.pad(table, (0, width - table.shape[1]), value=math.nan) for table in tables]


class RewardScorer(nn.Module, ABC):
    """Anything that scores images. Subclasses write ``evaluate`` and, if images must be resized, ``preprocess``.

    Attributes:
        name: as given to ``load_scorer``.
        differentiable: whether gradients flow from the reward to the pixels.
        needs: names of the context (keys of ``CONTEXT``) that ``score`` must be given.
        higher_is_better: False for e.g. BRISQUE; combinators turn the sign.
        statistics: mean and standard deviation of the reward on ordinary pictures, as published; None if unknown.
        gradient_checkpointing: recompute activations in the backward pass to the pixels.
        elsewhere: scoring takes no time of this process's device, so that drawing can go on meanwhile.
    """

    name: str = ""
    differentiable: bool = False
    needs: frozenset[str] = frozenset()
    higher_is_better: bool = True
    statistics: tuple[float, float] | None = None
    gradient_checkpointing: bool = False
    elsewhere: bool = False

    @abstractmethod
    def evaluate(self, images: Tensor, prompts: list[str], context: dict[str, Any]) -> RewardOutput:
        """Scores of checked and preprocessed ``images`` (B, ...), one of ``prompts`` each."""

    def forward(self, images: Tensor, prompts: list[str], context: dict[str, Any]) -> RewardOutput:
        """``evaluate``, so that a distributed wrapper can stand between."""
        return self.evaluate(images, prompts, context)

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Whether pictures of these prompts can be scored, before any is drawn.

        Raises:
            ValueError: they cannot; the prompt is named.
        """

    def preprocess(self, images: Tensor) -> Tensor:
        """What ``evaluate`` sees of ``images`` (B, 3, H, W) in [0, 1]; must be differentiable if the scorer is."""
        return images

    def score(self, images: Images, prompts: Sequence[str], **context: Any) -> RewardOutput:
        """Score ``images`` made for ``prompts`` (B).

        Gradients reach a tensor of images when the scorer is differentiable. Runs under the caller's autocast.

        Raises:
            ValueError: images of a wrong shape, dtype or range, another number of prompts, context that is missing or
                of another length, or (scorers that do not resize) of different sizes; scorer and input are named.
        """
        if isinstance(prompts, str):
            raise ValueError(f"scorer {self.name}: prompts is one string; expected one prompt per image")
        batch = to_pixels(images, f"scorer {self.name}: images")
        if len(prompts) != len(batch):
            raise ValueError(f"scorer {self.name}: {len(batch)} images but {len(prompts)} prompts")
        given = self._checked_context(context, len(batch))
        wanted = torch.is_grad_enabled() and self.differentiable
        with torch.set_grad_enabled(wanted):
            values = self._preprocessed(batch)
            if "source_images" in given:
                sources = to_pixels(given["source_images"], f"scorer {self.name}: source_images")
                given["source_images"] = self._preprocessed(sources)
            if self.gradient_checkpointing and values.requires_grad:
                output: RewardOutput = checkpoint(self.evaluate, values, list(prompts), given, use_reentrant=False)
                return output
            return self.evaluate(values, list(prompts), given)

    def _preprocessed(self, batch: Tensor | list[Tensor]) -> Any:
        device = self.device
        if isinstance(batch, Tensor):
            return self.preprocess(batch.to(device))
        parts = [self.preprocess(picture[None].to(device)) for picture in batch]
        if len({part.shape for part in parts}) > 1:
            sizes = sorted({tuple(part.shape[-2:]) for part in parts})
            raise ValueError(f"scorer {self.name}: images of different sizes {sizes}; expected one size")
        return torch.cat(parts)

    def _checked_context(self, context: dict[str, Any], count: int) -> dict[str, Any]:
        for key in sorted(self.needs):
            if context.get(key) is None:
                raise ValueError(f"scorer {self.name} needs {key}: {CONTEXT[key]}")
        given = {key: value for key, value in context.items() if key in self.needs}
        for key, value in given.items():
            if len(value) != count:
                raise ValueError(f"scorer {self.name}: {count} images but {len(value)} {key}")
        return given

    @property
    def device(self) -> torch.device:
        """Where the weights lie; the CPU without weights."""
        return next((parameter.device for parameter in self.parameters()), torch.device("cpu"))

    def frozen(self) -> RewardScorer:
        """Itself, in eval mode, weights without gradients."""
        self.requires_grad_(False)
        return self.eval()


class Embedder(RewardScorer, ABC):
    """A scorer whose embeddings of pictures and prompts others build on (PAL)."""

    @abstractmethod
    def embed(self, images: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Unit embeddings of preprocessed images, and of prompts, each (B, D) float32."""


def score_in_batches(
    scorer: RewardScorer, images: Images, prompts: Sequence[str], batch_size: int = 32, **context: Any
) -> RewardOutput:
    """``scorer.score`` over any number of images without holding more than ``batch_size`` in the network."""
    outputs = []
    for start in range(0, len(images), batch_size):
        part = slice(start, start + batch_size)
        sliced = {key: value[part] for key, value in context.items() if value is not None}
        outputs.append(scorer.score(images[part], prompts[part], **sliced))
    return RewardOutput.cat(outputs)
