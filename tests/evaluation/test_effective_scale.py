"""The scale that a guided prediction amounts to, against least squares."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffusion_align.evaluation.effective_scale import effective_scale


def predictions() -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(3, 2, 4, 4, 4, generator=torch.Generator().manual_seed(0)).unbind())


def test_classifier_free_guidance_has_its_own_scale() -> None:
    conditional, unconditional, _ = predictions()
    for scale in (0.0, 1.0, 7.5):
        found = effective_scale(unconditional + scale * (conditional - unconditional), conditional, unconditional)
        assert found.scale.tolist() == pytest.approx([scale] * 2, abs=1e-5)
        assert found.orthogonal.tolist() == pytest.approx([0.0] * 2, abs=1e-6)


def test_the_scale_is_that_of_least_squares() -> None:
    conditional, unconditional, guided = predictions()
    found = effective_scale(guided, conditional, unconditional)
    for row in range(2):
        delta = (conditional - unconditional)[row].double().flatten().numpy()
        moved = (guided - unconditional)[row].double().flatten().numpy()
        (scale,), (left,), *_ = np.linalg.lstsq(delta[:, None], moved, rcond=None)
        assert found.scale[row].item() == pytest.approx(scale, rel=1e-6)
        assert found.orthogonal[row].item() == pytest.approx(left / (moved**2).sum(), rel=1e-6)


def test_without_a_difference_there_is_no_scale() -> None:
    conditional, unconditional, _ = predictions()
    assert effective_scale(conditional, unconditional, unconditional).scale.isnan().all()
    with pytest.raises(ValueError, match="expected one shape, got"):
        effective_scale(conditional[:1], conditional, unconditional)
