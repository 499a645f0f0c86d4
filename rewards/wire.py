"""How a scorer in another process is asked: requests and answers as bytes (safetensors, which runs no code)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from .protocol import CONTEXT, RewardOutput

#: Raised when either side changes what it sends.
VERSION = 1
#: Where a server says what it is, and where it scores.
DESCRIBE, SCORE = "/describe", "/score"
#: Environment variable of the secret that both sides share.
TOKEN = "DIFFUSION_ALIGN_TOKEN"
#: Context (keys of ``CONTEXT``) that is pictures; the rest is text or numbers.
PICTURES = ("source_images", "masks")


class WireError(ValueError):
    """Bytes that are no request, or no answer, of this version."""


def request_bytes(images: Tensor | Sequence[Tensor], prompts: Sequence[str], context: Mapping[str, Any]) -> bytes:
    """A request to score ``images`` (B, 3, H, W), or B of (3, H, W), float in [0, 1]."""
    tensors = _named("images", images)
    said: dict[str, Any] = {}
    for name, value in context.items():
        if name in PICTURES:
            tensors |= _named(name, value)
        else:
            said[name] = value.tolist() if isinstance(value, Tensor) else list(value)
    return _pack(tensors, {"prompts": list(prompts), "context": said})


def read_request(content: bytes) -> tuple[Any, list[str], dict[str, Any]]:
    """Images, prompts and context of a request.

    Raises:
        WireError: it is none; the message says what is missing.
    """
    tensors, said = _unpack(content)
    try:
        prompts, context = [str(prompt) for prompt in said["prompts"]], dict(said["context"])
        images = _collected("images", tensors)
        context |= {name: _collected(name, tensors) for name in PICTURES if any(t.startswith(name) for t in tensors)}
    except (KeyError, TypeError) as error:
        raise WireError(f"a request without {error}") from None
    strange = sorted(set(context) - set(CONTEXT))
    if strange:
        raise WireError(f"a request with unknown context {strange}: expected some of {sorted(CONTEXT)}")
    return images, prompts, context


def answer_bytes(output: RewardOutput) -> bytes:
    """An answer."""
    tensors = {"reward": output.reward} | {f"aspect.{name}": values for name, values in output.aspects.items()}
    optional = {"std": output.std, "features": output.features, "words": output.words}
    optional |= {"members": output.members}
    tensors |= {name: tensor for name, tensor in optional.items() if tensor is not None}
    return _pack(tensors, {"aspects": list(output.aspects)})  # safetensors has an order of its own


def read_answer(content: bytes, count: int) -> RewardOutput:
    """The scores of ``count`` pictures.

    Raises:
        WireError: it is no answer, or one for another number of pictures.
    """
    tensors, said = _unpack(content)
    names = said.get("aspects", [])
    missing = [name for name in ("reward", *(f"aspect.{name}" for name in names)) if name not in tensors]
    if missing:
        raise WireError(f"an answer without {', '.join(missing)}")
    wrong = {name: len(tensor) for name, tensor in tensors.items() if len(tensor) != count}
    if wrong:
        raise WireError(f"an answer with {wrong} rows: expected {count}")
    aspects = {name: tensors[f"aspect.{name}"] for name in names}
    optional = {name: tensors.get(name) for name in ("std", "features", "words", "members")}
    return RewardOutput(tensors["reward"], aspects, **optional)


def _named(name: str, value: Tensor | Sequence[Tensor]) -> dict[str, Tensor]:
    """A batch under its name; pictures of different sizes are numbered."""
    return {name: value} if isinstance(value, Tensor) else {f"{name}.{i}": picture for i, picture in enumerate(value)}


def _collected(name: str, tensors: Mapping[str, Tensor]) -> Tensor | list[Tensor]:
    if name in tensors:
        return tensors[name]
    count = sum(key.startswith(f"{name}.") for key in tensors)
    if not count:
        raise KeyError(name)
    return [tensors[f"{name}.{i}"] for i in range(count)]


def _pack(tensors: Mapping[str, Tensor], said: Mapping[str, Any]) -> bytes:
    # Copies: safetensors refuses names that share memory, as rows of one batch do.
    own = {name: tensor.detach().to("cpu", torch.float32, copy=True).contiguous() for name, tensor in tensors.items()}
    return save(own, {"said": json.dumps({"version": VERSION, **said})})


def _unpack(content: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        length = int.from_bytes(content[:8], "little")
        said = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["said"])
        tensors = load(content)
    except Exception as error:  # whatever a parser says of foreign bytes
        raise WireError(f"bytes that are no safetensors of a scorer ({type(error).__name__})") from None
    if said.get("version") != VERSION:
        raise WireError(f"version {said.get('version')} of the exchange: expected {VERSION}; install one version")
    if any(tensor.dtype != torch.float32 for tensor in tensors.values()):
        raise WireError("tensors that are not float32")
    return tensors, said
