"""One step of each optimiser, beside the formula of its paper."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from diffusion_align.training.engine.config import RunConfig
from diffusion_align.training.engine.optimizer import build_optimizer

RATE, DECAY = 1e-2, 0.1


def adafactor_step(weight: Tensor, grads: list[Tensor]) -> Tensor:
    """``weight`` after Adafactor's steps (1804.04235, algorithms 4 and 5) with the rate as it is given."""
    row, column = torch.zeros(weight.shape[:-1]), torch.zeros(weight.shape[-1])
    second = torch.zeros_like(weight)
    for t, grad in enumerate(grads, start=1):
        keep = 1 - t**-0.8
        square = grad**2 + 1e-30
        if weight.ndim == 2:
            row = keep * row + (1 - keep) * square.mean(dim=1)
            column = keep * column + (1 - keep) * square.mean(dim=0)
            second = torch.outer(row, column) / row.mean()
        else:
            second = keep * second + (1 - keep) * square
        update = grad / second.sqrt()
        update = update / max(1.0, update.square().mean().sqrt().item())
        weight = weight - RATE * DECAY * weight - RATE * update
    return weight


@pytest.mark.parametrize("shape", [(5, 7), (6,)])
def test_adafactor_takes_the_published_step(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    start, grads = 0.03 * torch.randn(shape), [torch.randn(shape) for _ in range(3)]
    parameter = nn.Parameter(start.clone())
    optimizer = build_optimizer(RunConfig(optim="adafactor", learning_rate=RATE, weight_decay=DECAY), [parameter])
    for grad in grads:
        parameter.grad = grad.clone()
        optimizer.step()
    torch.testing.assert_close(parameter.detach(), adafactor_step(start, grads), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("optim", "size"), [("adafactor", 1.0), ("adafactor_scaled", 0.03)])
def test_only_the_scaled_one_multiplies_the_rate_by_the_parameter_s_size(optim: str, size: float) -> None:
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.full((8, 8), 0.03))
    before = parameter.detach().clone()
    optimizer = build_optimizer(RunConfig(optim=optim, learning_rate=RATE, weight_decay=0.0), [parameter])  # type: ignore[arg-type]
    parameter.grad = torch.randn(8, 8)
    optimizer.step()
    moved = (parameter.detach() - before).square().mean().sqrt()
    assert moved.item() == pytest.approx(RATE * size, rel=0.15)
