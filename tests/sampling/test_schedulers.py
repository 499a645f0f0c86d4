"""Every diffusers scheduler that Stable Diffusion's pipelines take, against the pipeline itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import cache
from typing import Any, get_args, get_type_hints

import diffusers
import numpy as np
import pytest
import torch
from diffusers import SchedulerMixin
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils import is_torchsde_available

from diffusion_align import load_adapter
from diffusion_align.adapters import Adapter
from diffusion_align.adapters.families import check_scheduler
from diffusion_align.commands.options import GenerateOptions
from diffusion_align.guidance.dynamic import DynamicGuidance
from diffusion_align.guidance.guider import StepView
from diffusion_align.guidance.schedules import ScheduleGuidance, TableGuidance
from diffusion_align.process import Level, VariancePreserving, model_calls
from diffusion_align.sampling.control import Moment, SamplingOptions
from diffusion_align.sampling.named import SCHEDULERS
from diffusion_align.sampling.sampler import sample
from diffusion_align.sampling.steering import fk_steering
from tests.brightness import Brightness

PROMPTS = ["a large red star on a dark background", "two small blue rings"]
SEEDS = [5, 2**40]
#: Pixels: small, because there are many schedulers.
SIDE = 32
SMALL = SamplingOptions(height=SIDE, width=SIDE)

#: Of diffusers' schedulers those whose noising process is Stable Diffusion's. DDIM's and DPM++'s inverse ones are for
#: inversion; a pipeline takes them, and so do we.
SAMPLERS = [
    *sorted({scheduler.name for scheduler in KarrasDiffusionSchedulers} - {"EDMEulerScheduler"}),
    "DDIMInverseScheduler",
    "DDIMParallelScheduler",
    "DDPMParallelScheduler",
    "DPMSolverMultistepInverseScheduler",
    "LCMScheduler",
    "SASolverScheduler",
    "TCDScheduler",
]  # fmt: skip
#: They call the denoiser more often than asked.
MANY_CALLS: dict[str, Callable[[int], int]] = {
    "HeunDiscreteScheduler": lambda steps: 2 * steps - 1,
    "KDPM2DiscreteScheduler": lambda steps: 2 * steps - 1,
    "KDPM2AncestralDiscreteScheduler": lambda steps: 2 * steps - 1,
    "PNDMScheduler": lambda steps: steps + 9,
    "PNDMScheduler, skip_prk_steps": lambda steps: steps + 1,
}
#: A class, and what its config changes, by a name that users know.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "SD 1.5's own": ("PNDMScheduler", {"skip_prk_steps": True, "steps_offset": 1, "set_alpha_to_one": False}),
    "DPM++ 2M Karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "DPM++ 2M exponential": ("DPMSolverMultistepScheduler", {"use_exponential_sigmas": True}),
    "DPM++ 2M beta": ("DPMSolverMultistepScheduler", {"use_beta_sigmas": True}),
    "DPM++ 2M lu": ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True}),
    "DPM++ 2M SDE Karras": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
    ),
    "DPM++ 3M": ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    "DPM++ 3M SDE": ("DPMSolverMultistepScheduler", {"solver_order": 3, "algorithm_type": "sde-dpmsolver++"}),
    "DPM 2M": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
    "DPM++ 2S": ("DPMSolverSinglestepScheduler", {"solver_order": 2, "use_karras_sigmas": True}),
    "DPM++ 3S": ("DPMSolverSinglestepScheduler", {"solver_order": 3}),
    "DPM++ 2S SDE": ("DPMSolverSinglestepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "Euler trailing": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
    "Euler ancestral leading": ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "leading"}),
    "Heun Karras": ("HeunDiscreteScheduler", {"use_karras_sigmas": True}),
    "Heun exponential": ("HeunDiscreteScheduler", {"use_exponential_sigmas": True}),
    "Heun trailing": ("HeunDiscreteScheduler", {"timestep_spacing": "trailing"}),
    "DPM2 Karras": ("KDPM2DiscreteScheduler", {"use_karras_sigmas": True}),
    "DPM2 a Karras": ("KDPM2AncestralDiscreteScheduler", {"use_karras_sigmas": True}),
    "LMS Karras": ("LMSDiscreteScheduler", {"use_karras_sigmas": True}),
    "UniPC Karras": ("UniPCMultistepScheduler", {"use_karras_sigmas": True}),
    "UniPC 3": ("UniPCMultistepScheduler", {"solver_order": 3}),
    "DEIS 3": ("DEISMultistepScheduler", {"solver_order": 3}),
    "DDIM trailing": ("DDIMScheduler", {"timestep_spacing": "trailing"}),
}


@pytest.fixture(scope="module")
def sd() -> Adapter:
    return silent("scenes-sd")


@pytest.fixture(scope="module")
def sdxl() -> Adapter:
    return silent("scenes-sdxl")


def silent(model: str) -> Adapter:
    adapter = load_adapter(model)
    adapter.pipeline.set_progress_bar_config(disable=True)
    return adapter


@cache
def prototype(adapter: Adapter, name: str, changes: tuple[tuple[str, Any], ...]) -> Any:
    """Some of diffusers' schedulers take half a second to be made."""
    return getattr(diffusers, name).from_config(adapter.pipeline.scheduler.config, **dict(changes))


