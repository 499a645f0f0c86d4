"""PAL (2406.08469): pluralistic alignment. Users are mixtures of a few prototypes over frozen embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, normalize, softmax

from diffusion_align.rewards.protocol import Embedder, RewardOutput, RewardScorer

from .scorer import TrainedScorer

#: Pull of a new user's mixture to the known users' mean: what a handful of comparisons may change.
PRIOR = 0.02


def projector(width: int, out: int) -> nn.Sequential:
    """The published two-layer GELU projector."""
    return nn.Sequential(nn.Linear(width, width), nn.Dropout(0.2), nn.GELU(), nn.Linear(width, out))


class PALHead(nn.Module):
    """Rewards of embeddings for users.

    PAL-A: minus the distance of f(image) to the user's ideal point sum_k w_k f(P_k).
    PAL-B: the cosine of f(image) and sum_k w_k g_k(prompt), the user's ideal point for that prompt.
    Both times exp(logit_scale); w = softmax(W_u) over K prototypes.
    """

    def __init__(self, variant: Literal["a", "b"], width: int, out: int, prototypes: int, users: int) -> None:
        super().__init__()
        if variant not in ("a", "b"):
            raise ValueError(f"PAL variant {variant!r}: expected 'a' or 'b'")
        self.variant = variant
        self.item = projector(width, out)
        self.mixture = nn.Parameter(0.1 * torch.randn(users, prototypes))
        self.logit_scale = nn.Parameter(torch.tensor(2.3))
        if variant == "a":
            self.prototypes = nn.Parameter(torch.randn(prototypes, width) / width**0.5)
        else:
            self.ideals = nn.ModuleList(projector(width, out) for _ in range(prototypes))

    def per_prototype(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        """f(image) (B, O) and every prototype's ideal point (B, K, O) for embeddings (B, D)."""
        if self.variant == "a":
            points = self.item(self.prototypes)
            return self.item(images), points.expand(len(images), *points.shape)
        return self.item(images), torch.stack([ideal(texts) for ideal in self.ideals], dim=1)

    def reward(self, item: Tensor, ideals: Tensor, mixture: Tensor) -> Tensor:
        """(B,) rewards for mixture logits (B, K)."""
        point = (softmax(mixture, dim=-1).unsqueeze(-1) * ideals).sum(dim=1)
        scale = self.logit_scale.exp()
        if self.variant == "a":
            return -scale * (item - point).norm(dim=-1)
        return scale * (normalize(item, dim=-1) * normalize(point, dim=-1)).sum(dim=-1)


class PALScorer(TrainedScorer):
    """Scores for a user: ``score(images, prompts, users=[...])``.

    Args:
        clip: what embeds images and prompts (any :class:`Embedder`); frozen, and not saved with the scorer.
        clip_name: how ``load_scorer`` finds it again.
        users: names in the order of the mixture's rows.
    """

    kind = "pal"
    name = "pal"
    differentiable = True
    needs = frozenset({"users"})

    def __init__(
        self,
        clip: RewardScorer,
        clip_name: str,
        users: Sequence[str],
        variant: Literal["a", "b"] = "b",
        prototypes: int = 4,
        out: int = 64,
    ) -> None:
        super().__init__()
        if not isinstance(clip, Embedder):
            raise ValueError(f"PAL needs a scorer with image and text embeddings, found {clip.name}")
        self.clip, self.clip_name = clip.frozen(), clip_name
        self.users = [str(user) for user in users]
        with torch.no_grad():
            width = clip.embed(clip.preprocess(torch.zeros(1, 3, 64, 64)), ["a"])[0].shape[-1]
        self.shape = {"variant": variant, "prototypes": prototypes, "out": out}
        self.head = PALHead(variant, width, out, prototypes, len(self.users))

    def preprocess(self, images: Tensor) -> Tensor:
        return self.clip.preprocess(images)

    def embed(self, images: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """The frozen embeddings, each (B, D) float32."""
        assert isinstance(self.clip, Embedder)
        return self.clip.embed(images, prompts)

    def rows(self, users: Sequence[object]) -> Tensor:
        """Row of each user.

        Raises:
            ValueError: a user the scorer does not know.
        """
        unknown = [user for user in users if str(user) not in self.users]
        if unknown:
            raise ValueError(
                f"scorer {self.name}: unknown user {unknown[0]!r} (of {len(self.users)} known ones, "
                f"e.g. {self.users[0]!r}): add a user with add_user, from a few comparisons"
            )
        return torch.tensor([self.users.index(str(user)) for user in users], device=self.device)

    def evaluate(self, images: Tensor, prompts: list[str], context: dict[str, Any]) -> RewardOutput:
        item, ideals = self.head.per_prototype(*self.embed(images, prompts))
        return RewardOutput(self.head.reward(item, ideals, self.head.mixture[self.rows(context["users"])]))

    def add_user(
        self, user: str, images_0: Tensor, images_1: Tensor, prompts: list[str], preferred: Tensor, steps: int = 200
    ) -> PALScorer:
        """Fit a new user's mixture, and nothing else, from N comparisons.

        Args:
            images_0, images_1: (N, 3, H, W) in [0, 1].
            preferred: (N,) P(image 0 is preferred): 0, 0.5 or 1.

        Raises:
            ValueError: the user is known already.
        """
        if user in self.users:
            raise ValueError(f"scorer {self.name}: user {user!r} is known already")
        with torch.no_grad():
            both = [
                self.head.per_prototype(*self.embed(self.preprocess(x.to(self.device)), prompts))
                for x in (images_0, images_1)
            ]
            centre = self.head.mixture.mean(dim=0)
        mixture = centre.clone().requires_grad_()
        optimizer = torch.optim.Adam([mixture], lr=0.1)
        for _ in range(steps):
            rows = mixture.expand(len(prompts), -1)
            logit = self.head.reward(*both[0], rows) - self.head.reward(*both[1], rows)
            loss = binary_cross_entropy_with_logits(logit, preferred.to(logit), reduction="sum")
            loss = loss / len(prompts) + PRIOR * (mixture - centre).square().sum()
            optimizer.zero_grad()
            loss.backward(inputs=[mixture])
            optimizer.step()
        self.users.append(user)
        self.head.mixture = nn.Parameter(torch.cat([self.head.mixture.data, mixture.detach()[None]]))
        self.head.mixture.requires_grad_(False)
        return self

    def trained_module(self) -> nn.Module:
        return self.head

    def settings(self) -> dict[str, Any]:
        return {"clip": self.clip_name, "users": self.users, **self.shape}

    @classmethod
    def build(cls, settings: dict[str, Any], folder: Path) -> Self:
        from diffusion_align.rewards.factory import load_scorer

        return cls(load_scorer(settings["clip"]), settings["clip"], settings["users"], settings["variant"],
                   settings["prototypes"], settings["out"])  # fmt: skip
