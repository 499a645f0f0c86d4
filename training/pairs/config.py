"""Settings of DPO, InPO and supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from diffusion_align.training.engine.config import (
    Fraction,
    NonNegative,
    NonNegativeFloat,
    PlanNotes,
    Positive,
    PositiveFloat,
)
from diffusion_align.training.policy.config import CachedExample, MemoryNeeds, TrainConfig, VAEJob, ValidationData, Work
from diffusion_align.training.policy.data_config import BatchedPairs, JudgedPairs
from diffusion_align.training.policy.flow_times import FlowTimes
from diffusion_align.training.policy.preference_config import PreferenceSettings

from .beyond_pairs.list_data import ListData, check_lists
from .beyond_pairs.width import ExampleKinds, Width, example_width
from .switches.config import (
    NoiseLevels,
    PairSwitches,
    ReferenceSwitches,
    check_levels,
    check_reference,
    check_switches,
)

#: Where SDXL-Turbo's four steps begin.
TURBO_TIMESTEPS = (249, 499, 749, 999)
#: Settings that the noise or the reference's arithmetic depends on, beside the model and the data.
REFERENCE_SETTINGS = (
    "seed", "noise_draws", "min_timestep", "max_timestep", "caption_dropout", "null_prompt", "size_ids",
    "mixed_precision", "weight_dtype", "full_finetuning", "attention", "torch_compile", "channels_last",
)  # fmt: skip
#: The same, of later versions, as they are by default: left out then, so that files from before they were are found.
#: Not every method has all of them.
LATER_REFERENCE_SETTINGS = {
    "timesteps": "all", "noise_offset": 0.0, "input_perturbation": 0.0, "timestep_density": "uniform",
    "timestep_logit_mean": 0.0, "timestep_logit_std": 1.0, "min_time": 0.0, "max_time": 1.0,
    "time_density": "logit-normal", "time_logit_mean": 0.0, "time_logit_std": 1.0, "shift": "auto",
    "train_guidance": 1.0, "max_sequence_length": None, "shared_noise": False,
}  # fmt: skip
INVERSION_SETTINGS = ("inversion_model", "inversion_steps", "renoise_iterations", "inversion_eta")


@dataclass(frozen=True, kw_only=True)
class DenoisingConfig(ExampleKinds, NoiseLevels, FlowTimes, BatchedPairs, TrainConfig):
    """What the methods share that denoise the pictures of a data set."""

    changeable: ClassVar[frozenset[str]] = frozenset({"cache_dir"})
    #: Pictures of an example that the network sees.
    pictures: ClassVar[int] = 2

    # -- data
    dataset: str = "scenes-pairs"
    """Pairs: shipped name, hub data set, parquet file or folder, or an image folder with metadata.jsonl/.csv."""
    relabel_with: str | None = None
    """Scorer whose verdicts take the place of the data set's labels; asked once, kept in output_dir/relabelled (for
    large data sets: diffusion-align data relabel)."""
    relabel_temperature: PositiveFloat | None = None
    """With relabel_with: soft labels, sigmoid(difference of scores / relabel_temperature), instead of sure ones; for
    losses that take them, pair_beta and curriculum."""
    streaming: bool = False
    """Read parquet files as they are, on this disk or on the hub, without a copy or random access (docs/data.md)."""
    shuffle_buffer: Positive = 10_000
    """Pairs of a stream that are shuffled together, evenly drawn from all of its files; they are held, encoded, and
    take a few GB for Pick-a-Pic."""
    cache_dir: str | None = None
    """Folder for cached VAE posteriors and prompt embeddings; made when absent, checked when present."""
    resolution: Positive | None = None
    """Side of the training images in pixels; unset takes the model's own."""
    random_crop: bool = False
    """Crop at random instead of in the centre (the same for both images of a pair; not with cache_dir)."""
    random_flip: bool = True
    """Mirror half of the pairs (both images)."""
    interpolation: Literal["lanczos", "bicubic", "bilinear"] = "lanczos"
    """Filter that makes images smaller or larger; the official code's is bilinear."""
    size_ids: Literal["pair", "own", "resolution"] = "pair"
    """SDXL's size ids: the chosen image's for both of a pair, each image's own, or an uncropped image of the trained
    size for all (the official code)."""
    aspect_ratio_buckets: bool = False
    """Keep aspect ratios: batches of equal shape with about resolution^2 pixels."""
    caption_dropout: Fraction = 0.0
    """Share of pairs trained with the null prompt."""
    null_prompt: Literal["pipeline", "encoded"] = "pipeline"
    """What a dropped caption becomes: what the pipeline's guidance takes (SDXL: zeros), or the empty prompt, encoded
    (the official Diffusion-DPO and InPO code). SD 1.x and 2.x encode it either way."""
    noise_draws: Positive | None = None
    """Number of fixed draws of timestep, noise, flip and crop for each pair; every visit takes one of them. Unset:
    fresh ones at every visit (not with streaming)."""

    # -- noise
    min_timestep: NonNegative = 0
    """Smallest training timestep."""
    max_timestep: Positive = 1000
    """Timesteps are drawn uniformly from [min_timestep, max_timestep)."""
    timesteps: tuple[NonNegative, ...] | Literal["all", "turbo", "zero-snr"] = "all"
    """Which of them: these only, e.g. 249 499 749 999; all; zero-snr, all with a schedule that ends in noise alone
    (zero terminal SNR); or turbo, for SDXL-Turbo, those four with that schedule (the official code)."""
    noise_offset: NonNegativeFloat = 0.0
    """Add this much of one more normal number for each channel to the noise, which lets a model learn very dark and
    very bright pictures (usual: 0.05 to 0.1)."""
    input_perturbation: NonNegativeFloat = 0.0
    """Show the network latents whose noise has this much more noise in it than it is asked to find (usual: 0.1)."""

    @property
    def timestep_set(self) -> tuple[int, ...]:
        """The only timesteps that are trained at; empty for all."""
        if isinstance(self.timesteps, str):
            return TURBO_TIMESTEPS if self.timesteps == "turbo" else ()
        return self.timesteps

    @property
    def zero_terminal_snr(self) -> bool:
        """Whether the schedule is changed so that it ends in noise alone."""
        return self.timesteps in ("turbo", "zero-snr")

    def check(self) -> None:
        super().check()
        if self.cache_dir is not None and self.random_crop:
            raise ValueError("random_crop cannot be used with cache_dir: cached latents hold one crop per image")
        for name in ("cache_dir", "streaming"):
            if self.relabel_with is not None and getattr(self, name):
                raise ValueError(
                    f"relabel_with cannot be used with {name}: label the pairs with diffusion-align data relabel, and "
                    "give their folder as dataset"
                )
        if self.relabel_temperature is not None and self.relabel_with is None:
            raise ValueError("relabel_temperature softens the labels of relabel_with: name a scorer there")
        low, high = self.min_timestep, self.max_timestep
        if low >= high:
            raise ValueError(f"min_timestep = {low} must be smaller than max_timestep = {high}")
        outside = [t for t in self.timestep_set if not low <= t < high]
        if outside:
            raise ValueError(
                f"timesteps has {outside[0]}: expected min_timestep = {low} to max_timestep - 1 = {high - 1}"
            )
        if self.timesteps == () or len(set(self.timestep_set)) < len(self.timestep_set):
            raise ValueError(f"timesteps {list(self.timestep_set)}: expected some, each of them once")
        if self.noise_draws is not None and self.streaming and self.cache_dir is None:
            raise ValueError("noise_draws needs pairs with random access, which meet again: set streaming to false")
        check_levels(self)

    def validation_data(self) -> ValidationData:
        return ValidationData(self.dataset)

    def memory_needs(self) -> MemoryNeeds:
        cached, pictures = self.cache_dir is not None, self.example.pictures
        encoding = VAEJob("encode", pictures * self.per_device_train_batch_size)
        return MemoryNeeds(self.resolution, cached, rows=pictures, vae_jobs=() if cached else (encoding,))

    def work(self) -> Work:
        cached, example = self.cache_dir is not None, self.example
        return Work(
            example.name,
            trained=example.pictures,
            forward={part: example.pictures * calls for part, calls in self.network_calls().items()},
            vae={} if cached else {"encode": example.pictures},
            prompts=0 if cached else 1,
        )

    def network_calls(self) -> dict[str, int]:
        """Calls of the network for each picture beside the one that is trained, by what they are for."""
        return {}

    def cached_example(self) -> CachedExample:
        is_there = self.cache_dir is not None and (Path(self.cache_dir) / "manifest.json").is_file()
        return CachedExample(self.example.pictures, 2 if self.random_flip else 1, is_there or self.cache_dir is None)

    def plan(self, world_size: int = 1) -> PlanNotes:
        data, examples = self.data_notes()
        return PlanNotes({"data": data, **self.costs(world_size, examples)}, examples)

    def data_notes(self) -> tuple[str | dict[str, str], int | None]:
        """What there is to say about the data set, and how many examples are used; None where that is not known."""
        from .loading import load_training_pairs

        try:
            pairs = load_training_pairs(self)
        except FileNotFoundError:
            raise
        except OSError as error:  # of the hub: who plans offline need not have the data yet
            return f"not read, training could not start here: {error}", self.max_pairs
        if pairs.used is None:
            return f"{pairs.name}: {pairs.counts['rows']:,} rows on the hub; ties are left out as they come", None
        found = pairs.summary()
        counts = pairs.counts | {f"{pairs.meaning.unit} used": pairs.used} | found.counts
        data = {name: f"{count:,}" for name, count in counts.items()}
        data |= {f"warning {number}": text for number, text in enumerate(found.warnings, start=1)}
        if pairs.uncaptioned:
            data["without caption"] += f" ({'; '.join(pairs.uncaptioned)})"
        return data, pairs.used


