"""Guidance away from a negative model: against two models whose predictions are combined by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from diffusion_align.adapters import Adapter, load_adapter
from diffusion_align.adapters.prompts import conditioning
from diffusion_align.commands.opening import contrasted
from diffusion_align.evaluation.effective_scale import ScaleMeter
from diffusion_align.guidance.contrastive import ContrastiveGuidance
from diffusion_align.guidance.modular import modular_pipeline
from diffusion_align.sampling.control import SamplingOptions
from diffusion_align.sampling.sampler import sample
from tests.adapters.loras.policies import trained

PROMPTS, SEEDS, STEPS, SCALE = ["a large red star", "two small blue rings"], [1, 2], 3, 4.0


@pytest.fixture(scope="module")
def loras(sdxl_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders "positive" and "negative"; they change different layers."""
    folder = tmp_path_factory.mktemp("loras")
    trained(sdxl_folder, 1).save(folder / "positive")
    trained(sdxl_folder, 2, rank=2, targets=("to_q", "conv1")).save(folder / "negative")
    return folder


@torch.no_grad()
def by_hand(positive: Adapter, negative: Adapter) -> Tensor:
    """The pictures (N, 3, H, W) of two models: one predicts with the prompt, the other with the null prompt."""
    scheduler = DDIMScheduler.from_config(positive.pipeline.scheduler.config)
    scheduler.set_timesteps(STEPS)
    x = torch.cat([torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in SEEDS])
    cond, null = conditioning(positive, PROMPTS, 64, 64), conditioning(negative, [None, None], 64, 64)
    for t in scheduler.timesteps:
        with_prompt = positive.predict(x, t.expand(2), cond).output
        without = negative.predict(x, t.expand(2), null).output
        x = scheduler.step(without + SCALE * (with_prompt - without), t, x).prev_sample
    return (positive.decode(x) / 2 + 0.5).clamp(0, 1)


@pytest.mark.slow
@pytest.mark.parametrize("keep", [1.0, 0.25])
def test_the_null_branch_has_the_negative_models_weights(keep: float, loras: Path, sdxl_folder: Path) -> None:
    positive = load_adapter(sdxl_folder).load_weights(loras / "positive")
    negative = load_adapter(sdxl_folder).load_weights(f"{loras / 'positive'}:{keep}", loras / "negative")
    want = by_hand(positive, negative)
    plain = sample(positive, PROMPTS, num_inference_steps=STEPS, guidance=SCALE, seeds=SEEDS)
    both = positive.load_negative(loras / "negative", keep=keep)
    drawn = sample(both, PROMPTS, num_inference_steps=STEPS, guidance=ContrastiveGuidance(SCALE), seeds=SEEDS)
    assert (drawn.images - want).abs().max() < 1e-4
    assert (drawn.images - plain.images).abs().max() > 1e-2
    assert drawn.nfe == 2 * STEPS
    # Nothing else sees the negative model.
    again = sample(both, PROMPTS, num_inference_steps=STEPS, guidance=SCALE, seeds=SEEDS)
    torch.testing.assert_close(again.images, plain.images, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_stopping_effective_scale_and_the_modular_pipeline(loras: Path, sdxl_folder: Path) -> None:
    adapter = load_adapter(sdxl_folder).load_weights(loras / "positive").load_negative(loras / "negative")
    meter = ScaleMeter()
    stopped = sample(
        adapter, PROMPTS, num_inference_steps=4, guidance=ContrastiveGuidance(SCALE, stop=0.5), seeds=SEEDS,
        options=SamplingOptions(on_guided=meter),
    )  # fmt: skip
    assert stopped.nfe == 6
    mean = meter.mean()
    assert mean.by_step[2:] == pytest.approx([1.0, 1.0], rel=1e-3)
    assert mean.orthogonal > 1e-3  # what the negative model adds is no scale
    guider = ContrastiveGuidance(SCALE)
    ours = sample(adapter, PROMPTS[:1], num_inference_steps=2, guidance=guider, seeds=SEEDS[:1])
    theirs = modular_pipeline(adapter, guider)(
        prompt=PROMPTS[:1], num_inference_steps=2, height=64, width=64, output="images", output_type="pt",
        generator=[torch.Generator().manual_seed(SEEDS[0])],
    )  # fmt: skip
    assert (ours.images - torch.as_tensor(theirs)).abs().max() < 1e-4


@pytest.mark.slow
def test_merged_once_it_is_lora_arithmetic(loras: Path, sdxl_folder: Path) -> None:
    sources = contrasted([f"{loras / 'positive'}:0.5"], [str(loras / "negative")], 1.5)
    assert sources == (f"{loras / 'positive'}:0.75", f"{loras / 'negative'}:-1.5")
    merged = load_adapter(sdxl_folder).load_weights(*sources).loras.whole()
    parts = [load_adapter(sdxl_folder).load_weights(loras / name).loras.whole() for name in ("positive", "negative")]
    assert merged.keys() == parts[0].keys() | parts[1].keys()
    for address, layer in merged.items():
        added = [
            weight * (part[address].up.flatten(1) @ part[address].down.flatten(1))
            for weight, part in zip((0.75, -1.5), parts, strict=True)
            if address in part
        ]
        torch.testing.assert_close(layer.up.flatten(1) @ layer.down.flatten(1), sum(added), rtol=1e-4, atol=1e-5)


def test_what_a_negative_model_does_not_go_with_is_named(loras: Path, sdxl_folder: Path, tmp_path: Path) -> None:
    adapter = load_adapter(sdxl_folder)
    with pytest.raises(ValueError, match="needs a negative model"):
        sample(adapter, PROMPTS, num_inference_steps=1, guidance=ContrastiveGuidance(SCALE), seeds=SEEDS)
    with pytest.raises(FileNotFoundError, match="expected the LoRA of a negative model"):
        adapter.load_negative(tmp_path / "none")
    with pytest.raises(ValueError, match="expected the LoRA of a negative model"):
        adapter.load_negative(tmp_path)
    adapter.load_negative(loras / "negative")
    assert adapter.loras.has_negative
    assert not adapter.has_reference
    assert adapter.loras.whole() == {}
    with pytest.raises(ValueError, match="load it once"):
        adapter.load_negative(loras / "negative")
    with pytest.raises(ValueError, match="load LoRAs before"):
        adapter.load_weights(loras / "positive")
