"""A policy's weights in files, as diffusers, ComfyUI, A1111 and kohya's tools load them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from diffusion_align.files import sealed_folder, verify_folder
from diffusion_align.shipped import SHIPPED_LORAS, shipped_path

from .lora_files import (
    KOHYA_FILE,
    LORA_FILE,
    Lora,
    combined,
    diffusers_state,
    find_lora_file,
    fused_state,
    kohya_header,
    kohya_state,
    read_header,
    tensors_hash,
    write_safetensors,
)
from .lora_stack import LoraStack

#: In the header of our files: whether other weights than the model's own must be loaded before the LoRA.
BASE_FIELD, OWN_BASE, OTHER_BASE = "diffusion_align.base", "the model", "other weights"

Layout: TypeAlias = Literal["diffusers", "kohya", "sd-scripts"]


@dataclass(frozen=True)
class Source:
    """A LoRA file, its folder or a network's folder, and its weight."""

    path: Path
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str | Path) -> Source:
        """From PATH or PATH:WEIGHT, e.g. ``runs/dpo:0.8``; a shipped LoRA's name stands for its folder."""
        path, colon, weight = str(text).rpartition(":")
        if not colon or Path(text).exists():
            return cls(lora_path(text))
        try:
            return cls(lora_path(path), float(weight))
        except ValueError:
            return cls(Path(text))


def lora_path(name: str | Path) -> Path:
    """The folder of a LoRA that comes with the package, or ``name`` itself."""
    return shipped_path(str(name)) if str(name) in SHIPPED_LORAS else Path(name)


def lora_hashes(sources: Sequence[str]) -> dict[str, str]:
    """A1111's short hash of each LoRA, by the name of its file or folder; kohya's layout counts, where it is there.

    A source that is a whole network has none.
    """
    found = {}
    for text in sources:
        path = Source.parse(text).path
        file = find_lora_file(path)
        if file is None:
            continue
        beside = file.with_name(KOHYA_FILE)
        read = beside if file.name == LORA_FILE and beside.is_file() else file
        found[path.stem if path.is_file() else path.resolve().name] = tensors_hash(read)[:12]
    return found


def told_name(model: str) -> str:
    """What others are told of where a model is: a folder's own name, or the whole name of a hub repository."""
    return Path(model).name if Path(model).exists() else model


def lora_header(stack: LoraStack) -> dict[str, str]:
    """What both files say of the base model; nothing in it depends on time, folder or machine."""
    spec = stack.family.model_spec(stack.pipeline)
    spec["modelspec.architecture"] += "/lora"
    name = str(stack.pipeline.config.get("_name_or_path") or "")
    if name:
        spec["ss_sd_model_name"] = told_name(name)
    return {"format": "pt", BASE_FIELD: OWN_BASE if stack.own_base else OTHER_BASE, **spec}


def save_lora(stack: LoraStack, folder: Path) -> Path:
    """Write all LoRAs of a model as one, for diffusers and in kohya's layout; returns the file that diffusers loads."""
    write_lora(stack, folder / KOHYA_FILE, "kohya")
    return write_lora(stack, folder / LORA_FILE, "diffusers")


def write_lora(stack: LoraStack, file: Path, layout: Layout, title: str | None = None) -> Path:
    """Write all LoRAs of a model as one; returns the file.

    Args:
        layout: "diffusers" for ``pipeline.load_lora_weights``; "kohya" for ComfyUI, A1111, Forge and diffusers;
            "sd-scripts" for kohya's own scripts, which call SDXL's blocks by their original numbers, and hold SD3's and
            FLUX's weights as the original checkpoints do, several in one.
        title: the LoRA's name in kohya's header.
    """
    lora, header = stack.whole(), lora_header(stack)
    if layout == "diffusers":
        return write_safetensors(file, diffusers_state(lora), header)
    names = stack.names()
    original = layout == "sd-scripts" and stack.family.scripts_name_original_blocks
    if original and names.scripts:
        state = fused_state(lora, names)
    else:
        state = kohya_state(lora, names.original if original else names.kohya)
    named = {} if title is None else {"ss_output_name": title, "modelspec.title": title}
    return write_safetensors(file, state, {**header, **kohya_header(lora), **named})


def save_network(pipeline: Any, network_name: str, folder: Path) -> Path:
    """Write all weights for ``from_pretrained(folder, subfolder=network_name)``; returns the network's folder."""
    with sealed_folder(folder / network_name) as place:
        getattr(pipeline, network_name).save_pretrained(place)
    return place


def load_policy(stack: LoraStack, sources: Sequence[Source]) -> None:
    """Load LoRAs, and before them a network, into the pipeline; no LoRA is attached unless all can be read.

    Raises:
        FileNotFoundError: neither a LoRA file nor the network's folder is there.
        ValueError: as ``read_lora``; a network that does not fit, has a weight or comes after a LoRA.
    """
    loras: list[Lora] = []
    for source in sources:
        file = find_lora_file(source.path)
        if file is not None:
            warn_of_other_base(stack, file)
            loras.append({address: layer.scaled(source.weight) for address, layer in stack.read(file).items()})
        elif loras or stack:
            raise ValueError(f"{source.path}: expected a LoRA; a whole network must come before all LoRAs")
        else:
            load_network(stack.pipeline, stack.family.network_name, source)
            stack.own_base = False
    stack.attach(combined(loras))


def load_negative(stack: LoraStack, sources: Sequence[Source], keep: float) -> None:
    """Load LoRAs as a negative model, beside ``keep`` times those that are active.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: as ``read_lora``; a whole network, or what ``LoraStack.attach_negative`` refuses.
    """
    loras: list[Lora] = []
    for source in sources:
        file = find_lora_file(source.path)
        if file is None:
            if not source.path.exists():
                raise FileNotFoundError(f"{source.path}: no such file or folder; expected the LoRA of a negative model")
            raise ValueError(f"{source.path}: expected the LoRA of a negative model")
        warn_of_other_base(stack, file)
        loras.append({address: layer.scaled(source.weight) for address, layer in stack.read(file).items()})
    stack.attach_negative(combined(loras), keep)


def warn_of_other_base(stack: LoraStack, file: Path) -> None:
    """Warn of a LoRA file that was trained on other weights than the model has."""
    if stack.own_base and base_of(file) == OTHER_BASE:
        warnings.warn(
            f"{file} was trained on other weights than the model's own (init_weights): load those first", stacklevel=4
        )


def base_of(file: Path) -> str | None:
    """What a LoRA file says that it must be loaded on; None for files of 0.1 and of other programs.

    Raises:
        ValueError: no safetensors file.
    """
    return read_header(file).get(BASE_FIELD)


def load_network(pipeline: Any, network_name: str, source: Source) -> None:
    """Load what ``save_network`` wrote, or any network's folder, into the pipeline.

    Raises:
        FileNotFoundError: neither a LoRA file nor the network's folder is there.
        ValueError: a network of another architecture, a file that has changed since it was written, or a weight.
    """
    network, path = getattr(pipeline, network_name), source.path
    folder = path / network_name if (path / network_name).is_dir() else path
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{path} holds no weights: expected {LORA_FILE}, one other LoRA file or a {network_name!r} folder"
        )
    if source.weight != 1:
        raise ValueError(f"{path}:{source.weight:g}: only a LoRA has a weight, this is a whole network")
    verify_folder(folder)
    weights = type(network).from_pretrained(folder).state_dict()
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{folder} does not fit this model: {str(error).splitlines()[1].strip()}") from None
