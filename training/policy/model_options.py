"""Which diffusion model is loaded and how: the same options for every command and every method that loads one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field


@dataclass(frozen=True, kw_only=True)
class VAEOptions:
    """How the VAE codes pictures, for every command and run that loads a diffusion model."""

    vae_batch_size: Annotated[int, Field(gt=0)] | None = None
    """Pictures that the VAE encodes or decodes at once; 1 is what diffusers calls slicing. Unset depends on their size:
    2 of 1024 pixels, 8 of 512, at most 16."""
    vae_tiling: bool = False
    """Let the VAE cut pictures larger than it was trained on into tiles: less memory, and seams may show."""


@dataclass(frozen=True, kw_only=True)
class ModelOptions(VAEOptions):
    """Which diffusion model, and how it is loaded."""

    model: str = "scenes-sdxl"
    """Shipped name, pipeline folder, single .safetensors file, or hub name."""
    variant: str | None = None
    """Which weight files of a folder or hub model, e.g. fp16; unset takes those without a name, or a folder's only
    ones."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    vae: str | None = None
    """Another autoencoder: folder, single .safetensors file, or hub name, e.g. madebyollin/sdxl-vae-fp16-fix."""
    model_config: str | None = None
    """For a single-file model: folder or hub name with the pipeline's configs and tokenizers (needed offline); unset
    takes published ones for what the file holds."""
    family: str | None = None
    """For a single-file model: sd, sdxl, sd-inpaint, sdxl-inpaint, sd3 or flux; unset recognises it by its tensors."""
    prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = None
    """What the network predicts, where the model's own config (or a single file's v_pred marker) says it wrongly."""
    max_sequence_length: Annotated[int, Field(ge=0)] | None = None
    """SD3, FLUX and AuraFlow: tokens that T5 is given. Unset is what model_index.json says, else the pipeline's own
    (256; FLUX dev 512); 0 leaves out the zeros of an SD3 without T5. What fills a prompt up is attended to."""
    dtype: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """Precision of the weights that are not trained. auto: weight_dtype in training; to draw, fp16 on a GPU and fp32
    on the CPU."""

    def model_flags(self) -> list[str]:
        """Flags with which other commands load the same model."""
        names = ("variant", "revision", "vae", "model_config", "family", "prediction_type", "max_sequence_length")
        given = {"model": self.model} | {name: value for name in names if (value := getattr(self, name)) is not None}
        return [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]


@dataclass(frozen=True, kw_only=True)
class TrainedModelOptions(ModelOptions):
    """Of runs: recipes call the precision ``weight_dtype``."""

    #: What weight_dtype holds, which must stay.
    changeable: ClassVar[frozenset[str]] = frozenset({"dtype"})
    #: weight_dtype holds what it came to, so that a flag can still change that.
    once: ClassVar[frozenset[str]] = frozenset({"dtype"})

    weight_dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Storage of the frozen weights (base UNet under LoRA, text encoders, reference copy); dtype overrides it."""

    def __post_init__(self) -> None:
        if self.dtype != "auto":
            object.__setattr__(self, "weight_dtype", self.dtype)
