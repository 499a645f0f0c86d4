"""LoRA files: every usual layout is read, and written are those of diffusers and of kohya's tools."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from diffusion_align.files import read_object, write_whole

from .lora_names import ALPHA, KINDS, MATRIX, NUMBERED, OTHER_KINDS, Address, LoraNames, with_text_model

#: Where diffusers' training scripts put a LoRA, and where ``load_lora_weights(folder)`` looks for it.
LORA_FILE = "pytorch_lora_weights.safetensors"
#: The same LoRA for ComfyUI, A1111, Forge and other readers of kohya's names.
KOHYA_FILE = "kohya_lora_weights.safetensors"
#: What peft's ``save_pretrained`` writes.
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
DIFFUSERS_HEADER = "lora_adapter_metadata"
#: In the header of our files: hash of everything else in the file, and how many bytes its tensors have.
CHECKSUM, DATA_BYTES = "diffusion_align.sha256", "diffusion_align.data_bytes"


@dataclass(frozen=True)
class LowRank:
    """What is added to one weight: up @ down, whose scale is in ``up``; both float32.

    Attributes:
        down: (r, in) of a Linear, (r, in, kh, kw) of a Conv2d.
        up: (out, r) or (out, r, 1, 1).
    """

    down: Tensor
    up: Tensor

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def scaled(self, weight: float) -> LowRank:
        return LowRank(self.down, self.up * weight)

    def copied(self) -> LowRank:
        """With tensors of its own, on the CPU."""
        return LowRank(*(matrix.to("cpu", copy=True) for matrix in (self.down, self.up)))


#: Matrices of one layer as a file has them, by kind: "down", "up", "mid".
Matrices = Mapping[str, Tensor]
#: A whole LoRA, module by module.
Lora = Mapping[Address, LowRank]


def combined(loras: Iterable[Lora]) -> dict[Address, LowRank]:
    """One LoRA that does what all ``loras`` do together: their ranks side by side."""
    whole: dict[Address, LowRank] = {}
    for lora in loras:
        for address, layer in lora.items():
            before = whole.get(address)
            if before is not None:
                layer = LowRank(torch.cat([before.down, layer.down]), torch.cat([before.up, layer.up], dim=1))
            whole[address] = layer
    return whole


# -- reading ---------------------------------------------------------------------------------------------------------


def find_lora_file(path: Path) -> Path | None:
    """``path`` itself if it is a file, or the LoRA of a folder, by its usual names or as the only file; else None."""
    if path.is_file():
        return path
    for name in (LORA_FILE, PEFT_FILE, KOHYA_FILE):
        if (path / name).is_file():
            return path / name
    others = list(path.glob("*.safetensors"))
    return others[0] if len(others) == 1 and not (path / "config.json").is_file() else None


def read_lora(file: Path, names: LoraNames, weights: Mapping[Address, torch.Size]) -> dict[Address, LowRank]:
    """Read a LoRA in diffusers', peft's or kohya's layout, with or without prefixes, network and text encoders.

    The scale alpha / r is taken from ``.alpha`` tensors, diffusers' header or peft's config beside the file; without
    any it is 1, as every reader has it.

    Args:
        names: the modules of the model that it is for.
        weights: their shapes.

    Raises:
        ValueError: no safetensors file, no LoRA (LoHa, LoKr, DoRA and others are named), keys that match no module of
            the model, a matrix without its partner, shapes that do not fit, or a file of ours of which a byte has
            changed; file and keys are named.
    """
    check_unchanged(file)
    with opened(file) as content:
        tensors = {key: content.get_tensor(key) for key in content.keys()}  # noqa: SIM118
    for word, kind in OTHER_KINDS.items():
        found = [key for key in tensors if word in key]
        if found:
            raise ValueError(f"{file} holds {kind} weights (e.g. {found[0]!r}): only LoRA is supported")
    matrices, alphas = sort_tensors(file, tensors, names)
    told = ToldScales.read(file, read_header(file))
    lora = {}
    for address, (name, kinds) in _single(file, matrices, names, weights).items():
        layer = fitted(kinds, weights[address])
        if layer is None:
            sizes = {kind: tuple(matrix.shape) for kind, matrix in kinds.items()}
            raise ValueError(
                f"{file}: {name} has matrices of {sizes}, which do not fit this model's weight of "
                f"{tuple(weights[address])}: is it a LoRA of another model?"
            )
        alpha = alphas.get(address)
        lora[address] = layer.scaled(told.scale(address, layer.rank) if alpha is None else alpha / layer.rank)
    return lora


def _single(
    file: Path, matrices: Mapping[Address | tuple[Address, ...], Matrices], names: LoraNames,
    weights: Mapping[Address, torch.Size],
) -> dict[Address, tuple[str, Matrices]]:  # fmt: skip
    """Name and matrices of every module, those that a file holds in one apart: they share the first matrix.

    Raises:
        ValueError: a matrix without its partner, or one in which there are other modules than the model's.
    """
    found: dict[Address, tuple[str, Matrices]] = {}
    for place, kinds in matrices.items():
        together = place if isinstance(place, tuple) else (place,)
        name = " + ".join(names.kohya[address] for address in together)
        missing = {"down", "up"} - kinds.keys()
        if missing:
            raise ValueError(f"{file}: {name} has no {min(missing)!r} matrix")
        rows = [weights[address][0] for address in together]
        if len(together) > 1 and sum(rows) != len(kinds["up"]):
            raise ValueError(
                f"{file}: {name} has {len(kinds['up'])} rows, expected {sum(rows)}: is it a LoRA of another model?"
            )
        parts = kinds["up"].split(rows) if len(together) > 1 else [kinds["up"]]
        for address, up in zip(together, parts, strict=True):
            found[address] = name, {**kinds, "up": up}
    return found


def fitted(kinds: Mapping[str, Tensor], shape: torch.Size) -> LowRank | None:
    """The matrices in float32 and in the shapes that a weight of ``shape`` asks for; None if they do not fit it."""
    down, up = (kinds[kind].float() for kind in ("down", "up"))
    if "mid" in kinds:  # a convolution in three factors: the middle one goes into the first
        down = torch.einsum("rshw,sc->rchw", kinds["mid"].float(), down.flatten(1))
    rank, kernel = down.shape[0], shape[2:]
    if down.shape[1] != shape[1] or down.numel() != rank * shape[1:].numel() or up.numel() != rank * shape[0]:
        return None
    return LowRank(down.reshape(rank, *shape[1:]), up.reshape(shape[0], rank, *[1] * len(kernel)))


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """A safetensors file.

    Raises:
        ValueError: it is none.
    """
    try:
        with safe_open(file, "pt") as content:
            yield content
    except SafetensorError as error:
        raise ValueError(f"{file}: not a safetensors file ({error})") from None


def read_header(file: Path) -> dict[str, str]:
    """What a file says of itself.

    Raises:
        ValueError: no safetensors file.
    """
    with opened(file) as content:
        return content.metadata() or {}


def sort_tensors(
    file: Path, tensors: Mapping[str, Tensor], names: LoraNames
) -> tuple[dict[Address | tuple[Address, ...], dict[str, Tensor]], dict[Address, float]]:
    """Matrices by module (or modules in one) and kind, and the alphas that are tensors.

    Raises:
        ValueError: keys that match nothing; the first ones are named.
    """
    matrices: dict[Address | tuple[Address, ...], dict[str, Tensor]] = {}
    alphas: dict[Address, float] = {}
    strange = []
    for key, tensor in tensors.items():
        parsed = NUMBERED.fullmatch(key) or MATRIX.fullmatch(key) or ALPHA.fullmatch(key)
        address = parsed and names.find(parsed["module"])
        if not parsed or address is None:
            strange.append(key)
        elif parsed.re is ALPHA:
            alphas |= dict.fromkeys(address if isinstance(address, tuple) else (address,), float(tensor))
        else:
            kind = KINDS.get(parsed["kind"], parsed["kind"])
            if kind in matrices.setdefault(address, {}):
                raise ValueError(f"{file}: two tensors are the {kind!r} matrix of {parsed['module']}")
            matrices[address][kind] = tensor
    if strange or not matrices:
        shown = ", ".join(repr(key) for key in sorted(strange)[:3]) or "it has none"
        raise ValueError(
            f"{file}: {len(strange)} of {len(tensors)} keys match no LoRA layer of this model ({shown}): is it a LoRA "
            "of another model?"
        )
    return matrices, alphas


@dataclass(frozen=True)
class ToldScales:
    """alpha and rank as a peft config tells them, by part ("" where it does not say which)."""

    configs: Mapping[str, Mapping[str, Any]]

    @classmethod
    def read(cls, file: Path, header: Mapping[str, str]) -> ToldScales:
        """From diffusers' header ("unet.lora_alpha": ...), or from the config that peft writes beside the file.

        Raises:
            ValueError: either cannot be read, or peft's config is one of another kind of adapter.
        """
        configs: dict[str, dict[str, Any]] = {}
        beside = file.parent / PEFT_CONFIG
        if file.name == PEFT_FILE and beside.is_file():
            config = read_object(beside)
            if config.get("peft_type") != "LORA" or config.get("use_dora"):
                kind = "DoRA" if config.get("use_dora") else config.get("peft_type")
                raise ValueError(f"{beside} is of a {kind} adapter: only LoRA is supported")
            configs[""] = config
        for key, value in _told_by(header, file).items():
            part, _, field = key.rpartition(".")
            configs.setdefault(part, {})[field] = value
        return cls(configs)

    def scale(self, address: Address, rank: int) -> float:
        config = self.configs.get(address.part) or self.configs.get("")
        if not config or "lora_alpha" not in config:
            return 1.0
        patterns = config.get("alpha_pattern") or {}
        key = get_pattern_key(patterns, address.module) if patterns else address.module
        alpha = float(patterns.get(key, config["lora_alpha"]))
        return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _told_by(header: Mapping[str, str], file: Path) -> dict[str, Any]:
    try:
        told = json.loads(header.get(DIFFUSERS_HEADER, "{}"))
        if not isinstance(told, dict):
            raise TypeError(f"expected an object, found {type(told).__name__}")
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{file}: {DIFFUSERS_HEADER} in its header cannot be read: {error}") from None
    return told


def tensors_hash(file: Path) -> str:
    """Hash by which A1111 and Civitai know a safetensors file: of what comes after its header."""
    with file.open("rb") as content:
        content.seek(8 + int.from_bytes(content.read(8), "little"))
        return hashlib.file_digest(content, "sha256").hexdigest()


# -- writing ---------------------------------------------------------------------------------------------------------


def diffusers_state(lora: Lora) -> dict[str, Tensor]:
    """``unet.X.lora_A.weight`` and so on, without alphas: their scale is in the matrices."""
    state = {}
    for address, layer in lora.items():
        module = with_text_model(address.module) if address.part.startswith("text_encoder") else address.module
        state[f"{address.part}.{module}.lora_A.weight"] = layer.down
        state[f"{address.part}.{module}.lora_B.weight"] = layer.up
    return state


def kohya_state(lora: Lora, names: Mapping[Address, str]) -> dict[str, Tensor]:
    """``lora_unet_X.lora_down.weight`` and so on; each ``.alpha`` is the rank, because the scale is in the matrices."""
    state = {}
    for address, layer in lora.items():
        name = names[address]
        state[f"{name}.lora_down.weight"] = layer.down
        state[f"{name}.lora_up.weight"] = layer.up
        state[f"{name}.alpha"] = torch.tensor(float(layer.rank))
    return state


def fused_state(lora: Lora, names: LoraNames) -> dict[str, Tensor]:
    """As ``kohya_state``, in kohya's scripts' names of fused weights: ranks side by side, and zeros where a module has
    none; a part that is in no fused weight keeps its own name.
    """
    state, left = {}, dict(lora)
    for name, together in names.scripts.items():
        layers = [left.pop(address, None) for address in together]
        there = [layer for layer in layers if layer is not None]
        if not there:
            continue
        ranks, device = [0 if layer is None else layer.rank for layer in layers], there[0].up.device
        rows = [names.rows[address] for address in together]
        up = torch.zeros(sum(rows), sum(ranks), device=device)
        for i, layer in enumerate(layers):
            if layer is not None:
                up[sum(rows[:i]) : sum(rows[: i + 1]), sum(ranks[:i]) : sum(ranks[: i + 1])] = layer.up
        state[f"{name}.lora_down.weight"] = torch.cat([layer.down for layer in there])
        state[f"{name}.lora_up.weight"] = up
        state[f"{name}.alpha"] = torch.tensor(float(sum(ranks)))
    return state | kohya_state(left, names.kohya)


def kohya_header(lora: Lora) -> dict[str, str]:
    """What kohya's tools and the browsers of A1111 read of a LoRA: its kind and rank."""
    ranks = {layer.rank for layer in lora.values()}
    rank = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"
    return {"ss_network_module": "networks.lora", "ss_network_dim": rank, "ss_network_alpha": rank}


