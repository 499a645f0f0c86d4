"""Our guiders in diffusers' modular SDXL pipeline: a denoiser block that shows them each step."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.modular_pipelines import SequentialPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import InputParam
from diffusers.modular_pipelines.stable_diffusion_xl.before_denoise import StableDiffusionXLInputStep
from diffusers.modular_pipelines.stable_diffusion_xl.decoders import StableDiffusionXLDecodeStep
from diffusers.modular_pipelines.stable_diffusion_xl.denoise import (
    StableDiffusionXLDenoiseStep,
    StableDiffusionXLLoopDenoiser,
)
from diffusers.modular_pipelines.stable_diffusion_xl.encoders import StableDiffusionXLTextEncoderStep
from diffusers.modular_pipelines.stable_diffusion_xl.modular_blocks_stable_diffusion_xl import (
    StableDiffusionXLBeforeDenoiseStep,
)

from diffusion_align.adapters import Adapter, Conditioning
from diffusion_align.adapters.autoencoder import ChunkedVAE
from diffusion_align.process import Level, VariancePreserving, call_level, model_calls

from .guider import StepGuidance, StepView


class BoundDenoiser(StableDiffusionXLLoopDenoiser):
    """diffusers' denoiser block, which first binds the guider (a :class:`StepGuidance`) to the step.

    Set it as ``sub_blocks["denoiser"]`` of a ``StableDiffusionXLDenoiseStep``, or use :func:`modular_pipeline`.
    """

    @property
    def inputs(self) -> list[Any]:
        return [*super().inputs, InputParam("prompt")]  # else the pipeline does not show the block its prompts

    @torch.no_grad()
    def __call__(self, components: Any, block_state: Any, i: int, t: Any) -> Any:
        guider = components.guider
        if isinstance(guider, StepGuidance):
            guider.bind(step_view(components, block_state, i))
        return super().__call__(components, block_state, i, t)


def step_view(components: Any, block_state: Any, place: int) -> StepView:
    """The step of the pipeline's call ``place`` as our guiders see it, from its state."""
    scheduler, steps = components.scheduler, block_state.num_inference_steps
    path, call = VariancePreserving.from_scheduler(scheduler), model_calls(scheduler, steps)[place]
    now, after = (Level.from_alpha_bar(s) for s in path.levels(scheduler, steps).alpha_sq[call.step :][:2].tolist())
    cond = Conditioning(block_state.prompt_embeds, getattr(block_state, "pooled_prompt_embeds", None))
    coder = ChunkedVAE(components.vae, scale_factor=components.vae_scale_factor)
    return StepView(
        call.step,
        steps,
        block_state.scaled_latents.float(),
        now if call.opens else call_level(scheduler, block_state.timesteps[place]),
        after,
        cond,
        range(len(block_state.scaled_latents)),
        path.output,
        coder.decode,
        prompts_of(getattr(block_state, "prompt", None), len(block_state.scaled_latents)),
        again=not call.opens,
        space=coder.space,
    )


def prompts_of(prompt: str | list[str] | None, images: int) -> list[str]:
    """One prompt per image; diffusers draws several images of a prompt next to each other."""
    given = [prompt or ""] if prompt is None or isinstance(prompt, str) else prompt
    return [each for each in given for _ in range(images // len(given))]


def modular_pipeline(adapter: Adapter, guider: Any) -> Any:
    """diffusers' modular text-to-image pipeline with the adapter's parts and ``guider``.

    Call it as ``modular_pipeline(adapter, guider)(prompt=..., num_inference_steps=..., output="images")``.

    Raises:
        ValueError: not an SDXL model: diffusers' modular Stable Diffusion pipelines are SDXL's.
    """
    if not adapter.family.modular or adapter.is_inpainting:
        raise ValueError("modular_pipeline: expected an SDXL text-to-image model")
    denoise = StableDiffusionXLDenoiseStep()
    denoise.sub_blocks["denoiser"] = BoundDenoiser()
    blocks = SequentialPipelineBlocks.from_blocks_dict(
        {
            "text_encoder": StableDiffusionXLTextEncoderStep(),
            "input": StableDiffusionXLInputStep(),
            "before_denoise": StableDiffusionXLBeforeDenoiseStep(),
            "denoise": denoise,
            "decode": StableDiffusionXLDecodeStep(),
        }
    )
    pipeline = blocks.init_pipeline()
    parts = {
        name: getattr(adapter.pipeline, name)
        for name in ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
    }
    pipeline.update_components(**parts, guider=guider)
    return pipeline
