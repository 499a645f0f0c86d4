"""What differs between model families. Other rooms ask a family for what they need, never for its name."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from diffusion_align.adapters.conditioning import Conditioning
from diffusion_align.quiet import unsaid

#: Most tokens of a prompt, the pipelines' own limit.
MOST_TOKENS = 512
#: How a model's pictures are guided (``Family.guidance``).
Guidance: TypeAlias = Literal["cfg", "embedded", "none"]


@dataclass(frozen=True)
class NetworkInputs:
    """What one forward pass takes.

    Attributes:
        x_t: (B, C, h, w) noisy latents, with mask and masked image where the model repaints.
        t: (B,) times, in the unit of the model's path.
        cond: (B) conditioning.
        skipped: numbers of the blocks that are left out, of networks that can (``Family.skippable``).
    """

    x_t: Tensor
    t: Tensor
    cond: Conditioning
    skipped: tuple[int, ...] = ()


class Family(Protocol):
    """Everything that differs between pipelines: prompts, guidance, the network's call, its parts and their names.

    Attributes:
        name: for messages.
        pipelines: diffusers' pipeline classes, by the name that says what a single file holds.
        network_name: the denoiser's attribute in a pipeline, and its folder.
        network_kind: what people call it.
        text_encoder_names: attributes of the text encoders.
        lora_targets: names of the modules that get a LoRA by default.
        lora_prefixes: kohya's prefixes of LoRA names, by part of the pipeline; the first is written, all are read.
        scripts_name_original_blocks: whether kohya's own scripts name LoRAs by ``original_names``.
        blocks: class names of the modules whose activations recomputation frees one at a time.
        conditioning_fields: fields of the denoiser's config that ask for further inputs, with the values understood.
        latent_fields: fields of the VAE's config that its pipelines read to scale latents.
        patch: latents that the network reads as one, along each side; sides must be divisible by it.
        overflows: whether its networks leave the range of half precision (fp16).
        vae_overflows: whether its VAEs leave the range of half precision, unless their config says
            ``force_upcast: false``.
        skippable: the network's attribute with the blocks that a pass may leave out; None: it cannot.
        modular: whether diffusers has a modular text-to-image pipeline of it that our guiders fit.
    """

    name: str
    pipelines: Mapping[str, type]
    network_name: str
    network_kind: str
    text_encoder_names: tuple[str, ...]
    lora_targets: tuple[str, ...]
    lora_prefixes: Mapping[str, tuple[str, ...]]
    scripts_name_original_blocks: bool
    blocks: tuple[str, ...]
    conditioning_fields: Mapping[str, Collection[Any]]
    latent_fields: Collection[str]
    patch: int
    overflows: bool
    vae_overflows: bool
    skippable: str | None
    modular: bool

    def matches(self, parts: Mapping[str, Any], network_config: Mapping[str, Any]) -> bool:
        """Whether this family drives a pipeline.

        Args:
            parts: its components by name, None where one is missing, and its class's name as "_class_name"; values of
                a model_index.json also work.
            network_config: of its denoiser.
        """

    def check(self, pipeline: Any) -> None:
        """Refuse what would silently change the mathematics.

        Raises:
            ValueError: a config field, a scheduler or a network that is not understood; the message names it.
        """

    def check_scheduler(self, scheduler: Any) -> None:
        """Refuse a scheduler that cannot draw what the family's pipelines do.

        Raises:
            ValueError: its noising process is another one, or its step needs more than a prediction, a time and
                latents.
        """

    def grid(self, scheduler: Any, steps: int, tokens: int) -> dict[str, Any]:
        """What the pipeline gives ``scheduler.set_timesteps`` beside the number of steps, for ``tokens`` tokens."""

    def tokens(self, height: int, width: int) -> int:
        """How many tokens the network makes of latents of this size."""

    def default_side(self, network_config: Any) -> int:
        """Side of the latents that the model was made for."""

    def default_length(self, network_config: Any) -> int | None:
        """Tokens that the longest text encoder is given unless a run says otherwise; None where that is fixed."""

    def encode(self, pipeline: Any, prompts: list[str], length: int | None = None) -> Conditioning:
        """Embed prompts; the empty prompt is embedded like any other.

        Args:
            length: tokens of the longest text encoder; None is ``default_length``.
        """

    def null(self, pipeline: Any, length: int | None = None) -> Conditioning:
        """The unconditional embedding that the pipeline itself uses for guidance, batch of 1."""

    def size_ids(self, sizes: Tensor) -> Tensor | None:
        """The network's inputs for sizes and crops, (B, 6) float32; None where it has none."""

    def guidance(self, network_config: Any) -> Guidance:
        """How its pictures are guided: "cfg" combines two predictions; "embedded" gives the network the scale
        (``Conditioning.guidance``) and no null prompt; "none" takes no scale."""

    def call(self, network: nn.Module, inputs: NetworkInputs) -> Tensor:
        """The network's raw output (B, C, h, w) in its own dtype."""

    def recompute(self, network: Any, attention_only: bool) -> None:
        """Recompute activations in the backward pass, of all blocks or of the transformer layers alone."""

    def check_speed(self, attention: str, channels_last: bool) -> None:
        """Raises ValueError where the network has no such attention kernels or memory format."""

    def compile(self, network: Any) -> None:
        """Compile each of its repeated blocks once (torch.compile)."""

    def original_names(self, network: Any) -> Mapping[str, str]:
        """The network's modules in the layout of the original checkpoints, by their name in diffusers."""

    def fused_names(self, network: Any) -> Mapping[str, tuple[str, ...]]:
        """The network's modules whose weights the original layout holds in one, rows one after the other, by its name;
        of transformers also those that are alone. Empty where ``original_names`` says it."""

    def other_names(self, network: Any) -> Mapping[str, tuple[str, ...]]:
        """The same by names that are read alone, of single trainers; matrices ``NAME.down.weight`` and ``.up``."""

    def model_spec(self, pipeline: Any) -> dict[str, str]:
        """What the header of a LoRA file says of its base model: ``modelspec.*`` and kohya's ``ss_*`` fields."""

    def memory_inputs(self, network: Any, rows: int, side: int, length: int | None = None) -> NetworkInputs:
        """Inputs on the ``meta`` device, of ``rows`` latents of ``side`` x ``side``, in the network's dtype."""


