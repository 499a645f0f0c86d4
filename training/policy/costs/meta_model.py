"""A run's model on torch's ``meta`` device: shapes and dtypes, no data. Plans are counted on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from peft import LoraConfig
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from diffusion_align.adapters.autoencoder import stored_dtype
from diffusion_align.adapters.families import DENOISERS, Family, Guidance, NetworkInputs, matching_family
from diffusion_align.adapters.loading import LENGTH_FIELD
from diffusion_align.adapters.lora import quicken_lora
from diffusion_align.adapters.parts import class_of, skeleton
from diffusion_align.adapters.single_file import read_single_file
from diffusion_align.devices import DTYPES
from diffusion_align.shipped import SHIPPED_MODELS, layout_path, shipped_path

if TYPE_CHECKING:
    from ..config import TrainConfig


@dataclass(frozen=True)
class MetaModel:
    """Parts of a pipeline without data, as a run makes them ready.

    Attributes:
        network: the denoiser, with its LoRA, or all of it trained; in the dtype that it computes in.
        base: how many parameters it has without the LoRA.
        vae: in the dtype that it is stored in.
        texts: text encoders; the second one of SDXL without its last projection.
        side: of the pictures, pixels.
        autocast: the dtype that the run computes in under autocast; None computes as weights are.
        own_precision: whether the denoiser computes in its own precision, without autocast.
        length: tokens that the longest text encoder is given; None where that is fixed.
    """

    family: Family
    network: Any
    base: int
    vae: AutoencoderKL
    texts: tuple[Any, ...]
    side: int
    autocast: torch.dtype | None
    own_precision: bool
    length: int | None = None

    @property
    def buffers(self) -> int:
        """How many numbers the network holds besides its parameters: SD3.5's table of places is a tenth of it."""
        return sum(buffer.numel() for buffer in self.network.buffers())

    @property
    def guidance(self) -> Guidance:
        """How its pictures are guided."""
        return self.family.guidance(self.network.config)

    @property
    def factor(self) -> int:
        """Pixels of a latent's side."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def latent(self) -> tuple[int, int, int]:
        """(C, h, w) of a picture's latents."""
        small = self.side // self.factor
        return self.vae.config.latent_channels, small, small

    @property
    def tokens(self) -> int:
        """That the first text encoder reads of a prompt."""
        return self.read_by(self.texts[0])

    def read_by(self, text: Any) -> int:
        """Tokens that one of ``texts`` reads of a prompt."""
        return int(getattr(text.config, "max_position_embeddings", self.length or 0))

    def inputs(self, rows: int, side: int) -> NetworkInputs:
        """Inputs of the network on the ``meta`` device, for latents of ``side`` x ``side``."""
        return self.family.memory_inputs(self.network, rows, side, self.length)

    @property
    def prompt_values(self) -> int:
        """Numbers that a prompt's embeddings are."""
        cond = self.inputs(1, self.latent[-1]).cond
        pooled = 0 if cond.pooled is None else cond.pooled.numel()
        return pooled + (cond.embeds.shape[-1] * self.tokens if self.length is None else cond.embeds.numel())

    @property
    def trained_shapes(self) -> list[torch.Size]:
        """Of the trained parameters."""
        return [parameter.shape for parameter in self.network.parameters() if parameter.requires_grad]


def build_meta_model(config: TrainConfig) -> MetaModel:
    """The model that ``config`` names, from its configs alone.

    Those of SD 1.5, SDXL and their inpainting models come with the package; nothing is fetched for them.

    Raises:
        OSError: the configs of the model or of ``vae`` can be found neither locally nor on the hub.
        ValueError: a family that is not supported, or no single file that is understood.
    """
    configs = _configs(config)
    source, index, there = configs.source, configs.index, configs.there
    kind, network_config, family = configs.kind, configs.network, configs.family
    vae = _vae(config, source, family)
    texts = tuple(_text(there[name], source, name) for name in family.text_encoder_names if name in there)
    with torch.device("meta"):
        network = kind.from_config(network_config)
        base = count_parameters(network)
        if not config.full_finetuning:
            network.requires_grad_(False)
            network.add_adapter(LoraConfig(r=config.lora_rank, target_modules=_targets(config, family)))
            quicken_lora(network)
    compute = DTYPES[config.compute_dtype]
    autocast = None if config.mixed_precision == "no" else compute
    network_to(network, autocast or (torch.float32 if config.full_finetuning else DTYPES[config.weight_dtype]))
    own_precision = not config.full_finetuning and DTYPES[config.weight_dtype] == autocast  # as ``Adapter.predict``
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    side = config.memory_needs().resolution or family.default_side(network_config) * factor
    length = family.default_length(network_config)
    if length is not None:
        told = index.get(LENGTH_FIELD, length)
        length = told if config.max_sequence_length is None else config.max_sequence_length
    return MetaModel(family, network, base, vae, texts, side, autocast, own_precision, length)


