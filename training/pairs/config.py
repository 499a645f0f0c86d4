"""Settings of DPO and InPO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from diffusion_align.objectives.declared import declared
from diffusion_align.training.engine.config import Fraction, NonNegative, NonNegativeFloat, Positive, PositiveFloat
from diffusion_align.training.policy.config import TrainConfig

if TYPE_CHECKING:
    LossType = str
else:
    LossType = Literal[declared("pair_loss")]


@dataclass(frozen=True, kw_only=True)
class DPOConfig(TrainConfig):
    """Diffusion-DPO (2311.12908) and the other pairwise losses on preference pairs."""

    method: ClassVar[str] = "dpo"

    # -- data
    dataset: str = "scenes-pairs"
    """Pairs: shipped name, hub data set, parquet file or folder, or an image folder with metadata.jsonl/.csv."""
    dataset_split: str = "train"
    """Split to train on."""
    streaming: bool = False
    """Read the data set as a stream, for what does not fit the disk."""
    max_pairs: Positive | None = None
    """Use only the first so many pairs."""
    max_corrupt: NonNegative = 100
    """Unreadable images that are skipped and reported before the run stops."""
    cache_dir: str | None = None
    """Folder for cached VAE posteriors and prompt embeddings; made when absent, checked when present."""
    resolution: Positive | None = None
    """Side of the training images in pixels; unset takes the model's own."""
    random_crop: bool = False
    """Crop at random instead of in the centre (the same for both images of a pair; not with cache_dir)."""
    random_flip: bool = True
    """Mirror half of the pairs (both images)."""
    aspect_ratio_buckets: bool = False
    """Keep aspect ratios: batches of equal shape with about resolution^2 pixels."""
    caption_dropout: Fraction = 0.0
    """Share of pairs trained with the null prompt."""
    dataloader_num_workers: NonNegative = 2
    """Threads that read ahead."""
    noise_draws: Positive | None = None
    """So many fixed draws of timestep, noise, flip and crop for each pair, one of them at each visit; unset: fresh ones
    at every visit (not with streaming)."""
    reference_cache: bool = False
    """Remember the reference's errors, two numbers a pair and draw, in cache_dir: from the second visit of a draw on
    its forward pass is skipped (needs noise_draws and cache_dir)."""

    # -- objective
    loss_type: LossType = "sigmoid"
    """Preference loss (docs/dpo.md has the table)."""
    beta: PositiveFloat = 5000.0
    """Strength of the pull to the reference; the logit is 0.5 * beta * (s_chosen - s_rejected)."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Assumed share of flipped labels."""
    sft_weight: NonNegativeFloat = 0.0
    """Weight of an added denoising loss on the chosen images."""
    min_timestep: NonNegative = 0
    """Smallest training timestep."""
    max_timestep: Positive = 1000
    """Timesteps are drawn uniformly from [min_timestep, max_timestep)."""


@dataclass(frozen=True, kw_only=True)
class InPOConfig(DPOConfig):
    """DDIM-InPO (2503.18454): DPO whose noise is found by DDIM inversion of each image."""

    method: ClassVar[str] = "inpo"

    inversion_model: Literal["policy", "reference"] = "policy"
    """Which denoiser inverts the images: the current policy (official code) or the frozen reference."""
    inversion_steps: Positive = 10
    """DDIM steps from the clean image to exactly t."""
    renoise_iterations: NonNegative = 0
    """Extra fixed-point predictions averaged per inversion step (ReNoise, SmPO)."""
    inversion_eta: Fraction = 0.1
    """Weight of fresh noise in every inversion step."""
