"""Settings of training latent evaluators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from diffusion_align.guidance.judges.evaluator_kinds import EvaluatorKind
from diffusion_align.training.engine.config import JudgeRun, NonNegativeFloat, Positive, PositiveFloat
from diffusion_align.training.policy.data_config import PairData
from diffusion_align.training.policy.model_options import TrainedModelOptions


@dataclass(frozen=True, kw_only=True)
class EvaluatorConfig(PairData, TrainedModelOptions, JudgeRun):
    """Train the latent evaluators of dynamic guidance (2509.16131): alignment, fidelity, preference, task, value."""

    method: ClassVar[str] = "evaluator"
    takes_scorer: ClassVar[bool] = True

    # -- optimisation
    per_device_train_batch_size: Positive = 64
    """Pairs per device and micro-step."""
    learning_rate: PositiveFloat = 1e-3
    """Peak learning rate: evaluators are small, and start from nothing."""

    # -- evaluator
    kinds: tuple[EvaluatorKind, ...] = ("alignment", "fidelity", "preference")
    """What it judges; all kinds share one tower on the noisy latents. value needs scale_0 and scale_1 in dataset."""
    loss_type: Literal["bradley_terry", "thurstone"] = "bradley_terry"
    """Of the kind preference. bradley_terry: P = sigmoid(difference), weighted by alpha_bar; thurstone: P =
    Phi(difference / sqrt(2 v)) with v = scale sigma^2 + floor, both learned, so that scores keep one scale at every
    noise level (DiNa-LRM). eval/calibration/preference tells confidence minus accuracy by timestep."""
    width: Positive = 48
    """Channels of the tower."""
    features: Positive = 128
    """Width of the picture's and the prompt's embeddings."""
    towers: str | None = None
    """Trained evaluator whose towers are taken and frozen, so that only heads are trained (for few pairs); unset: fresh
    towers."""
    scale_penalty: NonNegativeFloat = 0.3
    """Penalty on the squared weights that predict the best scale from a prompt (value); use more with fewer pairs."""
    teacher: str | None = None
    """Scorer whose reward the kind task predicts from noisy latents."""
    model: str = "scenes-sdxl"
    """Model whose latents and prompt embeddings are judged: shipped name, pipeline folder, single .safetensors file, or
    hub name. Its UNet is not loaded."""

    # -- data
    dataset: str = "scenes-pairs"
    """Judged pairs of generated pictures (Pick-a-Pic's columns), for preference, and against real ones for fidelity."""
    real_dataset: str | None = None
    """Pairs whose preferred picture is real and fits its caption, for alignment and fidelity; unset: dataset's."""
    validation_split: str = "validation"
    """Split that scores are standardised and accuracy is measured on."""
    alignment_aspect: str = "prompt_following"
    """Aspect (column label_0_ASPECT) that says which picture fits the prompt; where it is missing the overall label."""
    value_aspect: str = "overall"
    """Aspect of the pairs' verdicts that the kind value learns from; overall: the verdict on the whole."""
    max_pairs: Positive | None = None
    """Use only this many pairs of each data set; all latents are held in memory, in half precision."""
    pair_selection: Literal["random", "first"] = "random"
    """Which they are: drawn at random by the seed, or the first of each data set."""

    def next_commands(self) -> list[list[str]]:
        dynamic = ["--guidance", "dynamic", "--evaluator", self.output_dir]
        return [["generate", "a prompt of yours", *self.model_flags(), *dynamic]]

    def check(self) -> None:
        super().check()
        if self.loss_type == "thurstone" and "preference" not in self.kinds:
            raise ValueError("loss_type thurstone is of the kind preference: add it to kinds")
        if "fidelity" in self.kinds and self.real_dataset is None:
            raise ValueError("kinds has fidelity, which tells generated from real pictures: give real_dataset")
