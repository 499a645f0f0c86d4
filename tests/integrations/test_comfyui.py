"""ComfyUI's nodes in ComfyUI's own samplers: the pictures of our sampler, and those of ComfyUI's own guider.

ComfyUI is not part of this repository. ``COMFYUI=FOLDER pytest tests/integrations`` runs these with a checkout of it,
whose requirements are installed; they need no graphics card and no weights but the shipped ones.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from diffusion_align.adapters import Adapter, Conditioning, load_adapter
from diffusion_align.adapters.prompts import conditioning
from diffusion_align.guidance.dynamic import DynamicGuidance
from diffusion_align.guidance.schedules import ScheduleGuidance, TableGuidance
from diffusion_align.process import set_steps
from diffusion_align.sampling.sampler import sample
from tests.adapters.families.tiny_flow import LENGTH
from tests.documents.pages import ROOT

COMFYUI = os.environ.get("COMFYUI", "")
if not COMFYUI:
    pytest.skip("COMFYUI names no checkout of ComfyUI to run its samplers", allow_module_level=True)

PROMPT = "a large red star on a dark background"
SEEDS = [5, 6]
STEPS = 5  # of which DDIM's 1000 timesteps are a multiple: else it rounds them, and Euler does not
FOLDER = ROOT / "integrations" / "comfyui"


@pytest.fixture(scope="module")
def comfy() -> SimpleNamespace:
    """ComfyUI's modules on the CPU, and our nodes by their class."""
    sys.path.append(COMFYUI)
    importlib.import_module("comfy.cli_args").args.cpu = True
    names = ("latent_formats", "model_base", "model_patcher", "samplers", "supported_models", "supported_models_base")
    modules = {name: importlib.import_module(f"comfy.{name}") for name in names}
    nodes = importlib.import_module("integrations.comfyui")
    return SimpleNamespace(**modules, nodes=nodes.NODE_CLASS_MAPPINGS)


class Denoiser(nn.Module):
    """An adapter's network as ComfyUI calls one."""

    dtype = torch.float32

    def __init__(self, adapter: Adapter, cond: Conditioning) -> None:
        super().__init__()
        self.adapter, self.time_ids = adapter, cond.time_ids
        self.network = adapter.network

    def forward(self, x: Tensor, t: Tensor, context: Tensor, y: Tensor, **_: Any) -> Tensor:
        ids = None if self.time_ids is None else self.time_ids[:1].expand(len(x), -1)
        times = t / 1000 if self.adapter.path.straight else t.long()
        return self.adapter.predict(x, times, Conditioning(context, y, ids)).output


def patcher(comfy: SimpleNamespace, adapter: Adapter, cond: Conditioning) -> Any:
    """The adapter as ComfyUI's MODEL."""

    class Model(comfy.model_base.BaseModel):
        def encode_adm(self, **told: Any) -> Tensor:
            return told["pooled_output"]

    kind = comfy.model_base.ModelType.FLOW if adapter.path.straight else comfy.model_base.ModelType.EPS
    model = Model(comfy.supported_models_base.BASE({"disable_unet_model_creation": True}), kind)
    model.diffusion_model = Denoiser(adapter, cond)
    return comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))


def as_conditioning(cond: Conditioning) -> list[Any]:
    """ComfyUI's CONDITIONING."""
    return [[cond.embeds, {"pooled_output": cond.pooled}]]


def asked(adapter: Adapter) -> tuple[Conditioning, Conditioning]:
    size = adapter.default_resolution
    return conditioning(adapter, [PROMPT], size, size), conditioning(adapter, [None], size, size)


