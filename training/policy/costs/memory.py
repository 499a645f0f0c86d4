"""How much device memory a run needs, found without weights: the step is run on torch's ``meta`` device.

Meta tensors have shapes and dtypes but no data, so SDXL's true UNet runs here in seconds, and what autograd would
keep for the backward pass can be counted instead of guessed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from diffusion_align.adapters.autoencoder import ChunkedVAE, chunk_size
from diffusion_align.adapters.prompts import CAPACITY
from diffusion_align.evaluation.compare import SamplingSettings

from .live_bytes import AutocastShapes, LiveBytes, RememberedShapes, flash_attention_shapes
from .meta_model import MetaModel, build_meta_model, count_parameters

if TYPE_CHECKING:
    from ..config import MemoryNeeds, TrainConfig

GIB = 2**30
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
#: Pictures that validation draws at once.
VALIDATION_BATCH = SamplingSettings().batch_size


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device at the peak of a training step, without the allocator's overhead.

    Attributes:
        frozen_weights: UNet, VAE and text encoders as stored; without the latter two where a cache replaces them.
        reference: a second UNet, when all weights are trained.
        trained_weights, gradients, optimizer, ema: of the trained parameters.
        copies: further ones of these, e.g. NFT's policy that draws.
        buckets: the gradients' second copy, in which several processes exchange them.
        activations: kept for the backward pass, plus the largest block's while it is recomputed.
        vae: peak of encoding the pairs (unless they are cached) or decoding pictures, in chunks of ``vae_batch_size``,
            and the pictures themselves.
        vae_in_backward: whether the VAE works while the activations are kept (DRaFT), instead of before or after.
        trained_parameters: how many parameters are trained.
        prompt_cache: bytes of the host, at most, for embeddings of recent prompts; not in the total.
    """

    frozen_weights: int
    reference: int
    trained_weights: int
    gradients: int
    buckets: int
    optimizer: int
    ema: int
    activations: int
    vae: int
    vae_in_backward: bool
    trained_parameters: int
    copies: int = 0
    prompt_cache: int = 0

    @property
    def total(self) -> int:
        weights = self.frozen_weights + self.reference + self.trained_weights
        lasting = weights + self.gradients + self.buckets + self.optimizer + self.ema + self.copies
        if self.vae_in_backward:
            return lasting + self.activations + self.vae
        return lasting + max(self.activations, self.vae)

    def rows(self) -> dict[str, str]:
        """For reading: name and GiB of each part, and of all."""
        rows = {
            field.name.replace("_", " "): f"{getattr(self, field.name) / GIB:9.3f} GiB"
            for field in fields(self)
            if field.name not in ("trained_parameters", "vae_in_backward", "prompt_cache")
        }
        rows["activations"] += " (kept for the backward pass)"
        rows["vae"] += " (with the activations)" if self.vae_in_backward else " (not while activations are kept)"
        rows["total, per device"] = f"{self.total / GIB:9.3f} GiB (allocator overhead is not in it)"
        rows["on the host, prompt cache"] = f"{self.prompt_cache / GIB:9.3f} GiB at most"
        rows["trained parameters"] = f"{self.trained_parameters:,}"
        return rows


def estimate_memory(config: TrainConfig, world_size: int = 1, model: MetaModel | None = None) -> MemoryEstimate:
    """Memory per device of a run of ``config`` on ``world_size``.

    Args:
        model: of ``build_meta_model(config)``, if it is there already; its UNet then recomputes as the run's.

    Raises:
        OSError: the configs of the model or of ``vae`` can be found neither locally nor on the hub.
        ValueError: as ``build_meta_model``.
    """
    model = model or build_meta_model(config)
    needs = config.guided_by(model.guidance).memory_needs()
    shapes = model.trained_shapes
    trained = sum(shape.numel() for shape in shapes)
    rows = needs.rows * config.per_device_train_batch_size
    with AutocastShapes(None if model.own_precision else model.autocast):
        kept = saved_bytes(model, rows, config.gradient_checkpointing)
    stored = BYTES[config.weight_dtype]
    whole = (model.base + model.buffers) * stored
    frozen = 4 * model.buffers if config.full_finetuning else whole
    if not needs.cached or config.eval_steps:  # validation decodes pictures and encodes prompts
        frozen += sum(map(count_parameters, model.texts)) * stored
        frozen += count_parameters(model.vae) * model.vae.dtype.itemsize
    compute = config.compute_dtype
    casts = compute != "fp32" and (config.full_finetuning or config.weight_dtype != compute)
    if casts and config.gradient_checkpointing != "full":
        frozen += model.base * BYTES[compute]  # autograd keeps a cast copy of every weight, unless blocks make it anew
    return MemoryEstimate(
        frozen_weights=frozen,
        reference=whole if config.full_finetuning else 0,
        trained_weights=4 * trained,
        gradients=4 * trained,
        buckets=4 * trained if world_size > 1 else 0,
        optimizer=optimizer_bytes(config.optim, shapes),
        ema=4 * trained if config.use_ema else 0,
        copies=4 * trained * needs.copies,
        activations=needs.passes * kept,
        vae=_vae_bytes(config, needs, model),
        vae_in_backward=needs.vae_in_backward,
        trained_parameters=trained,
        prompt_cache=0 if needs.cached else CAPACITY,
    )


