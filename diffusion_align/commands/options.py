"""Options of the commands that are not training runs. Nothing heavy is imported here: --help must be instant."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from diffusion_align.guidance.judges.evaluator_kinds import EvaluatorKind
from diffusion_align.training.policy.model_options import ModelOptions

#: How ``generate`` can guide.
GuidanceKind = Literal[
    "constant",
    "linear",
    "cosine",
    "power",
    "interval",
    "list",
    "replay",
    "dynamic",
    "annealing",
    "contrastive",
]


class Options:
    """What every command's options share."""

    #: Counts, which must be at least 1.
    counts: ClassVar[tuple[str, ...]] = ()

    def check(self) -> None:
        """Whether the options fit each other, as far as they tell without models and files.

        Raises:
            ValueError: they do not; the message names the flags.
        """
        for name in self.counts:
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected at least 1")


@dataclass(frozen=True, kw_only=True)
class DrawingOptions(ModelOptions):
    """The model that a command draws with, and trained weights on top of it."""

    lora: tuple[str, ...] = ()
    """Trained weights: a run's or checkpoint's folder, a LoRA file or a UNet folder. Several LoRAs add up; PATH:WEIGHT
    scales one, e.g. --lora runs/dpo:0.8 style.safetensors:0.5."""


@dataclass(frozen=True)
class GenerateOptions(DrawingOptions, Options):
    """Draw images with a model, with or without trained weights."""

    counts: ClassVar[tuple[str, ...]] = ("num_images", "num_inference_steps", "batch_size", "particles")

    prompt: str | None = None
    """The prompt (the flag may be left out if it comes first); or give --prompts."""
    prompts: str | None = None
    """File of prompts (.txt, .csv, .jsonl, .parquet)."""
    out: str = "images"
    """Folder for PNG files; each carries its settings."""
    overwrite: bool = False
    """Write over pictures of the same name in --out."""
    num_images: int = 4
    """Images per prompt."""
    num_inference_steps: int = 25
    """Sampling steps."""
    scheduler: Literal[
        "default",
        "ddim",
        "pndm",
        "euler",
        "euler-a",
        "heun",
        "dpm++",
        "dpm++-karras",
        "dpm++-sde",
        "unipc",
        "lcm",
        "tcd",
    ] = "default"
    """Sampler; default is the model's own."""
    guidance: GuidanceKind = "constant"
    """How the guidance scale is chosen: fixed, by a schedule whose mean is --guidance-scale, in a noise interval, from
    --scales or --schedule, or searched at every step for every image. annealing: by a
    learned --schedule, from noise level and disagreement; contrastive: fixed, away from --negative-lora."""
    guidance_scale: float = 5.0
    """Classifier-free guidance scale; 1 switches guidance off."""
    embedded_guidance: float | None = None
    """FLUX dev: the scale that the network is told, while --guidance-scale combines two predictions (true guidance, for
    twice the cost). Unset tells it --guidance-scale, in one prediction."""
    skip_guidance_layers: tuple[int, ...] = ()
    """SD3.5 medium: skip-layer guidance, away from the prediction without these blocks of the network, e.g. 7 8 9."""
    skip_layer_guidance_scale: float = 2.8
    """Its scale."""
    skip_layer_guidance_start: float = 0.01
    """Share of the steps after which it begins."""
    skip_layer_guidance_stop: float = 0.2
    """Share of the steps before which it ends."""
    guidance_stop: float = 1.0
    """Share of the steps, from the first one on, that are guided; the others take the prompt's prediction alone, for
    half the cost (Step AG). A replay takes it from its record."""
    power: float = 1.0
    """Exponent of the power schedule."""
    sigma_interval: tuple[float, float] = (0.3, 5.0)
    """For interval guidance: guidance is on between these noise levels."""
    scales: tuple[float, ...] = ()
    """For list guidance: one scale per step."""
    schedule: str | None = None
    """For replay: the .json record of a picture. Without a prompt, it also gives prompt, seed and steps. For annealing:
    the file that evaluate guidance --fit wrote."""
    evaluator: str | None = None
    """For dynamic guidance: a shipped evaluator, the folder that train evaluator wrote, or a published judge:
    latent-clip:PATH, lrm:FOLDER; unset: the one that comes with a shipped --model."""
    evaluators: tuple[EvaluatorKind, ...] = ("alignment", "preference")
    """For dynamic guidance: which of its judgements count."""
    candidates: tuple[float, ...] = (2.5, 3.5, 5.0)
    """For dynamic guidance: the scales it chooses from."""
    weighting: Literal["uniform", "linear", "adaptive", "adaptive-signed"] = "uniform"
    """For dynamic guidance: how the evaluators are weighted."""
    pixel_scorers: tuple[str, ...] = ()
    """For dynamic guidance: scorers that also judge decoded predictions (expensive: one decoding per candidate)."""
    alignment_strength: float = 1.0
    """With --lora: 0 draws with the model without LoRAs, 1 with them, more goes beyond."""
    negative_lora: tuple[str, ...] = ()
    """A negative model, e.g. of train dpo --swap-labels: LoRAs as --lora takes them. With --guidance contrastive it is
    the null branch's network, which costs a call of its own; or see --negative-merge."""
    negative_keep: float = 1.0
    """For contrastive guidance: share of --lora that the negative model has, too."""
    negative_merge: float | None = None
    """Instead of contrastive guidance: draw with base + W (LoRA - negative LoRA), merged once, at no further cost."""
    search: Literal["none", "best-of-n", "fk", "gradient"] = "none"
    """Steer with --scorer: keep the best of --particles images, resample particles, or follow the reward's gradient."""
    scorer: str | None = None
    """The scorer that --search uses."""
    particles: int = 4
    """Images drawn for each one that is kept (best-of-n, fk)."""
    steering_strength: float | None = None
    """Strength of fk (unset: 10) and of gradient (unset: 0.1)."""
    image: str | None = None
    """For inpainting models: the picture to repaint in part."""
    mask: str | None = None
    """For inpainting models: a picture that is white where --image is to be repainted."""
    negative_prompt: str | None = None
    """Prompt of the unconditional branch; unset is the pipeline's own null prompt (SDXL: zeros, not the empty text)."""
    seed: int = 0
    """Image i of a prompt has seed + i, whatever the batch."""
    height: int | None = None
    """Pixels; unset takes the model's own."""
    width: int | None = None
    """Pixels; unset takes the model's own."""
    batch_size: int = 8
    """Images drawn at once."""
    device: str = "auto"
    """cuda, mps, cpu; auto takes a GPU where there is one."""

    def check(self) -> None:
        replayed = self.guidance == "replay" and self.schedule is not None
        if (self.prompt is None) == (self.prompts is None) and not (replayed and self.prompt is None):
            raise ValueError("generate needs a prompt, or --prompts FILE (and not both)")
        if not 0 <= self.guidance_stop <= 1:
            raise ValueError(f"--guidance-stop {self.guidance_stop:g}: expected a share of the steps, 0 to 1")
        if self.guidance == "replay" and self.guidance_stop != 1:
            raise ValueError("--guidance-stop does not go with --guidance replay, which guides the recorded steps")
        if self.guidance == "annealing" and self.schedule is None:
            raise ValueError("--guidance annealing needs --schedule, the file that evaluate guidance --fit wrote")
        if self.guidance == "contrastive" and not self.negative_lora:
            raise ValueError("--guidance contrastive needs --negative-lora")
        if self.negative_lora and (self.guidance == "contrastive") == (self.negative_merge is not None):
            raise ValueError("--negative-lora goes with either --guidance contrastive or --negative-merge")
        if self.negative_keep != 1 and self.guidance != "contrastive":
            raise ValueError("--negative-keep goes with --guidance contrastive")
        if self.negative_merge is not None and not self.negative_lora:
            raise ValueError("--negative-merge needs --negative-lora")
        super().check()


