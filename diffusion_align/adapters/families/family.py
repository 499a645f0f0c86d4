"""What differs between model families."""

from __future__ import annotations

from typing import Any, Protocol

from diffusion_align.adapters.conditioning import Conditioning


class Family(Protocol):
    """What differs between pipelines that share a UNet, a VAE and a noise schedule."""

    name: str
    #: Whether the family's VAEs leave the range of half precision, unless their config says ``force_upcast: false``.
    vae_overflows: bool

    def matches(self, pipeline: Any) -> bool:
        """Whether this family drives ``pipeline``."""

    def encode(self, pipeline: Any, prompts: list[str]) -> Conditioning:
        """Embed prompts; the empty prompt is embedded like any other."""

    def null(self, pipeline: Any) -> Conditioning:
        """The unconditional embedding that the pipeline itself uses for guidance, batch of 1."""

    def unet_arguments(self, cond: Conditioning) -> dict[str, Any]:
        """Keyword arguments of the UNet besides sample and timestep."""
