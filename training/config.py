"""Settings of every run: plain dataclasses. A field's comment is the command line's help and the docs' table.

Names follow TRL and diffusers. Nothing heavy is imported here, so that ``diffusion-align train dpo --help`` is instant.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from diffusion_align.guidance.kinds import EvaluatorKind
from diffusion_align.options import VAEOptions

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every run of the training loop shares, whatever it trains."""

    method: ClassVar[str]

    config: str | None = None
    """YAML recipe, or the config.yaml of an earlier run; flags override it."""
    dry_run: bool = False
    """Print the plan (resolved config, memory estimate, steps, data counts) and stop."""

    # -- optimisation
    max_steps: Positive = 2000
    """Optimiser steps."""
    per_device_train_batch_size: Positive = 1
    """Pairs (or prompts) per device and micro-step."""
    gradient_accumulation_steps: Positive = 1
    """Micro-steps per optimiser step."""
    learning_rate: PositiveFloat = 1e-5
    """Peak learning rate."""
    lr_scheduler_type: Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "constant",
                               "constant_with_warmup"] = "constant_with_warmup"  # fmt: skip
    """Schedule of the learning rate (diffusers.optimization)."""
    warmup_steps: NonNegative = 0
    """Steps of linear warm-up."""
    optim: Literal["adamw", "adamw_8bit", "adafactor"] = "adamw"
    """Optimiser: fused AdamW, bitsandbytes' 8-bit AdamW, or Adafactor."""
    adam_beta1: Fraction = 0.9
    """AdamW's first decay."""
    adam_beta2: Fraction = 0.999
    """AdamW's second decay."""
    adam_epsilon: PositiveFloat = 1e-8
    """AdamW's epsilon."""
    weight_decay: NonNegativeFloat = 1e-2
    """Weight decay."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are clipped to this norm."""
    use_ema: bool = False
    """Keep an exponential average of the trained weights; it is what is validated and saved."""
    ema_decay: Fraction = 0.9999
    """Decay of that average."""
    seed: int = 0
    """Seed of the run; every sample's noise, timestep and augmentation follow from it and the sample's position."""
    mixed_precision: Literal["no", "fp16", "bf16", "auto"] = "no"
    """Autocast of the forward pass; LoRA weights and optimiser states stay float32. auto is bf16 where the device
    computes it in hardware, else no."""

    # -- the run
    output_dir: str = "runs/train"
    """Folder of weights, checkpoints, metrics, pictures and config.yaml."""
    overwrite_output_dir: bool = False
    """Start anew although output_dir holds checkpoints (they are deleted)."""
    resume_from_checkpoint: str | None = None
    """"latest" (of output_dir), a checkpoint folder, or a run folder."""
    save_steps: Positive = 200
    """Steps between checkpoints."""
    save_total_limit: Positive = 2
    """Checkpoints kept."""
    logging_steps: Positive = 10
    """Steps between log lines; metrics are averaged over them."""
    report_to: Literal["tensorboard", "wandb", "none"] = "tensorboard"
    """Tracker, besides metrics.jsonl."""
    progress: bool = True
    """Show a progress bar."""
    eval_steps: NonNegative = 0
    """Steps between validations against the base on fixed prompts and seeds; 0 switches it off."""
    early_stopping_patience: NonNegative = 0
    """Stop after so many validations in a row without a new best; the best weights are kept in output_dir/best."""
    metric_for_best_model: str = "eval/reward"
    """Metric of validation that early stopping watches (larger is better)."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(VAEOptions, RunConfig):
    """What every method that trains a diffusion model shares."""

    # -- model
    model: str = "scenes-sdxl"
    """Shipped name, pipeline folder, single .safetensors file, or hub name."""
    model_config: str | None = None
    """For a single-file model: folder or hub name with the pipeline's configs and tokenizers."""
    variant: str | None = None
    """Weight variant of a hub model, e.g. fp16."""
    vae: str | None = None
    """Another autoencoder, e.g. madebyollin/sdxl-vae-fp16-fix."""
    init_weights: str | None = None
    """LoRA file or UNet folder merged into the base before training (e.g. an SFT run); it is then the reference too."""

    # -- policy
    full_finetuning: bool = False
    """Train all UNet weights against a frozen copy, instead of a LoRA whose reference is the UNet without it."""
    lora_rank: Positive = 8
    """Rank of the LoRA matrices."""
    lora_alpha: PositiveFloat | None = None
    """LoRA scale is alpha / rank; unset means alpha = rank."""
    lora_dropout: Fraction = 0.0
    """Dropout on the LoRA input."""
    lora_target_modules: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """Suffixes of the UNet modules that get a LoRA."""

    # -- speed and memory
    weight_dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Storage of the frozen weights (base UNet under LoRA, text encoders, reference copy)."""
    gradient_checkpointing: Literal["none", "attention", "full"] = "none"
    """Recompute activations in the backward pass: nowhere, in the transformer layers, everywhere."""
    attention: Literal["sdpa", "xformers"] = "sdpa"
    """Attention kernels."""
    torch_compile: bool = False
    """Compile each transformer block of the UNet (torch.compile)."""
    channels_last: bool = False
    """Channels-last memory format of the UNet."""

    # -- validation
    validation_prompts: str | None = None
    """File of prompts (.txt, .csv, .jsonl, .parquet); unset takes captions of the validation split."""
    num_validation_prompts: Positive = 64
    """How many prompts are used."""
    validation_scorer: str | None = None
    """Scorer that compares policy and base, e.g. scenes-oracle; unset saves pictures only."""
    validation_inference_steps: Positive = 20
    """Sampling steps."""
    validation_guidance_scale: NonNegativeFloat = 5.0
    """Classifier-free guidance scale."""
    validation_seed: int = 1234
    """Image i is drawn with this seed + i."""


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
    loss_type: Literal["sigmoid", "robust", "hinge", "ipo", "kto", "bco_pair", "sppo_hard", "exo_pair", "apo_zero",
                       "apo_down", "nca_pair", "mapo"] = "sigmoid"  # fmt: skip
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


@dataclass(frozen=True, kw_only=True)
class RewardConfig(RunConfig):
    """Train a scorer on judged pairs (vp-score, edit, pal, clip) or on rated repaintings (prefpaint)."""

    method: ClassVar[str] = "reward"

    # -- scorer
    scorer: str = "vp-score"
    """What to train: vp-score (score per aspect), edit (before and after), pal (per user), clip, prefpaint
    (repaintings); or a trained scorer to go on from: a shipped one's name, or a folder."""
    architecture: str = "small"
    """small, objects: for 64-pixel scenes, the latter reads objects that it finds first (pretrain its reader);
    image-reward: ViT-L/16 and BERT-base (vp-score); clip-b32: OpenAI's CLIP (prefpaint)."""
    tokenizer: str = "scenes-sdxl"
    """Shipped model, folder or hub name that has the tokenizer (vp-score, edit, clip)."""
    freeze_vision: bool = False
    """Train only what reads beside the pictures, not what sees them (vp-score): at first, where the latter is trained
    and the former is not."""
    reader: str | None = None
    """Trained vp-score whose picture and text reader an edit scorer starts from; unset: a fresh one."""
    clip: str = "scenes-clip"
    """Scorer whose frozen embeddings are used (pal)."""
    pal_variant: Literal["a", "b"] = "b"
    """a: ideal points; b: ideal points that depend on the prompt."""
    pal_prototypes: Positive = 4
    """Prototypes that users are mixtures of."""

    # -- data
    dataset: str = "scenes-pairs"
    """Judged pairs in Pick-a-Pic's columns, also label_0_ASPECT, user_id, source (before an edit), wrong_words_0 and
    wrong_words_1 (what each image does not show, by word; a vp-score then says so, too); for prefpaint rated
    repaintings: image, source, mask, score_CRITERION."""
    dataset_split: str = "train"
    """Split to train on."""
    validation_split: str | None = "validation"
    """Split of the same data set that accuracy is measured on; unset: none."""
    max_pairs: Positive | None = None
    """Use only the first so many pairs."""
    max_corrupt: NonNegative = 100
    """Unreadable images that are skipped and reported before the run stops."""
    dataloader_num_workers: NonNegative = 2
    """Threads that read ahead."""
    rows_together: Positive = 1
    """Rows that stand together in the data set and are drawn together, e.g. all pairs of one prompt's pictures: a
    picture in several pairs of a batch is encoded once."""

    # -- objective
    aspect_weight: NonNegativeFloat = 1.0
    """Weight of the aspects' mean loss beside the overall one."""
    word_weight: NonNegativeFloat = 1.0
    """Weight of the words' mean loss (vp-score, on data with wrong_words_0 and wrong_words_1)."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Assumed share of flipped labels."""
    contrastive_weight: NonNegativeFloat = 0.0
    """Weight of BLIP's image-text contrastive loss on the preferred pictures (vp-score trained from nothing)."""


