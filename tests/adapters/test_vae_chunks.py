"""The VAE takes a few pictures at a time, whoever asks, and the results are those of all at once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion_align.adapters import Adapter, load_adapter
from diffusion_align.adapters.autoencoder import chunk_size
from diffusion_align.commands.guiding.guidance_options import EvaluateGuidanceOptions
from diffusion_align.commands.options import AnnotateOptions, GenerateOptions
from diffusion_align.data import (
    Comparisons,
    PairLoader,
    PairTransform,
    PixelExamples,
    build_cache,
    fingerprint,
    load_pairs,
)
from diffusion_align.data.holes import Holes
from diffusion_align.evaluation.compare import SamplingSettings, sample_and_score
from diffusion_align.guidance.dynamic import DynamicGuidance
from diffusion_align.guidance.modular import modular_pipeline
from diffusion_align.sampling.control import SamplingOptions
from diffusion_align.sampling.sampler import generate, sample
from diffusion_align.sampling.steering import fk_steering, reward_gradient
from diffusion_align.training.engine.accelerator import build_accelerator
from diffusion_align.training.evaluators.config import EvaluatorConfig
from diffusion_align.training.evaluators.noisy_pairs import EncodedPairs
from diffusion_align.training.methods import build_job
from diffusion_align.training.online.config import RAFTConfig
from diffusion_align.training.online.gradients.config import DRaFTConfig
from diffusion_align.training.online.rollout import RolloutEngine
from diffusion_align.training.pairs.config import DPOConfig
from diffusion_align.training.pairs.job import dpo_job
from diffusion_align.training.pairs.method import PairMethod
from diffusion_align.training.pairs.noising import GaussianNoising
from tests.brightness import Brightness

PROMPTS = ["a red circle", "two blue squares", "a green star", "a yellow triangle", "a grey moon"]
SEEDS = [1, 2, 3, 4, 5]
SHORT: dict[str, Any] = {"num_inference_steps": 2, "seeds": SEEDS}


@pytest.fixture
def adapter(sdxl_folder: Path) -> Adapter:
    return load_adapter(sdxl_folder)


def pictures(count: int, side: int = 64) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def noise(count: int) -> Tensor:
    return torch.randn(count, 4, 16, 16, generator=torch.Generator().manual_seed(0))


# -- the chunks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("side", "without", "with_graph"), [(64, 16, 16), (512, 8, 2), (768, 3, 1), (1024, 2, 1), (2048, 1, 1)]
)
def test_the_default_goes_by_the_pictures_size(side: int, without: int, with_graph: int) -> None:
    assert (chunk_size(side, side), chunk_size(side, side, with_graph=True)) == (without, with_graph)


def test_single_pictures_are_coded_to_the_bit_as_alone(adapter: Adapter) -> None:
    adapter.code_in_chunks(1)
    pixels, latents = pictures(3), noise(3)
    alone = [adapter.vae.encode(picture[None]).latent_dist for picture in pixels]
    scale = adapter.vae.config.scaling_factor
    mean, std = adapter.encode_posterior(pixels)
    assert torch.equal(mean, torch.cat([each.mean for each in alone]) * scale)
    assert torch.equal(std, torch.cat([each.std for each in alone]) * scale)
    assert torch.equal(
        adapter.decode(latents), torch.cat([adapter.vae.decode(z[None] / scale).sample for z in latents])
    )


@pytest.mark.parametrize("batch_size", [2, 5])
def test_any_chunk_gives_the_same_latents_and_pictures(batch_size: int, adapter: Adapter) -> None:
    pixels, latents = pictures(5), noise(5)
    (mean, std), decoded = adapter.encode_posterior(pixels), adapter.decode(latents)
    adapter.code_in_chunks(batch_size)
    for ours, whole in zip(adapter.encode_posterior(pixels), (mean, std), strict=True):
        torch.testing.assert_close(ours, whole, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(adapter.decode(latents), decoded, rtol=1e-5, atol=1e-6)


def test_gradients_through_chunks_are_those_of_the_vae(adapter: Adapter) -> None:
    adapter.code_in_chunks(2)
    weight = pictures(5)
    ours, theirs = noise(5).requires_grad_(), noise(5).requires_grad_()
    (adapter.decode(ours) * weight).sum().backward()
    (adapter.vae.decode(theirs / adapter.vae.config.scaling_factor).sample * weight).sum().backward()
    assert ours.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)


def test_chunks_do_not_change_what_is_drawn(adapter: Adapter) -> None:
    whole = generate(adapter, PROMPTS, **SHORT)
    assert (generate(adapter.code_in_chunks(1), PROMPTS, **SHORT) - whole).abs().max() < 1e-5


def test_tiling_is_the_vae_s_own(adapter: Adapter) -> None:
    pixels = pictures(2, 128)
    whole, _ = adapter.encode_posterior(pixels)
    assert not adapter.vae.use_tiling
    tiled, _ = adapter.code_in_chunks(tiling=True).encode_posterior(pixels)
    assert adapter.vae.use_tiling
    assert tiled.shape == whole.shape
    assert not torch.equal(tiled, whole)


def test_a_cache_made_in_tiles_is_another_one(adapter: Adapter) -> None:
    before = fingerprint(adapter, PairTransform(64))
    assert fingerprint(adapter.code_in_chunks(tiling=True), PairTransform(64)) != before


@pytest.mark.parametrize("load", [True, False], ids=["load", "set"])
def test_a_chunk_of_no_pictures_is_refused(load: bool, sdxl_folder: Path) -> None:
    with pytest.raises(ValueError, match="vae_batch_size 0: expected at least 1 picture"):
        load_adapter(sdxl_folder, vae_batch_size=0) if load else load_adapter(sdxl_folder).code_in_chunks(0)


@pytest.mark.parametrize("cls", [DPOConfig, EvaluatorConfig, GenerateOptions, AnnotateOptions, EvaluateGuidanceOptions])
def test_every_command_that_loads_a_model_has_the_settings(cls: type[Any]) -> None:
    assert {"vae_batch_size", "vae_tiling"} <= set(cls.__dataclass_fields__)


# -- every door --------------------------------------------------------------------------------------------------------


class Doors:
    """Everything that codes pictures, by name; each is given five or more of them."""

    def __init__(self, adapter: Adapter, pairs: Path, folder: Path) -> None:
        self.adapter, self.pairs, self.folder = adapter, pairs, folder

    def training_step(self) -> None:
        found: Any = load_pairs(self.pairs)
        loader = PairLoader(PixelExamples(found, PairTransform(64)), 3)
        self.adapter.train_lora(rank=2)
        PairMethod(DPOConfig(), self.adapter, loader, GaussianNoising(self.adapter)).loss(loader.load(0))

    def cache(self) -> None:
        found: Any = load_pairs(self.pairs)
        build_cache(self.adapter, found, PairTransform(64), self.folder / "cache")

    def evaluator_training(self) -> None:
        EncodedPairs(self.adapter, Comparisons(str(self.pairs), "train", None))

    def generate(self) -> None:
        generate(self.adapter, PROMPTS, **SHORT)

    def validation(self) -> None:
        sample_and_score(self.adapter, PROMPTS, None, SamplingSettings(num_inference_steps=2))

    def fk_steering(self) -> None:
        fk_steering(self.adapter, PROMPTS[:2], Brightness(), 3, seeds=[1, 2], every=1, num_inference_steps=2)

    def reward_gradient(self) -> None:
        uphill = SamplingOptions(callback=reward_gradient(self.adapter, PROMPTS, Brightness()))
        sample(self.adapter, PROMPTS, options=uphill, **SHORT)

    def pixel_guidance(self) -> None:
        guider = DynamicGuidance(None, (), (1.0, 3.0, 5.0), pixel_scorers=["brightness"])
        guider.use(scorers=[Brightness()])
        sample(self.adapter, PROMPTS, guidance=guider, **SHORT)

    def rollouts(self) -> None:
        config = self.online(RAFTConfig, num_generations=5, prompts_per_rollout=1, rollout_batch_size=5)
        RolloutEngine(config, self.adapter, build_accelerator(config), Brightness()).draw(0)

    def draft(self) -> None:
        config = self.online(DRaFTConfig, per_device_train_batch_size=5, max_steps=1)
        method = build_job(config, build_accelerator(config), self.adapter, Brightness()).method
        method.loss(next(method.batches()))[0].backward()

    def online(self, cls: type[Any], **options: Any) -> Any:
        (self.folder / "prompts.txt").write_text("\n".join(PROMPTS))
        common = {"dataset": str(self.folder / "prompts.txt"), "output_dir": str(self.folder), "report_to": "none"}
        return cls(num_inference_steps=2, **common, **options)


DOORS = [name for name in vars(Doors) if not name.startswith("_") and name != "online"]


@pytest.fixture
def chunks(adapter: Adapter) -> Iterator[list[int]]:
    """How many pictures the VAE's encoder or decoder was given, call by call; at most two are wanted."""
    seen: list[int] = []

    def count(module: Any, inputs: tuple[Tensor, ...]) -> None:
        seen.append(len(inputs[0]))

    adapter.code_in_chunks(2)
    handles = [part.register_forward_pre_hook(count) for part in (adapter.vae.encoder, adapter.vae.decoder)]
    yield seen
    for handle in handles:
        handle.remove()


