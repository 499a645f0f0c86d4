"""What a card says of a run, gathered from its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusion_align.adapters.lora_files import find_lora_file
from diffusion_align.evaluation.stats import WinRate
from diffusion_align.shipped import SHIPPED
from diffusion_align.training.engine.metrics import read_metrics
from diffusion_align.training.pairs.left_out import data_facts, kept_counts
from diffusion_align.training.policy.config import TrainConfig
from diffusion_align.training.settings import load_run

from .sharing_options import REPOSITORY

#: Licences of base models, as their own cards say: weights made from them have the same.
LICENCES: Mapping[str, str] = {
    "stabilityai/stable-diffusion-xl-base-1.0": "openrail++",
    "stabilityai/stable-diffusion-2-1": "openrail++",
    "stabilityai/stable-diffusion-2-1-base": "openrail++",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "creativeml-openrail-m",
    "runwayml/stable-diffusion-v1-5": "creativeml-openrail-m",
    "stable-diffusion-v1-5/stable-diffusion-inpainting": "creativeml-openrail-m",
    "diffusers/stable-diffusion-xl-1.0-inpainting-0.1": "openrail++",
    "scenes-sdxl": "apache-2.0",
    "scenes-sd": "apache-2.0",
    "scenes-inpaint": "apache-2.0",
    "scenes-uneven": "apache-2.0",
    "scenes-flow": "apache-2.0",
}


@dataclass(frozen=True)
class Measured:
    """A win rate that a card may show.

    Attributes:
        judge: scorer or people.
        over: what it was compared with.
        prompts: on which it was measured, in words.
        trained_on: why the judge is not independent; "" where it is, as far as the run says.
    """

    judge: str
    over: str
    rate: WinRate
    prompts: str
    trained_on: str = ""


@dataclass(frozen=True)
class RunFacts:
    """Everything that a card is made of, but for its pictures.

    Attributes:
        weights: files that the hub gets, relative to the folder.
        is_lora: whether they are a LoRA; else a whole network.
        method: its name; about: what its settings say of it, with the paper's number.
        data: counts, for reading; empty where nobody counted.
        evaluation: the table of ``evaluate``, where there is one.
    """

    folder: Path
    config: TrainConfig
    weights: Sequence[str]
    is_lora: bool
    method: str
    about: str
    data: Mapping[str, str]
    measured: Sequence[Measured]
    evaluation: Mapping[str, Any] | None = None
    side: str = ""
    warnings: Sequence[str] = field(default_factory=tuple)

    @property
    def base(self) -> str:
        """The base model's name."""
        return self.config.model

    @property
    def base_on_hub(self) -> str | None:
        """Its name on the hub; None of what is shipped or on this disk."""
        return hub_name(self.base)

    @property
    def dataset_on_hub(self) -> str | None:
        """Likewise of the data set."""
        name = getattr(self.config, "dataset", None)
        return None if name is None else hub_name(name)

    def licence(self, given: str | None) -> str | None:
        """The one that was given, or that of a known base."""
        return given or LICENCES.get(self.base)


def hub_name(name: str) -> str | None:
    """``name`` if it can be a repository of the hub."""
    return name if REPOSITORY.fullmatch(name) and not Path(name).exists() and name not in SHIPPED else None


def gather(folder: Path, evaluation: Path | None) -> RunFacts:
    """Read a run's folder, and the evaluation's if there is one.

    Raises:
        FileNotFoundError: no run, no weights in it, or no evaluation where one was named.
        ValueError: a run that trains no diffusion model, or an evaluation that it is no side of.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"--run {folder}: no such folder")
    config = load_run(folder)
    if config is None:
        raise FileNotFoundError(f"--run {folder}: no config.yaml, this is no run's folder")
    if not isinstance(config, TrainConfig):
        raise ValueError(f"--run {folder} is a run of {config.method}, which trains no diffusion model")
    lora = find_lora_file(folder)
    networks = [folder / name for name in ("unet", "transformer") if (folder / name / "config.json").is_file()]
    if lora is not None:
        weights = [file.name for file in sorted(folder.glob("*_lora_weights.safetensors"))] or [lora.name]
    elif networks:
        weights = [str(file.relative_to(folder)) for file in sorted(networks[0].rglob("*")) if file.is_file()]
    else:
        raise FileNotFoundError(f"--run {folder}: no weights in it yet; a card is for a finished run")
    counts = kept_counts(folder)
    table, side = read_evaluation(folder, evaluation)
    return RunFacts(
        folder,
        config,
        weights,
        lora is not None,
        config.method,
        " ".join((type(config).__doc__ or "").split()),
        {} if counts is None else data_facts(folder, counts),
        measured_by(table, side) if table is not None else measured_in_run(folder, config),
        table,
        side,
        () if counts is None else counts.warnings,
    )


def read_evaluation(folder: Path, given: Path | None) -> tuple[Mapping[str, Any] | None, str]:
    """The table of an evaluation, and what the run is called in it."""
    place = given or folder / "evaluate"
    file = place / "table.json"
    if not file.is_file():
        if given is not None:
            raise FileNotFoundError(f"--evaluation {given}: no table.json in it; expected a folder that evaluate wrote")
        return None, ""
    table = json.loads(file.read_text())
    for side in table.get("sides", []):
        what = side["side"].partition("@")[0]
        if Path(what).exists() and Path(what).resolve() == folder.resolve():
            return table, str(side["name"])
    names = ", ".join(side["side"] for side in table.get("sides", [])) or "none"
    raise ValueError(f"{file}: {folder} is no side of it: expected it among {names}")


def measured_by(table: Mapping[str, Any], side: str) -> list[Measured]:
    """Win rates of a side in an evaluation, matched ones first, as they stand there."""
    prompts = f"{table['prompts']['count']} prompts x {table['seeds_per_prompt']} seeds"
    found = []
    for verdict in table["verdicts"]:
        if verdict["side"] != side and verdict["side"] != f"{side} (as given)":
            continue
        rate = WinRate.from_json(verdict["win_rate"])
        judge = verdict["scorer"]
        why = table["scorers"].get(judge, {}).get("trained_on", {}).get(side, "")
        guidance = f", guidance {verdict['label']}" if verdict["label"] else ""
        found.append(Measured(judge, verdict["baseline"], rate, prompts + guidance, why))
    return found


def measured_in_run(folder: Path, config: TrainConfig) -> list[Measured]:
    """The run's own last validation, which chose nothing but saw the same prompts again and again."""
    path = folder / "metrics.jsonl"
    lines = [line for line in read_metrics(path) if "eval/win_rate" in line] if path.is_file() else []
    if not lines or config.validation_scorer is None:
        return []
    last, count = lines[-1], config.num_validation_prompts
    rate = float(last["eval/win_rate"])
    interval = (float(last["eval/win_rate_low"]), float(last["eval/win_rate_high"]))
    shown = WinRate(0, 0, 0, rate, interval, count)
    return [Measured(config.validation_scorer, "base", shown, f"at most {count} validation prompts of the run")]