@dataclass(frozen=True)
class ExportOptions(ModelOptions, Options):
    """Write a run's weights as other programs read them. Options of the model that are unset are the run's own."""

    run: str
    """Folder of a run or of one of its checkpoints, or a LoRA file (the flag may be left out if it comes first)."""
    format: Literal["diffusers", "kohya", "sd-scripts", "merged"]
    """diffusers: a LoRA for load_lora_weights; kohya: for ComfyUI, A1111 and Forge; sd-scripts: for kohya's own, which
    number SDXL's blocks and fuse SD3's and FLUX's weights as the originals do; merged: a whole pipeline with the
    weights folded in."""
    out: str | None = None
    """File of a LoRA (.safetensors), or folder of a merged pipeline; unset: beside the run, named after it."""
    model: str = field(default="", kw_only=True)
    """The model that the weights are for; unset takes it from the run's config.yaml."""
    dtype: Literal["auto", "fp32", "fp16", "bf16"] = field(default="auto", kw_only=True)
    """Of a merged pipeline's weights, which are rounded after the LoRA is folded in; auto is fp32."""

    def check(self) -> None:
        super().check()
        if self.out is not None and self.out.endswith(".safetensors") == (self.format == "merged"):
            kind = "a folder" if self.format == "merged" else "a .safetensors file"
            raise ValueError(f"--out {self.out}: --format {self.format} writes {kind}")