def made(adapter: Adapter, name: str, **changes: Any) -> Any:
    """A scheduler from the model's own config."""
    if name == "DPMSolverSDEScheduler" and not is_torchsde_available():
        pytest.skip("diffusers' DPMSolverSDEScheduler needs torchsde")
    name, _, switch = name.partition(", ")
    switches = {switch: True} if switch else {}
    return deepcopy(prototype(adapter, name, tuple((switches | changes).items())))


def theirs(adapter: Adapter, scheduler: Any, steps: int, scale: float, eta: float) -> torch.Tensor:
    """What the model's pipeline draws with ``scheduler``."""
    if hasattr(scheduler, "noise_sampler_seed"):
        scheduler.noise_sampler_seed = SEEDS  # unset, the pipeline draws another picture each time
    parts = adapter.pipeline.components | {"scheduler": scheduler}
    pipeline = type(adapter.pipeline)(**parts) if "text_encoder_2" in parts else without_checker(adapter, parts)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    return pipeline(
        PROMPTS, height=SIDE, width=SIDE, num_inference_steps=steps, guidance_scale=scale, eta=eta,
        generator=generators, output_type="pt",
    ).images  # fmt: skip


def without_checker(adapter: Adapter, parts: dict[str, Any]) -> Any:
    return type(adapter.pipeline)(**parts, requires_safety_checker=False)


def check(adapter: Adapter, name: str, changes: dict[str, Any], steps: int, scale: float, eta: float) -> None:
    expected = theirs(adapter, made(adapter, name, **changes), steps, scale, eta)
    ours = sample(
        adapter, PROMPTS, seeds=SEEDS, num_inference_steps=steps, guidance=scale, eta=eta,
        scheduler=made(adapter, name, **changes), options=SMALL,
    )  # fmt: skip
    assert (ours.images - expected).abs().max() < 1e-4
    assert ours.scales.shape == (steps, len(PROMPTS))


