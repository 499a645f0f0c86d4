"""LoRA as one operation: peft's results and gradients, in fewer steps; everything unusual is left to peft."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from diffusion_align.adapters import load_adapter
from diffusion_align.adapters.lora import LoraLinear, LowRankLinear, quicken_lora


def layers(rank: int = 4, alpha: int = 8, dropout: float = 0.0, bias: bool = True) -> tuple[Linear, LoraLinear]:
    """The same LoRA of a frozen Linear as peft's layer and as ours, B not zero."""
    torch.manual_seed(0)
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=["0"])
    slow = inject_adapter_in_model(config, nn.Sequential(nn.Linear(24, 40, bias=bias)))[0]
    assert type(slow) is Linear
    nn.init.normal_(slow.lora_B["default"].weight, std=0.1)
    fast = copy.deepcopy(slow)
    quicken_lora(nn.ModuleList([fast]))
    assert isinstance(fast, LoraLinear)
    return slow, fast


def run(layer: Linear, x: Tensor) -> dict[str, Tensor]:
    """Output and gradients of a loss that weighs every output differently."""
    x = x.clone().requires_grad_()
    y = layer(x)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    gradients: dict[str, Any] = {name: p.grad for name, p in layer.named_parameters() if p.requires_grad}
    return {"y": y, "x": x.grad, **gradients}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(6, 24), (2, 3, 24)])
def test_output_and_gradients_are_pefts(shape: tuple[int, ...], bias: bool) -> None:
    slow, fast = layers(bias=bias)
    x = torch.randn(shape)
    expected, found = run(slow, x), run(fast, x)
    assert set(found) == {"y", "x", "lora_A.default.weight", "lora_B.default.weight"}
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, msg=lambda text, name=name: f"{name}: {text}")


def test_gradients_are_those_of_the_formula_in_double_precision() -> None:
    torch.manual_seed(0)
    x, a, b = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 5), (2, 5), (7, 2)))
    weight, bias = torch.randn(7, 5, dtype=torch.float64), torch.randn(7, dtype=torch.float64)

    def layer(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return LowRankLinear.apply(x, weight, bias, a, b, 0.7, torch.float64)

    assert torch.autograd.gradcheck(layer, (x, a, b))
    torch.testing.assert_close(layer(x, a, b), x @ weight.t() + bias + 0.7 * x @ a.t() @ b.t())


def test_bfloat16_is_no_further_from_float32_than_pefts() -> None:
    slow, fast = layers()
    x = torch.randn(64, 24)
    exact = run(copy.deepcopy(slow), x)
    with torch.autocast("cpu", torch.bfloat16):
        theirs, ours = run(slow, x), run(fast, x)
    assert ours["y"].dtype == torch.bfloat16
    for name in exact:
        assert ours[name].dtype == theirs[name].dtype
        error, allowed = ((side[name].float() - exact[name]).norm() for side in (ours, theirs))
        assert error <= 1.1 * allowed, name


def test_weights_of_half_precision_multiply_in_it_without_autocast() -> None:
    slow, fast = layers()
    x = torch.randn(64, 24).bfloat16()
    exact = run(copy.deepcopy(slow), x.float())
    for layer in (slow, fast):
        layer.base_layer.to(torch.bfloat16)
    theirs, ours = run(slow, x), run(fast, x)
    assert ours["y"].dtype == torch.bfloat16
    for name in exact:
        assert ours[name].dtype == theirs[name].dtype
        assert (ours[name].float() - exact[name]).norm() <= 0.01 * exact[name].norm(), name


def test_layers_that_share_an_input_keep_it_once_in_bfloat16() -> None:
    def saved(layer: Linear) -> int:
        kept: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        x = torch.randn(512, 24, dtype=torch.bfloat16).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            layer(x), layer(x), layer(x)  # as q, k and v do
        return sum(kept.values())

    slow, fast = layers()
    for layer in (slow, fast):
        layer.base_layer.to(torch.bfloat16)
    assert saved(slow) - saved(fast) >= 1.9 * 512 * 24 * 2  # next to two copies of 512 x 24


def test_a_layer_whose_input_needs_no_gradient_trains() -> None:
    slow, fast = layers()
    x = torch.randn(6, 24)
    for layer in (slow, fast):
        layer(x).square().sum().backward()
    expected, found = (layer.lora_A["default"].weight.grad for layer in (slow, fast))
    assert expected is not None
    torch.testing.assert_close(found, expected)


def switched_off(layer: Linear) -> None:
    layer.enable_adapters(False)


def merged(layer: Linear) -> None:
    layer.merge()


@pytest.mark.parametrize("change", [switched_off, merged])
def test_what_is_unusual_is_pefts_bit_for_bit(change: Any) -> None:
    slow, fast = layers()
    change(slow)
    change(fast)
    x = torch.randn(6, 24, dtype=slow.base_layer.weight.dtype)
    assert torch.equal(fast(x), slow(x))


def test_dropout_is_pefts_bit_for_bit() -> None:
    slow, fast = layers(dropout=0.5)
    x = torch.randn(6, 24)
    torch.manual_seed(1)
    expected = slow(x)
    torch.manual_seed(1)
    assert torch.equal(fast(x), expected)


def test_every_linear_lora_of_a_policy_is_one_operation(sdxl_folder: Path) -> None:
    adapter = load_adapter(sdxl_folder).train_lora(rank=4)
    kinds = {type(module) for module in adapter.unet.modules() if isinstance(module, Linear)}
    assert kinds == {LoraLinear}
