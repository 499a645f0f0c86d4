"""Options of ``diffusion-align evaluate guidance``. Nothing heavy is imported here: --help must be instant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from diffusion_align.guidance.judges.evaluator_kinds import EvaluatorKind

from ..options import DrawingOptions, Options

#: Groups of rows of the table.
RowGroup = Literal["curve", "dynamic", "step-ag", "usual", "bound"]


@dataclass(frozen=True)
class EvaluateGuidanceOptions(DrawingOptions, Options):
    """Compare ways to guide, at equal denoiser calls and at matched scale: static scales, schedules, dynamic search."""

    counts: ClassVar[tuple[str, ...]] = (
        "num_prompts", "num_validation_prompts", "num_inference_steps", "batch_size", "shown",
    )  # fmt: skip

    scorer: str = "scenes-oracle"
    """Scorer that judges the pictures; no way of guiding sees it."""
    prompts: str | None = None
    """File of test prompts; unset: fresh held-out prompts of scenes."""
    validation_prompts: str | None = None
    """File of the prompts that the static scale is chosen on; unset: fresh ones of scenes."""
    num_prompts: int = 500
    """Test prompts."""
    num_validation_prompts: int = 250
    """Validation prompts."""
    num_inference_steps: int = 20
    """Sampling steps, two denoiser calls each."""
    seeds: tuple[int, ...] = (0, 1_000_000, 2_000_000)
    """Seeds of the repetitions; image i of a repetition has this seed + i."""
    ways: tuple[RowGroup, ...] = ("curve", "dynamic", "step-ag", "usual")
    """Rows of the table. curve: every static scale of --sweep on the test prompts; dynamic: dynamic guidance, its mean
    schedule, its mean scale of each prompt; step-ag: guidance in the first --stops of the steps only, at fewer and at
    as many calls; usual: limited interval, linear, cosine, APG, CFG-Zero*; bound: with the judge (or --bound-scorer)
    picking each step's candidate on decoded predictions, and each prompt's scale on other seeds."""
    static: float | None = None
    """The best static scale, if it is known; unset: found by the sweep."""
    sweep: tuple[float, ...] = (1.0, 2.0, 3.5, 5.0, 7.0, 10.0)
    """Static scales tried on the validation prompts; the best one is the baseline."""
    matched_prompts: int = 32
    """Test prompts that each way's effective scale is measured on (two more calls a step); each row is then also put
    beside classifier-free guidance at that scale. 0: neither."""
    stops: tuple[float, ...] = (0.5,)
    """Shares of the steps that Step AG guides."""
    bound_scorer: str | None = None
    """Scorer that picks candidates in the bound rows; unset: the judge itself."""
    evaluator: str | None = None
    """Evaluator of dynamic guidance; unset: the one that comes with a shipped --model."""
    evaluators: tuple[EvaluatorKind, ...] = ("alignment", "preference")
    """Judgements used together; each is also tried alone."""
    candidates: tuple[float, ...] = (2.5, 3.5, 5.0)
    """Scales that dynamic guidance chooses from."""
    weighting: Literal["uniform", "linear", "adaptive", "adaptive-signed"] = "uniform"
    """How the evaluators are weighted."""
    normalise: Literal["population", "candidates"] = "candidates"
    """Standardise scores over the noise level's population, or over each image's candidates."""
    negative_lora: tuple[str, ...] = ()
    """A negative model, as of generate: adds a row of contrastive guidance, at the scale of --sweep that is best on the
    validation prompts, and one of both LoRAs merged."""
    negative_keep: float = 1.0
    """Share of --lora that the negative model has, too."""
    merge_weights: tuple[float, ...] = (0.5, 1.0)
    """W of base + W (LoRA - negative LoRA); the best on the validation prompts is the row. None given: no such row."""
    fit: str | None = None
    """File to write: learn an annealing schedule s(t, |delta|) between the least and the largest of --candidates, from
    rollouts of the validation prompts that --scorer judges, and add its row; generate --guidance annealing takes it."""
    fit_rollouts: int = 8
    """Pictures of each validation prompt, with random schedules, that it is learned from."""
    annealing: str | None = None
    """A schedule that --fit wrote before: adds its row."""
    selector: str | None = None
    """Scorer for a best-of-2 row; unset leaves the row out."""
    shown: int = 4
    """Prompts whose pictures the report shows: the first ones, not chosen."""
    batch_size: int = 32
    """Images drawn at once."""
    out: str = "runs/evaluate-guidance"
    """Folder of table.json and report.html."""
    overwrite: bool = False
    """Write over a table that is there already, and over the file of --fit."""
    device: str = "auto"
    """cuda, mps, cpu; auto takes a GPU where there is one."""

    def check(self) -> None:
        super().check()
        if (self.prompts is None) != (self.validation_prompts is None):
            raise ValueError("give both --prompts and --validation-prompts, or neither")
        if self.matched_prompts < 0:
            raise ValueError(f"--matched-prompts {self.matched_prompts}: expected at least 0")
        if self.fit is not None and self.annealing is not None:
            raise ValueError("--fit learns a schedule, --annealing takes one: give one of them")
        if self.fit is not None and (self.fit_rollouts < 2 or not 0 < min(self.candidates) < max(self.candidates)):
            raise ValueError("--fit needs --fit-rollouts of at least 2, and --candidates that differ and are above 0")
        if any(not 0 < stop < 1 for stop in self.stops):
            raise ValueError(f"--stops {' '.join(f'{stop:g}' for stop in self.stops)}: expected shares between 0 and 1")