def optimizer_bytes(optim: str, shapes: Iterable[torch.Size]) -> int:
    """Bytes of an optimiser's state for float32 parameters of ``shapes``.

    AdamW keeps two moments; in eight bits, one byte each. Both kinds of Adafactor factor the second moment of what
    has two dimensions or more over the last two of them: of a 3 x 3 convolution that leaves two thirds.
    """
    if optim in ("adafactor", "adafactor_scaled"):
        return 4 * sum(_factored(shape) for shape in shapes)
    return {"adamw": 8, "adamw_8bit": 2}[optim] * sum(shape.numel() for shape in shapes)


def _factored(shape: torch.Size) -> int:
    count = shape.numel()
    return count if len(shape) < 2 else count // shape[-1] + count // shape[-2]


@dataclass(frozen=True)
class AutocastVAE(ChunkedVAE):
    """A ``meta`` VAE as it codes under CUDA's autocast to ``autocast``, also where the backward pass computes it again:
    a mode around that pass is not seen inside of it."""

    autocast: torch.dtype | None = None

    @contextmanager
    def _own_precision(self) -> Iterator[None]:
        with AutocastShapes(self.autocast):
            yield


def vae_bytes(
    vae: AutoencoderKL, job: Literal["encode", "decode", "decode_with_graph"], pictures: int, side: int,
    batch_size: int | None = None, autocast: torch.dtype | None = None,
) -> int:  # fmt: skip
    """Most bytes alive while a ``meta`` VAE codes ``pictures`` of ``side`` pixels, pixels and latents included.

    One chunk is run; beyond it only pixels and latents grow with the number of pictures.

    Args:
        batch_size: pictures at once; None as in a run.
        autocast: what CUDA's autocast would compute in.
    """
    factor, channels = 2 ** (len(vae.config.block_out_channels) - 1), vae.config.latent_channels
    coder, small = AutocastVAE(vae, batch_size, factor, autocast=autocast), side // factor
    with_graph = job == "decode_with_graph"
    chunk = min(pictures, batch_size or chunk_size(side, side, with_graph))
    with flash_attention_shapes(), torch.set_grad_enabled(with_graph), LiveBytes() as live:
        pixels, latents = torch.empty(chunk, 3, side, side, device="meta"), None
        if job == "encode":
            coder.encode(pixels)
        else:
            latents = torch.empty(chunk, channels, small, small, device="meta", requires_grad=with_graph)
            decoded = coder.decode(latents)
            if with_graph:
                decoded.backward(pixels)
    each = 4 * (3 * side * side + 2 * channels * small * small)
    return live.peak + (pictures - chunk) * each * (1 if job == "encode" else 2)


def _vae_bytes(config: TrainConfig, needs: MemoryNeeds, model: MetaModel) -> int:
    """The largest of what the run does with its VAE."""
    vae, side, autocast = model.vae, model.side, model.autocast
    # Pictures are decoded under autocast, which leaves a VAE alone that is in half precision, and fp16 leaves SDXL's.
    whole = vae.dtype == torch.float32
    own, validated = (autocast if autocast != torch.float16 else None, torch.bfloat16) if whole else (None, None)
    found, size = [0], config.vae_batch_size
    for job in needs.vae_jobs:
        precision = None if job.kind == "encode" else own
        found.append(vae_bytes(vae, job.kind, job.pictures, side, size, precision))
    if config.eval_steps:
        pictures = min(VALIDATION_BATCH, config.num_validation_prompts)
        found.append(vae_bytes(vae, "decode", pictures, side, size, validated))
    return max(found)


def saved_bytes(model: MetaModel, rows: int, checkpointing: str) -> int:
    """Bytes autograd keeps in one forward of a ``meta`` model's network on ``rows`` latents."""
    blocks = _measure(model, rows)
    if checkpointing == "none":
        return blocks.total
    model.family.recompute(model.network, attention_only=checkpointing == "attention")
    return _measure(model, rows).total + blocks.largest_block


@dataclass
class _Saved:
    total: int = 0
    largest_block: int = 0


def _measure(model: MetaModel, rows: int) -> _Saved:
    """Count what one training-mode forward keeps, and the most that a single block adds."""
    unet, family = model.network, model.family
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

    hooks = [
        handle
        for module in unet.modules()
        if type(module).__name__ in family.blocks
        for handle in (module.register_forward_pre_hook(before), module.register_forward_hook(after))
    ]
    unet.train()
    hooked = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with flash_attention_shapes(), RememberedShapes(), hooked:
        family.call(unet, model.inputs(rows, model.latent[-1]))
    for hook in hooks:
        hook.remove()
    return found
