"""Stage 2: the product itself on the device, with the shipped miniature, whose answers are known from the CPU."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from diffusion_align.adapters import load_adapter
from diffusion_align.guidance.dynamic import DynamicGuidance
from diffusion_align.sampling.sampler import generate, sample
from diffusion_align.training.online.config import GRPOConfig
from diffusion_align.training.pairs.config import DPOConfig, InPOConfig
from diffusion_align.training.run import train

from .reference import answer
from .rows import Finding, Goal, Row, Stage
from .workshop import Scale, Workshop

PROMPTS = ("one large red star on a light background", "two small blue circles on a dark background")
#: Largest difference of a step's loss between bf16 on the device and fp32 on the CPU, at beta 500: twice what bf16
#: makes of DPO's 20 steps on a CPU (0.031; the first gradient's norm is 0.0% off).
LOSS_TOLERANCE = 0.06
#: Largest mean difference between pictures, in [0, 1].
PICTURE_TOLERANCE = 0.02


def settings(scale: Scale, folder: Path, precision: str) -> dict[str, Any]:
    return {
        "max_steps": scale.product_steps, "per_device_train_batch_size": 4, "beta": 500.0, "learning_rate": 1e-4,
        "max_pairs": 64, "output_dir": str(folder), "overwrite_output_dir": True, "mixed_precision": precision,
        "logging_steps": 1, "progress": False, "report_to": "none", "dataloader_num_workers": 0,
    }  # fmt: skip


def run_steps(
    method: str, scale: Scale, folder: Path, precision: str, weights: Literal["fp32", "bf16"] = "fp32"
) -> dict[str, list[float]]:
    """Loss and gradient norm of every step of a run through ``train``."""
    common = settings(scale, folder, precision) | {"weight_dtype": weights}
    config = DPOConfig(**common) if method == "dpo" else InPOConfig(inversion_steps=4, **common)
    lines = [line for line in train(config).history if "loss" in line]
    return {name: [line[name] for line in lines] for name in ("loss", "grad_norm")}


def losses_agree(method: str, half: bool, shop: Workshop) -> Finding:
    """bf16 on the device, its weights stored in it if ``half``, against fp32 on the CPU, step by step."""
    precision = "bf16" if shop.cuda else "no"
    found = run_steps(method, shop.scale, shop.folder / method, precision, "bf16" if half and shop.cuda else "fp32")
    expected = answer(shop, f"losses-{method}")
    apart = gradient = None
    if expected:
        apart = max(abs(a - b) for a, b in zip(found["loss"], expected["loss"], strict=True))
        gradient = abs(found["grad_norm"][0] / expected["grad_norm"][0] - 1)
    late = "the CPU had no answer yet"
    goals = (
        Goal.at_most(f"losses within {LOSS_TOLERANCE} of the CPU's in fp32", apart, LOSS_TOLERANCE, late),
        Goal.at_most("the first gradient's norm within 2% of the CPU's", gradient, 0.02, late),
    )
    figures = {"precision": precision, "largest_difference": apart, "first_gradient_apart": gradient}
    figures |= {"first": found["loss"][0], "last": found["loss"][-1]}
    return Finding(figures, goals, () if shop.cuda else ("both runs are fp32 on the CPU",))


def self_test(shop: Workshop) -> Finding:
    """GRPO stops with an error where sampler and update disagree about the same step's probability."""
    common = settings(shop.scale, shop.folder / "grpo", "bf16" if shop.cuda else "no") | {"max_steps": 1}
    for name in ("beta", "max_pairs", "dataloader_num_workers"):
        del common[name]
    result = train(GRPOConfig(num_generations=2, prompts_per_rollout=2, train_steps=2, num_inference_steps=4, **common))
    passed = result.step == 1
    return Finding({"reward": result.history[-1]["reward"]}, (Goal("on-policy self-test passes", None, passed),))


def guidance_chooses(shop: Workshop) -> Finding:
    """Dynamic guidance on the device."""
    guider = DynamicGuidance()
    adapter = load_adapter("scenes-sdxl", device=shop.device)
    steps = shop.scale.product_steps
    samples = sample(adapter, PROMPTS, num_inference_steps=steps, guidance=guider, seeds=(1, 2))
    known = set(guider.candidates.tolist())
    inside = all(scale in known for record in samples.records for scale in record["scales"])
    figures = {"steps": steps, "scales_used": len({s for record in samples.records for s in record["scales"]})}
    return Finding(figures, (Goal("every scale is one of the candidates", None, inside),))


def pipeline_agrees(shop: Workshop) -> Finding:
    """``generate`` against the diffusers pipeline with the same seeds, in fp32."""
    adapter = load_adapter("scenes-sdxl", device=shop.device)
    steps = shop.scale.product_steps
    ours = generate(adapter, PROMPTS, num_inference_steps=steps, seeds=(1, 2), guidance_scale=5.0)
    adapter.pipeline.set_progress_bar_config(disable=True)
    theirs = adapter.pipeline(
        list(PROMPTS), num_inference_steps=steps, guidance_scale=5.0, output_type="pt",
        generator=[torch.Generator().manual_seed(seed) for seed in (1, 2)],
    ).images.cpu()  # fmt: skip
    return Finding({"steps": steps, **difference(ours, theirs)}, (same_pictures(ours, theirs),))


def variant_agrees(shop: Workshop, attention: str, compiled: bool) -> Finding:
    """The same pictures with another attention, or with compiled blocks."""
    dtype = torch.bfloat16 if shop.cuda else torch.float32
    steps, pictures = shop.scale.product_steps, []
    for changed in (False, True):
        adapter = load_adapter("scenes-sdxl", dtype=dtype, device=shop.device)
        if changed:
            adapter.optimize(attention=attention)
            if compiled:
                adapter.unet.compile_repeated_blocks(backend=backend(shop))
        pictures.append(generate(adapter, PROMPTS, num_inference_steps=steps, seeds=(1, 2)))
    notes = () if shop.scale.true_size or not compiled else ("traced, not compiled: backend eager",)
    return Finding(difference(*pictures), (same_pictures(*pictures),), notes)


def backend(shop: Workshop) -> str:
    """A small run traces its blocks but calls no compiler, which takes longer than all the rest of it."""
    return "inductor" if shop.scale.true_size else "eager"


def difference(a: torch.Tensor, b: torch.Tensor) -> dict[str, float]:
    return {"mean_difference": float((a - b).abs().mean()), "largest_difference": float((a - b).abs().max())}


def same_pictures(a: torch.Tensor, b: torch.Tensor) -> Goal:
    return Goal.at_most(
        f"pictures within {PICTURE_TOLERANCE} on average", float((a - b).abs().mean()), PICTURE_TOLERANCE
    )


STAGE = Stage(
    "product",
    "The product on the device",
    lambda shop: [
        Row("generate equals the pipeline", 5, pipeline_agrees),
        Row("dpo", 12, partial(losses_agree, "dpo", False)),
        Row("inpo", 8, partial(losses_agree, "inpo", False)),
        Row("dpo, weights in bf16", 6, partial(losses_agree, "dpo", True)),
        Row("inpo, weights in bf16", 6, partial(losses_agree, "inpo", True)),
        Row("grpo self-test", 6, self_test),
        Row("dynamic guidance", 4, guidance_chooses),
        Row("xformers", 5, lambda shop: variant_agrees(shop, "xformers", False), needs="xformers"),
        Row("torch.compile", 15, lambda shop: variant_agrees(shop, "sdpa", True)),
    ],
)
