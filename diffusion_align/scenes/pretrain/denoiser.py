"""Train the denoisers of the scenes pipelines (UNet and text encoders together) on cached latents."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from diffusion_align.devices import fast_autocast
from diffusion_align.process import VariancePreserving
from diffusion_align.scenes.world.render import IMAGE_SIZE


def build_unet(cross_attention_dim: int, sdxl: bool, in_channels: int = 4) -> UNet2DConditionModel:
    """SD's UNet with two levels: 16x16 without attention, 8x8 with one transformer layer a block."""
    sdxl_only = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 16,
        "projection_class_embeddings_input_dim": 128 + 6 * 16,
    }
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=in_channels,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(48, 96),
        layers_per_block=1,
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=(2, 4),
        norm_num_groups=8,
        use_linear_projection=sdxl,
        **(sdxl_only if sdxl else {}),
    )


def build_scheduler() -> DDIMScheduler:
    """The noise schedule of SD 1.5 and SDXL."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


@dataclass
class Networks:
    """What is trained together; ``encode`` turns token ids (B, L) into UNet keyword arguments."""

    unet: UNet2DConditionModel
    text_encoders: list[nn.Module]
    encode: Callable[[list[nn.Module], Tensor], dict[str, object]]

    def modules(self) -> list[nn.Module]:
        return [self.unet, *self.text_encoders]


def encode_sdxl(encoders: list[nn.Module], ids: Tensor) -> dict[str, object]:
    """SDXL: penultimate states of both encoders side by side, pooled projection and size ids."""
    first, second = (encoder(ids, output_hidden_states=True) for encoder in encoders)
    states = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    time_ids = torch.tensor([IMAGE_SIZE, IMAGE_SIZE, 0, 0, IMAGE_SIZE, IMAGE_SIZE], dtype=torch.float32)
    added = {"text_embeds": second.text_embeds, "time_ids": time_ids.expand(len(ids), 6)}
    return {"encoder_hidden_states": states, "added_cond_kwargs": added}


def encode_sd(encoders: list[nn.Module], ids: Tensor) -> dict[str, object]:
    """SD: the last hidden state of the only encoder."""
    return {"encoder_hidden_states": encoders[0](ids).last_hidden_state}


@dataclass(frozen=True)
class LatentSet:
    """Posterior means and deviations (N, 8, h, w), token ids (N, L) and, for inpainting, extra UNet channels."""

    posterior: Tensor
    ids: Tensor
    scaling_factor: float
    extra: Tensor | None = None

    def sample(self, rows: Tensor) -> Tensor:
        mean, std = self.posterior[rows].chunk(2, dim=1)
        return (mean + std * torch.randn_like(mean)) * self.scaling_factor


def train_denoiser(
    networks: Networks,
    data: LatentSet,
    minutes: float,
    checkpoint: Path,
    batch_size: int = 64,
    learning_rate: float = 1.2e-3,
    empty_ids: Tensor | None = None,
    seed: int = 0,
) -> Networks:
    """Epsilon-prediction MSE, min-SNR weighted (gamma 5, 2303.09556; at least 0.15), with 10% caption dropout.

    Returns the exponential average (0.999) of the weights. A ``checkpoint`` left by an earlier run is the start of this
    one (its weights; the learning rate warms up and decays again).

    ``empty_ids`` (L,) are the tokens of "" for pipelines that encode the null prompt (SD); None zeroes the embeddings
    as SDXL's ``force_zeros_for_empty_prompt`` does.
    """
    torch.manual_seed(seed)
    path = VariancePreserving.from_scheduler(build_scheduler())
    levels = path.at(torch.arange(path.num_timesteps))
    snr = (levels.alpha_sq / levels.sigma_sq).flatten()
    weight = (snr.clamp(max=5.0) / snr).clamp(min=0.15)

    def loss() -> Tensor:
        rows = torch.randint(len(data.ids), (batch_size,))
        x0, ids = data.sample(rows), data.ids[rows].clone()
        drop = torch.rand(batch_size) < 0.1
        if empty_ids is not None:
            ids[drop] = empty_ids
        t = torch.randint(1000, (batch_size,))
        eps = torch.randn_like(x0)
        x_t = path.noise(x0, eps, t)
        if data.extra is not None:
            x_t = torch.cat([x_t, data.extra[rows].float()], dim=1)
        with fast_autocast("cpu"):
            cond = networks.encode(networks.text_encoders, ids)
            if empty_ids is None:
                zero_rows(cond, drop)
            error = (networks.unet(x_t, t, **cond).sample.float() - eps).square().mean(dim=(1, 2, 3))
        return (error * weight[t]).mean()

    train_averaged(networks.modules(), loss, minutes, checkpoint, learning_rate)
    return networks


def train_averaged(
    modules: Sequence[nn.Module],
    loss: Callable[[], Tensor],
    minutes: float,
    checkpoint: Path,
    learning_rate: float,
    matrices: Sequence[nn.Parameter] = (),
) -> None:
    """Minimise ``loss()`` by AdamW for so many minutes; ``modules`` end as the exponential average (0.999).

    The rate warms up in 200 steps and falls in a line. A ``checkpoint`` left by an earlier run is the start.
    It is written every 250 steps. ``matrices`` are the weights that Muon moves instead of AdamW.
    """
    if checkpoint.is_file():
        for module, state in zip(modules, torch.load(checkpoint, weights_only=True), strict=True):
            module.load_state_dict(state)
    ema = [copy.deepcopy(module) for module in modules]
    parameters = [parameter for module in modules for parameter in module.parameters()]
    by_muon = {id(matrix) for matrix in matrices}
    others = [parameter for parameter in parameters if id(parameter) not in by_muon]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.98), weight_decay=1e-3)
    ]
    if matrices:  # with updates as large as AdamW's, so that both take one learning rate
        optimizers.append(
            torch.optim.Muon(matrices, lr=learning_rate, weight_decay=1e-3, adjust_lr_fn="match_rms_adamw")
        )
    start, step, budget, running = time.time(), 0, minutes * 60, 0.0
    while (elapsed := time.time() - start) < budget:
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = learning_rate * min(1.0, (step + 1) / 200) * max(0.03, 1 - elapsed / budget)
        value = loss()
        for parameter in parameters:
            parameter.grad = None
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        decay = min(0.999, step / (step + 10))
        for averaged, module in zip(ema, modules, strict=True):
            for a, p in zip(averaged.parameters(), module.parameters(), strict=True):
                a.data.lerp_(p.data, 1 - decay)
        running += value.item()
        if step % 100 == 0:
            print(f"step {step} {elapsed:.0f}s loss {running / 100:.4f}", flush=True)
            running = 0.0
        if step % 250 == 0:
            torch.save([m.state_dict() for m in ema], checkpoint)
    for module, averaged in zip(modules, ema, strict=True):
        module.load_state_dict(averaged.state_dict())
    torch.save([m.state_dict() for m in ema], checkpoint)
    print(f"trained {step} steps", flush=True)


def zero_rows(cond: dict[str, object], drop: Tensor) -> None:
    """Replace the embeddings of dropped rows by zeros (SDXL's null prompt)."""
    keep = (~drop).float()
    states, added = cond["encoder_hidden_states"], cond["added_cond_kwargs"]
    assert isinstance(states, Tensor)
    assert isinstance(added, dict)
    cond["encoder_hidden_states"] = states * keep[:, None, None]
    added["text_embeds"] = added["text_embeds"] * keep[:, None]
