"""Agreement: against worked examples and an independent implementation."""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np
import pytest

from diffusion_align.studio.labels.agreement import (
    cohen_kappa,
    krippendorff_alpha,
    over_prompts,
    percent_agreement,
    self_agreement,
)
from diffusion_align.studio.labels.verdicts import Verdict


def raters(*rows: str) -> list[dict[Hashable, Hashable]]:
    return [{item: answer for item, answer in enumerate(row.split()) if answer != "."} for row in rows]


#: Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011), section C: four observers, missing data.
PUBLISHED = raters(
    "1 2 3 3 2 1 4 1 2 . . .", "1 2 3 3 2 2 4 1 2 5 . 3", ". 3 3 3 2 3 4 2 2 5 1 .", "1 2 3 3 2 4 4 1 2 5 1 ."
)


def test_alpha_is_the_published_example() -> None:
    assert krippendorff_alpha(PUBLISHED) == pytest.approx(0.743, abs=5e-4)


def test_alpha_of_two_complete_raters_is_the_papers_binary_example() -> None:
    # Section A: ten units, nominal and binary, alpha = 0.095.
    found = raters("0 1 0 0 0 0 0 0 1 0", "1 1 1 0 0 1 0 0 0 0")
    assert krippendorff_alpha(found) == pytest.approx(0.095, abs=5e-4)


def test_kappa_is_a_worked_example() -> None:
    # 50 proposals: 20 both yes, 5 yes/no, 10 no/yes, 15 both no: p_o = 0.7, p_e = 0.5, kappa = 0.4.
    first = raters(" ".join(["y"] * 25 + ["n"] * 25))[0]
    second = raters(" ".join(["y"] * 20 + ["n"] * 5 + ["y"] * 10 + ["n"] * 15))[0]
    assert cohen_kappa(first, second) == pytest.approx(0.4)
    assert percent_agreement([first, second]) == pytest.approx(0.7)


def test_what_is_not_defined_is_nan() -> None:
    same = raters("y y", "y y")
    assert np.isnan(cohen_kappa(*same))
    assert np.isnan(krippendorff_alpha(same))
    assert np.isnan(percent_agreement(raters("y .", ". y")))


def test_the_interval_resamples_whole_prompts() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(2, size=40)
    found = [{item: int(truth[item] ^ (rng.random() < 0.1)) for item in range(40)} for _ in range(2)]
    one_prompt = over_prompts(found, dict.fromkeys(range(40), "p"), percent_agreement, resamples=50)
    assert one_prompt.interval == (one_prompt.value, one_prompt.value)
    each = over_prompts(found, {item: str(item) for item in range(40)}, percent_agreement, resamples=400)
    assert each.count == 40
    assert each.interval[0] < each.value < each.interval[1]
    assert each.interval[1] - each.interval[0] == pytest.approx(
        4 * np.sqrt(each.value * (1 - each.value) / 40), rel=0.25
    )


def test_agreement_with_oneself_and_with_the_left() -> None:
    def seen(unit: str, visit: int, shown: tuple[int, int], best: int) -> Verdict:
        return Verdict(f"{unit}{visit}", unit, visit, shown, "better", best, 1 - best)

    verdicts = [seen("a", 0, (0, 1), 0), seen("a", 1, (1, 0), 0), seen("b", 0, (0, 1), 0), seen("b", 1, (1, 0), 1)]
    found = self_agreement(verdicts)
    assert (found.repeats, found.agreed) == (2, 1)
    assert found.left is not None
    assert (found.left.wins, found.left.count) == (3, 4)
