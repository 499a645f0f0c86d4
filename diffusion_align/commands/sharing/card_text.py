"""The words of a model card, from what is known of a run; nothing is claimed that was not measured."""

from __future__ import annotations

import re
from collections.abc import Iterator

from diffusion_align.environment import versions
from diffusion_align.shipped import SHIPPED_MODELS
from diffusion_align.training.engine.reporting.run_report import changed_settings

from .cleaning import cleaned
from .gallery import Gallery
from .run_facts import RunFacts

_PAPER = re.compile(r"\b(\d{4}\.\d{5})\b")
#: Settings that say where things lay on the disk of whoever trained, or how the run was watched.
NOT_SHOWN = frozenset({"output_dir", "report_to", "progress", "cache_dir", "push_to_hub", "hub_model_id", "device"})


def card_text(facts: RunFacts, gallery: Gallery, repo: str, licence: str | None) -> str:
    """The card's body in Markdown, from the title on."""
    parts = [
        f"# {repo.partition('/')[2]}",
        f"{what_it_is(facts)} Trained with [diffusion-align](https://pypi.org/project/diffusion-align/), method "
        f"`{facts.method}`: {linked(facts.about)}",
        *(["<Gallery />", gallery.note] if gallery.pictures else [gallery.note]),
        "## Use",
        f"```python\n{snippet(facts, repo)}\n```",
        also_for(facts),
        "## Measured",
        *measured(facts),
        "## Not checked",
        "\n".join(f"- {line}" for line in not_checked(facts)),
        "## Training",
        settings(facts),
        *data(facts),
        "Versions: " + ", ".join(f"{name} {version}" for name, version in versions().items()) + ".",
        "## Licence",
        f"`{licence}`"
        if licence
        else "Not stated. The licence of the base model and of the data hold; whoever shares these weights must say "
        "which one that is.",
    ]
    return "\n\n".join(part for part in parts if part)


def what_it_is(facts: RunFacts) -> str:
    """One sentence."""
    kind = f"A LoRA of rank {facts.config.lora_rank}" if facts.is_lora else "All weights of the denoiser"
    base = facts.base_on_hub
    return f"{kind} for {f'[{base}](https://huggingface.co/{base})' if base else f'`{cleaned(facts.base)}`'}."


def linked(text: str) -> str:
    """Numbers of arXiv as links."""
    return _PAPER.sub(r"[\1](https://arxiv.org/abs/\1)", text)


def snippet(facts: RunFacts, repo: str) -> str:
    """Code that loads the weights in diffusers and draws one picture."""
    base, lines = facts.base_on_hub, ["import torch", "from diffusers import DiffusionPipeline"]
    if base is None and facts.base in SHIPPED_MODELS:
        lines.append("from diffusion_align.shipped import shipped_path  # the small base model comes with this package")
        source = f'shipped_path("{facts.base}")'
    else:
        source = f'"{base or cleaned(facts.base)}"'
    if not facts.is_lora:
        lines.insert(1, "from diffusers import UNet2DConditionModel")
    lines += [
        "",
        'device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)',
        f"pipe = DiffusionPipeline.from_pretrained({source}, torch_dtype=dtype).to(device)",
    ]
    if facts.is_lora:
        lines.append(f'pipe.load_lora_weights("{repo}", weight_name="{facts.weights[-1]}")')
    else:
        lines += [
            f'unet = UNet2DConditionModel.from_pretrained("{repo}", subfolder="unet", torch_dtype=dtype)',
            "pipe.unet = unet.to(device)",
        ]
    lines.append('image = pipe("a large red star on a dark background").images[0]')
    return "\n".join(lines)


def also_for(facts: RunFacts) -> str:
    """Other programs' files."""
    kohya = [name for name in facts.weights if name.startswith("kohya")]
    return f"In ComfyUI, A1111 and Forge load `{kohya[0]}`." if kohya else ""


def measured(facts: RunFacts) -> Iterator[str]:
    """The table of win rates."""
    if not facts.measured:
        yield "Nothing was measured: there is no evaluation of this run."
        return
    lines = ["| judge | over | win rate, 95% interval | on | independent |", "|---|---|---|---|---|"]
    for each in facts.measured:
        low, high = each.rate.interval
        free = f"no: {each.trained_on}" if each.trained_on else "as far as the run says"
        lines.append(
            f"| {cleaned(each.judge)} | {cleaned(each.over)} | {each.rate.rate:.1%} [{low:.1%}, {high:.1%}] | "
            f"{each.prompts} | {cleaned(free)} |"
        )
    yield "\n".join(lines)
    yield "Ties count half. Intervals resample prompts where the evaluation had them."
    if facts.evaluation is not None:
        yield str(facts.evaluation["note"])
        if facts.evaluation["warnings"]:
            yield "\n".join(f"- **{cleaned(line)}**" for line in facts.evaluation["warnings"])


def not_checked(facts: RunFacts) -> Iterator[str]:
    """What a reader might take for granted, and must not."""
    judges = {each.judge for each in facts.measured}
    if "people" not in judges:
        yield "No people have judged these pictures."
    if not facts.measured or all(each.trained_on for each in facts.measured):
        yield "No judge that is independent of the training has judged them."
    yield "Other prompts, resolutions, samplers and guidance scales than those named here."
    yield "Bias, unsafe content and memorised pictures: those of the base model may have become more or fewer."
    yield "Use together with other LoRAs."


def settings(facts: RunFacts) -> str:
    """Settings that are not the defaults."""
    rows = [row for row in changed_settings(facts.config) if row[0] not in NOT_SHOWN]
    table = ["| setting | value | default |", "|---|---|---|"]
    table += [f"| `{name}` | {escaped(value)} | {escaped(usual)} |" for name, value, usual in rows]
    return "All settings are in `config.yaml`; those that are not the defaults:\n\n" + "\n".join(table)


def escaped(value: str) -> str:
    """In a cell of a table."""
    return cleaned(value).replace("|", "\\|") or " "


def data(facts: RunFacts) -> Iterator[str]:
    """What it was trained on."""
    if facts.data:
        yield "Data:\n\n" + "\n".join(f"- {name}: {cleaned(count)}" for name, count in facts.data.items())
    if facts.warnings:
        yield "\n".join(f"- **{cleaned(line)}**" for line in facts.warnings)
