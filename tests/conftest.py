"""Tiny random pipelines in the diffusers layout, one per model family; built once per test session."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from diffusers import DDIMScheduler, StableDiffusionInpaintPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import nn
from transformers import CLIPTokenizer

from diffusion_align.rewards.trained.vp import VPScore
from diffusion_align.scenes.make.pairs import encode_jpeg
from diffusion_align.scenes.pretrain.denoiser import build_scheduler, build_unet
from diffusion_align.scenes.pretrain.reader import new_reader
from diffusion_align.scenes.pretrain.text import build_sd_text_encoder, build_sdxl_text_encoders, build_tokenizer
from diffusion_align.scenes.pretrain.vae import build_vae
from diffusion_align.scenes.world.grammar import sample_prompt, sample_scene
from diffusion_align.scenes.world.render import render
from diffusion_align.shipped import shipped_path
from tests.adapters.families.tiny_flow import auraflow_pipeline, flux_pipeline, sd3_pipeline
from tests.processes import TwoProcesses


def pytest_configure() -> None:
    # Tiny tensors, and tests on every core side by side: more threads only wait for each other. The variable is for
    # the processes that tests start (notebooks, the command line).
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What trains in two processes comes first: one worker does it then, and only its processes have to start."""
    items.sort(key=lambda item: "two_processes" not in getattr(item, "fixturenames", ()))


def pytest_collection_finish() -> None:
    """What the imports made stays: looking through it again and again takes a tenth of the tests' time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
    gc.enable()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # some libraries count what they are left with at the end


def livened(*modules: nn.Module) -> None:
    """Give zero-initialised biases and norms some spread, so that no weight can be lost without a trace."""
    generator = torch.Generator().manual_seed(1)
    for module in modules:
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    return build_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def save(pipeline: Any, folder: Path) -> Path:
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sdxl_folder(tokenizer: CLIPTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    vae, (first, second) = build_vae(), build_sdxl_text_encoders(tokenizer)
    unet = build_unet(64 + 128, sdxl=True)
    livened(vae, unet, first, second)
    pipeline = StableDiffusionXLPipeline(
        vae, first, second, tokenizer, tokenizer, unet, build_scheduler(), force_zeros_for_empty_prompt=True
    )
    return save(pipeline, tmp_path_factory.mktemp("sdxl"))


def sd_pipeline(tokenizer: CLIPTokenizer, in_channels: int = 4) -> Any:
    torch.manual_seed(0)
    vae, encoder, unet = build_vae(), build_sd_text_encoder(tokenizer), build_unet(128, False, in_channels)
    livened(vae, unet, encoder)
    kind = StableDiffusionPipeline if in_channels == 4 else StableDiffusionInpaintPipeline
    return kind(vae, encoder, tokenizer, unet, build_scheduler(), None, None, requires_safety_checker=False)


@pytest.fixture(scope="session")
def sd_folder(tokenizer: CLIPTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(sd_pipeline(tokenizer), tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="session")
def sd_v_folder(tokenizer: CLIPTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pipeline = sd_pipeline(tokenizer)
    pipeline.scheduler = DDIMScheduler.from_config(build_scheduler().config, prediction_type="v_prediction")
    return save(pipeline, tmp_path_factory.mktemp("sd_v"))


@pytest.fixture(scope="session")
def inpaint_folder(tokenizer: CLIPTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(sd_pipeline(tokenizer, in_channels=9), tmp_path_factory.mktemp("inpaint"))


@pytest.fixture(scope="session")
def sd3_folder(tokenizer: CLIPTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(sd3_pipeline(tokenizer), tmp_path_factory.mktemp("sd3"))


@pytest.fixture(scope="session")
def flux_folder(tokenizer: CLIPTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(flux_pipeline(tokenizer), tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="session")
def auraflow_folder(tokenizer: CLIPTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(auraflow_pipeline(tokenizer), tmp_path_factory.mktemp("auraflow"))


@pytest.fixture(scope="session")
def pairs_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve training and four validation pairs of rendered scenes in the Pick-a-Pic layout."""
    folder = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("validation", 4)):
        specs = [sample_prompt(rng) for _ in range(count)]
        images = [[encode_jpeg(render(sample_scene(spec, rng))) for _ in range(2)] for spec in specs]
        table = {
            "jpg_0": [first for first, _ in images],
            "jpg_1": [second for _, second in images],
            "caption": [spec.text() for spec in specs],
            "label_0": [float(i % 2) for i in range(count)],
            "label_1": [float(1 - i % 2) for i in range(count)],
        }
        Dataset.from_dict(table).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoProcesses]:
    """For runs in two processes; they start with the first run."""
    processes = TwoProcesses(tmp_path_factory.mktemp("two_processes"))
    yield processes
    processes.close()


@pytest.fixture(scope="session")
def scorer() -> VPScore:
    """An untrained scorer that reads objects and says of each word whether it is shown."""
    return new_reader(shipped_path("scenes-sdxl") / "tokenizer").eval()
