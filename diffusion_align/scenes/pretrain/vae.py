"""The autoencoder of the scenes world: AutoencoderKL, factor 4, four latent channels."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from diffusion_align.devices import fast_autocast

from .corpus import Corpus


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
        force_upcast=False,
    )


def pixels(images: object, index: Tensor) -> Tensor:
    """Rows ``index`` of a uint8 array (N, H, W, 3) as float (B, 3, H, W) in [-1, 1]."""
    batch = torch.stack([torch.from_numpy(images[int(i)].copy()) for i in index])  # type: ignore[index]
    return batch.permute(0, 3, 1, 2).float() / 127.5 - 1.0


def train_vae(corpus: Corpus, out: Path, minutes: float, batch_size: int = 16, seed: int = 0) -> AutoencoderKL:
    """Reconstruction (L1 + L2 + gradients, so that edges stay sharp) with a light KL term.

    The first half of the budget sees 32-pixel crops: four times as many steps while the filters form. An autoencoder
    that is already in ``out`` is trained on, on whole images and with half the learning rate.
    """
    torch.manual_seed(seed)
    resumed = (out / "config.json").is_file()
    if resumed:
        vae = AutoencoderKL.from_pretrained(out)
    else:
        vae = build_vae()
        with torch.no_grad():  # start nearly deterministic: unit posterior noise would drown the first, small codes
            vae.quant_conv.bias[4:] -= 6
    peak = 1e-3 if resumed else 2e-3
    optimizer = torch.optim.Adam(vae.parameters(), lr=2e-3, betas=(0.9, 0.99))
    start, step, budget = time.time(), 0, minutes * 60
    while (elapsed := time.time() - start) < budget:
        for group in optimizer.param_groups:
            group["lr"] = peak * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * (1 - elapsed / budget))
        x = pixels(corpus.images, torch.randint(len(corpus.captions), (batch_size,)))
        if not resumed and elapsed < budget / 2:
            top, left = (4 * int(v) for v in torch.randint(0, 9, (2,)))
            x = x[:, :, top : top + 32, left : left + 32]
        with fast_autocast("cpu"):
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample()).sample.float()
        edges = sum(F.l1_loss(y.diff(dim=d), x.diff(dim=d)) for d in (2, 3))
        loss = F.l1_loss(y, x) + F.mse_loss(y, x) + edges + 2e-6 * posterior.kl().float().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 100 == 0:
            print(f"vae step {step} {elapsed:.0f}s l1 {F.l1_loss(y, x):.4f} kl {posterior.kl().mean():.0f}", flush=True)
            vae.save_pretrained(out)
    with torch.no_grad():
        latents = encode_corpus(vae, corpus, range(1024))[:, :4]
    vae.register_to_config(scaling_factor=round(float(1 / latents.std()), 5))
    vae.save_pretrained(out)
    return vae


@torch.no_grad()
def encode_pixels(vae: AutoencoderKL, x: Tensor) -> Tensor:
    """Posterior mean and standard deviation (B, 8, h, w) of pixels (B, 3, H, W), not yet scaled."""
    with fast_autocast("cpu"):
        dist = vae.encode(x).latent_dist
    return torch.cat([dist.mean.float(), dist.std.float()], dim=1)


def encode_corpus(vae: AutoencoderKL, corpus: Corpus, rows: range, batch_size: int = 128) -> Tensor:
    """Posterior parameters (N, 8, 16, 16) of the corpus' images ``rows``."""
    batches = torch.arange(rows.start, rows.stop).split(batch_size)
    return torch.cat([encode_pixels(vae, pixels(corpus.images, batch)) for batch in batches])
