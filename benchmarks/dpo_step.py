"""The DPO step against the published scripts' way of doing it, on the same pairs, trained weights and dtype.

The baseline follows the official Diffusion-DPO script: a second UNet as reference, one pair per micro-step with
gradient accumulation, and VAE and text encoders run inside the step. Ours is the code users run: ``PairMethod.loss`` on
cached latents and prompt embeddings, one fused forward, the reference by switching the adapters off.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, mse_loss

from diffusion_align.adapters import Adapter, Conditioning, load_adapter
from diffusion_align.data import PairBatch
from diffusion_align.training.pairs.config import DPOConfig
from diffusion_align.training.pairs.method import PairMethod
from diffusion_align.training.pairs.noising import GaussianNoising

from .harness import ratio_interval, time_interleaved, write_result
from .sdxl import build_random_sdxl

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks dpo-step", description=__doc__)
    parser.add_argument("--model", choices=("scenes-sdxl", "sdxl-random"), default="scenes-sdxl")
    parser.add_argument("--vs", choices=("baseline",), default="baseline")
    parser.add_argument("--policy", choices=("lora", "full"), default="lora")
    parser.add_argument("--pairs", type=int, default=None, help="pairs per step (16; sdxl-random: 4)")
    parser.add_argument("--resolution", type=int, default=None, help="pixels (the model's own)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default=None, help="stored weights (fp32; sdxl-random: bf16)")
    parser.add_argument("--checkpointing", choices=("none", "attention", "full"), default="none")
    parser.add_argument("--compile", action="store_true", help="torch.compile our transformer blocks")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args(argv)
    random = args.model == "sdxl-random"
    pairs = args.pairs or (4 if random else 16)
    dtype = DTYPES[args.dtype or ("bf16" if random else "fp32")]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    torch.manual_seed(args.seed)
    adapter = build_random_sdxl(device, dtype) if random else load_adapter(args.model, dtype=dtype, device=device)
    reference = copy.deepcopy(adapter.unet).cpu()
    if args.policy == "lora":
        adapter.train_lora(rank=8)
    else:
        adapter.train_full(reference_dtype=dtype)
    adapter.optimize(args.checkpointing, "sdpa", args.compile)
    batch = make_batch(adapter, pairs, args.resolution or adapter.default_resolution, args.seed)
    ours = our_step(adapter, cached(adapter, batch), dtype)
    memory = {"ours": peak_memory(ours)} if device.type == "cuda" else {}
    baseline = baseline_step(adapter, reference.to(device), batch, dtype)
    if memory:
        memory["baseline"] = peak_memory(baseline)
        if args.policy == "full":  # ours has a reference of its own, which the baseline must not be charged for
            memory["baseline"] -= sum(p.numel() * p.element_size() for p in reference.parameters())
    seconds = time_interleaved({"ours": ours, "baseline": baseline}, args.rounds)
    result: dict[str, Any] = {
        "model": args.model,
        "policy": args.policy,
        "pairs_per_step": pairs,
        "dtype": str(dtype).removeprefix("torch."),
        "gradient_checkpointing": args.checkpointing,
        "compiled": args.compile,
        "seed": args.seed,
        "pairs_per_second_over_baseline": ratio_interval(seconds["baseline"], seconds["ours"]),
    }
    if memory:
        medians = {name: sorted(values)[len(values) // 2] for name, values in seconds.items()}
        result["seconds_per_step"] = medians
        result["peak_memory_gib"] = {name: value / 2**30 for name, value in memory.items()}
        result["memory_over_baseline"] = memory["ours"] / memory["baseline"]
    suffix = f"{args.model}_{args.policy}".replace("-", "_")
    write_result(f"dpo_step_{suffix}", result, args.out)


def make_batch(adapter: Adapter, pairs: int, resolution: int, seed: int) -> PairBatch:
    """Random pictures with distinct captions: the cost of a step does not depend on what they show."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(2, pairs, 3, resolution, resolution, generator=generator) * 2 - 1
    size = torch.tensor([resolution, resolution, 0, 0, resolution, resolution], dtype=torch.float32)
    return PairBatch(
        captions=[f"a large red star, number {i}" for i in range(pairs)],
        size_ids=size.expand(2, pairs, 6).contiguous(),
        preference=torch.ones(pairs),
        weight=torch.ones(pairs),
        seeds=torch.arange(pairs),
        keys=[str(i) for i in range(pairs)],
        pixels=pixels,
        posterior=None,
        cond=None,
    )