# -- the pipeline's picture --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "scale", "eta"), [(4, 5.0, 0.0), (5, 1.0, 0.6)])
@pytest.mark.parametrize("name", SAMPLERS)
def test_pictures_are_the_pipelines(name: str, steps: int, scale: float, eta: float, sd: Adapter) -> None:
    check(sd, name, {}, steps, scale, eta)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_pictures_of_the_usual_variants_are_the_pipelines(name: str, sd: Adapter) -> None:
    check(sd, *VARIANTS[name], steps=4, scale=5.0, eta=0.0)


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "scale", "eta"), [(3, 0.0, 0.0), (4, 5.0, 1.0), (13, 1.0, 0.0)])
@pytest.mark.parametrize("name", SAMPLERS)
def test_pictures_of_sdxl_are_the_pipelines(name: str, steps: int, scale: float, eta: float, sdxl: Adapter) -> None:
    if name == "PNDMScheduler" and steps < 4:
        name += ", skip_prk_steps"
    check(sdxl, name, {}, steps, scale, eta)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("name", ["PNDMScheduler, skip_prk_steps", "HeunDiscreteScheduler", "TCDScheduler"])
def test_any_number_of_steps_is_made(name: str, steps: int, sd: Adapter) -> None:
    check(sd, name, {}, steps, scale=0.0, eta=0.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["DDIMScheduler", "HeunDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_a_timestep_too_many_by_rounding_is_part_of_the_last_step(name: str, sd: Adapter) -> None:
    """61 "trailing" steps are 62 timesteps in diffusers: a range of floats."""
    check(sd, name, {"timestep_spacing": "trailing"}, steps=61, scale=1.0, eta=0.0)


@pytest.mark.parametrize(
    "name",
    ["DDPMScheduler", "EulerAncestralDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "LCMScheduler",
     "SASolverScheduler", "DPMSolverSDEScheduler"],
)  # fmt: skip
def test_fresh_noise_is_the_pictures_own(name: str, sd: Adapter) -> None:
    """Not a share of its batch's noise."""
    options: dict[str, Any] = {"num_inference_steps": 3, "guidance": 1.0, "scheduler": made(sd, name), "options": SMALL}
    together = sample(sd, PROMPTS, seeds=SEEDS, **options).images
    alone = torch.cat([sample(sd, [p], seeds=[s], **options).images for p, s in zip(PROMPTS, SEEDS, strict=True)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)
    other = sample(sd, PROMPTS[:1], seeds=[6], **options).images
    assert (other - alone[:1]).abs().max() > 0.01


def test_every_scheduler_of_the_command_line_is_understood(sd: Adapter) -> None:
    names = set(get_args(get_type_hints(GenerateOptions)["scheduler"]))
    assert names == {*SCHEDULERS, "default"}
    for name, changes in SCHEDULERS.values():
        check_scheduler(made(sd, name, **changes))


# -- refused -----------------------------------------------------------------------------------------------------------


def constructible() -> list[str]:
    """diffusers' schedulers that can be made from a pipeline's config with the packages that are here."""
    classes = {name: getattr(diffusers, name) for name in dir(diffusers) if name.endswith("Scheduler")}
    found = []
    for name, cls in classes.items():
        if issubclass(cls, SchedulerMixin):  # the others stand in for one whose packages are missing
            needed = [p.name for p in inspect.signature(cls.__init__).parameters.values() if p.default is p.empty]
            found += [name] * (set(needed) <= {"self", "args", "kwargs"})
    return found


REFUSED = sorted(set(constructible()) - set(SAMPLERS) - {"UnCLIPScheduler"})  # its table of betas is another one


def test_edm_and_flow_are_among_the_refused() -> None:
    assert {"EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler",
            "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler"} <= set(REFUSED)  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_other_processes_are_refused_by_name(name: str, sd: Adapter) -> None:
    """At the sampler's door, too: a scheduler may be given there, or set on a pipeline that was already loaded."""
    with pytest.raises(ValueError, match=f"scheduler: .*{name}"):
        sample(sd, PROMPTS, seeds=SEEDS, scheduler=made(sd, name))


def test_flow_sigmas_are_refused(sd: Adapter) -> None:
    scheduler = made(sd, "UniPCMultistepScheduler", use_flow_sigmas=True)
    with pytest.raises(ValueError, match="scheduler: use_flow_sigmas = True is not understood"):
        sample(sd, PROMPTS, seeds=SEEDS, scheduler=scheduler)


def test_a_step_that_needs_more_is_refused(sd: Adapter) -> None:
    class Masked(diffusers.DDIMScheduler):
        def step(self, model_output: Any, timestep: Any, sample: Any, mask: Any) -> Any:  # type: ignore[override]
            raise NotImplementedError

    with pytest.raises(ValueError, match="a step of Masked needs mask"):
        sample(sd, PROMPTS, seeds=SEEDS, scheduler=Masked.from_config(sd.pipeline.scheduler.config))


@pytest.mark.parametrize(("name", "steps"), [("PNDMScheduler", 3), ("LCMScheduler", 60)])
def test_steps_that_cannot_be_made_are_named(name: str, steps: int, sd: Adapter) -> None:
    with pytest.raises(ValueError, match=f"num_inference_steps = {steps}: {name} cannot make them"):
        sample(sd, PROMPTS, seeds=SEEDS, num_inference_steps=steps, scheduler=made(sd, name))


# -- values per step ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(MANY_CALLS))
def test_calls_belong_to_the_steps_that_were_asked_for(name: str, sd: Adapter) -> None:
    scheduler = made(sd, name)
    scheduler.set_timesteps(5)
    calls = model_calls(scheduler, 5)
    assert len(calls) == len(scheduler.timesteps) == MANY_CALLS[name](5)
    assert [call.step for call in calls if call.opens] == [call.step for call in calls if call.closes] == [*range(5)]
    assert [call.step for call in calls] == sorted(call.step for call in calls)
    levels = VariancePreserving.from_scheduler(scheduler).levels(scheduler, 5).alpha_sq
    assert len(levels) == 6
    assert (levels.diff() > 0).all()


class Watching(ScheduleGuidance):
    """Constant guidance that remembers what it was shown."""

    def __init__(self, scale: float) -> None:
        super().__init__(scale)
        self.seen: list[tuple[int, bool, float, float]] = []

    def bind(self, view: StepView) -> None:
        super().bind(view)
        self.seen.append((view.step, view.again, view.now.alpha_sq, view.after.alpha_sq))


@pytest.mark.parametrize("name", sorted(MANY_CALLS))
def test_guiders_see_the_noise_level_of_every_call(name: str, sd: Adapter) -> None:
    """That of the timestep which the denoiser is told, between training levels linear in log sigma."""
    guider, steps, scheduler = Watching(3.0), 5, made(sd, name)
    sample(sd, PROMPTS, seeds=SEEDS, num_inference_steps=steps, guidance=guider, scheduler=scheduler, options=SMALL)
    scheduler.set_timesteps(steps)
    table = scheduler.alphas_cumprod.double().numpy()
    log_sigmas = 0.5 * (np.log(1 - table) - np.log(table))
    expected = 1 / (1 + np.exp(2 * np.interp(scheduler.timesteps.numpy(), np.arange(len(table)), log_sigmas)))
    np.testing.assert_allclose([now for _, _, now, _ in guider.seen], expected, rtol=2e-3)
    assert all(now < after for _, again, now, after in guider.seen if not again)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(MANY_CALLS))
def test_tables_and_records_have_one_entry_per_step(name: str, sd: Adapter) -> None:
    steps, watched = 4, replace(SMALL, keep_trajectory=True)
    table = torch.tensor([[5.0, 1.0], [2.0, 3.0], [0.5, 4.0], [3.0, 1.0]])
    options: dict[str, Any] = {"num_inference_steps": steps, "seeds": SEEDS, "scheduler": made(sd, name)}
    drawn = sample(sd, PROMPTS, guidance=table, options=watched, **options)
    assert torch.equal(drawn.scales, table)
    assert [len(record["scales"]) for record in drawn.records] == [steps, steps]
    assert drawn.nfe == 2 * MANY_CALLS[name](steps)
    assert drawn.trajectory is not None
    assert len(drawn.trajectory) == steps + 1
    assert torch.equal(drawn.trajectory[-1], drawn.latents)
    same = sample(sd, PROMPTS, guidance=TableGuidance([3.0] * steps), options=SMALL, **options)
    assert torch.equal(same.images, sample(sd, PROMPTS, guidance=3.0, options=SMALL, **options).images)
    with pytest.raises(ValueError, match=f"it has {MANY_CALLS[name](steps)} steps, the run {steps}"):
        sample(sd, PROMPTS, guidance=TableGuidance([3.0] * MANY_CALLS[name](steps)), **options)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(MANY_CALLS))
def test_dynamic_guidance_chooses_once_a_step_and_is_replayed(name: str, sd: Adapter) -> None:
    guider = DynamicGuidance(None, candidates=(1.0, 2.0, 4.0), pixel_scorers=("brightness",), normalise="population")
    guider.use(scorers=[Brightness()])
    options: dict[str, Any] = {"num_inference_steps": 4, "seeds": SEEDS, "scheduler": made(sd, name), "options": SMALL}
    searched = sample(sd, PROMPTS, guidance=guider, **options)
    for record in searched.records:
        scores = torch.tensor(record["scores"]["brightness"])
        assert scores.shape == (4, 3)
        assert record["searched"] == [0, 1, 2, 3]
        assert record["scales"] == [record["candidates"][k] for k in scores.argmax(dim=1).tolist()]
    table = TableGuidance(searched.scales.tolist(), branches=searched.records[0]["branches"])
    assert torch.equal(sample(sd, PROMPTS, guidance=table, **options).images, searched.images)


@pytest.mark.parametrize("name", [*sorted(MANY_CALLS), "EulerDiscreteScheduler", "DDIMScheduler"])
def test_callbacks_come_after_whole_steps(name: str, sd: Adapter) -> None:
    """And know how much of the latents is picture: noise free, the last step's are x0 itself."""
    moments: list[Moment] = []
    options = replace(SMALL, callback=moments.append, keep_trajectory=True)
    drawn = sample(sd, PROMPTS, seeds=SEEDS, num_inference_steps=4, options=options, scheduler=made(sd, name))
    assert [moment.step for moment in moments] == [1, 2, 3, 4]
    assert drawn.trajectory is not None
    for i, moment in enumerate(moments):
        assert torch.equal(moment.before, drawn.trajectory[i])
        assert torch.equal(moment.latents, drawn.trajectory[i + 1])
    scheduler = made(sd, name)
    scheduler.set_timesteps(4)
    levels = VariancePreserving.from_scheduler(scheduler).levels(scheduler, 4)
    scaled = scheduler.init_noise_sigma != 1
    expected = [1.0] * 4 if scaled else levels.alpha[1:].tolist()
    assert [moment.signal for moment in moments] == pytest.approx(expected)


def test_levels_are_exact_at_the_start_of_karras_steps(sd: Adapter) -> None:
    """Their timesteps are rounded, their sigmas are not."""
    for name in ("HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"):
        scheduler = made(sd, name, use_karras_sigmas=True)
        scheduler.set_timesteps(4)
        levels = VariancePreserving.from_scheduler(scheduler).levels(scheduler, 4)
        euler = made(sd, "EulerDiscreteScheduler", use_karras_sigmas=True, timestep_spacing="leading")
        euler.set_timesteps(4)
        expected = [Level.from_alpha_bar(1 / (1 + float(sigma) ** 2)).alpha_sq for sigma in euler.sigmas]
        assert levels.alpha_sq.tolist() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", [*sorted(MANY_CALLS), "LMSDiscreteScheduler", "SASolverScheduler"])
def test_fk_steering_refuses_schedulers_that_remember(name: str, sd: Adapter) -> None:
    with pytest.raises(ValueError, match="one-step scheduler"):
        fk_steering(sd, PROMPTS, Brightness(), seeds=SEEDS, scheduler=made(sd, name))
