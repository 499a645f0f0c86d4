"""What scenes-flow starts from."""

from __future__ import annotations

import torch
from transformers import CLIPTextModel

from diffusion_align.scenes.pretrain.flow import build_transformer, text_features, with_projection
from diffusion_align.shipped import shipped_path


@torch.no_grad()
def test_the_text_encoder_with_a_projection_says_what_it_said() -> None:
    plain = CLIPTextModel.from_pretrained(shipped_path("scenes-sdxl") / "text_encoder", dtype=torch.float32)
    ids = torch.arange(48).reshape(2, 24)
    before, after = plain(ids, output_hidden_states=True), with_projection(plain)(ids, output_hidden_states=True)
    assert torch.equal(after.hidden_states[-2], before.hidden_states[-2])
    assert torch.equal(after.text_embeds, before.pooler_output)
    states, pooled = text_features([with_projection(plain)], ids)
    assert torch.equal(states, before.hidden_states[-2].half())
    assert torch.equal(pooled, before.pooler_output.half())


@torch.no_grad()
def test_the_transformer_starts_as_zero_whatever_it_is_given() -> None:
    network = build_transformer()
    x, text = torch.randn(2, 4, 16, 16), torch.randn(2, 24, 192)
    assert network(x, text, torch.randn(2, 192), torch.tensor([300.0, 700.0])).sample.abs().max() == 0
