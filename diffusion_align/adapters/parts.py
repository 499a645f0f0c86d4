"""Parts of a pipeline in files: which weights a folder has, and parts of which only the config is read."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import nn
from transformers import PreTrainedModel

#: What an adapter may do without: the denoiser where nothing is predicted, the encoders where all is cached.
Part: TypeAlias = Literal["network", "vae", "text_encoders"]
PARTS: frozenset[Part] = frozenset(get_args(Part))
#: What turns pictures and prompts into what is trained on.
ENCODERS: frozenset[Part] = frozenset({"vae", "text_encoders"})
#: Parts that judge or replace pictures; no picture is drawn or trained with them.
NEVER = ("safety_checker", "feature_extractor", "image_encoder")
#: "-00001-of-00003" of a file among several.
SHARD = re.compile(r"-\d{5}-of-\d{5}")


def class_of(entry: Collection[str]) -> type:
    """The class that a model_index.json names, e.g. ["diffusers", "AutoencoderKL"].

    Raises:
        ValueError: another library than diffusers and transformers.
    """
    library, name = entry
    if library not in ("diffusers", "transformers"):
        raise ValueError(f"{name} of {library!r} is not understood: expected a class of diffusers or transformers")
    found: type = getattr(import_module(library), name)
    return found


def skeleton(kind: Any, source: str, name: str, revision: str | None = None) -> nn.Module:
    """The part ``name`` of a pipeline as its config describes it, on the ``meta`` device: no weight is read.

    Args:
        kind: its class, of diffusers or transformers.
        source: folder or hub name of the pipeline.
    """
    where = {"subfolder": name} | ({} if revision is None else {"revision": revision})
    with torch.device("meta"):
        if issubclass(kind, PreTrainedModel):
            built: nn.Module = kind(kind.config_class.from_pretrained(source, **where))
        else:
            built = kind.from_config(kind.load_config(source, **where))
    return built


def stored_variants(folder: Path) -> set[str | None]:
    """Variants of the weights in a part's folder, e.g. {None, "fp16"}; None is the one without a name."""
    names = (SHARD.sub("", path.name.removesuffix(".safetensors")) for path in folder.glob("*.safetensors"))
    return {name.partition(".")[2] or None for name in names}


def find_variants(folder: Path, names: Iterable[str], wanted: str | None = None) -> Mapping[str, str | None]:
    """Which variant of each part is to be read: the wanted one, or the only one there is.

    Args:
        names: of the parts, each a folder in the pipeline's ``folder``.
        wanted: None is the one without a name (float32). Where a part has only another one than what was asked for by
            name, a warning says so.

    Raises:
        ValueError: a part is there in several variants, but not in the wanted one.
    """
    found: dict[str, str | None] = {}
    for name in names:
        stored = stored_variants(folder / name)
        if len(stored) > 1 and wanted not in stored:
            held = ", ".join(sorted(variant or "without a name" for variant in stored))
            raise ValueError(f"{folder / name} holds the variants {held}: say which with --variant")
        found[name] = next(iter(stored)) if len(stored) == 1 else wanted
    others = [name for name, variant in found.items() if wanted not in (None, variant)]
    if others:
        warnings.warn(f"{folder}: no {wanted} weights of {', '.join(others)}: the only ones are read", stacklevel=4)
    return found


def check_whole(name: str, pipeline: Any, absent: Collection[str]) -> None:
    """Raise ValueError if a part should have weights, and some were not in the file.

    Args:
        name: of the model, for the message.
        absent: names of parts that are not to have any.
    """
    for part, module in pipeline.components.items():
        if part in absent or not isinstance(module, nn.Module):
            continue
        lost = [key for key, value in module.named_parameters() if value.is_meta]
        if lost:
            raise ValueError(f"{name}: {part} is not whole: {len(lost)} weights are missing, e.g. {lost[0]}")


def frozen_copy(network: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """A copy of ``network`` that is not trained; one in its own precision is never held on the way.

    Args:
        dtype: of matrices and kernels. Norms and biases, a thousandth of the weights, stay as they are: under autocast
            to ``dtype`` the copy then equals the network to the bit. None copies everything as it is.
    """
    cast = {} if dtype is None else {
        id(p): nn.Parameter(p.detach().to(dtype, copy=True), False) for p in network.parameters() if p.ndim > 1
    }  # fmt: skip
    return copy.deepcopy(network, cast).requires_grad_(False).eval()
