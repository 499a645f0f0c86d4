"""Which fields of a flow model's configs are understood; any other that is set is refused by name."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from typing import Any

from diffusion_align.process import is_flow
from diffusion_align.process.gate import grid_of

from .understood import NOISE_SCHEDULE, SAMPLING, VAE, check_fields, check_networks, check_step, check_values

#: What :class:`~diffusion_align.process.FlowMatching` and diffusers' own steps read of a flow scheduler. A scheduler
#: that counts its times backwards (``invert_sigmas``) or makes a picture in several sizes (``scale_factors``) is none
#: of these models'.
FLOW_SCHEDULE = NOISE_SCHEDULE | SAMPLING | frozenset(
    {"shift", "use_dynamic_shifting", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len",
     "use_flow_sigmas", "stochastic_sampling"}
)  # fmt: skip
#: The transformers' structure, which their own forward passes deal with.
TRANSFORMER = frozenset(
    {"sample_size", "in_channels", "out_channels", "num_layers", "num_single_layers", "attention_head_dim",
     "num_attention_heads", "joint_attention_dim", "caption_projection_dim", "pooled_projection_dim",
     "pos_embed_max_size", "dual_attention_layers", "qk_norm", "axes_dims_rope"}
)  # fmt: skip
#: Networks of a flow pipeline that are used.
NETWORKS = frozenset({"transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"})


def check_flow_understood(
    pipeline: Any,
    conditioning: Mapping[str, Collection[Any]],
    latents: Collection[str],
    packed: int,
    structure: Collection[str] = (),
) -> None:
    """Refuse what would silently change the mathematics: config fields, and further networks.

    Args:
        conditioning: fields of the denoiser's config that ask for further inputs, and the values that the family knows.
        latents: fields of the VAE's config that its pipelines read to scale latents.
        packed: latents that the pipeline packs into one channel vector before the network.
        structure: fields of the denoiser's config besides ``TRANSFORMER`` that its own forward pass deals with.

    Raises:
        ValueError: one that is not understood; the message names it.
    """
    transformer, vae = pipeline.transformer, pipeline.vae
    check_networks(pipeline, NETWORKS)
    check_flow_scheduler(pipeline.scheduler)
    check_fields("transformer", transformer, TRANSFORMER | set(structure) | set(conditioning))
    check_fields("vae", vae, VAE | set(latents))
    check_values("transformer", transformer.config, conditioning)
    channels = packed * vae.config.latent_channels
    for name in ("in_channels", "out_channels"):
        found = transformer.config.get(name)
        if found not in (channels, None if name == "out_channels" else channels):
            raise ValueError(
                f"transformer: {name} = {found} is not understood: expected {channels}, those of the latents (models "
                "that fill, edit or are controlled by pictures are not supported)"
            )
    for name in latents:
        if vae.config.get(name) is None:
            raise ValueError(f"vae: expected a {name}, which the pipeline reads")


def check_flow_scheduler(scheduler: Any) -> None:
    """Refuse a scheduler that cannot draw what the flow pipelines do.

    Raises:
        ValueError: its noising process is another one, or its step needs more than a prediction, a time and latents;
            the message names it and what to take.
    """
    if not is_flow(scheduler):
        raise ValueError(
            f"scheduler: {type(scheduler).__name__} is not of flow matching, which this model needs: take "
            "FlowMatchEulerDiscreteScheduler, or a solver with use_flow_sigmas and prediction_type flow_prediction"
        )
    check_step(scheduler)
    check_fields("scheduler", grid_of(scheduler), FLOW_SCHEDULE)


def takes(scheduler: Any, option: str) -> bool:
    """Whether ``scheduler.set_timesteps`` has a parameter of this name."""
    return option in inspect.signature(grid_of(scheduler).set_timesteps).parameters
