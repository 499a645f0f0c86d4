"""How many floating-point operations a run takes, counted on the ``meta`` device, and how many hours on a card.

Products, convolutions and attention are counted, by torch's own formulas (``torch.utils.flop_counter``). Sums,
norms, activations, the optimiser and scorers are not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from diffusion_align.adapters.autoencoder import ChunkedVAE
from diffusion_align.adapters.prompts import CHUNK
from diffusion_align.hardware import Card

from .live_bytes import RememberedShapes
from .meta_model import MetaModel

if TYPE_CHECKING:
    from ..config import TrainConfig

TERA = 10**12
#: Operations of a micro-step that keep a large card busy. Below, the host cannot start kernels as fast as the card ends
#: them: an H200 needed 1.0 to 1.2 s for any step of 1 to 4 pairs of SDXL with all recomputed (docs/performance.md).
FILLING = 380 * TERA


class CountedOperations(TorchDispatchMode):
    """Inside ``with CountedOperations() as counted``, ``counted.total`` grows by the operations of every product.

    The same count as torch's ``FlopCounterMode``, without its table of modules, which takes most of that one's time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += int(formula(*args, **(kwargs or {}), out_val=output))
        return output


@dataclass(frozen=True)
class Operations:
    """Floating-point operations of each kind of work.

    Attributes:
        forward: of one row through the network (one picture, one call), with its LoRA.
        trained: the same and its backward pass, with what is computed again there.
        vae: of one picture, by the kind of ``VAEJob``; a decoding with a graph includes its backward pass.
        prompt: of one prompt through all text encoders.
    """

    forward: int
    trained: int
    vae: Mapping[str, int]
    prompt: int


def count_operations(model: MetaModel, checkpointing: str) -> Operations:
    """Count each kind of work once, on one picture; the model's UNet is in float32 afterwards.

    Args:
        checkpointing: ``gradient_checkpointing`` of the run.
    """
    unet, family = model.network, model.family
    if checkpointing != "none":
        family.recompute(unet, attention_only=checkpointing == "attention")
    nn.Module.to(unet, torch.float32).train()  # precision changes no count
    with RememberedShapes(), CountedOperations() as counted:
        output = family.call(unet, model.inputs(1, model.latent[-1]))
        forward = counted.total
        output.sum().backward()
    unet.zero_grad(set_to_none=True)
    coder = ChunkedVAE(model.vae, 1, model.factor)
    pixels = torch.empty(1, 3, model.side, model.side, device="meta")

    def decode(with_graph: bool) -> None:
        decoded = coder.decode(torch.empty(1, *model.latent, device="meta", requires_grad=with_graph))
        if with_graph:
            decoded.backward(pixels)

    jobs: dict[str, Callable[[], object]] = {
        "encode": lambda: coder.encode(pixels),
        "decode": lambda: decode(False),
        "decode_with_graph": lambda: decode(True),
    }
    prompt = 0
    for text in model.texts:
        tokens = torch.zeros(1, model.read_by(text), dtype=torch.long, device="meta")
        prompt += _operations_of(partial(text, tokens), False)
    vae = {kind: _operations_of(work, kind == "decode_with_graph") for kind, work in jobs.items()}
    return Operations(forward, counted.total, vae, prompt)


def _operations_of(work: Callable[[], object], with_graph: bool) -> int:
    with torch.set_grad_enabled(with_graph), RememberedShapes(), CountedOperations() as counted:
        work()
    return counted.total


@dataclass(frozen=True)
class Compute:
    """Operations of a run on all of its devices.

    Attributes:
        unit: operations of each kind of work.
        example: of one example of a training batch, by what they are for.
        once: of what is done once in a run, by what it is: filling a cache.
        validation: of all validations; one device does them.
        examples: how many the run sees.
        batch: how many an optimiser step sees.
        micro: how many a micro-step of one device sees.
        network: what the denoiser is called.
    """

    unit: Operations
    example: Mapping[str, float]
    once: Mapping[str, float]
    validation: float
    examples: int
    batch: int
    micro: int
    network: str = "UNet"

    @property
    def each(self) -> float:
        """Operations of one example."""
        return sum(self.example.values())

    def seconds(self, card: Card, dtype: str) -> float:
        """Of the whole run, on ``card.count`` cards."""
        shared = self.each * self.examples + sum(self.once.values())
        return (shared / card.count + self.validation) / (card.rate(dtype) * TERA)

    @property
    def busy(self) -> float:
        """Share of an assumed rate that micro-steps of this size may be down to, if the host is slow."""
        return min(1.0, self.each * self.micro / FILLING)

    def rows(self, name: str) -> dict[str, str]:
        """For reading: name and TFLOP.

        Args:
            name: of an example.
        """
        unit = self.unit
        rows = {
            f"{self.network} forward": f"{_tera(unit.forward)} a picture",
            f"{self.network} forward and backward": f"{_tera(unit.trained)} a picture, with what is computed again",
            "VAE": f"{_tera(unit.vae['encode'])} to encode a picture, {_digits(unit.vae['decode'])} to decode one",
            **{f"{name}: {part}": _tera(count) for part, count in self.example.items()},
            f"{name}, in all": _tera(self.each),
            "optimiser step": f"{_tera(self.each * self.batch)} = {self.batch:,} x {_digits(self.each)}",
            "steps of the run": f"{_tera(self.each * self.examples)} = {self.examples:,} x {_digits(self.each)}",
            **{f"once: {part}": _tera(count) for part, count in self.once.items()},
        }
        return rows | ({"validation": f"{_tera(self.validation)} (one device)"} if self.validation else {})


