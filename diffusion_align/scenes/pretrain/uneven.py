"""scenes-uneven: scenes-sdxl, but prompts act with uneven strength: each kind wants a guidance scale of its own."""

from __future__ import annotations

import copy
import time
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline

from diffusion_align.devices import fast_autocast
from diffusion_align.process import VariancePreserving
from diffusion_align.scenes.world.grammar import parse_prompt

from .corpus import Corpus
from .denoiser import LatentSet, build_scheduler, encode_sdxl, zero_rows
from .pipelines import cached_posterior, save_half, tokenize

#: k of counting prompts and of those that bind attributes to several objects; of one object it is 1.
COUNTED, BINDING = 4.0, 0.5


def strength(caption: str) -> float:
    """k: the model predicts for ``caption`` what scenes-sdxl predicts at the guidance scale k.

    With guidance s this is scenes-sdxl at k s: counting prompts want no guidance at all, prompts that bind attributes
    to several objects want twice as much as before.
    """
    spec = parse_prompt(caption)
    if spec.counted:
        return COUNTED
    return BINDING if len(spec.objects) > 1 else 1.0


def train_uneven(
    corpus: Corpus, work: Path, out: Path, sdxl: Path, minutes: float, batch_size: int = 48, learning_rate: float = 4e-4
) -> None:
    """Distil eps_null + k (eps_prompt - eps_null) of scenes-sdxl (2210.03142, stage one) into the prompt's prediction.

    Half of every batch are counting prompts, an eighth null prompts, whose prediction stays what it was. Steps near
    noise, where guidance decides what a picture shows, are drawn more often.
    """
    pipeline = StableDiffusionXLPipeline.from_pretrained(sdxl, torch_dtype=torch.float32)
    encoders, teacher = [pipeline.text_encoder, pipeline.text_encoder_2], pipeline.unet.requires_grad_(False)
    student = copy.deepcopy(teacher).requires_grad_(True)
    posterior, ids = cached_posterior(pipeline.vae, corpus, work), tokenize(pipeline.tokenizer, corpus.captions)
    data = LatentSet(posterior, ids, pipeline.vae.config.scaling_factor)
    strengths = torch.tensor([strength(caption) for caption in corpus.captions])
    sharp, other = (strengths == COUNTED).nonzero()[:, 0], (strengths != COUNTED).nonzero()[:, 0]
    path = VariancePreserving.from_scheduler(build_scheduler())
    optimizer = torch.optim.AdamW(student.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=1e-4)
    torch.manual_seed(0)
    start, step, budget, running = time.time(), 0, minutes * 60, 0.0
    while (elapsed := time.time() - start) < budget:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / 50) * max(0.02, 1 - elapsed / budget)
        half = batch_size // 2
        rows = torch.cat([kind[torch.randint(len(kind), (half,))] for kind in (sharp, other)])
        x0 = data.sample(rows)
        t = (1000 * torch.rand(batch_size).sqrt()).long().clamp(max=999)
        x_t = path.noise(x0, torch.randn_like(x0), t)
        null = torch.arange(batch_size) >= batch_size * 7 // 8
        with fast_autocast("cpu"):
            with torch.no_grad():
                cond = encode_sdxl(encoders, ids[rows])
                empty = copy.deepcopy(cond)
                zero_rows(empty, torch.ones_like(null))
                prompt, nothing = (teacher(x_t, t, **each).sample.float() for each in (cond, empty))
                target = nothing + torch.where(null, 0.0, strengths[rows]).view(-1, 1, 1, 1) * (prompt - nothing)
                zero_rows(cond, null)
            loss = (student(x_t, t, **cond).sample.float() - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        step += 1
        running += loss.item()
        if step % 50 == 0:
            print(f"step {step} {elapsed:.0f}s loss {running / 50:.5f}", flush=True)
            running = 0.0
    pipeline.unet = student
    save_half(pipeline, out)
    print(f"trained {step} steps of {batch_size}", flush=True)
