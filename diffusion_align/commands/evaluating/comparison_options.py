"""Options of ``diffusion-align evaluate A B``. Nothing heavy is imported here: --help must be instant."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from diffusion_align.commands.options import Options
from diffusion_align.training.policy.model_options import ModelOptions


@dataclass(frozen=True)
class EvaluateOptions(ModelOptions, Options):
    """Compare models, or folders of pictures: the same prompts and the same noise on all sides, the prompt as unit."""

    counts: ClassVar[tuple[str, ...]] = (
        "seeds", "num_prompts", "num_validation_prompts", "num_inference_steps", "batch_size", "shown",
    )  # fmt: skip

    sides: tuple[str, ...]
    """Two or more of [NAME=]WHAT[@key=value,...] (the flag may be left out if they come first). WHAT: base, a run's
    folder, a LoRA file (PATH:WEIGHT scales it), a pipeline's folder, single file or hub name, or a folder of pictures.
    Keys are flags of generate, e.g. dpo=runs/dpo@guidance=dynamic,candidates=2.5+3.5+5."""
    model: str = field(default="", kw_only=True)
    """What base is, and what LoRA files are for; unset: the model of the first run among the sides, or
    scenes-sdxl."""
    prompts: str | None = None
    """File (.txt, .csv, .tsv, .jsonl, .parquet; a column category gives tables by category), or a set: scenes, parti,
    hpdv2, geneval, t2i-compbench, or SET:PATH for a set on this disk. Unset: those of the folders of pictures, or
    scenes for shipped models."""
    num_prompts: int | None = None
    """Use only the first so many; unset: all (of scenes 100)."""
    seeds: int = 4
    """Pictures of each prompt."""
    seed: int = 0
    """Noise of a picture is drawn from this, its prompt and its number, the same on all sides."""
    scorers: tuple[str, ...] = ()
    """Judges: names (docs/rewards.md), folders of trained scorers or addresses; unset: scenes-oracle, for scenes."""
    match: Literal["none", "scale", "effective"] = "none"
    """Scorers love large guidance scales. scale: each side at its own best scale of --sweep by the first scorer, on
    validation prompts; effective: the baseline at the scale whose guidance term is as long as the side's."""
    sweep: tuple[float, ...] = (1.0, 2.0, 3.5, 5.0, 7.0, 10.0)
    """With --match: the scales that are tried on the validation prompts."""
    validation_prompts: str | None = None
    """With --match: file or set of prompts that are not tested on; unset: other prompts of scenes."""
    num_validation_prompts: int = 32
    """With --match: how many of them, one picture each."""
    judge: Literal["scorers", "people"] = "scorers"
    """people: write a blind task with all pictures in pairs; --resume reads the labels and makes the table."""
    baseline: str | None = None
    """Side that the others are put beside; unset: the one called base, else the first."""
    num_inference_steps: int = 25
    """Sampling steps, of sides that do not say."""
    guidance_scale: float = 5.0
    """Classifier-free guidance scale, of sides that do not say."""
    artefact_monitor: bool = False
    """Also measure BRISQUE (if installed), blockiness, high-frequency energy and near duplicates, and mark a figure
    where the paired 99% interval of its change leaves what may be; else the baseline's own spread decides."""
    shown: int = 6
    """Prompts whose pictures the report shows: the first ones, not chosen."""
    batch_size: int = 8
    """Pictures drawn and scored at once."""
    out: str = "runs/evaluate"
    """Folder of table.json, details.parquet, report.html and the pictures."""
    resume: bool = False
    """Go on in --out: nothing that is there is drawn or scored again."""
    overwrite: bool = False
    """Start again although --out holds an evaluation; its pictures are deleted."""
    device: str = "auto"
    """cuda, mps, cpu; auto takes a GPU where there is one."""

    def check(self) -> None:
        super().check()
        from diffusion_align.evaluation.arena.side_grammar import parse_sides

        names = [side.name for side in parse_sides(self.sides)]
        if self.baseline is not None and self.baseline not in names:
            raise ValueError(f"--baseline {self.baseline}: expected the name of a side, one of {', '.join(names)}")
        if self.resume and self.overwrite:
            raise ValueError("--resume goes on, --overwrite starts again: give one of them")
        if self.match == "none" and self.validation_prompts is not None:
            raise ValueError("--validation-prompts are for --match scale or effective, which choose by them")
        if self.match != "none" and (len(self.sweep) < 2 or not all(scale >= 1 for scale in self.sweep)):
            raise ValueError("--sweep: expected at least two guidance scales, each at least 1")
        if self.judge == "people" and self.match == "scale" and not self.scorers:
            raise ValueError("--match scale chooses scales by a scorer: give --scorers")
