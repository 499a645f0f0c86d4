"""Which fields of a pipeline's configs are understood; any other that is set is refused by name.

A config field that nobody reads can silently change the mathematics: a guidance embedding, statistics of the latents,
another noise schedule. So what is known is listed, and the rest must have its default.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from typing import Any

from diffusers import AutoencoderKL
from torch import nn

#: What :class:`~diffusion_align.process.path.VariancePreserving` reads of a scheduler.
NOISE_SCHEDULE = frozenset(
    {"num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr",
     "prediction_type"}
)  # fmt: skip
NEEDED = frozenset({"beta_start", "beta_end", "beta_schedule", "prediction_type"})
#: Switches of schedulers that must stay off: they turn the noising process into another one, or its integer times
#: into logarithms.
OFF = frozenset({"use_flow_sigmas", "use_dynamic_shifting", "timestep_type"})
#: What a scheduler's own steps read: they are diffusers' own here, too.
SAMPLING = frozenset(
    {"algorithm_type", "clip_sample", "clip_sample_range", "corrector_order", "disable_corrector",
     "dynamic_thresholding_ratio", "euler_at_final", "final_sigmas_type", "flow_shift", "interpolation_type",
     "lambda_min_clipped", "lower_order_final", "noise_sampler_seed", "original_inference_steps", "predict_x0",
     "predictor_order", "sample_max_value", "set_alpha_to_one", "shift_terminal", "sigma_max", "sigma_min",
     "skip_prk_steps", "solver_order", "solver_p", "solver_type", "steps_offset", "tau_func", "thresholding",
     "time_shift_type", "timestep_scaling", "timestep_spacing", "use_beta_sigmas",
     "use_exponential_sigmas", "use_karras_sigmas", "use_lu_lambdas", "variance_type"}
)  # fmt: skip
#: What every scheduler's step is given.
GIVEN = frozenset({"model_output", "timestep", "sample"})
#: The UNet's structure, which its own forward pass deals with.
UNET = frozenset(
    {"sample_size", "in_channels", "out_channels", "center_input_sample", "flip_sin_to_cos", "freq_shift",
     "down_block_types", "mid_block_type", "up_block_types", "only_cross_attention", "block_out_channels",
     "layers_per_block", "downsample_padding", "mid_block_scale_factor", "dropout", "act_fn", "norm_num_groups",
     "norm_eps", "cross_attention_dim", "transformer_layers_per_block", "reverse_transformer_layers_per_block",
     "attention_head_dim", "num_attention_heads", "dual_cross_attention", "use_linear_projection",
     "addition_time_embed_dim", "upcast_attention", "resnet_time_scale_shift", "resnet_skip_time_act",
     "resnet_out_scale_factor", "time_embedding_type", "time_embedding_dim", "time_embedding_act_fn",
     "timestep_post_act", "conv_in_kernel", "conv_out_kernel", "projection_class_embeddings_input_dim",
     "attention_type", "mid_block_only_cross_attention", "cross_attention_norm", "addition_embed_type_num_heads",
     "time_cond_proj_dim"}
)  # fmt: skip
#: The autoencoder's structure.
VAE = frozenset(
    {"in_channels", "out_channels", "down_block_types", "up_block_types", "block_out_channels", "layers_per_block",
     "act_fn", "latent_channels", "norm_num_groups", "sample_size", "force_upcast",
     "use_quant_conv", "use_post_quant_conv", "mid_block_add_attention"}
)  # fmt: skip
#: Networks of a pipeline that are used, or that change no picture.
NETWORKS = frozenset({"unet", "vae", "text_encoder", "text_encoder_2", "safety_checker", "image_encoder"})


def check_understood(pipeline: Any, conditioning: Mapping[str, Collection[Any]], latents: Collection[str]) -> None:
    """Refuse what would silently change the mathematics: config fields, and further networks.

    Args:
        conditioning: fields of the denoiser's config that ask for further inputs, and the values that the family knows.
        latents: fields of the VAE's config that its pipelines read to scale latents.

    Raises:
        ValueError: a field of the scheduler, the denoiser or the VAE that is set and not understood, another
            scheduler that ``check_scheduler`` refuses, another kind of VAE, or a network that is not understood; the
            message names it.
    """
    unet, vae = pipeline.unet, pipeline.vae
    check_networks(pipeline, NETWORKS)
    check_scheduler(pipeline.scheduler)
    for part, owner, known in (("unet", unet, UNET | set(conditioning)), ("vae", vae, VAE | set(latents))):
        check_fields(part, owner, known)
    check_values("unet", unet.config, conditioning)
    check_latents(unet.config, vae.config)


def check_values(part: str, config: Mapping[str, Any], known: Mapping[str, Collection[Any]]) -> None:
    """Refuse values of a network's config that ask for inputs of which nobody knows."""
    for name, values in known.items():
        if config.get(name) not in values:
            raise ValueError(
                f"{part}: {name} = {config.get(name)!r} asks for inputs that are not understood; expected "
                f"{' or '.join(repr(value) for value in values)}"
            )


