"""Pictures of a card: a few of the run's own, with their prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from diffusion_align.commands.console import note
from diffusion_align.data import load_prompts
from diffusion_align.data.prompts import training_prompts
from diffusion_align.files import write_whole
from diffusion_align.pictures import bare_png, decoded_picture

from .run_facts import RunFacts

#: Folder of a card's pictures.
FOLDER = "images"


@dataclass(frozen=True)
class Shown:
    """One picture.

    Attributes:
        file: relative to the card.
    """

    prompt: str
    file: str


@dataclass(frozen=True)
class Gallery:
    """Pictures, and how they were come by.

    Attributes:
        note: whether they were chosen; a reader must know.
    """

    pictures: Sequence[Shown]
    note: str


def make_gallery(facts: RunFacts, evaluation: Path | None, count: int, device: str) -> Gallery:
    """The first ``count`` pictures of the evaluation, or drawn with the run's validation prompts.

    Raises:
        ValueError, OSError: a picture that cannot be read, or a model that cannot be loaded.
    """
    if count == 0:
        return Gallery((), "There are no pictures: none were asked for.")
    if facts.evaluation is not None:
        files = of_evaluation(evaluation or facts.folder / "evaluate", facts.side, count)
        told = "The first prompts of the evaluation in alphabetical order, first seed each: not chosen by looks."
    else:
        prompts = own_prompts(facts)[:count]
        if not prompts:
            return Gallery((), "There are no pictures: the run names no validation prompts that are at hand.")
        files = drawn(facts, prompts, device)
        told = "The run's first validation prompts, seed 0 each: not chosen by looks."
    return Gallery([kept(facts.folder, i, prompt, image) for i, (prompt, image) in enumerate(files)], told)


def of_evaluation(folder: Path, side: str, count: int) -> list[tuple[str, Image.Image]]:
    """First seed of the first prompts."""
    import pyarrow.parquet

    columns = ["side", "prompt", "seed", "picture"]
    rows: list[Mapping[str, Any]] = pyarrow.parquet.read_table(folder / "details.parquet", columns=columns).to_pylist()
    first: dict[str, str] = {}
    for row in rows:
        if row["side"] == side:
            first.setdefault(row["prompt"], row["picture"])
    return [
        (prompt, decoded_picture(folder / file, str(folder / file))) for prompt, file in list(first.items())[:count]
    ]


def own_prompts(facts: RunFacts) -> list[str]:
    """The prompts that the run was validated with, as far as they are at hand."""
    config = facts.config
    data = config.validation_data()
    try:
        if config.validation_prompts is not None:
            return load_prompts(config.validation_prompts)
        return [] if data.dataset is None or data.mask_kinds else training_prompts(data.dataset, "validation")
    except (OSError, ValueError) as error:
        note(f"the card has no pictures of the run's validation prompts: {error}")
        return []


def drawn(facts: RunFacts, prompts: Sequence[str], device: str) -> list[tuple[str, Image.Image]]:
    """A picture of each prompt, with the settings of the run's validation."""
    from diffusion_align.devices import pick_device
    from diffusion_align.sampling.sampler import generate, to_uint8
    from diffusion_align.training.policy.model import load_policy_model

    config = facts.config
    adapter = load_policy_model(config, pick_device(device)).load_weights(facts.folder)
    images = generate(
        adapter,
        list(prompts),
        num_inference_steps=config.validation_inference_steps,
        guidance_scale=config.validation_guidance_scale,
        seeds=[0] * len(prompts),
        batch_size=4,
    )
    return [(prompt, Image.fromarray(picture)) for prompt, picture in zip(prompts, to_uint8(images), strict=True)]


def kept(folder: Path, number: int, prompt: str, image: Image.Image) -> Shown:
    """Written as PNG without any record of where and how."""
    name = f"{FOLDER}/{number:02d}.png"
    write_whole(folder / name, bare_png(image))
    return Shown(prompt, name)