@torch.no_grad()
def cached(adapter: Adapter, batch: PairBatch) -> PairBatch:
    """The same batch as the cache would give it: latents and prompt embeddings instead of pixels."""
    assert batch.pixels is not None
    rows = [adapter.encode_posterior(image[None]) for image in batch.pixels.flatten(0, 1)]
    shape = (2, len(batch), *rows[0][0].shape[1:])
    mean, std = (torch.cat([row[i] for row in rows]).view(shape).half() for i in range(2))
    cond = adapter.encode_prompts(batch.captions)
    return PairBatch(
        batch.captions, batch.size_ids, batch.preference, batch.weight, batch.seeds, batch.keys, None, (mean, std),
        Conditioning(cond.embeds, cond.pooled),
    )  # fmt: skip


class _Once:
    """A source of one batch, over and over."""

    def __init__(self, batch: PairBatch) -> None:
        self.batch = batch

    def __iter__(self) -> Iterator[PairBatch]:
        while True:
            yield self.batch

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """There is no position."""


def our_step(adapter: Adapter, batch: PairBatch, dtype: torch.dtype) -> Callable[[], None]:
    """One optimiser step as ``train`` does it."""
    parameters = list(adapter.trainable_parameters().values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
    method = PairMethod(
        DPOConfig(beta=5000.0), adapter, _Once(batch), GaussianNoising(adapter), lambda: autocast(adapter, dtype)
    )

    def step() -> None:
        loss, _ = method.loss(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def baseline_step(adapter: Adapter, reference: Any, batch: PairBatch, dtype: torch.dtype) -> Callable[[], None]:
    """One optimiser step as the published scripts do it."""
    parameters = list(adapter.trainable_parameters().values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)
    pipeline, device, pairs = adapter.pipeline, adapter.device, len(batch)
    assert batch.pixels is not None
    pixels = batch.pixels

    def step() -> None:
        for i in range(pairs):
            with torch.no_grad():
                image = pixels[:, i].to(device, pipeline.vae.dtype)
                latents = pipeline.vae.encode(image).latent_dist.sample() * pipeline.vae.config.scaling_factor
                latents = latents.float()
                cond = adapter.encode_prompts([batch.captions[i]]).repeat(2)
            noise = torch.randn_like(latents[:1]).repeat(2, 1, 1, 1)
            t = torch.randint(0, 1000, (1,), device=device).repeat(2)
            noisy = adapter.path.noise(latents, noise, t)
            arguments: dict[str, Any] = {"encoder_hidden_states": cond.embeds}
            if cond.pooled is not None:
                time_ids = batch.size_ids[:, i].to(device)
                arguments["added_cond_kwargs"] = {"text_embeds": cond.pooled, "time_ids": time_ids}
            with autocast(adapter, dtype):
                prediction = adapter.unet(noisy, t, **arguments).sample
                with torch.no_grad():
                    expected = reference(noisy, t, **arguments).sample
            loss = published_loss(prediction, expected, noise, beta=5000.0) / pairs
            loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def published_loss(prediction: Tensor, expected: Tensor, noise: Tensor, beta: float) -> Tensor:
    """Diffusion-DPO's loss of one pair, chosen first."""
    errors = mse_loss(prediction.float(), noise.float(), reduction="none").mean(dim=(1, 2, 3))
    ref_errors = mse_loss(expected.float(), noise.float(), reduction="none").mean(dim=(1, 2, 3))
    inside = -0.5 * beta * ((errors[0] - errors[1]) - (ref_errors[0] - ref_errors[1]))
    return -logsigmoid(inside)


def autocast(adapter: Adapter, dtype: torch.dtype) -> torch.autocast:
    """bf16 autocast for bf16 weights; both variants compute in the same precision."""
    return torch.autocast(adapter.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


def peak_memory(step: Callable[[], None]) -> int:
    """Peak bytes on the GPU during one step, of everything that is resident."""
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()
