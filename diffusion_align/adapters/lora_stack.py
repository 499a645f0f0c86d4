"""The LoRAs of one model: loaded ones, the one that is trained, and what is already folded into the weights."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .families import Family
from .lora import quicken_lora
from .lora_files import Lora, LowRank, combined, read_lora
from .lora_names import Address, LoraNames

#: Name of the frozen adapter beside the trained one.
BESIDE = "beside"
#: Name of the LoRA that makes the network a negative model; active in nothing but a guider's null branch.
NEGATIVE = "negative"
#: Adapters of a part that has none.
NONE: Mapping[str, Any] = MappingProxyType({})


class LoraStack:
    """What LoRAs add to the network and the text encoders of a pipeline, all of them together.

    Attributes:
        folded: what was folded into the weights; files hold it, too, so that they fit the model as it was loaded.
        own_base: whether what is beneath all LoRAs is the model as it was loaded, and no other network's weights.
    """

    def __init__(self, pipeline: Any, family: Family) -> None:
        self.pipeline, self.family = pipeline, family
        self.folded: Lora = {}
        self.own_base = True
        self._found: tuple[list[Mapping[str, Any]], list[tuple[str, ...]], list[BaseTunerLayer]] = ([], [], [])

    @property
    def parts(self) -> dict[str, nn.Module]:
        """What can have a LoRA, by its attribute of the pipeline."""
        names = (self.family.network_name, *self.family.text_encoder_names)
        found = {name: getattr(self.pipeline, name, None) for name in names}
        return {name: part for name, part in found.items() if part is not None}

    @property
    def on_encoders(self) -> bool:
        """Whether a LoRA changes what prompts become."""
        return any(adapters(part) for name, part in self.parts.items() if name != self.family.network_name)

    def check_network_only(self) -> None:
        """Whether all that the LoRAs change is the network.

        Raises:
            ValueError: a text encoder, too, which a saved network would not hold.
        """
        if any(address.part != self.family.network_name for address in self.whole()):
            raise ValueError(
                "all weights cannot be trained on top of a LoRA that changes text encoders: the result would not hold "
                "them. Fold it in first (diffusion-align export --format merged), and train the new model"
            )

    def __bool__(self) -> bool:
        """Whether a LoRA can be switched off."""
        return any(set(adapters(part)) - {NEGATIVE} for part in self.parts.values())

    @property
    def has_negative(self) -> bool:
        """Whether a negative model was attached."""
        return any(NEGATIVE in adapters(part) for part in self.parts.values())

    def names(self) -> LoraNames:
        """What files call the model's modules."""
        parts, family = self.parts, self.family
        network = parts[family.network_name]
        tables = family.original_names(network), family.fused_names(network), family.other_names(network)
        return LoraNames.of(parts, family.network_name, family.lora_prefixes, *tables)

    def read(self, file: Path) -> dict[Address, LowRank]:
        """A LoRA of this model from a file of any usual layout.

        Raises:
            ValueError: as ``read_lora``.
        """
        parts, names = self.parts, self.names()
        shapes = {address: weight_of(parts[address.part], address.module).shape for address in names.kohya}
        return read_lora(file, names, shapes)

    def layers(self) -> list[BaseTunerLayer]:
        """All LoRA layers, searched once for every set of adapters.

        peft's own switches walk the whole network and every layer's parameters: 35 ms of a step at SDXL's size.
        """
        configs = [adapters(part) for part in self.parts.values()]
        names = [tuple(config) for config in configs]
        known, as_named, layers = self._found
        # Another LoRA of the same name comes with another dict.
        if as_named != names or any(a is not b for a, b in zip(known, configs, strict=True)):
            layers = [m for part in self.parts.values() for m in part.modules() if isinstance(m, BaseTunerLayer)]
            self._found = configs, names, layers
        return layers

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        """Inside, the model is without its LoRAs, in the text encoders, too."""
        layers = self.layers()
        for layer in layers:
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer in layers:
                layer._disable_adapters = False

    def attach(self, lora: Lora) -> None:
        """Add a frozen LoRA to those that are there; all are active together.

        Raises:
            ValueError: a negative model is there, which holds a share of those that came before it.
        """
        self._check_no_negative("load LoRAs before the negative model")
        for name, part in self.parts.items():
            of_part = {address.module: layer for address, layer in lora.items() if address.part == name}
            if of_part:
                attach(part, of_part, f"loaded_{len(adapters(part))}")
        for layer in self.layers():
            if isinstance(layer, LoraLayer):
                layer.set_adapter(sorted(layer.lora_A), inference_mode=True)

    def put_beside(self, lora: Lora) -> None:
        """Make ``lora`` the frozen one that is active beside the trained one, in the place of the last such; an empty
        one takes it away."""
        for name, part in self.parts.items():
            if BESIDE in adapters(part):
                part.delete_adapters(BESIDE)  # type: ignore[operator]
            of_part = {address.module: layer for address, layer in lora.items() if address.part == name}
            if of_part:
                attach(part, of_part, BESIDE)
        for layer in self.layers():
            if isinstance(layer, LoraLayer):
                layer.set_adapter(sorted(layer.lora_A))
                for matrices in (layer.lora_A, layer.lora_B):
                    if BESIDE in matrices:
                        matrices[BESIDE].requires_grad_(False)

    def attach_negative(self, lora: Lora, keep: float) -> None:
        """Add the LoRA of a negative model, which stays inactive: ``lora`` and the ``keep``-fold of what is active now.

        Raises:
            ValueError: it changes text encoders, or a negative model is there already.
        """
        self._check_no_negative("load it once, with all its files")
        network = self.family.network_name
        beyond = sorted({address.part for address in lora if address.part != network})
        if beyond:
            raise ValueError(
                f"a negative model changes the network only, but its LoRA changes {', '.join(beyond)}, too"
            )
        active = {address: layer for address, layer in self.attached().items() if address.part == network}
        whole = combined([{address: layer.scaled(keep) for address, layer in active.items()} if keep else {}, lora])
        attach(self.parts[network], {address.module: layer for address, layer in whole.items()}, NEGATIVE)
        for layer in self.layers():
            if isinstance(layer, LoraLayer):
                layer.set_adapter(sorted(set(layer.lora_A) - {NEGATIVE}), inference_mode=True)

    def _check_no_negative(self, advice: str) -> None:
        if self.has_negative:
            raise ValueError(f"a negative model is loaded: {advice}")

    def attached(self) -> dict[Address, LowRank]:
        """What the active LoRAs add, as one.

        Raises:
            ValueError: an adapter that is no LoRA, which only diffusers or peft can have put there.
        """
        return {
            Address(name, module): added
            for name, part in self.parts.items()
            for module, layer in part.named_modules()
            if isinstance(layer, BaseTunerLayer) and (added := added_by(layer, f"{name}.{module}")) is not None
        }

    def whole(self) -> dict[Address, LowRank]:
        """What all LoRAs add to the model as it was loaded, as one: folded ones first."""
        return combined([self.folded, self.attached()])

    def fold(self) -> None:
        """Put every LoRA into the weights beneath it, and keep what was put there.

        Raises:
            ValueError: a negative model is there, which would be lost.
        """
        self._check_no_negative("it is for guidance; train or merge a model without it")
        if not self:
            return
        self.folded = {address: layer.copied() for address, layer in self.whole().items()}
        for layer in self.layers():
            layer.merge()
        self.pipeline.unload_lora_weights()