def write_safetensors(file: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> Path:
    """Write a file that all may read and whose bytes depend on its contents only; returns it.

    safetensors itself writes the header in the order of a hash table, and files for their owner alone.
    """
    content = save({name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())})
    start = 8 + int.from_bytes(content[:8], "little")
    tensors_told, data = json.loads(content[8:start]), content[start:]
    notes = {**header, DATA_BYTES: str(len(data))}
    notes[CHECKSUM] = content_hash(notes, tensors_told, data)
    told = {"__metadata__": dict(sorted(notes.items())), **tensors_told}
    text = json.dumps(told, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    write_whole(file, len(text).to_bytes(8, "little") + text + data)
    return file


def content_hash(notes: Mapping[str, str], tensors: Mapping[str, Any], data: bytes) -> str:
    """Hash of a file: what its header notes and tells of its tensors, in any order, and their bytes."""
    rest = {name: value for name, value in notes.items() if name != CHECKSUM}
    return hashlib.sha256(json.dumps([rest, tensors], sort_keys=True).encode() + data).hexdigest()


def check_unchanged(file: Path) -> None:
    """Whether a file is as ``write_safetensors`` wrote it; files of other programs are taken as they are.

    A program that writes tensors of its own under a header of ours nearly always changes how many bytes they have.

    Raises:
        ValueError: no safetensors file, or a byte of it has changed.
    """
    notes = read_header(file)
    if CHECKSUM not in notes:
        return
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    tensors = json.loads(content[8:start])
    del tensors["__metadata__"]
    if notes.get(DATA_BYTES) == str(len(content) - start) and (
        content_hash(notes, tensors, content[start:]) != notes[CHECKSUM]
    ):
        raise ValueError(
            f"{file} does not match the checksum in its header: it was damaged. A run's last checkpoint holds the same "
            f"weights; if another program changed them on purpose, let it leave out the header's {CHECKSUM}"
        )
