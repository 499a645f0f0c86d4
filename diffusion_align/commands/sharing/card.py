"""``diffusion-align card``: README.md of a run, with the header that the hub reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from diffusion_align.commands.console import conclude, note
from diffusion_align.files import write_whole

from .card_text import card_text
from .cleaning import check_secrets, cleaned
from .gallery import Gallery, make_gallery
from .run_facts import RunFacts, gather
from .sharing_options import CardOptions

#: What we write stands between these; what stands outside is a person's.
BEGIN, END = "<!-- diffusion-align: begin -->", "<!-- diffusion-align: end -->"
NAME = "README.md"


def write_card(options: CardOptions) -> tuple[Path, ModelCard, RunFacts]:
    """Write README.md and its pictures into the run's folder.

    Raises:
        FileNotFoundError, ValueError: no finished run of a diffusion model, an evaluation that is not of it, or what
            looks like a secret in the text.
    """
    folder = Path(options.run)
    evaluation = None if options.evaluation is None else Path(options.evaluation)
    facts = gather(folder, evaluation)
    gallery = make_gallery(facts, evaluation, options.num_pictures, options.device)
    licence = facts.licence(options.license)
    if licence is None:
        note(f"the licence of {facts.base} is not known: the card states none; give --license")
    path = folder / NAME
    before = ModelCard.load(path, ignore_metadata_errors=True) if path.is_file() else None
    data = card_data(facts, gallery, options.hub_model_id, licence)
    kept: dict[str, Any] = {} if before is None else before.data.to_dict()
    merged = ModelCardData(**{**kept, **data.to_dict()}) if kept else data
    text = merged_text("" if before is None else before.text, card_text(facts, gallery, options.hub_model_id, licence))
    card = ModelCard(f"---\n{merged.to_yaml()}\n---\n{text}")
    check_secrets(str(card), str(path))
    write_whole(path, (str(card).rstrip() + "\n").encode())
    return path, card, facts


def card_data(facts: RunFacts, gallery: Gallery, repo: str, licence: str | None) -> ModelCardData:
    """The header."""
    tags = ["text-to-image", "diffusers", "diffusers-training", "diffusion-align", facts.method]
    if facts.is_lora:
        tags += ["lora", "template:sd-lora"]
    results = [
        EvalResult(
            task_type="text-to-image",
            task_name="Text to image",
            dataset_type="prompts",
            dataset_name=each.prompts,
            metric_type="win_rate",
            metric_name=f"win rate over {cleaned(each.over)} by {cleaned(each.judge)}, 95% "
            f"[{each.rate.interval[0]:.3f}, {each.rate.interval[1]:.3f}]",
            metric_value=round(each.rate.rate, 4),
        )
        for each in facts.measured[:1]  # the headline; the table has them all
    ]
    more: dict[str, Any] = {}
    if facts.base_on_hub:
        more["base_model_relation"] = "adapter" if facts.is_lora else "finetune"
    if gallery.pictures:
        more["widget"] = [{"text": each.prompt, "output": {"url": each.file}} for each in gallery.pictures]
    return ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        license=licence,
        base_model=facts.base_on_hub,
        datasets=[facts.dataset_on_hub] if facts.dataset_on_hub else None,
        tags=sorted(set(tags)),
        model_name=repo.partition("/")[2],
        eval_results=results or None,
        **more,
    )


def merged_text(before: str, ours: str) -> str:
    """Our part in the place of the old one; without one before, below what a person wrote."""
    block = f"{BEGIN}\n\n{ours}\n\n{END}"
    start, end = before.find(BEGIN), before.find(END)
    if start >= 0 and end > start:
        return before[:start] + block + before[end + len(END) :]
    return f"{before.rstrip()}\n\n{block}".lstrip()


def run_card(options: CardOptions) -> int:
    """Write the card, and print its file; returns the exit status."""
    path, card, _ = write_card(options)
    conclude(path, {"card": str(path), "data": card.data.to_dict()})
    return 0