@dataclass(frozen=True)
class DemoOptions(Options):
    """DPO and InPO on the embedded world: train, compare with the base on held-out prompts, write a report."""

    counts: ClassVar[tuple[str, ...]] = ("num_prompts",)

    out: str = "runs/demo"
    """Folder of report.html, summary.json, pictures, the encoded pairs and the two runs. A demo with the same settings
    is made anew there; a folder that holds anything else is left alone."""
    overwrite: bool = False
    """Write over whatever --out holds under the names of a demo's files."""
    num_prompts: int = 250
    """Held-out prompts of the comparison (the test split has 250)."""
    dpo_steps: int | None = None
    """Optimiser steps; unset takes the recipe's."""
    inpo_steps: int | None = 60
    """Optimiser steps; None takes the recipe's 100, which take a minute more."""
    seed: int = 0
    """Seed of both trainings."""


@dataclass(frozen=True)
class ScoreOptions(Options):
    """Score pictures with any scorers: a folder, or a table of pairs (Pick-a-Pic's columns)."""

    counts: ClassVar[tuple[str, ...]] = ("batch_size",)

    source: str
    """Folder of pictures, parquet file or folder, shipped or hub data set (the flag may be left out if it comes
    first)."""
    scorers: tuple[str, ...]
    """Names (docs/rewards.md) or folders of trained scorers."""
    out: str = "scores.parquet"
    """Table to write: .parquet or .jsonl."""
    overwrite: bool = False
    """Write over a table that is there already."""
    prompts: str | None = None
    """For a folder: file with one prompt per picture, in the order of the file names; unset reads the metadata that
    generate writes."""
    split: str = "test"
    """For a table: its split."""
    batch_size: int = 32
    """Pictures scored at once."""
    device: str = "auto"
    """cuda, mps, cpu; auto takes a GPU where there is one."""

    def check(self) -> None:
        super().check()
        if not self.out.endswith((".parquet", ".jsonl")):
            raise ValueError(f"--out {self.out}: expected a .parquet or .jsonl file")


