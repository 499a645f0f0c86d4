"""The judges of latents for dynamic guidance, by name: evaluators trained here and published ones."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from torch import Tensor

from diffusion_align.adapters import Conditioning
from diffusion_align.adapters.autoencoder import LatentSpace

from .evaluator import load_evaluator
from .published_latents import INSTEAD


class LatentJudge(Protocol):
    """What dynamic guidance needs from a judge. One that has ``latents``, a ``LatentSpace`` or None, says with it which
    autoencoder it was made for.

    Attributes:
        kinds: what it judges.
        clean: whether it is shown predictions of clean latents, instead of the next, noisy ones.
        calibrated: whether its scores are standardised for the noise level.
    """

    kinds: tuple[str, ...]
    clean: bool
    calibrated: bool

    def to(self, device: Any) -> Any:
        """Move the weights."""

    def check(self, x: Tensor, cond: Conditioning) -> None:
        """Raises ``ValueError``: it was made for other latents (B, C, h, w) or prompt embeddings."""

    def read(self, cond: Conditioning, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        """What it needs from the prompts (B), tensors (B, ...); called once a run."""

    def judge(self, x: Tensor, log_snr: Tensor, read: tuple[Tensor, ...], scale: Tensor) -> dict[str, Tensor]:
        """Scores (B,) by kind, higher is better, of latents (B, C, h, w) at ``log_snr`` (B,), to which the guidance
        ``scale`` (B,) led."""


#: Published judges, by the name before the colon, as "module:function" of a path (None: from the hub).
PUBLISHED: Mapping[str, str] = MappingProxyType(
    {"latent-clip": ".latent_clip:load_latent_clip", "lrm": ".lrm:load_lrm"}
)


def load_judge(name: str | Path) -> LatentJudge:
    """A judge by name: a shipped evaluator, the folder of a trained one, or "latent-clip", "latent-clip:PATH",
    "lrm:FOLDER".

    Raises:
        FileNotFoundError, ValueError: there is none, or its weights do not fit.
    """
    published, _, path = str(name).partition(":")
    if published not in PUBLISHED:
        return load_evaluator(name)
    module, _, function = PUBLISHED[published].partition(":")
    load: Callable[[str | None], LatentJudge] = getattr(import_module(module, __package__), function)
    return load(path or None)


def check_kinds(judge: LatentJudge, kinds: Sequence[str]) -> None:
    """Raises ``ValueError`` if ``judge`` does not judge one of ``kinds``."""
    missing = [kind for kind in kinds if kind not in judge.kinds]
    if missing:
        raise ValueError(f"evaluator judges {', '.join(judge.kinds)}, not {', '.join(missing)}")


def check_latents(judge: LatentJudge, found: Callable[[], LatentSpace]) -> None:
    """Whether ``judge`` was made for latents of the model's autoencoder; a warning where it does not say which.

    Raises:
        ValueError: it was made for those of another.
    """
    latents: LatentSpace | None = getattr(judge, "latents", None)
    if latents is None:
        warnings.warn(
            "the evaluator does not say which autoencoder's latents it was trained on, as those of earlier versions: "
            "their channels and size are checked, the autoencoder is not",
            stacklevel=2,
        )
        return
    difference = latents.difference(found())
    if difference is not None:
        raise ValueError(f"the evaluator was trained on the latents of another autoencoder ({difference}): {INSTEAD}")