@dataclass(frozen=True, kw_only=True)
class SFTConfig(DenoisingConfig):
    """Supervised fine-tuning: denoise pictures with captions, or the chosen pictures of pairs."""

    method: ClassVar[str] = "sft"
    pictures: ClassVar[int] = 1

    # -- data
    dataset: str = "scenes-pairs"
    """Pictures with captions (columns image, caption), or pairs, whose chosen pictures are taken: shipped name, hub
    data set, parquet file or folder, or an image folder with metadata.jsonl/.csv."""
    size_ids: Literal["own", "resolution"] = "own"
    """SDXL's size ids: each image's own, or an uncropped image of the trained size for all."""


@dataclass(frozen=True, kw_only=True)
class ReferencedConfig(ReferenceSwitches, DenoisingConfig):
    """What the methods share that compare the policy with a reference."""

    @property
    def needs_reference(self) -> bool:
        """Whether the reference is asked at all."""
        return True

    @property
    def watches_frozen(self) -> bool:
        """Whether the frozen reference is asked beside another one."""
        return self.needs_reference and self.reference != "frozen" and self.watch_frozen

    def check(self) -> None:
        super().check()
        check_reference(self)

    def network_calls(self) -> dict[str, int]:
        frozen = {"frozen reference, to watch": 1} if self.watches_frozen else {}
        return {"reference": 1, **frozen} if self.needs_reference else {}

    def memory_needs(self) -> MemoryNeeds:
        # A moving reference, and the policy's weights while it has their place.
        return replace(super().memory_needs(), copies=0 if self.reference == "frozen" else 2)