def adapters(part: nn.Module) -> Mapping[str, Any]:
    """peft's configs of a part's adapters, by name."""
    found: Mapping[str, Any] | None = getattr(part, "peft_config", None)
    return NONE if found is None else found


def weight_of(part: nn.Module, module: str) -> torch.Tensor:
    """The weight of a Linear or convolution, also beneath a LoRA."""
    found: Any = part.get_submodule(module)
    weight: torch.Tensor = (found.get_base_layer() if isinstance(found, BaseTunerLayer) else found).weight
    return weight


def added_by(layer: Any, name: str) -> LowRank | None:
    """What a layer's active LoRAs add, as one; None where none of them is active."""
    parts = []
    for adapter in layer.active_adapters:
        if not isinstance(layer, LoraLayer) or adapter in layer.lora_variant:
            raise ValueError(f"{name}: adapter {adapter!r} is no plain LoRA: it cannot be saved or trained on")
        if adapter in layer.lora_A:
            down, up = layer.lora_A[adapter].weight.detach().float(), layer.lora_B[adapter].weight.detach().float()
            parts.append(LowRank(down, up).scaled(layer.scaling[adapter]))
    found = combined([{Address("", name): part} for part in parts])
    return next(iter(found.values()), None)


def add_policy(
    network: Any, rank: int, alpha: float, targets: Sequence[str], dropout: float,
    init: Literal["kaiming", "gaussian"], seed: int,
) -> None:  # fmt: skip
    """Add a LoRA that is trained: float32 matrices, drawn as ``init`` says (``Adapter.train_lora``) from ``seed``."""
    config = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=list(targets), lora_dropout=dropout,
        init_lora_weights=True if init == "kaiming" else init,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network.add_adapter(config)
    cast_training_params(network, dtype=torch.float32)
    quicken_lora(network)


def attach(part: Any, lora: Mapping[str, LowRank], name: str) -> None:
    """Add ``lora`` to one part as adapter ``name``: frozen float32 matrices beside the weights."""
    most = max(layer.rank for layer in lora.values())
    other = {f"^{re.escape(module)}": layer.rank for module, layer in lora.items() if layer.rank != most}
    config = LoraConfig(
        r=most, lora_alpha=most, rank_pattern=other, alpha_pattern=dict(other), target_modules=list(lora)
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():  # peft draws matrices, which are then replaced
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several LoRAs are meant
        part.add_adapter(config, name)
    for module, layer in lora.items():
        owner = part.get_submodule(module)
        device = owner.get_base_layer().weight.device
        for matrices, tensor in ((owner.lora_A, layer.down), (owner.lora_B, layer.up)):
            placed = tensor if device.type == "meta" else tensor.to(device)  # a part that was not loaded has no weights
            matrices[name].weight = nn.Parameter(placed, requires_grad=False)
