"""The known families. A new one is a file of this folder and a line here."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from .family import Family

#: "module:class" of this folder, in the order in which they are asked whether a pipeline is theirs.
KNOWN: tuple[str, ...] = (
    "sdxl:StableDiffusionXL",
    "sd:StableDiffusion",
    "sd3:StableDiffusion3",
    "flux:Flux",
    "auraflow:AuraFlow",
)
#: Attributes of a pipeline that may be its denoiser.
DENOISERS = ("unet", "transformer")


def _family(address: str) -> Family:
    module, _, name = address.partition(":")
    family: Family = getattr(import_module(f".{module}", __package__), name)()
    return family


FAMILIES: tuple[Family, ...] = tuple(_family(address) for address in KNOWN)


def find_family(pipeline: Any) -> Family:
    """The family of a loaded diffusers pipeline.

    Raises:
        ValueError: none matches; the message names the pipeline's class and the supported families.
    """
    parts = dict(getattr(pipeline, "components", {}))
    network = next((parts[name] for name in DENOISERS if parts.get(name) is not None), None)
    name = type(pipeline).__name__
    return matching_family(parts | {"_class_name": name}, {} if network is None else network.config, name)


def matching_family(parts: Mapping[str, Any], network_config: Mapping[str, Any], what: str) -> Family:
    """The family of a pipeline that may be known by its configs alone.

    Args:
        parts: its components by name, None where one is missing, and its class's name as "_class_name"; or a
            model_index.json.
        network_config: of its denoiser.
        what: how an error names the pipeline, e.g. its class.

    Raises:
        ValueError: none matches; the message names the pipeline and the supported families.
    """
    given = {name: part for name, part in parts.items() if not isinstance(part, list) or part[0] is not None}
    for family in FAMILIES:
        if family.matches(given, network_config):
            return family
    names = ", ".join(family.name for family in FAMILIES)
    raise ValueError(
        f"{what} is not supported: expected a pipeline of one of these families: {names} "
        "(Stable Diffusion 1.x/2.x, SDXL and their inpainting variants; SD3, SD3.5, FLUX.1 and AuraFlow from text, "
        "not Fill, Kontext, Control, Redux or ControlNets)"
    )


def pipeline_classes() -> dict[str, type]:
    """Pipeline classes of all families, by what a single file holds ("sdxl", "sd-inpaint", ...)."""
    return {name: cls for family in FAMILIES for name, cls in family.pipelines.items()}
