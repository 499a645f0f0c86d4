"""Train scenes-flow: a rectified flow in Stable Diffusion 3's layout, on the text encoders of scenes-sdxl."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
)
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from diffusion_align.adapters.loading import LENGTH_FIELD
from diffusion_align.devices import fast_autocast

from .corpus import Corpus
from .denoiser import train_averaged
from .pipelines import cached_posterior, save_half, tokenize

#: Widths: of the image stream, of both CLIPs side by side.
WIDTH, TEXT_WIDTH = 128, 64 + 128

#: How many zeros stand where T5's tokens would, with their share of the steps. The pipeline appends them when there is
#: no T5 (256 unless told otherwise), and attention sees them: a model trained with one number needs that number.
ZERO_TOKENS = ((0, 0.67), (24, 0.3), (256, 0.03))


def build_transformer(side: int = 16, channels: int = 4) -> SD3Transformer2DModel:
    """SD3's transformer: 6 blocks of 128, patches of 2 x 2, so that 16 x 16 latents are 64 tokens.

    It starts as SD3 and DiT do (2212.09748): modulations and the last layer are zero, so each block starts as the
    identity.
    """
    network = SD3Transformer2DModel(
        sample_size=side,
        patch_size=2,
        in_channels=channels,
        out_channels=channels,
        num_layers=6,
        attention_head_dim=32,
        num_attention_heads=WIDTH // 32,
        joint_attention_dim=TEXT_WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        pos_embed_max_size=side // 2,
        qk_norm="rms_norm",
    )
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
            if name.endswith((".norm1.linear", ".norm1_context.linear", "norm_out.linear", "proj_out")):
                nn.init.zeros_(module.weight)
    return network


def block_matrices(network: nn.Module) -> list[nn.Parameter]:
    """What Muon moves (kellerjordan.github.io/posts/muon): the blocks' matrices, without those that make modulations.

    300 steps from one checkpoint with the same draws ended at a loss of 0.2590, with AdamW at 0.2605.
    """
    return [
        parameter
        for name, parameter in network.named_parameters()
        if "transformer_blocks" in name and parameter.ndim == 2 and "norm" not in name
    ]


def with_projection(encoder: CLIPTextModel) -> CLIPTextModelWithProjection:
    """The same text encoder with the projection that SD3's pooled embedding goes through: the identity."""
    projected = CLIPTextModelWithProjection(encoder.config)
    projected.text_model.load_state_dict(encoder.state_dict())
    with torch.no_grad():
        projected.text_projection.weight.copy_(torch.eye(encoder.config.projection_dim))
    return projected


@torch.no_grad()
def text_features(encoders: list[CLIPTextModelWithProjection], ids: Tensor) -> tuple[Tensor, Tensor]:
    """States (N, L, 192) before the last layer and pooled embeddings (N, 192) of both encoders, side by side, fp16."""
    states, pooled = [], []
    for rows in ids.split(256):
        found = [encoder(rows, output_hidden_states=True) for encoder in encoders]
        states.append(torch.cat([one.hidden_states[-2] for one in found], dim=-1).half())
        pooled.append(torch.cat([one.text_embeds for one in found], dim=-1).half())
    return torch.cat(states), torch.cat(pooled)


def train_flow(corpus: Corpus, work: Path, out: Path, sdxl: Path, minutes: float) -> None:
    """scenes-flow: the mean squared error of v = eps - x0 at sigma = sigmoid(n), n normal (2403.03206, eq. 19).

    The autoencoder is scenes-sdxl's, with the shift and scale that make its latents standard. Text encoders stay as
    they are. 10% of the captions become the empty prompt, which is the pipeline's null prompt.
    """
    source = StableDiffusionXLPipeline.from_pretrained(sdxl, torch_dtype=torch.float32)
    vae = AutoencoderKL.from_config(source.vae.config)
    vae.load_state_dict(source.vae.state_dict())
    posterior = cached_posterior(vae, corpus, work)
    means = posterior[:2048, :4].float()
    shift, scale = round(float(means.mean()), 5), round(float(1 / means.std()), 5)
    vae.register_to_config(shift_factor=shift, scaling_factor=scale)

    encoders = [with_projection(source.text_encoder), source.text_encoder_2]
    place = {caption: row for row, caption in enumerate(dict.fromkeys([*corpus.captions, ""]))}
    states, pooled = text_features(encoders, tokenize(source.tokenizer, list(place)))
    caption_rows, empty = torch.tensor([place[caption] for caption in corpus.captions]), place[""]

    torch.manual_seed(0)
    network = build_transformer()
    lengths = torch.tensor([length for length, _ in ZERO_TOKENS])
    shares = torch.tensor([share for _, share in ZERO_TOKENS])

    def loss(batch_size: int = 64) -> Tensor:
        rows = torch.randint(len(posterior), (batch_size,))
        mean, std = posterior[rows].float().chunk(2, dim=1)
        x0 = (mean + std * torch.randn_like(mean) - shift) * scale
        text = torch.where(torch.rand(batch_size) < 0.1, empty, caption_rows[rows])
        zeros = int(lengths[torch.multinomial(shares, 1)])
        context = nn.functional.pad(states[text].float(), (0, 0, 0, zeros))
        sigma = torch.randn(batch_size).sigmoid()
        eps, at = torch.randn_like(x0), sigma[:, None, None, None]
        # Torch's fused attention is slow backwards on a CPU; over a few tokens its plain one takes a fifth less.
        with fast_autocast("cpu"), sdpa_kernel(SDPBackend.MATH if zeros < 100 else SDPBackend.FLASH_ATTENTION):
            v = network((1 - at) * x0 + at * eps, context, pooled[text].float(), 1000 * sigma).sample
        return (v.float() - (eps - x0)).square().mean()

    checkpoint = work / "flow.pt"
    rate = 1e-3 if checkpoint.is_file() else 1.5e-3  # what was averaged already is not to be shaken up again
    train_averaged([network], loss, minutes, checkpoint, rate, block_matrices(network))
    pipeline = StableDiffusion3Pipeline(
        network,
        FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae,
        encoders[0],
        source.tokenizer,
        encoders[1],
        source.tokenizer,
        None,
        None,
    )
    pipeline.register_to_config(**{LENGTH_FIELD: 0})
    save_half(pipeline, out)
