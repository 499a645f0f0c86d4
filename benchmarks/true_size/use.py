"""What a user does with a model: draw, train a step, export, draw with the result."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .comfyui import keys_found
from .sources import laid_out
from .watched import Watched, in_gib, run_command

#: The pairs' recipe of each model, and what it needs to run here: no download, one small pair, float32.
SETTINGS = (
    "--vae", "None", "--no-streaming", "--max-steps", "1", "--per-device-train-batch-size", "1",
    "--gradient-accumulation-steps", "1", "--learning-rate", "1e-3", "--warmup-steps", "0", "--weight-dtype", "fp32",
    "--mixed-precision", "no", "--caption-dropout", "0",
)  # fmt: skip
DRAWING = ("a photo of thing 1", "--num-images", "1", "--num-inference-steps", "2")


@dataclass(frozen=True)
class Uses:
    """How all layouts of one pipeline are used.

    Attributes:
        folder: the pipeline.
        recipe: of ``train dpo``.
        pairs: folder to train on.
        resolution: of training and drawing.
        comfyui: folder of ComfyUI, or None.
        merged_dtype: of the exported pipeline's weights.
    """

    folder: Path
    recipe: Path
    pairs: Path
    work: Path
    resolution: int
    comfyui: Path | None
    merged_dtype: str
    before: int
    threads: int

    def row(self, layout: str) -> dict[str, Any]:
        """All of it with one layout."""
        with laid_out(self.folder, layout, self.work) as model:
            return self.measure(layout, model)

    def measure(self, layout: str, model: list[str]) -> dict[str, Any]:
        run, peaks = self.work / f"run-{layout}", {}
        base, drawn = self.draw("base", model)
        peaks["generate"] = self.peak(drawn)
        training = ["train", "dpo", "--config", str(self.recipe), *model, *SETTINGS, "--dataset", str(self.pairs),
                    "--resolution", str(self.resolution), "--output-dir", str(run)]  # fmt: skip
        estimated = estimate(run_command([*training, "--dry-run"], self.threads).output)
        shutil.rmtree(run, ignore_errors=True)
        peaks["train dpo"] = self.peak(run_command(training, self.threads)) | {"estimate_gib": estimated}
        with_lora, drawn = self.draw("lora", [*model, "--lora", str(run)])
        peaks["generate --lora"] = self.peak(drawn)
        names = {kind: self.names(run, kind) for kind in ("diffusers", "kohya")}
        merged = self.work / f"run-{layout}-merged"
        shutil.rmtree(merged, ignore_errors=True)
        watched = run_command(
            ["export", str(run), "--format", "merged", "--dtype", self.merged_dtype, "--out", str(merged)], self.threads
        )
        peaks["export --format merged"] = self.peak(watched)
        from_merged, _ = self.draw("merged", ["--model", str(merged)])
        shutil.rmtree(merged)
        return {
            "resolution": self.resolution,
            "merged_dtype": self.merged_dtype,
            "lora_changes_pixels_by": difference(with_lora, base),
            "merged_differs_by": difference(with_lora, from_merged),
            "comfyui": names,
            "peaks": peaks,
        }

    def draw(self, name: str, flags: list[str]) -> tuple[np.ndarray[Any, Any], Watched]:
        out, side = self.work / f"drawn-{name}", str(self.resolution)
        shutil.rmtree(out, ignore_errors=True)
        watched = run_command(
            ["generate", *DRAWING, *flags, "--height", side, "--width", side, "--out", str(out)], self.threads
        )
        (picture,) = out.glob("*.png")
        return np.asarray(Image.open(picture)).astype(int), watched

    def names(self, run: Path, kind: str) -> dict[str, int] | None:
        """The names that ComfyUI finds in an exported file."""
        file = self.work / f"{kind}.safetensors"
        file.unlink(missing_ok=True)
        run_command(["export", str(run), "--format", kind, "--out", str(file)], self.threads)
        return None if self.comfyui is None else keys_found(self.comfyui, file, self.folder)

    def peak(self, watched: Watched) -> dict[str, float]:
        return {"resident_gib": in_gib(watched.resident), "own_gib": in_gib(watched.own - self.before)}


def difference(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> int:
    """Largest difference of two pictures, in steps of 1 / 255."""
    return int(np.abs(one - other).max())


def estimate(plan: str) -> float:
    """The total in what ``--dry-run`` prints, GiB."""
    match = re.search(r"total, per device\s+([\d.]+) GiB", plan)
    if match is None:
        raise ValueError(f"no total of the memory in the plan:\n{plan}")
    return round(float(match[1]), 2)