def check_networks(pipeline: Any, known: Collection[str]) -> None:
    """Refuse a pipeline with a ControlNet or the like, and VAEs of another kind (they have no posterior)."""
    for name, part in pipeline.components.items():
        if name not in known and isinstance(part, nn.Module):
            raise ValueError(f"{name} ({type(part).__name__}) of {type(pipeline).__name__} is not understood")
    if not isinstance(pipeline.vae, AutoencoderKL):
        raise ValueError(f"vae: {type(pipeline.vae).__name__} is not understood: expected AutoencoderKL")


def check_latents(unet: Mapping[str, Any], vae: Mapping[str, Any]) -> None:
    """Refuse channels and statistics of the latents that the denoiser's inputs and outputs do not fit."""
    taken, given, latents = unet["in_channels"], unet["out_channels"], vae["latent_channels"]
    inpaints = taken == 2 * latents + 1
    if not inpaints and taken != latents:
        raise ValueError(
            f"unet: in_channels = {taken} is not understood: expected {latents}, or {2 * latents + 1} of an inpainting "
            "model"
        )
    if given != latents:
        raise ValueError(f"unet: out_channels = {given} is not understood: expected {latents}, those of the latents")
    mean, std = (vae.get(name) for name in ("latents_mean", "latents_std"))
    if (mean is None) != (std is None):
        name, value = ("latents_std", std) if mean is None else ("latents_mean", mean)
        raise ValueError(f"vae: {name} = {value!r} is not understood alone: expected both latents_mean and latents_std")
    if mean is not None and inpaints:
        raise ValueError(
            f"vae: latents_mean = {mean!r} is not understood in an inpainting model: diffusers' pipeline does not "
            "apply it to the masked picture"
        )


def check_scheduler(scheduler: Any) -> None:
    """Refuse a scheduler that cannot draw what Stable Diffusion's pipelines do.

    Raises:
        ValueError: its noising process is another one (EDM, flow matching), or its step needs more than a prediction,
            a time and latents; the message names it.
    """
    name, made_from = type(scheduler).__name__, inspect.signature(type(scheduler).__init__).parameters
    parameters = {each.name for each in made_from.values() if each.kind is not each.VAR_KEYWORD} - {"self"}
    missing, strange = NEEDED - parameters, parameters - NOISE_SCHEDULE - SAMPLING - OFF
    if missing or strange:
        what = f"no {', '.join(sorted(missing))}" if missing else ", ".join(sorted(strange))
        raise ValueError(
            f"scheduler: {name} has {what}: its noising process is not Stable Diffusion's, which this model's family "
            "needs"
        )
    check_step(scheduler)
    check_fields("scheduler", scheduler, NOISE_SCHEDULE | SAMPLING)


def check_step(scheduler: Any) -> None:
    """Refuse a scheduler whose step needs more than a prediction, a time and latents."""
    given = inspect.signature(scheduler.step).parameters.values()
    wanted = [each.name for each in given if each.default is each.empty and each.name not in GIVEN]
    if wanted:
        name = type(scheduler).__name__
        raise ValueError(f"scheduler: a step of {name} needs {', '.join(wanted)}, which Stable Diffusion's have not")


def check_fields(part: str, owner: Any, known: Collection[str]) -> None:
    """Refuse fields of a part's config that are set and not among ``known``."""
    for name, value in _set_fields(owner).items():
        if name not in known:
            raise ValueError(f"{part}: {name} = {value!r} is not understood ({type(owner).__name__})")


def _set_fields(owner: Any) -> dict[str, Any]:
    """Fields that the class reads and whose value is not its default."""
    parameters = inspect.signature(type(owner).__init__).parameters
    return {
        name: value
        for name, value in owner.config.items()
        if name in parameters and not _same(value, parameters[name].default)
    }


def _same(value: Any, default: Any) -> bool:
    listed = isinstance(value, list | tuple) and isinstance(default, list | tuple)
    return list(value) == list(default) if listed else bool(value == default)
