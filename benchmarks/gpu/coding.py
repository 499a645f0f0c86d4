"""Stage 5: the VAE, by how many pictures it codes at once."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .measure import NO_CUDA, peak_of, seconds_of
from .rows import Finding, Row, Stage
from .workshop import Workshop


@torch.no_grad()
def coded(job: str, chunk: int, dtype: torch.dtype | None, shop: Workshop) -> Finding:
    """Seconds per picture, and the peak beyond the weights."""
    adapter, count, side = shop.with_encoders(), shop.scale.vae_pictures, shop.scale.resolution
    kept = adapter.vae.dtype
    vae = adapter.vae.to(dtype or kept)
    small = side // adapter.vae_scale_factor
    shape = (count, 3, side, side) if job == "encode" else (count, adapter.latent_channels, small, small)
    inputs = torch.randn(shape, device=shop.device, dtype=vae.dtype)

    def run() -> list[Tensor]:
        if job == "encode":
            return [vae.encode(part).latent_dist.mean for part in inputs.split(chunk)]
        return [vae.decode(part).sample.clone() for part in inputs.split(chunk)]

    try:
        run()
        figures = {"chunk": chunk, "dtype": str(vae.dtype), "seconds_per_picture": seconds_of(run, 0, 2) / count}
        return Finding(figures | {"peak_gib": peak_of(shop, run)}, notes=() if shop.cuda else (NO_CUDA,))
    finally:
        vae.to(kept)


def rows(shop: Workshop) -> list[Row]:
    chunks = [chunk for chunk in (2, 1, 4, 8) if chunk <= shop.scale.vae_pictures]
    found = [
        Row(f"{job}, {n} at once", 3, partial(coded, job, n, None)) for n in chunks for job in ("encode", "decode")
    ]
    return [
        *found,
        *(Row(f"{job}, 1 at once, fp32", 4, partial(coded, job, 1, torch.float32)) for job in ("encode", "decode")),
    ]


STAGE = Stage("vae", "VAE by chunk size", rows)