@dataclass(frozen=True, kw_only=True)
class EvaluatorConfig(VAEOptions, RunConfig):
    """Train the latent evaluators of dynamic guidance (2509.16131): alignment, fidelity, preference, task, value."""

    method: ClassVar[str] = "evaluator"

    # -- evaluator
    kinds: tuple[EvaluatorKind, ...] = ("alignment", "fidelity", "preference")
    """What it judges; all kinds share one tower on the noisy latents. value needs scale_0 and scale_1 in dataset."""
    width: Positive = 48
    """Channels of the tower."""
    features: Positive = 128
    """Width of the picture's and the prompt's embeddings."""
    towers: str | None = None
    """Trained evaluator whose towers this one takes, frozen: for few pairs, only heads are trained; unset: fresh."""
    scale_penalty: NonNegativeFloat = 0.3
    """Weight of the squared weights by which the best scale follows from a prompt (value): more with fewer pairs."""
    teacher: str | None = None
    """Scorer whose reward the kind task predicts from noisy latents."""
    model: str = "scenes-sdxl"
    """Whose latents and prompt embeddings: shipped name, pipeline folder, or hub name."""
    weight_dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Storage of the model's frozen encoders."""

    # -- data
    dataset: str = "scenes-pairs"
    """Judged pairs of generated pictures (Pick-a-Pic's columns), for preference, and against real ones for fidelity."""
    real_dataset: str | None = None
    """Pairs whose preferred picture is real and fits its caption, for alignment and fidelity; unset: dataset's."""
    dataset_split: str = "train"
    """Split to train on."""
    validation_split: str = "validation"
    """Split that scores are standardised and accuracy is measured on."""
    alignment_aspect: str = "prompt_following"
    """Aspect (column label_0_ASPECT) that says which picture fits the prompt; where it is missing the overall label."""
    value_aspect: str = "overall"
    """Aspect of the pairs' verdicts that the kind value learns from; overall: the verdict on the whole."""
    max_pairs: Positive | None = None
    """Use only the first so many pairs of each data set; all latents are held in memory, in half precision."""
    max_corrupt: NonNegative = 100
    """Unreadable images that are skipped and reported before the run stops."""
