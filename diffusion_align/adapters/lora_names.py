"""What LoRA files call the modules of a model: one table of every known spelling, made from the model itself."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

#: A tensor's key: the module's name, and which matrix it is. Spellings: ``X.lora_A.weight`` (peft, diffusers; an
#: adapter's name may follow the letter), ``X.lora_down.weight`` (kohya), ``X_lora.down.weight``, ``X.lora.down.weight``
#: and ``X.lora_linear_layer.down.weight`` (older diffusers).
MATRIX = re.compile(r"(?P<module>.+?)[._](?:lora|lora_linear_layer)[._](?P<kind>A|B|down|up|mid)(?:\.[^.]+)?\.weight")
#: XLabs' keys of FLUX, whose modules' names end in "lora", "lora1" (picture) or "lora2" (text).
NUMBERED = re.compile(
    r"(?P<module>(?:diffusion_model\.)?(?:double|single)_blocks\..+_lora[12]?)\.(?P<kind>down|up)\.weight"
)
ALPHA = re.compile(r"(?P<module>.+?)\.alpha")
KINDS = {"A": "down", "B": "up"}
#: Other kinds of adapters, by a word that their keys hold.
OTHER_KINDS = {
    "hada_w": "LoHa", "lokr_": "LoKr", "dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", "boft_": "BOFT",
    "oft_": "OFT", "bundle_emb": "pivotal tuning (embeddings)", "lora_controlnet": "Control-LoRA",
    "query_norm.scale": "FLUX Control (Depth, Canny)",
}  # fmt: skip
#: Attention projections of the text encoders, as early diffusers called them.
EARLY_PROJECTIONS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


@dataclass(frozen=True)
class Address:
    """A module of a pipeline.

    Attributes:
        part: the pipeline's attribute, e.g. "unet".
        module: its name in there, e.g. "mid_block.attentions.0.proj_in".
    """

    part: str
    module: str


@dataclass(frozen=True)
class LoraNames:
    """What the modules of one model are called in files.

    Attributes:
        addresses: every module that can have a LoRA, by every name that files give it.
        kohya: the name that we write for kohya's readers, e.g. "lora_unet_mid_block_attentions_0_proj_in".
        fused: modules that a file may hold in one, rows of the weight one after the other, by every name that files
            give them; ``scripts``: by the name that kohya's scripts give them; ``rows``: how many each of them has.
        original: the same with the blocks of the original layout, as kohya's own scripts name SDXL's; equal to
            ``kohya`` where the original layout has no other name.
    """

    addresses: Mapping[str, Address]
    kohya: Mapping[Address, str]
    original: Mapping[Address, str]
    fused: Mapping[str, tuple[Address, ...]]
    scripts: Mapping[str, tuple[Address, ...]]
    rows: Mapping[Address, int]

    @classmethod
    def of(
        cls,
        parts: Mapping[str, nn.Module],
        network_name: str,
        prefixes: Mapping[str, tuple[str, ...]],
        original_names: Mapping[str, str],
        fused_names: Mapping[str, tuple[str, ...]],
        other_names: Mapping[str, tuple[str, ...]],
    ) -> LoraNames:
        """The names of a model's modules.

        Args:
            parts: network and text encoders, by their attribute in the pipeline.
            network_name: which of them is the network: names without a part are its.
            prefixes: kohya's by part; the first is written, all are read.
            original_names: the network's modules in the layout of the original checkpoints.
            fused_names: of that layout, names of several of the network's modules in one.
            other_names: the same of single trainers, which are read alone.
        """
        addresses: dict[str, Address] = {}
        kohya, original = {}, {}
        for part, model in parts.items():
            for module in adaptable(model):
                address, full = Address(part, module), module
                if part != network_name:
                    full = with_text_model(module)
                old = original_names.get(module, full) if part == network_name else full
                kohya[address] = f"{prefixes[part][0]}_{full.replace('.', '_')}"
                original[address] = f"{prefixes[part][0]}_{old.replace('.', '_')}"
                dotted = {module, full, *early_names(full)}
                names = {f"{part}.{name}" for name in dotted}
                names |= {f"{prefix}_{name.replace('.', '_')}" for prefix in prefixes[part] for name in (full, old)}
                if part == network_name:
                    names |= {*dotted, f"diffusion_model.{old}"}
                addresses |= dict.fromkeys(names, address)
        fused, scripts = {}, {}
        rows: dict[Address, int] = {}
        for name, modules in fused_names.items():
            together = tuple(Address(network_name, module) for module in modules)
            script = f"lora_unet_{name.replace('.', '_')}"
            scripts[script] = together
            for address in together:
                linear: Any = parts[network_name].get_submodule(address.module)
                rows[address] = linear.out_features
            for spelled in (name, f"diffusion_model.{name}", script):
                fused[spelled] = together
        for name, modules in other_names.items():
            together = tuple(Address(network_name, module) for module in modules)
            fused |= dict.fromkeys((name, f"diffusion_model.{name}"), together)
        return cls(addresses, kohya, original, fused, scripts, rows)

    def find(self, name: str) -> Address | tuple[Address, ...] | None:
        """The module, or modules in one, that a file calls ``name``; None if there is none."""
        for word in ("base_model.model.", "processor."):  # peft's wrapper, and diffusers' attention processors
            name = name.replace(word, "")
        return self.addresses.get(name) or self.fused.get(name)


def adaptable(model: nn.Module) -> Iterator[str]:
    """Names of the Linear and Conv2d modules, those that have a LoRA already under their own name."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        if isinstance(module, BaseTunerLayer):
            inside = (*inside, name + ".")
        if isinstance(module, nn.Linear | nn.Conv2d | BaseTunerLayer):
            yield name


def with_text_model(module: str) -> str:
    """A text encoder's module as files name it: some versions of transformers leave out ``text_model``."""
    outside = module.startswith("text_model.") or module == "text_projection"
    return module if outside else f"text_model.{module}"


def early_names(name: str) -> Iterator[str]:
    """What early versions of diffusers called an attention's projection."""
    if name.endswith(".to_out.0"):
        yield name.removesuffix(".0")
    stem, _, last = name.rpartition(".")
    yield from (f"{stem}.{early}" for early, now in EARLY_PROJECTIONS.items() if last == now)