def encode_prompts(
    family: Family, pipeline: Any, prompts: Sequence[str | None], length: int | None = None
) -> Conditioning:
    """Conditioning of ``prompts``; None becomes the pipeline's own null prompt (SDXL: zeros)."""
    # Which prompts are cut is said once (``cut_prompts``), not for every batch with the text that is lost.
    modules = {kind.__module__ for kind in type(pipeline).__mro__ if kind.__module__.startswith("diffusers.")}
    with unsaid(*modules, "transformers.tokenization_utils_base"):
        cond = family.encode(pipeline, [prompt or "" for prompt in prompts], length)
    nulls = [i for i, prompt in enumerate(prompts) if prompt is None]
    if not nulls:
        return cond
    null = family.null(pipeline, length).repeat(len(nulls))
    rows = torch.tensor(nulls, device=cond.embeds.device)
    pooled = cond.pooled
    if pooled is not None and null.pooled is not None:
        pooled = pooled.index_copy(0, rows, null.pooled)
    return replace(cond, embeds=cond.embeds.index_copy(0, rows, null.embeds), pooled=pooled)


def checked_length(length: int | None, family: Family, pipeline: Any) -> int | None:
    """``max_sequence_length`` of a model; None is the family's own.

    Raises:
        ValueError: the family's text encoders have a fixed length, or there are no such lengths.
    """
    usual = family.default_length(getattr(pipeline, family.network_name).config)
    if length is None:
        return usual
    if usual is None:
        raise ValueError(
            f"max_sequence_length = {length} is for models that read prompts with T5 (SD3, FLUX, AuraFlow); "
            f"{family.name} reads 77 tokens: leave it unset"
        )
    least = 0 if getattr(pipeline, family.text_encoder_names[-1], None) is None else 1  # zeros may be left out
    if not least <= length <= MOST_TOKENS:
        raise ValueError(f"max_sequence_length = {length}: expected {least} to {MOST_TOKENS} tokens")
    return length