@dataclass(frozen=True)
class RelabelOptions(Options):
    """Label existing pairs by a scorer, once, and keep them: the official Diffusion-DPO code's choice model."""

    counts: ClassVar[tuple[str, ...]] = ("batch_size", "shard_size", "max_pairs")

    source: str
    """Pairs: shipped or hub data set, parquet file or folder, or a folder with metadata.jsonl or metadata.csv (the flag
    may be left out if it comes first). Or ranked lists on this disk."""
    scorer: str
    """Name (docs/rewards.md), folder of a trained scorer, or address of a served one."""
    out: str
    """Folder for the labelled pairs; give it as --dataset. A run that died goes on there."""
    checkpoint: str | None = None
    """Weights file or folder of the scorer instead of the published ones."""
    split: str = "train"
    """Split of the data set."""
    streaming: bool = False
    """Read the data set as a stream, for what does not fit the disk."""
    tie_margin: float = 0.0
    """Pairs whose scores differ by this or less are ties, in the scorer's own unit (the run says how large margins
    are)."""
    temperature: float | None = None
    """Add soft labels, sigmoid(difference of the scores / temperature), which loss_type sigmoid learns from; unset adds
    none."""
    max_pairs: int | None = None
    """Label only this many pairs, drawn at random (of a stream the first)."""
    seed: int = 0
    """What they are drawn with."""
    max_corrupt: int = 100
    """How many pairs whose images cannot be decoded are left out and reported before the run stops."""
    batch_size: int = 16
    """Pairs scored at once."""
    shard_size: int = 1000
    """Pairs of a file; a run that died repeats one file at most."""
    device: str = "auto"
    """cuda, mps, cpu; auto takes a GPU where there is one."""

    def check(self) -> None:
        super().check()
        for name in ("tie_margin", "max_corrupt"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected at least 0")
        if self.temperature is not None and not self.temperature > 0:
            raise ValueError(f"--temperature {self.temperature}: expected more than 0")


@dataclass(frozen=True, kw_only=True)
class OneScorerOptions(Options):
    """A scorer, and what its loader is given."""

    scorer: str
    """Name (docs/rewards.md) or folder of a trained scorer (the flag may be left out if it comes first)."""
    checkpoint: str | None = None
    """Weights file or folder instead of the published ones."""
    options: tuple[str, ...] = ()
    """Further options of the scorer as KEY=VALUE; a key given twice becomes a list, e.g. templates=a.txt
    templates=b.txt."""
    device: str = "auto"
    """cuda, mps, cpu; auto takes a GPU where there is one."""

    def check(self) -> None:
        super().check()
        for option in self.options:
            if not option.partition("=")[0] or "=" not in option:
                raise ValueError(f"--options {option}: expected KEY=VALUE")


@dataclass(frozen=True, kw_only=True)
class ServeScorerOptions(OneScorerOptions):
    """Serve a scorer to runs in other processes, which name it by its address (http://127.0.0.1:8765).

    A server that other machines reach needs a secret in the environment variable DIFFUSION_ALIGN_TOKEN, on both sides.
    """

    counts: ClassVar[tuple[str, ...]] = ("batch_size",)

    host: str = "127.0.0.1"
    """Address to listen at."""
    port: int = 8765
    """Port to listen at; 0 takes a free one."""
    batch_size: int = 32
    """Pictures scored at once."""

    def check(self) -> None:
        super().check()
        if not 0 <= self.port < 2**16:
            raise ValueError(f"--port {self.port}: expected 0 to 65535")


@dataclass(frozen=True)
class ScorersOptions(Options):
    """List every scorer: size and licence of its weights, what it needs, and whether the weights are on this machine.

    'diffusion-align scorers verify NAME' loads one and scores a few pictures.
    """

    # No options of its own: --json, which every command has, gives one JSON list.


@dataclass(frozen=True, kw_only=True)
class VerifyScorerOptions(OneScorerOptions):
    """Load a scorer, score a few pictures that the package draws, compare with what is known of it, and print a row
    for the table of what was run (docs/evidence/scorers.md). Weights that are not here are downloaded."""


@dataclass(frozen=True)
class AnnotateOptions(DrawingOptions, Options):
    """Make preference pairs by AI feedback: draw pictures for prompts, score them, compare them."""

    counts: ClassVar[tuple[str, ...]] = ("num_inference_steps", "batch_size")

    prompts: str
    """File of prompts (.txt, .csv, .jsonl, .parquet); the flag may be left out if it comes first."""
    scorers: tuple[str, ...]
    """SCORER for the overall verdict, ASPECT=SCORER for an aspect, e.g. pickscore aesthetic=aesthetic; the scorer llm
    asks a model behind --llm-url. Without an overall scorer the verdict is the mean of the standardised aspects."""
    out: str = "annotated"
    """Folder for pictures and pairs (train-00000-of-00001.parquet: give the folder as --dataset)."""
    per_prompt: int = 4
    """Pictures per prompt."""
    pairs: Literal["all", "best-worst"] = "all"
    """Every pair of a prompt's pictures, or only the best with the worst."""
    tie_margin: float = 0.1
    """Scores closer than this, in standard deviations within a prompt, are a tie."""
    num_inference_steps: int = 25
    """Sampling steps."""
    guidance_scale: float = 5.0
    """Classifier-free guidance scale."""
    seed: int = 0
    """Picture i of prompt p has seed + p * per_prompt + i."""
    batch_size: int = 8
    """Images drawn at once."""
    llm_url: str = "http://localhost:8000/v1"
    """OpenAI-compatible endpoint of the scorer llm; its key is read from OPENAI_API_KEY."""
    llm_model: str = "default"
    """Name of the model at that endpoint."""
    device: str = "auto"
    """cuda, mps, cpu; auto takes a GPU where there is one."""

    def check(self) -> None:
        super().check()
        if self.per_prompt < 2:
            raise ValueError(f"--per-prompt {self.per_prompt}: expected at least 2 pictures to compare")
