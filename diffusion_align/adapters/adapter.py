"""One model, whatever its family: latents, prompts, noise, prediction, and the policy/reference pair."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import extract_model_from_parallel
from diffusers.utils import is_xformers_available
from torch import Tensor, nn

from diffusion_align.devices import autocast_dtype, no_autocast
from diffusion_align.process import Path as NoisePath
from diffusion_align.process import Prediction, path_of

from .autoencoder import ChunkedVAE, LatentSpace, check_vae_batch_size
from .conditioning import Conditioning
from .families import NetworkInputs, checked_length, encode_prompts, find_family
from .lora_stack import LoraStack, add_policy
from .parts import Part, frozen_copy
from .pipeline_parts import PipelineParts
from .policy_files import Source, load_negative, load_policy, save_lora, save_network


class Adapter(PipelineParts):
    """Wraps a diffusers pipeline's parts; built by :func:`diffusion_align.load_adapter`.

    Pixels are float (B, 3, H, W) in [-1, 1]; latents (B, C, H/f, W/f) are scaled to about unit variance. A fresh
    adapter trains nothing; ``train_lora`` or ``train_full`` makes the UNet a policy with a frozen reference.

    Attributes:
        path: the noising process that the denoiser was trained on.
        loras: the LoRAs of UNet and text encoders: loaded, trained, and folded into the weights.
        denoiser: what ``predict`` calls: the UNet, during training in its distributed wrapper.
        vae_batch_size: pictures that the VAE codes at once; None depends on their size (``autoencoder.chunk_size``).
        max_sequence_length: tokens that the longest text encoder is given; None where that is fixed. What fills a
            prompt up to it is attended to, so that another length is another model.
    """

    def __init__(self, pipeline: Any, absent: Collection[Part] = (), max_sequence_length: int | None = None) -> None:
        super().__init__(pipeline, find_family(pipeline), absent)
        self.family.check(pipeline)
        self.path: NoisePath = path_of(pipeline.scheduler)
        self.max_sequence_length = checked_length(max_sequence_length, self.family, pipeline)
        self.denoiser: nn.Module = self.network
        self.vae_batch_size: int | None = None
        self.loras = LoraStack(pipeline, self.family)
        self._reference_network: Any = None
        self._lora_targets: tuple[str, ...] | None = None
        for module in (self.network, self.vae, *self.text_encoders):
            module.requires_grad_(False).eval()

    def __repr__(self) -> str:
        count = sum(parameter.numel() for parameter in self.network.parameters())
        trained = "a LoRA is trained" if self.is_lora else "a LoRA is loaded" if self.has_lora else ""
        trained = "all weights are trained" if self._reference_network is not None else trained
        where = f"{str(self.dtype).removeprefix('torch.')} on {self.device}"
        size = f"{self.default_resolution} pixels, {count / 1e6:.1f} M parameters"
        return f"Adapter({self.family.name}, {size}, {where}{f', {trained}' if trained else ''})"

    # -- parts ---------------------------------------------------------------------------------------------------

    def wrap(self, wrapper: Callable[[nn.Module], nn.Module]) -> nn.Module:
        """Put ``wrapper(denoiser)``, e.g. for distributed training, in the denoiser's place, and return it."""
        self.denoiser = wrapper(self.denoiser)
        if self.dtype != torch.float32:
            extract_model_from_parallel(self.denoiser, keep_fp32_wrapper=False)  # accelerate's autocast around forward
        return self.denoiser

    @property
    def shardable(self) -> tuple[nn.Module, ...]:
        """Denoiser and reference where all weights are trained, which may be cut over processes; else none."""
        return () if self._reference_network is None else (self.network, self._reference_network)

    def to(self, device: torch.device | str) -> Adapter:
        """Move every part; dtypes stay as they are."""
        for module in (*self.present(), self._reference_network):
            if module is not None:
                module.to(device)
        self.path = self.path.to(device)
        return self

    def park_encoders(self) -> Adapter:
        """Move VAE and text encoders to the CPU, for runs whose latents and embeddings are cached."""
        for module in self.present():
            if module is not self.network:
                module.to("cpu")
        return self

    # -- latents and prompts -------------------------------------------------------------------------------------

    @property
    def _coder(self) -> ChunkedVAE:
        needs_float32 = self.family.vae_overflows and self.vae.config.force_upcast
        return ChunkedVAE(self.vae, self.vae_batch_size, self.vae_scale_factor, needs_float32)

    def encode_posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of q(latents | pixels), each (B, C, h, w) float32 and scaled.

        ``pixels`` may be on any device; ``vae_batch_size`` of them are moved to the VAE's at once.

        Raises:
            ValueError: the size of ``pixels`` is not divisible by the VAE factor.
        """
        self.require("vae")
        height, width = pixels.shape[-2:]
        if height % self.vae_scale_factor or width % self.vae_scale_factor:
            raise ValueError(
                f"images of {height}x{width} pixels cannot be encoded: "
                f"both sides must be divisible by {self.vae_scale_factor}"
            )
        return self._coder.encode(pixels)

    def encode_images(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents of ``pixels``: the posterior mean, or a sample of it with standard normal ``noise`` (B, C, h, w)."""
        mean, std = self.encode_posterior(pixels)
        return mean if noise is None else mean + std * noise

    def encode_inpaint(self, pixels: Tensor, masks: Tensor) -> Tensor:
        """What an inpainting UNet sees beside the noise: the mask and the latents of the picture without its hole.

        Args:
            pixels: (B, 3, H, W) in [-1, 1].
            masks: (B, 1, H, W), 1 where the picture is to be repainted.

        Returns:
            (B, 1 + C, h, w), for ``Conditioning.inpaint``. The latents are posterior means (diffusers samples them).
        """
        latents, _ = self.encode_posterior(pixels * (masks < 0.5))
        small = torch.nn.functional.interpolate(masks.to(latents), size=latents.shape[-2:])
        return torch.cat([small, latents], dim=1)

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) float32, about [-1, 1] and not clamped.

        Gradients flow to ``latents``; activations are recomputed in the backward pass, a chunk at a time.
        """
        self.require("vae")
        return self._coder.decode(latents)

    def latent_space(self) -> LatentSpace:
        """Which latents these are, for networks that were trained on latents."""
        self.require("vae")
        return self._coder.space()

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str | None]) -> Conditioning:
        """Conditioning of ``prompts``; None is the pipeline's own null prompt (SDXL: zeros).

        An empty string is encoded like any other, as diffusers' pipelines do it.
        """
        self.require("text_encoders")
        return self._by_both(lambda: encode_prompts(self.family, self.pipeline, prompts, self.max_sequence_length))

    @torch.no_grad()
    def null_conditioning(self, batch: int) -> Conditioning:
        """The unconditional branch of classifier-free guidance, ``batch`` times."""
        self.require("text_encoders")
        return self._by_both(lambda: self.family.null(self.pipeline, self.max_sequence_length).repeat(batch))

    def _by_both(self, encode: Callable[[], Conditioning]) -> Conditioning:
        """What the policy's text encoders give, and beside it the reference's where a LoRA makes a difference."""
        cond = encode()
        if self._is_reference or not self.loras.on_encoders:
            return cond
        with self.loras.switched_off():
            base = encode()
        return replace(cond, base_embeds=base.embeds, base_pooled=base.pooled)

    # -- prediction ----------------------------------------------------------------------------------------------

    def predict(self, x_t: Tensor, t: Tensor, cond: Conditioning, skipped: tuple[int, ...] = ()) -> Prediction:
        """Run the denoiser, without its ``skipped`` blocks, on ``x_t`` (B, C, h, w) at times ``t`` (B,) of ``path``.

        Raises:
            ValueError: an inpainting model without ``cond.inpaint``, or the other way round; likewise a model that
                takes the guidance scale, and ``cond.guidance``.
        """
        self.require("network")
        if self.is_inpainting != (cond.inpaint is not None):
            raise ValueError(
                "this inpainting model needs a mask and masked image (cond.inpaint)"
                if self.is_inpainting
                else f"cond.inpaint was given, but the UNet takes {self.network.config.in_channels} channels only"
            )
        if self.embeds_guidance != (cond.guidance is not None):
            raise ValueError(
                "this distilled model takes the guidance scale as an input (cond.guidance; unet: time_cond_proj_dim)"
                if self.embeds_guidance
                else "cond.guidance was given, but the network does not take it"
            )
        if skipped and self.family.skippable is None:
            raise ValueError(f"a {self.family.name} model's network can leave out no blocks, found skipped {skipped}")
        cond = cond.of_reference() if self._is_reference else cond
        sample = x_t if cond.inpaint is None else torch.cat([x_t, cond.inpaint.to(x_t.dtype)], dim=1)
        dtype = self.dtype
        inputs = NetworkInputs(sample.to(dtype), t, cond.to(dtype=dtype), skipped)
        # Weights in the run's half precision compute as the pipeline does. Autocast would take norms in float32 and
        # copy what they give for each product after them: that is a quarter of a step's memory.
        network = self._reference_network if self._is_reference else None
        own = no_autocast(self.device) if dtype == autocast_dtype(self.device) else nullcontext()
        with own:
            output = self.family.call(network or self.denoiser, inputs).float()
        return self.path.views(output, x_t.float(), t)

    # -- policy and reference ------------------------------------------------------------------------------------

    _is_reference = False

    def train_lora(
        self,
        rank: int = 8,
        alpha: float | None = None,
        targets: Sequence[str] | None = None,
        dropout: float = 0.0,
        seed: int = 0,
        init: Literal["kaiming", "gaussian"] = "kaiming",
    ) -> Adapter:
        """Add trainable LoRA matrices (float32) to the UNet; the reference is the UNet with them switched off.

        What was loaded or trained before is folded into the weights first, and so belongs to the reference. ``save``
        writes it, too: the file fits the model as it was before.

        Args:
            alpha: LoRA scale is alpha / rank; None means alpha = rank.
            targets: suffixes of the module names to adapt; None takes the family's own.
            init: of the matrix A: uniform in +-1 / sqrt(inputs), peft's, or normal with deviation 1 / rank, diffusers'
                scripts'. B starts at zero.

        Raises:
            ValueError: a target matches no module; the message lists it.
        """
        targets = self.family.lora_targets if targets is None else targets
        names = [name for name, _ in self.network.named_modules()]
        missing = [t for t in targets if not any(name == t or name.endswith("." + t) for name in names)]
        if missing:
            kind, usual = self.family.network_kind, self.family.lora_targets[0]
            raise ValueError(f"lora_target_modules {missing} match no module of the {kind}, e.g. {usual!r}")
        self._start_on_top()
        add_policy(self.network, rank, alpha or rank, targets, dropout, init, seed)
        self._lora_targets = tuple(targets)
        return self

    def train_full(self, reference_dtype: torch.dtype | None = None) -> Adapter:
        """Make all UNet weights trainable (float32) and keep a frozen copy, in ``reference_dtype``, as reference.

        LoRAs that were loaded or trained before are folded into the weights first.

        Raises:
            ValueError: one of them changes a text encoder, which the saved UNet would not hold.
        """
        self.loras.check_network_only()
        self._start_on_top()
        self.loras.own_base = False
        self._reference_network = frozen_copy(self.network, reference_dtype)
        nn.Module.to(self.network, torch.float32).requires_grad_(True)  # diffusers' own warns of any dtype
        return self

    def _start_on_top(self) -> None:
        """Make the policy as it is the reference of what is trained next."""
        self.fold_loras()
        self._reference_network = None
        self.network.requires_grad_(False)

    def fold_loras(self) -> Adapter:
        """Put loaded and trained LoRAs into the weights, in the text encoders, too."""
        self.loras.fold()
        self._lora_targets = None
        return self

    @property
    def is_lora(self) -> bool:
        """Whether a LoRA is trained."""
        return self._lora_targets is not None

    @property
    def has_lora(self) -> bool:
        """Whether there are LoRA matrices, to be trained or loaded from a file."""
        return bool(self.loras)

    @property
    def has_reference(self) -> bool:
        """Whether ``reference`` is another policy than the current one."""
        return self.has_lora or self._reference_network is not None

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, ``predict`` is the frozen reference policy and builds no graph; prompts are encoded by it, too."""
        with torch.no_grad(), self.loras.switched_off() if self._reference_network is None else nullcontext():
            self._is_reference = True
            try:
                yield
            finally:
                self._is_reference = False

    def reference_state(self) -> dict[str, Tensor]:
        """Names and weights of the reference policy, as the UNet without LoRA names them."""
        state = (self._reference_network or self.network).state_dict()
        return {name.replace(".base_layer.", "."): w for name, w in state.items() if ".lora_" not in name}

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Names and parameters that training changes, in the UNet's order."""
        return {name: p for name, p in self.network.named_parameters() if p.requires_grad}

    # -- speed and memory ----------------------------------------------------------------------------------------

    def optimize(self, gradient_checkpointing: str = "none", attention: str = "sdpa", compile: bool = False) -> Adapter:
        """Trade memory and speed: checkpoint ``none``, ``attention`` (transformer layers only) or ``full``;
        attention by ``sdpa`` or ``xformers``; ``compile`` each transformer block once (torch.compile)."""
        self.family.check_speed(attention, channels_last=False)
        if gradient_checkpointing != "none":
            self.family.recompute(self.network, attention_only=gradient_checkpointing == "attention")
        if attention == "xformers":
            if not is_xformers_available():
                raise ImportError(
                    "attention xformers needs the xformers package: pip install 'diffusion-align[xformers]'"
                )
            self.network.enable_xformers_memory_efficient_attention()
        if compile:
            self.family.compile(self.network)
        return self

    def code_in_chunks(self, batch_size: int | None = None, tiling: bool = False) -> Adapter:
        """Set how the VAE codes pictures.

        Args:
            batch_size: pictures at once, 1 is what diffusers calls slicing; None leaves it as it is.
            tiling: cut pictures larger than the VAE's ``sample_size`` into overlapping tiles; the result is not the
                same to the bit. False leaves it as it is.

        Raises:
            ValueError: ``batch_size`` is below 1.
        """
        check_vae_batch_size(batch_size)
        self.vae_batch_size = batch_size or self.vae_batch_size
        if tiling:
            self.vae.enable_tiling()
        return self

    # -- saving and loading weights ------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> Path:
        """Write the policy as diffusers, ComfyUI, A1111 and Forge load it.

        LoRAs: ``pytorch_lora_weights.safetensors`` for ``pipe.load_lora_weights(folder)``, and for the others the same
        in ``kohya_lora_weights.safetensors``. All weights: ``unet/`` for
        ``UNet2DConditionModel.from_pretrained(folder, subfolder="unet")``.

        Returns:
            The file for diffusers, or the folder written.
        """
        if self.has_lora:
            return save_lora(self.loras, Path(folder))
        return save_network(self.pipeline, self.family.network_name, Path(folder))

    def load_weights(self, *sources: str | Path) -> Adapter:
        """Load LoRAs or a UNet: what ``save`` wrote, or files of other tools.

        LoRAs may be in diffusers', peft's or kohya's layout, with text encoders or not; all that are loaded add up.

        Args:
            sources: files or folders; ``PATH:WEIGHT`` scales a LoRA, e.g. ``"style.safetensors:0.5"``.

        Raises:
            FileNotFoundError: neither a LoRA file nor a ``unet`` folder is there.
            ValueError: a UNet of another architecture or on top of a LoRA; keys or shapes of a LoRA that do not fit the
                model, or none that does; weights beside a LoRA that is being trained.
        """
        if self.is_lora:
            raise ValueError("a LoRA is trained on this model: load weights before train_lora, or into a fresh model")
        load_policy(self.loras, [Source.parse(source) for source in sources])
        return self

    def load_negative(self, *sources: str | Path, keep: float = 1.0) -> Adapter:
        """Load LoRAs as a negative model for ``ContrastiveGuidance``: the network of its null branch, and of no other.

        Its weights are base + ``keep`` delta_positive + delta_negative (Diffusion-NPO, 2505.11245, whose m is 1 -
        ``keep``), where delta_positive are the LoRAs that were loaded before.

        Args:
            sources: as of ``load_weights``; of ``train dpo --swap-labels`` runs, or others whose pictures are worse.

        Raises:
            FileNotFoundError: no such file or folder.
            ValueError: a whole network, a LoRA that does not fit or changes text encoders, one is loaded already, or a
                LoRA is being trained.
        """
        if self.is_lora:
            raise ValueError("a LoRA is trained on this model: load the negative model into a fresh one")
        load_negative(self.loras, [Source.parse(source) for source in sources], keep)
        return self