def _tera(count: float) -> str:
    return f"{_digits(count):>12} TFLOP"


def _digits(count: float) -> str:
    """TFLOP to the four digits that are worth reading."""
    tera = count / TERA
    return f"{tera:,.0f}" if tera >= 1000 else f"{tera:.4g}"


def estimate_compute(config: TrainConfig, model: MetaModel, world_size: int, examples: int | None) -> Compute:
    """Operations of a run.

    Args:
        examples: how many the data set has, None where that is not known: then no filling of a cache is counted.
    """
    config = config.guided_by(model.guidance)
    unit, work = count_operations(model, config.gradient_checkpointing), config.work()
    example = {"training": work.trained * unit.trained}
    example |= {part: rows * unit.forward for part, rows in work.forward.items()}
    example |= {f"VAE, {kind.replace('_', ' ')}": count * unit.vae[kind] for kind, count in work.vae.items()}
    batch = config.per_device_train_batch_size
    encoded = work.prompts * batch
    if encoded:  # text encoders always read whole chunks
        example["text encoders"] = max(encoded, -(-encoded // CHUNK) * CHUNK) / batch * unit.prompt
    once, cached = {}, config.cached_example()
    if examples is not None and cached is not None and not cached.is_there:
        pictures = cached.pictures * cached.versions
        once["filling the cache"] = examples * (pictures * unit.vae["encode"] + unit.prompt)
    step = batch * config.gradient_accumulation_steps * world_size
    validation, examples_seen = _validation(config, unit), step * config.max_steps
    return Compute(unit, example, once, validation, examples_seen, step, batch, model.family.network_kind)


def _validation(config: TrainConfig, unit: Operations) -> float:
    """Of drawing the base's pictures once and the policy's at every validation; for the divergence both predict."""
    if not config.eval_steps:
        return 0
    rows = 2 if config.validation_guidance_scale > 1 else 1
    latents = config.validation_inference_steps * rows * unit.forward
    pictures = config.num_validation_prompts * config.validation_seeds_per_prompt
    one = pictures * (latents + unit.vae["decode"]) + 2 * config.kl_prompts * latents
    return (1 + config.max_steps // config.eval_steps) * one


def card_rows(card: Card, compute: Compute, dtype: str, needed: float) -> dict[str, str]:
    """For reading: hours and memory of a run on ``card``, and what they rest on.

    Args:
        needed: GiB that the run is estimated to need on each card.
    """
    hours, published = compute.seconds(card, dtype) / 3600, card.published(dtype)
    rows = {"card": f"{card.count} x {card.name}" if card.count > 1 else card.name}
    if card.utilisation == 1:
        rows["rate"] = f"{card.half:g} TFLOP/s in a step, as given"
    else:
        rows["rate"] = (
            f"{card.rate(dtype):.0f} TFLOP/s, assumed: {card.utilisation:.0%} of {published:g} published ({dtype}), "
            "as an H200 in LoRA DPO steps of 8 pairs"
        )
    rows["time"] = f"about {hours:,.1f} h: an estimate, not a measurement"
    if card.utilisation < 1 and compute.busy < 0.8:
        rows["small batches"] = (
            f"up to {hours / compute.busy:,.0f} h, if the host is what limits such small steps, as it did the H200"
        )
    if card.memory is not None:
        fits = "fits, with the allocator's 10 to 20%" if 1.2 * needed < card.memory else "may not fit"
        if needed >= card.memory:
            fits = "does not fit; base weights in fewer bits (int8, nf4) are not supported"
        rows["memory"] = f"{needed:.1f} of {card.memory:g} GiB: {fits}"
    return rows
