"""How much device memory a run needs, found without weights: the step is run on torch's ``meta`` device.

Meta tensors have shapes and dtypes but no data, so SDXL's true UNet runs here in seconds, and what autograd would
keep for the backward pass can be counted instead of guessed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from diffusion_align.adapters import SHIPPED_MODELS, shipped_path
from diffusion_align.adapters.base import checkpoint_activations

from .config import TrainConfig
from .dtypes import DTYPES

BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
#: Bytes per trained parameter that the optimiser keeps; Adafactor's factored moments are negligible.
OPTIMIZER_BYTES = {"adamw": 8, "adamw_8bit": 2, "adafactor": 0}


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device at the peak of a training step, without the allocator's overhead.

    Attributes:
        frozen_weights: UNet, VAE and text encoders as stored (VAE and text encoders only if nothing is cached).
        reference: a second UNet, when all weights are trained.
        trained_weights, gradients, optimizer, ema: of the trained parameters.
        activations: kept for the backward pass, plus the largest block's while it is recomputed.
        trained_parameters: how many parameters are trained.
    """

    frozen_weights: int
    reference: int
    trained_weights: int
    gradients: int
    optimizer: int
    ema: int
    activations: int
    trained_parameters: int

    @property
    def total(self) -> int:
        parts = (self.frozen_weights, self.reference, self.trained_weights, self.gradients, self.optimizer, self.ema)
        return sum(parts) + self.activations


def estimate_memory(config: TrainConfig) -> MemoryEstimate | None:
    """Memory of a pairwise run of ``config``; None for a single-file model without ``model_config``.

    Raises:
        OSError: the model's configs can be found neither locally nor on the hub.
    """
    source = config.model_config or config.model
    if source in SHIPPED_MODELS:
        source = str(shipped_path(source))
    if Path(source).is_file():
        return None
    compute = {"no": "fp32", "auto": "bf16"}.get(config.mixed_precision, config.mixed_precision)
    vae_config = AutoencoderKL.load_config(source, subfolder="vae")
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(source, subfolder="unet"))
        others = _count(AutoencoderKL.from_config(vae_config)) + sum(_text_encoder_sizes(source))
        base = _count(unet)
        if not config.full_finetuning:
            unet.requires_grad_(False)
            unet.add_adapter(LoraConfig(r=config.lora_rank, target_modules=list(config.lora_target_modules)))
    trained = sum(p.numel() for p in unet.parameters() if p.requires_grad)
    nn.Module.to(unet, DTYPES[compute])  # diffusers' own .to warns about casts that matter for real weights only
    side = getattr(config, "resolution", None)
    latent = side // 2 ** (len(vae_config["block_out_channels"]) - 1) if side else unet.config.sample_size
    rows = 2 * getattr(config, "per_device_train_batch_size", 1)
    activations = saved_bytes(unet, rows, latent, config.gradient_checkpointing)
    stored = BYTES[config.weight_dtype]
    frozen = 0 if config.full_finetuning else base * stored
    if not getattr(config, "cache_dir", None):
        frozen += others * stored
    if compute != "fp32" and (config.full_finetuning or config.weight_dtype != compute):
        frozen += base * BYTES[compute]  # autocast keeps a second, cast copy of every weight
    return MemoryEstimate(
        frozen_weights=frozen,
        reference=base * stored if config.full_finetuning else 0,
        trained_weights=4 * trained,
        gradients=4 * trained,
        optimizer=OPTIMIZER_BYTES[config.optim] * trained,
        ema=4 * trained if config.use_ema else 0,
        activations=activations,
        trained_parameters=trained,
    )


def saved_bytes(unet: UNet2DConditionModel, rows: int, latent: int, checkpointing: str) -> int:
    """Bytes autograd keeps in one forward of a ``meta`` UNet on ``rows`` latents of side ``latent``."""
    blocks = _measure(unet, rows, latent)
    if checkpointing == "none":
        return blocks.total
    checkpoint_activations(unet, attention_only=checkpointing == "attention")
    return _measure(unet, rows, latent).total + blocks.largest_block


@dataclass
class _Saved:
    total: int = 0
    largest_block: int = 0


def _measure(unet: UNet2DConditionModel, rows: int, latent: int) -> _Saved:
    """Count what one training-mode forward keeps, and the most that a single block adds."""
    found, seen, keep = _Saved(), {p.untyped_storage()._cdata for p in unet.parameters()}, []
    starts: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            keep.append(tensor)  # a freed storage's address could be taken by the next one
            found.total += storage.nbytes()
        return tensor

    def before(module: nn.Module, _: Any) -> None:
        starts[id(module)] = found.total

    def after(module: nn.Module, _: Any, __: Any) -> None:
        found.largest_block = max(found.largest_block, found.total - starts[id(module)])

    names = ("BasicTransformerBlock", "ResnetBlock2D")
    hooks = [
        handle
        for module in unet.modules()
        if type(module).__name__ in names
        for handle in (module.register_forward_pre_hook(before), module.register_forward_hook(after))
    ]
    unet.train()
    with _counted_attention(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        sample, t, arguments = _inputs(unet, rows, latent)
        unet(sample, t, **arguments)
    for hook in hooks:
        hook.remove()
    return found


def _inputs(unet: UNet2DConditionModel, rows: int, latent: int) -> tuple[Tensor, Tensor, dict[str, Any]]:
    dtype, config = unet.dtype, unet.config
    sample = torch.empty(rows, config.in_channels, latent, latent, dtype=dtype, device="meta")
    arguments: dict[str, Any] = {
        "encoder_hidden_states": torch.empty(rows, 77, config.cross_attention_dim, dtype=dtype, device="meta")
    }
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        arguments["added_cond_kwargs"] = {
            "text_embeds": torch.empty(rows, pooled, dtype=dtype, device="meta"),
            "time_ids": torch.empty(rows, 6, dtype=dtype, device="meta"),
        }
    return sample, torch.empty(rows, dtype=torch.long, device="meta"), arguments


class _FlashShapes(torch.autograd.Function):
    """Attention that keeps what flash kernels keep (inputs, output, row sums), never the L x L matrix."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        rows = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
        ctx.save_for_backward(query, key, value, output, rows)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


@contextmanager
def _counted_attention() -> Iterator[None]:
    original = nn.functional.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        return _FlashShapes.apply(query, key, value)

    nn.functional.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = original


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _text_encoder_sizes(source: str) -> list[int]:
    index = DiffusionPipeline.load_config(source)
    sizes = []
    for name in ("text_encoder", "text_encoder_2"):
        if index.get(name, [None])[0] is not None:
            sizes.append(_count(CLIPTextModel(CLIPTextConfig.from_pretrained(source, subfolder=name))))
    return sizes
