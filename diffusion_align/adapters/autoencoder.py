"""The VAE a few pictures at a time, so that what it holds at once does not grow with their number."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from diffusion_align.devices import autocast_dtype, no_autocast

#: Pixels that are coded at once: 2 pictures of 1024 px, 8 of 512 px.
CHUNK_PIXELS = 2 * 1024**2
#: Most pictures at once: more small ones gain nothing on a GPU and leave the caches of a CPU.
LARGEST_CHUNK = 16
#: With a graph a quarter as many: autograd keeps seven times what decoding alone needs
#: (tests/training/policy/test_vae_memory.py).
GRAPH_SHARE = 4
#: How far latents of one picture may be apart, in shares of their size: half precision makes 0.01 to 0.03 of it.
ALIKE = 0.1


def chunk_size(height: int, width: int, with_graph: bool = False) -> int:
    """How many pictures of ``height`` x ``width`` pixels the VAE takes at once unless ``vae_batch_size`` is set."""
    budget = CHUNK_PIXELS // GRAPH_SHARE if with_graph else CHUNK_PIXELS
    return max(1, min(LARGEST_CHUNK, budget // (height * width)))


def check_vae_batch_size(batch_size: int | None) -> None:
    """Raise ValueError unless ``batch_size`` is None or at least 1."""
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"vae_batch_size {batch_size}: expected at least 1 picture at once")


@dataclass(frozen=True)
class LatentSpace:
    """Which latents an autoencoder makes: what tells whether a network that was trained on latents can read others.

    Attributes:
        vae: the autoencoder's class.
        scale, shift: of latents = (the autoencoder's own - shift) * scale; several numbers are one for each channel.
        example: a picture that is always the same, encoded: means of its four quarters, by channel. It stands for the
            weights: a hash of them would be another one in half precision, or where only the decoder was trained on.
            None: not known, as of published networks.
    """

    vae: str
    scale: float | tuple[float, ...]
    shift: float | tuple[float, ...] = 0.0
    example: tuple[float, ...] | None = None

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> LatentSpace:
        """What ``dataclasses.asdict`` made, as JSON gives it back.

        Raises:
            TypeError: a field is missing or unknown.
        """
        fields: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in values.items()}
        return cls(**fields)

    def difference(self, other: LatentSpace) -> str | None:
        """What sets latents of ``other`` apart from these, in words; None: nothing that is known."""
        for name, own, found in (
            ("class", self.vae, other.vae), ("scale", self.scale, other.scale), ("shift", self.shift, other.shift)
        ):  # fmt: skip
            if own != found:
                return f"its {name} is {own}, this model's {found}"
        if self.example is None or other.example is None:
            return None
        if len(self.example) != len(other.example):
            return f"{len(self.example) // 4} channels, this model has {len(other.example) // 4}"
        apart = sum(abs(own - found) for own, found in zip(self.example, other.example, strict=True))
        same = apart <= ALIKE * sum(map(abs, self.example))
        return None if same else "its weights are others: a picture becomes other latents"


def stored_dtype(dtype: torch.dtype, overflows: bool, force_upcast: bool) -> torch.dtype:
    """What a VAE is stored in when the rest of the model is in ``dtype``.

    Args:
        overflows: whether VAEs of the family leave the range of half precision: SDXL's does, SD 1.x's and 2.x's do not.
        force_upcast: the VAE's own setting. diffusers' default is True, so it means nothing where ``overflows`` is
            False: SD 1.x's configs do not have it.
    """
    return torch.float32 if overflows and force_upcast else dtype


@dataclass(frozen=True)
class ChunkedVAE:
    """A diffusers VAE that encodes and decodes in chunks; every part of the package codes pictures through it.

    Attributes:
        vae: an ``AutoencoderKL``.
        batch_size: pictures at once; None depends on their size (``chunk_size``).
        scale_factor: pixels per latent along each side.
        needs_float32: whether fp16 autocast must be kept away from it.
    """

    vae: Any
    batch_size: int | None = None
    scale_factor: int = 8
    needs_float32: bool = False

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of q(latents | pixels), each (B, C, h, w) float32 and scaled.

        Args:
            pixels: (B, 3, H, W) in [-1, 1], on any device: chunks are moved to the VAE's.
        """
        size = self.batch_size or chunk_size(pixels.shape[-2], pixels.shape[-1])
        parts = [self._encode(part) for part in pixels.split(size)]
        mean, std = (torch.cat(side) for side in zip(*parts, strict=True))
        return mean, std

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) float32, about [-1, 1] and not clamped.

        Gradients flow to ``latents``. A chunk's activations are computed again in the backward pass, so that those of
        one chunk are held at a time; without ``batch_size`` chunks are then a quarter as large.
        """
        with_graph = torch.is_grad_enabled() and latents.requires_grad
        height, width = (side * self.scale_factor for side in latents.shape[-2:])
        parts = latents.split(self.batch_size or chunk_size(height, width, with_graph))
        if not with_graph:
            return torch.cat([self._decode(part) for part in parts])
        # The VAE draws nothing: there is no random state to bring back.
        return torch.cat([checkpoint(self._decode, p, use_reentrant=False, preserve_rng_state=False) for p in parts])

    def space(self) -> LatentSpace:
        """Which latents these are."""
        scale, shift = (tuple(v.flatten().tolist()) if isinstance(v, Tensor) else v for v in self._affine())
        y, x = torch.meshgrid(*[torch.linspace(-1, 1, 8 * self.scale_factor)] * 2, indexing="ij")
        mean, _ = self.encode(torch.stack([(3 * x + 2 * y).sin(), (2 * x - 3 * y).cos(), (4 * x * y).sin()])[None])
        example = torch.nn.functional.adaptive_avg_pool2d(mean, 2).flatten().tolist()
        return LatentSpace(type(self.vae).__name__, scale, shift, tuple(round(value, 4) for value in example))

    def _encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        scale, shift = self._affine()
        with self._own_precision():
            posterior = self.vae.encode(pixels.to(self.vae.device, self.vae.dtype)).latent_dist
        return (posterior.mean.float() - shift) * scale, posterior.std.float() * scale

    def _decode(self, latents: Tensor) -> Tensor:
        scale, shift = self._affine()
        with self._own_precision():
            pixels: Tensor = self.vae.decode((latents / scale + shift).to(self.vae.dtype)).sample
        return pixels.float()

    def _affine(self) -> tuple[float | Tensor, float | Tensor]:
        """Scale and shift of latents = (the VAE's own - shift) * scale: numbers, or (1, C, 1, 1) with statistics."""
        config = self.vae.config
        if config.get("latents_mean") is not None and config.get("latents_std") is not None:
            mean, std = (
                torch.tensor(values, device=self.vae.device).view(1, -1, 1, 1)
                for values in (config.latents_mean, config.latents_std)
            )
            return config.scaling_factor / std, mean
        return config.scaling_factor, getattr(config, "shift_factor", None) or 0.0

    @contextmanager
    def _own_precision(self) -> Iterator[None]:
        """Keep autocast away from what is in half precision already (its norms would take twice the memory), and fp16
        autocast from what overflows."""
        device = self.vae.device
        overflows = self.needs_float32 and autocast_dtype(device) == torch.float16
        with no_autocast(device) if self.vae.dtype != torch.float32 or overflows else nullcontext():
            yield