def comfyuis(guider: Any, sampler: Any, sigmas: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Latents (2, C, h, w) at the last noise level, from the noise of ``SEEDS``."""
    noise = torch.cat([torch.randn((1, *shape), generator=torch.Generator().manual_seed(seed)) for seed in SEEDS])
    with torch.inference_mode():
        latents: Tensor = guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True, seed=0)
    return latents


def shape_of(adapter: Adapter) -> tuple[int, ...]:
    return (adapter.latent_channels, *[adapter.default_resolution // adapter.vae_scale_factor] * 2)


def inputs(adapter: Adapter, comfy: SimpleNamespace) -> tuple[Any, Any, Any]:
    """What every guider node takes."""
    cond, null = asked(adapter)
    return patcher(comfy, adapter, cond), as_conditioning(cond), as_conditioning(null)


def written(folder: Path, scales: list[float]) -> str:
    (folder / "record.json").write_text(json.dumps({"scales": scales}))
    return str(folder / "record.json")


EVALUATOR = {
    "evaluator": "scenes-sdxl-evaluator", "kinds": "alignment, preference", "candidates": "1.5, 4, 8",
    "weighting": "uniform", "normalise": "candidates", "start": 0.0, "stop": 0.7, "fallback": 2.0,
}  # fmt: skip
SCHEDULE = {
    "guidance_scale": 5.0, "schedule": "cosine", "power": 1.0, "sigma_low": 0.0, "sigma_high": 0.0, "stop": 1.0,
}  # fmt: skip
CASES: dict[str, tuple[str, Callable[[Path], dict[str, Any]], Callable[[], Any]]] = {
    "schedule": ("DiffusionAlignScheduledGuider", lambda folder: SCHEDULE, lambda: ScheduleGuidance(5.0, "cosine")),
    "stop": (
        "DiffusionAlignScheduledGuider",
        lambda folder: SCHEDULE | {"schedule": "constant", "stop": 0.5},
        lambda: ScheduleGuidance(5.0, stop=0.5),
    ),
    "record": (
        "DiffusionAlignSavedScheduleGuider",
        lambda folder: {"file": written(folder, [7.0, 1.0, 3.0, 4.0, 2.0])},
        lambda: TableGuidance([7.0, 1.0, 3.0, 4.0, 2.0]),
    ),
    "dynamic": (
        "DiffusionAlignDynamicGuider",
        lambda folder: EVALUATOR,
        lambda: DynamicGuidance(candidates=[1.5, 4.0, 8.0], stop=0.7, fallback=2.0),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_pictures_are_those_of_our_sampler(case: str, comfy: SimpleNamespace, tmp_path: Path) -> None:
    node, settings, guidance = CASES[case]
    adapter = load_adapter("scenes-sdxl")
    scheduler = DDIMScheduler.from_config(adapter.pipeline.scheduler.config, timestep_spacing="trailing")
    ours = sample(
        adapter, [PROMPT] * 2, num_inference_steps=STEPS, guidance=guidance(), seeds=SEEDS, scheduler=scheduler
    )
    set_steps(scheduler, STEPS)
    levels = adapter.path.levels(scheduler)
    (guider,) = comfy.nodes[node]().guider(*inputs(adapter, comfy), **settings(tmp_path))
    euler = comfy.samplers.sampler_object("euler")
    for _ in range(2):  # ComfyUI keeps a guider from one run to the next
        theirs = comfyuis(guider, euler, levels.sigma / levels.alpha, shape_of(adapter)) * levels.alpha[-1]
        assert torch.stack(guider.guidance.scales).equal(ours.scales)
        torch.testing.assert_close(theirs, ours.latents, rtol=0, atol=1e-4)
    assert case != "dynamic" or len(ours.scales[:4].unique()) > 1


def test_pictures_of_flow_models_are_those_of_our_sampler(comfy: SimpleNamespace, sd3_folder: Path) -> None:
    adapter = load_adapter(sd3_folder, max_sequence_length=LENGTH)
    guidance, scheduler = ScheduleGuidance(5.0, "cosine"), adapter.pipeline.scheduler
    ours = sample(adapter, [PROMPT] * 2, num_inference_steps=STEPS, guidance=guidance, seeds=SEEDS)
    set_steps(scheduler, STEPS)
    (guider,) = comfy.nodes["DiffusionAlignScheduledGuider"]().guider(*inputs(adapter, comfy), **SCHEDULE)
    sigmas = adapter.path.levels(scheduler).sigma
    theirs = comfyuis(guider, comfy.samplers.sampler_object("euler"), sigmas, shape_of(adapter))
    assert torch.stack(guider.guidance.scales).equal(ours.scales)
    torch.testing.assert_close(theirs, ours.latents, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def unet(comfy: SimpleNamespace) -> Any:
    """A small random UNet of ComfyUI's own with SDXL's layout, as MODEL."""
    config = {
        "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [1, 1],
        "channel_mult": (1, 2), "transformer_depth": [0, 1], "transformer_depth_output": [0, 0, 1, 1],
        "transformer_depth_middle": 1, "context_dim": 64, "use_spatial_transformer": True, "num_classes": "sequential",
        "use_linear_in_transformer": True, "adm_in_channels": 128 + 6 * 256, "use_temporal_attention": False,
        "legacy": False, "dtype": torch.float32,
    }  # fmt: skip
    torch.manual_seed(0)
    settings = comfy.supported_models.SDXL(config)
    settings.unet_config["num_head_channels"] = 16
    model = settings.get_model({})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    return comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))


@pytest.fixture(scope="module")
def conds() -> tuple[list[Any], list[Any]]:
    generator = torch.Generator().manual_seed(1)
    made = [(torch.randn(1, 7, 64, generator=generator), torch.randn(1, 128, generator=generator)) for _ in range(2)]
    positive, negative = ([[embeds, {"pooled_output": pooled}]] for embeds, pooled in made)
    return positive, negative


@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m", "dpmpp_sde", "uni_pc", "euler_ancestral", "ddim"])
def test_a_constant_scale_is_comfyuis_own_guider(
    name: str, comfy: SimpleNamespace, unet: Any, conds: tuple[list[Any], list[Any]]
) -> None:
    whole = SCHEDULE | {"schedule": "constant"}
    (guider,) = comfy.nodes["DiffusionAlignScheduledGuider"]().guider(unet, *conds, **whole)
    theirs = comfy.samplers.CFGGuider(unet)
    theirs.set_conds(*conds)
    theirs.set_cfg(5.0)
    sigmas = comfy.samplers.calculate_sigmas(unet.get_model_object("model_sampling"), "karras", 5)
    found = []
    for each in (guider, theirs):
        torch.manual_seed(0)
        found.append(comfyuis(each, comfy.samplers.sampler_object(name), sigmas.clone(), (4, 8, 8)))
    assert found[0].isfinite().all()
    assert found[0].equal(found[1])
    assert len(guider.guidance.scales) == 5


def test_patches_of_the_model_see_the_scale(
    comfy: SimpleNamespace, unet: Any, conds: tuple[list[Any], list[Any]], tmp_path: Path
) -> None:
    seen: list[tuple[str, Any]] = []

    def look(name: str) -> Callable[[dict[str, Any]], Any]:
        def patch(told: dict[str, Any]) -> Any:
            seen.append((name, told["cond_scale"]))
            return told[name]

        return patch

    patched = unet.clone()
    patched.set_model_sampler_pre_cfg_function(look("conds_out"))
    patched.set_model_sampler_post_cfg_function(look("denoised"))
    file = tmp_path / "record.json"
    file.write_text(json.dumps({"scales": [[3.0, 4.0], [2.0, 2.0]]}))
    (guider,) = comfy.nodes["DiffusionAlignSavedScheduleGuider"]().guider(patched, *conds, file=str(file))
    comfyuis(guider, comfy.samplers.sampler_object("euler"), torch.tensor([10.0, 1.0, 0.0]), (4, 8, 8))
    assert [name for name, _ in seen] == ["conds_out", "denoised"] * 2
    assert [scale.flatten().tolist() for _, scale in seen[:2]] == [[3.0, 4.0]] * 2
    assert [scale for _, scale in seen[2:]] == [2.0, 2.0]


@pytest.mark.parametrize(
    ("node", "changed", "message"),
    [
        ("DiffusionAlignSavedScheduleGuider", {"file": "none.json"}, "none.json: no such file"),
        ("DiffusionAlignDynamicGuider", EVALUATOR | {"candidates": "1, x"}, "candidates '1, x': expected numbers"),
        ("DiffusionAlignDynamicGuider", EVALUATOR | {"evaluator": "nobody"}, "evaluator 'nobody'"),
        (
            "DiffusionAlignDynamicGuider",
            EVALUATOR | {"evaluator": "latent-clip"},
            "prompt: latent-clip reads the prompt",
        ),
    ],
)
def test_what_cannot_be_is_said_by_the_node(
    node: str, changed: dict[str, Any], message: str, comfy: SimpleNamespace, unet: Any, conds: Any
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        comfy.nodes[node]().guider(unet, *conds, **changed)


def test_an_evaluator_of_another_model_is_refused(comfy: SimpleNamespace, unet: Any, conds: Any) -> None:
    (guider,) = comfy.nodes["DiffusionAlignDynamicGuider"]().guider(unet, *conds, **EVALUATOR)
    with pytest.raises(ValueError, match="evaluator was trained for latents and prompts"):
        comfyuis(guider, comfy.samplers.sampler_object("euler"), torch.tensor([10.0, 1.0, 0.0]), (4, 8, 8))


def test_the_nodes_in_the_example_take_what_it_gives_them(comfy: SimpleNamespace) -> None:
    graph = json.loads((FOLDER / "example.json").read_text())
    ours = [node for node in graph.values() if node["class_type"] in comfy.nodes]
    assert ours
    for node in ours:
        takes = comfy.nodes[node["class_type"]].INPUT_TYPES()
        assert set(takes["required"]) <= set(node["inputs"]) <= set(takes["required"]) | set(takes.get("optional", {}))
