"""A LoRA layer as one operation: no copies of its input, sums in place, and a backward pass of four products."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.nn.functional import linear

from diffusion_align.devices import autocast_dtype, no_autocast


class LowRankLinear(torch.autograd.Function):
    """y = x W^T + bias + scale (x A^T) B^T, with gradients for x, A and B; W and the bias are frozen."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, dtype: torch.dtype
    ) -> Tensor:
        """x (..., in), W (out, in), bias (out,), A (r, in), B (out, r); all are multiplied in ``dtype``."""
        ctx.dtypes, ctx.scale = (x.dtype, a.dtype, b.dtype), scale
        with no_autocast(x.device):
            x, weight, a, b = (tensor.to(dtype) for tensor in (x, weight, a, b))
            low = linear(x, a)
            y = linear(x, weight, None if bias is None else bias.to(dtype))
            y.view(-1, y.shape[-1]).addmm_(low.view(-1, low.shape[-1]), b.t(), alpha=scale)
        ctx.save_for_backward(x, weight, a, b, low)
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, low = ctx.saved_tensors
        x_dtype, a_dtype, b_dtype = ctx.dtypes
        grad_x = None
        grad = grad_outputs[0].flatten(0, -2)
        grad_low = linear(grad, b.t() * ctx.scale)
        grad_a = (grad_low.t() @ x.flatten(0, -2)).to(a_dtype)
        grad_b = ((low.flatten(0, -2).t() * ctx.scale) @ grad).t().to(b_dtype)
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight).addmm_(grad_low, a).view_as(x).to(x_dtype)
        return grad_x, None, None, grad_a, grad_b, None, None


class LoraLinear(Linear):
    """peft's layer, whose usual case is one operation: a frozen Linear, one adapter that is switched on, no dropout.

    Results differ from peft's in the last bits: it rounds after every product, scaling and sum. peft gives the LoRA its
    own float32 copy of the input, which autocast copies back and every layer keeps for the backward pass.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = self.plain_adapter()
        if name is None or args or kwargs:
            return super().forward(x, *args, **kwargs)
        base, a, b = self.base_layer, self.lora_A[name].weight, self.lora_B[name].weight
        dtype = autocast_dtype(x.device) or base.weight.dtype
        return LowRankLinear.apply(x, base.weight, base.bias, a, b, self.scaling[name], dtype)

    def plain_adapter(self) -> str | None:
        """The one adapter that is added to a frozen base, or None where anything else is asked for."""
        names = self.active_adapters
        if self.disable_adapters or self.merged or len(names) != 1 or names[0] not in self.lora_A:
            return None
        name: str = names[0]
        plain = (
            type(self.base_layer) is nn.Linear
            and not self.base_layer.weight.requires_grad
            and isinstance(self.lora_dropout[name], nn.Identity)
            and name not in self.lora_variant
            and self.lora_B[name].bias is None
        )
        return name if plain else None


def quicken_lora(network: nn.Module) -> None:
    """Let every LoRA of a Linear in ``network`` be one operation; peft sees its own layers."""
    for module in network.modules():
        if type(module) is Linear:
            module.__class__ = LoraLinear