@dataclass(frozen=True, kw_only=True)
class DPOConfig(PairSwitches, ListData, PreferenceSettings, ReferencedConfig, JudgedPairs):
    """Diffusion-DPO (2311.12908) and the other losses on preference pairs and ranked lists."""

    method: ClassVar[str] = "dpo"
    changeable: ClassVar[frozenset[str]] = frozenset({"reference_cache", "entanglement_steps"})
    stop_rules: ClassVar[frozenset[str]] = TrainConfig.stop_rules | {"entanglement", "large_margins"}
    for_pairs: ClassVar[tuple[str, ...]] = (
        *PreferenceSettings.for_pairs, "pair_beta", "linear_eta", "margin_dropout", "swap_labels",
    )  # fmt: skip
    options: ClassVar[Mapping[str, tuple[str, ...]]] = {**PreferenceSettings.options, "linear_eta": ("linear",)}

    # -- data
    reference_cache: bool = False
    """Remember the reference's errors in cache_dir, two numbers for each pair and draw. From the second visit of a draw
    on, the reference's forward pass is skipped (needs noise_draws and cache_dir)."""

    # -- objective
    beta: PositiveFloat = 5000.0
    """Strength of the pull to the reference; the logit is 0.5 * beta * (s_chosen - s_rejected)."""
    entanglement_steps: NonNegative = 0
    """Every so many optimiser steps, take the gradients of the chosen and the rejected error apart, and log their
    cosine and kappa (entanglement/...); costs one more backward pass then. 0 is off."""

    @property
    def example(self) -> Width:
        if not self.is_list:
            return super().example
        return example_width(self.dataset, self.dataset_split, self.units, self.list_size)

    def on_lists(self, folder: str) -> DPOConfig:
        return replace(self, dataset=folder, lists_from_pairs=False)

    def check(self) -> None:
        super().check()
        self.check_loss()
        check_switches(self)
        check_lists(self)
        if self.reference_cache:
            self.check_reference_cache()
        if self.entanglement_steps and self.torch_compile:
            raise ValueError(
                "entanglement_steps takes gradients twice, which the compiled network forgets after one: set "
                "torch_compile to false"
            )
        if self.entanglement_steps and self.is_list:
            raise ValueError(
                f"entanglement_steps compares a chosen and a rejected picture, loss_type {self.loss_type} takes lists: "
                "set it to 0"
            )

    def check_reference_cache(self) -> None:
        """Raises ValueError where the reference's errors could not be remembered."""
        if self.noise_draws is None:
            raise ValueError("reference_cache needs noise_draws, e.g. 8: fresh noise has no second visit")
        if self.cache_dir is None:
            raise ValueError("reference_cache needs cache_dir: the errors belong to its latents and lie beside them")
        if not self.needs_reference:
            named = ", ".join(self.loss_types)
            raise ValueError(f"reference_cache has nothing to remember: loss_type {named} has no reference")

    def network_calls(self) -> dict[str, int]:
        calls = super().network_calls()
        return {"reference, at first visits": 1} if calls and self.reference_cache else calls

    def reference_settings(self) -> dict[str, Any]:
        """Settings that a reference error depends on to its last bit."""
        later = {name: getattr(self, name, default) for name, default in LATER_REFERENCE_SETTINGS.items()}
        changed = {name: value for name, value in later.items() if value != LATER_REFERENCE_SETTINGS[name]}
        return {name: getattr(self, name) for name in REFERENCE_SETTINGS} | changed


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
    shared_noise: bool = False
    """Give both images of a pair the same fresh noise, which then cancels in their comparison; false: each its own
    (official code)."""

    def check(self) -> None:
        super().check()
        if self.shared_noise and not self.inversion_eta:
            raise ValueError("shared_noise is about the fresh noise of inversion_eta, which is 0: set it above 0")
        for name in ("noise_offset", "input_perturbation"):
            if getattr(self, name):
                raise ValueError(f"{name} = {getattr(self, name)}: inpo finds its noise by inversion and adds none")
        if self.zero_terminal_snr:
            raise ValueError(
                f"timesteps {self.timesteps} changes the schedule, along which inpo inverts with the model as it is: "
                "give the timesteps themselves, e.g. 249 499 749"
            )

    def check_reference_cache(self) -> None:
        super().check_reference_cache()
        if self.inversion_model == "policy":
            raise ValueError(
                "reference_cache cannot be used with inversion_model policy, whose noise changes as it learns: "
                "set inversion_model to reference"
            )

    def network_calls(self) -> dict[str, int]:
        return {**super().network_calls(), "inversion": self.inversion_steps * (1 + self.renoise_iterations)}

    def reference_settings(self) -> dict[str, Any]:
        return super().reference_settings() | {name: getattr(self, name) for name in INVERSION_SETTINGS}