@pytest.mark.slow
@pytest.mark.parametrize("door", DOORS)
def test_every_door_hands_the_vae_no_more_than_a_chunk(
    door: str, adapter: Adapter, chunks: list[int], pairs_folder: Path, tmp_path: Path
) -> None:
    open_door: Callable[[], None] = getattr(Doors(adapter, pairs_folder, tmp_path), door)
    open_door()
    assert sum(chunks) >= 5
    assert max(chunks) == 2


def test_inpainting_hands_the_vae_no_more_than_a_chunk(inpaint_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, seen = load_adapter(inpaint_folder, vae_batch_size=2), []
    adapter.vae.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    Holes([""] * 5, pictures(5) / 2 + 0.5, torch.ones(5, 1, 64, 64)).encode(adapter)
    assert seen == [2, 2, 1]


def test_guiders_in_diffusers_modular_pipeline_decode_in_chunks(adapter: Adapter, chunks: list[int]) -> None:
    guider = DynamicGuidance(None, (), tuple(float(scale) for scale in range(1, 19)), pixel_scorers=["brightness"])
    guider.use(scorers=[Brightness()])
    modular_pipeline(adapter, guider)(prompt=["a red circle"], num_inference_steps=1, output="images")
    assert chunks == [16, 2, 1]  # 18 candidates by their size, then the picture by diffusers' own block


@pytest.mark.slow
@pytest.mark.parametrize(("eval_steps", "given", "expected"), [(0, False, 1), (10, False, 0), (0, True, 0)])
def test_a_cached_run_parks_the_encoders_that_it_loaded_and_does_not_need(
    eval_steps: int, given: bool, expected: int, sdxl_folder: Path, pairs_folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    parked: list[Adapter] = []
    monkeypatch.setattr(Adapter, "park_encoders", lambda self: parked.append(self))
    config = DPOConfig(
        model=str(sdxl_folder), dataset=str(pairs_folder), cache_dir=str(tmp_path), eval_steps=eval_steps
    )
    dpo_job(config, build_accelerator(config), load_adapter(sdxl_folder) if given else None)
    assert len(parked) == expected


# -- dtypes ------------------------------------------------------------------------------------------------------------


def with_upcast(source: Path, folder: Path, force_upcast: bool | None) -> Path:
    """``source`` with ``force_upcast`` in its VAE's config set, or (None) left out, as in SD 1.x's."""
    shutil.copytree(source, folder)
    path = folder / "vae" / "config.json"
    config = json.loads(path.read_text())
    config.pop("force_upcast", None)
    path.write_text(json.dumps(config | ({} if force_upcast is None else {"force_upcast": force_upcast})))
    return folder


@pytest.mark.parametrize(
    ("family", "force_upcast", "expected"),
    [
        ("sd_folder", None, torch.bfloat16),
        ("sd_folder", True, torch.bfloat16),
        ("sdxl_folder", None, torch.float32),
        ("sdxl_folder", False, torch.bfloat16),
    ],
)
def test_only_a_vae_that_overflows_is_kept_in_float32(
    family: str, force_upcast: bool | None, expected: torch.dtype, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = with_upcast(request.getfixturevalue(family), tmp_path / "model", force_upcast)
    adapter = load_adapter(folder, dtype=torch.bfloat16)
    assert adapter.vae.dtype == expected
    assert adapter.unet.dtype == torch.bfloat16


def test_a_vae_kept_in_float32_is_not_rounded_on_its_way(sdxl_folder: Path, tmp_path: Path) -> None:
    loaded = load_adapter(with_upcast(sdxl_folder, tmp_path / "model", True), dtype=torch.bfloat16)
    expected = load_adapter(sdxl_folder).vae.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.vae.state_dict().items())


def test_another_vae_follows_the_same_rule(sdxl_folder: Path, tmp_path: Path) -> None:
    other = with_upcast(sdxl_folder, tmp_path / "model", True) / "vae"
    assert load_adapter(sdxl_folder, dtype=torch.bfloat16, vae=str(other)).vae.dtype == torch.float32


def test_fp16_autocast_is_kept_away_from_a_vae_that_overflows(sdxl_folder: Path, tmp_path: Path) -> None:
    adapter = load_adapter(with_upcast(sdxl_folder, tmp_path / "model", True))
    latents, pixels = noise(1), pictures(1)
    expected = adapter.decode(latents), adapter.encode_images(pixels)
    with torch.autocast("cpu", dtype=torch.float16):
        assert torch.equal(adapter.decode(latents), expected[0])
        assert torch.equal(adapter.encode_images(pixels), expected[1])


def test_autocast_is_kept_away_from_a_vae_in_half_precision(sdxl_folder: Path) -> None:
    adapter = load_adapter(sdxl_folder, dtype=torch.bfloat16)
    latents = noise(1)
    expected = adapter.decode(latents)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(adapter.decode(latents), expected)
