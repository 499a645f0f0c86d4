"""Options of the commands that help to begin. Nothing heavy is imported here: --help must be instant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from diffusion_align.commands.options import Options
from diffusion_align.training.methods import METHODS


@dataclass(frozen=True)
class DoctorOptions(Options):
    """Look at this machine: versions, devices, optional packages, model cache, disk, and a training of two steps.

    Each line is ok, warn or fail, with what to do; paths and secrets are left out, so that all of it can be pasted.
    Exit status 1: something failed.
    """

    quick: bool = False
    """Without the training: three seconds."""


@dataclass(frozen=True)
class InitOptions(Options):
    """Write a recipe with comments for a method, a model and a data set, fitted into a card's memory, and its plan."""

    method: str
    """What to train with, e.g. dpo (the flag may be left out if it comes first)."""
    model: str = "scenes-sdxl"
    """Shipped name, pipeline folder, single .safetensors file, or hub name."""
    dataset: str | None = None
    """What to train on; unset is the method's own default."""
    vram: float | None = None
    """GiB of the card that the run must fit into; settings that save memory are taken until it does."""
    out: str | None = None
    """File to write; unset is METHOD.yaml. One that is there is left alone."""

    def check(self) -> None:
        super().check()
        if self.method not in METHODS:
            from diffusion_align.commands.parsing import unknown

            raise ValueError(unknown("training method", self.method, METHODS))
        if self.vram is not None and not self.vram > 0:
            raise ValueError(f"--vram {self.vram:g}: expected GiB, more than 0")


@dataclass(frozen=True)
class CompletionOptions(Options):
    """Print a script that completes commands, flags and their values.

    bash: eval "$(diffusion-align completion bash)" in ~/.bashrc; zsh: the same in ~/.zshrc; fish: diffusion-align
    completion fish > ~/.config/fish/completions/diffusion-align.fish
    """

    shell: Literal["bash", "zsh", "fish"]
    """Which shell (the flag may be left out if it comes first)."""


@dataclass(frozen=True)
class ListRecipesOptions(Options):
    """List the shipped recipes."""


@dataclass(frozen=True)
class ShowRecipeOptions(Options):
    """Print a shipped recipe."""

    name: str
    """Its name, e.g. scenes_dpo (the flag may be left out if it comes first)."""


@dataclass(frozen=True)
class CopyRecipeOptions(Options):
    """Copy a shipped recipe, to change it."""

    name: str
    """Its name, e.g. scenes_dpo (the flag may be left out if it comes first)."""
    out: str | None = None
    """File to write; unset is NAME.yaml here. One that is there is left alone."""
