"""What a PNG tells A1111: read back as A1111 reads it, by its own regular expression."""

from __future__ import annotations

import json
import re
from typing import Any

import diffusers
import pytest

from diffusion_align.sampling.infotext import Infotext, SamplerTold

#: modules/infotext_utils.py of A1111: a name, a colon, and a quoted value or all up to the next comma.
FIELD = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
TOLD: dict[str, Any] = {
    "prompt": "a red star", "negative_prompt": "", "steps": 25, "sampler": SamplerTold("Euler"), "scale": 5.0,
    "seed": 7, "size": (1024, 768), "model": "stabilityai/sdxl", "loras": {},
}  # fmt: skip


def as_a1111_reads(text: str) -> dict[str, str]:
    """Every field of the last line; what stands above it is the prompt, and from its mark on the negative one."""
    *lines, last = text.strip().split("\n")
    fields = FIELD.findall(last)
    assert len(fields) >= 3  # with fewer the last line counts as prompt
    mark = next((i for i, line in enumerate(lines) if line.startswith("Negative prompt:")), len(lines))
    negative = "\n".join(lines[mark:]).removeprefix("Negative prompt:").strip()
    told = {name: json.loads(value) if value.startswith('"') else value for name, value in fields}
    return {"Prompt": "\n".join(lines[:mark]), "Negative prompt": negative, **told}


def test_every_field_comes_back() -> None:
    read = as_a1111_reads(Infotext(**TOLD).text())
    assert read == {
        "Prompt": "a red star", "Negative prompt": "", "Steps": "25", "Sampler": "Euler", "CFG scale": "5",
        "Seed": "7", "Size": "1024x768", "Model": "stabilityai/sdxl",
    }  # fmt: skip


def test_signs_that_part_fields_do_no_harm() -> None:
    prompt, model = 'a sign: "no, 5: 3",\na star', 'C: my "model", v1'
    loras = {"a:b, c": "0123456789ab", "plain": "ba9876543210"}
    told = TOLD | {"prompt": prompt, "negative_prompt": "blurry, Steps: 3\nugly", "model": model, "loras": loras}
    read = as_a1111_reads(Infotext(**told).text())
    assert (read["Prompt"], read["Negative prompt"]) == (prompt, "blurry, Steps: 3\nugly")
    assert (read["Model"], read["Steps"], read["Seed"]) == (model, "25", "7")
    assert dict(part.split(": ") for part in read["Lora hashes"].split(", ")) == {
        "ab c": "0123456789ab",
        "plain": "ba9876543210",
    }


@pytest.mark.parametrize(
    ("kind", "changes", "name", "schedule"),
    [
        ("DDIMScheduler", {}, "DDIM", ""),
        ("EulerAncestralDiscreteScheduler", {}, "Euler a", ""),
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, "DPM++ 2M", "Karras"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "DPM++ 2M SDE", ""),
        ("DEISMultistepScheduler", {}, "DEISMultistep", ""),
    ],
)
def test_samplers_have_a1111_s_names(kind: str, changes: dict[str, Any], name: str, schedule: str) -> None:
    sampler = SamplerTold.of(getattr(diffusers, kind)(**changes))
    assert sampler == SamplerTold(name, schedule)
    assert as_a1111_reads(Infotext(**TOLD | {"sampler": sampler}).text()).get("Schedule type", "") == schedule