def guidance_of(config: TrainConfig) -> Guidance:
    """How the pictures of the model that ``config`` names are guided, by its configs alone.

    Raises:
        OSError, ValueError: as ``build_meta_model``.
    """
    configs = _configs(config)
    return configs.family.guidance(configs.network)


@dataclass(frozen=True)
class _Configs:
    """What is known of a model without its parts: where its configs are, its index and the parts that are there, the
    denoiser's class and config, and the family."""

    source: str
    index: Mapping[str, Any]
    there: Mapping[str, Any]
    kind: Any
    network: Mapping[str, Any]
    family: Family


def _configs(config: TrainConfig) -> _Configs:
    source = _source(config)
    index = DiffusionPipeline.load_config(source)
    there = {name: entry for name, entry in index.items() if isinstance(entry, list) and entry[0] is not None}
    kind: Any = next((class_of(there[name]) for name in DENOISERS if name in there), None)
    part = next((name for name in DENOISERS if name in there), "")
    network = {} if kind is None else kind.load_config(source, subfolder=part)
    return _Configs(source, index, there, kind, network, matching_family(index, network, source))


def _text(entry: list[str], source: str, name: str) -> nn.Module:
    """A text encoder; CLIP's without the projection of the pooled embedding."""
    kind = class_of(entry)
    with torch.device("meta"):
        if kind.__name__.startswith("CLIP"):
            built: nn.Module = CLIPTextModel(CLIPTextConfig.from_pretrained(source, subfolder=name))
        else:
            built = skeleton(kind, source, name)
    return built.requires_grad_(False).eval()


def _targets(config: TrainConfig, family: Family) -> list[str]:
    """Modules that get a LoRA, as ``prepare_policy`` chooses them."""
    own = config.lora_target_modules == type(config).lora_target_modules
    return list(family.lora_targets if own else config.lora_target_modules)


def _source(config: TrainConfig) -> str:
    """Folder or hub name with the configs of the model."""
    name = config.model_config or config.model
    if name in SHIPPED_MODELS:
        return str(shipped_path(name))
    if Path(name).is_file():
        name = read_single_file(Path(name)).configs
    return _with_package(name)


def _with_package(name: str) -> str:
    """A folder of the package instead of a hub name, where it has the configs."""
    folder = None if Path(name).exists() else layout_path(name)
    return name if folder is None else str(folder)


def _vae(config: TrainConfig, source: str, family: Family) -> AutoencoderKL:
    """The run's VAE, in the dtype that it is stored in."""
    settings: Mapping[str, Any] = AutoencoderKL.load_config(source, subfolder="vae")
    if config.vae is not None and not Path(config.vae).is_file():  # a single file takes the pipeline's config
        settings = AutoencoderKL.load_config(_with_package(config.vae))
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(settings)
    nn.Module.to(vae, stored_dtype(DTYPES[config.weight_dtype], family.vae_overflows, vae.config.force_upcast))
    if config.vae_tiling:
        vae.enable_tiling()
    return vae.requires_grad_(False).eval()


def network_to(network: Any, dtype: torch.dtype) -> None:
    """Cast a ``meta`` network to ``dtype``, except for LoRA matrices, which stay float32 as in a run."""
    lora = {name for name, p in network.named_parameters() if p.requires_grad and "lora" in name}
    for name, parameter in network.named_parameters():
        if name not in lora:
            parameter.data = parameter.data.to(dtype)


def count_parameters(module: nn.Module) -> int:
    """How many numbers a module's parameters are."""
    return sum(parameter.numel() for parameter in module.parameters())
