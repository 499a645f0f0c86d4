"""The protocol, the factory and the combinators."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_align.rewards import (
    Cached,
    Calibrated,
    Ensemble,
    RewardOutput,
    RewardScorer,
    Weighted,
    load_scorer,
    score_in_batches,
)
from diffusion_align.rewards.combine import standardised_by_prompt
from diffusion_align.rewards.weights import load_exactly, read_weights


class Brightness(RewardScorer):
    """Mean brightness times ``scale``; counts its calls."""

    name = "brightness"
    differentiable = True

    def __init__(self, scale: float = 1.0, offset: float = 0.0) -> None:
        super().__init__()
        self.scale, self.offset, self.scored = scale, offset, 0

    def evaluate(self, images: torch.Tensor, prompts: list[str], context: dict[str, Any]) -> RewardOutput:
        self.scored += len(images)
        return RewardOutput(self.scale * images.mean(dim=(1, 2, 3)) + self.offset)


class Darkness(Brightness):
    name = "darkness"
    higher_is_better = False


class NeedsMasks(Brightness):
    name = "needs-masks"
    needs = frozenset({"masks"})


def pictures(count: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "prompts", "message"),
    [
        (torch.rand(3, 8, 8), ["a"], r"brightness: images: expected shape \(B, 3, H, W\), found \(3, 8, 8\)"),
        (torch.rand(2, 3, 8, 8) * 2 - 1, ["a", "b"], r"expected values in \[0, 1\], found \[-"),
        (torch.full((1, 3, 8, 8), torch.nan), ["a"], r"expected values in \[0, 1\], found \[nan"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), ["a"], "found torch.uint8; divide uint8 by 255"),
        (torch.rand(2, 3, 8, 8), ["a"], "brightness: 2 images but 1 prompts"),
        (torch.rand(1, 3, 8, 8), "a", "prompts is one string"),
        ([], [], "found nothing"),
        (["a.png"], ["a"], "or PIL pictures, found str"),
    ],
)
def test_bad_images_are_named(images: Any, prompts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Brightness().score(images, prompts)


def test_missing_context_is_named() -> None:
    with pytest.raises(ValueError, match=r"scorer needs-masks needs masks: \(B, 1, H, W\)"):
        NeedsMasks().score(pictures(), ["a"] * 4)
    with pytest.raises(ValueError, match="needs-masks: 4 images but 2 masks"):
        NeedsMasks().score(pictures(), ["a"] * 4, masks=torch.zeros(2, 1, 8, 8))


def test_different_sizes_need_a_scorer_that_resizes() -> None:
    mixed = [Image.new("RGB", (8, 8)), Image.new("RGB", (9, 8))]
    with pytest.raises(ValueError, match="brightness: images of different sizes"):
        Brightness().score(mixed, ["a", "b"])


def test_an_unknown_scorer_lists_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match=r"unknown scorer 'pikscore' \(did you mean 'pickscore'\?\): known scorers are aes"
    ):
        load_scorer("pikscore")


def test_an_unknown_option_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"scorer hps-v2.1 has no option 'arch': expected antialias, checkpoint, model"
    ):
        load_scorer("hps-v2.1", arch="ViT-H-14")


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere.pt: no such file; expected HPS_v2.1_compressed.pt of xswu"):
        load_scorer("hps-v2.1", str(tmp_path / "nowhere.pt"))


def test_offline_without_the_weights_says_where_they_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        FileNotFoundError, match=r"HPS_v2_compressed.pt is not in the local cache and cannot be fetched from xswu/HPSv2"
    ):
        load_scorer("hps-v2")


def test_wrong_keys_are_counted_and_named(tmp_path: Path) -> None:
    module = torch.nn.Linear(2, 3)
    with pytest.raises(
        ValueError, match=r"x.pt does not fit Linear: 1 missing \(first: bias\); 1 unexpected \(first: c\)"
    ):
        load_exactly(module, {"weight": torch.zeros(3, 2), "c": torch.zeros(1)}, "x.pt")
    with pytest.raises(ValueError, match=r"of another shape \(first: weight \(2, 2\) instead of \(3, 2\)\)"):
        load_exactly(module, {"weight": torch.zeros(2, 2), "bias": torch.zeros(3)}, "x.pt")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_torn_checkpoint_is_named(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"torn{suffix}"
    path.write_bytes(b"\x50\x4b\x03\x04 half a file")
    with pytest.raises(ValueError, match=f"torn{suffix} cannot be read"):
        read_weights(path)


def test_a_pickle_with_code_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "evil.pt"
    torch.save({"weight": Path("/")}, path)
    with pytest.raises(ValueError, match=r"evil.pt cannot be read"):
        read_weights(path)


# -- plug-ins ----------------------------------------------------------------------------------------------------------


def test_an_installed_plugin_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plugin_brightness.py").write_text(
        "from tests.rewards.test_scorer_protocol import Brightness\n"
        "def load(name, checkpoint=None, scale=1.0):\n    return Brightness(scale)\n"
    )
    info = tmp_path / "plugin_brightness-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin-brightness\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[diffusion_align.rewards]\nmy-brightness = plugin_brightness:load\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    images = pictures()
    reward = load_scorer("my-brightness", scale=2.0).score(images, ["a"] * 4).reward
    torch.testing.assert_close(reward, 2 * images.mean(dim=(1, 2, 3)))


# -- combinators -------------------------------------------------------------------------------------------------------


def test_gradients_are_off_for_scorers_that_have_none() -> None:
    scorer = Brightness()
    images = pictures().requires_grad_()
    assert scorer.score(images, ["a"] * 4).reward.requires_grad
    scorer.differentiable = False
    assert not scorer.score(images, ["a"] * 4).reward.requires_grad


def test_batches_give_the_scores_of_one_batch() -> None:
    images = pictures(7)
    whole = Brightness().score(images, ["a"] * 7).reward
    torch.testing.assert_close(score_in_batches(Brightness(), images, ["a"] * 7, batch_size=3).reward, whole)


def test_running_standardisation_is_that_of_all_rewards_seen() -> None:
    ensemble = Ensemble([Brightness(3.0, 5.0), Brightness(-1.0)], how="mean", standardise="running")
    first, second = pictures(5, 1), pictures(9, 2)
    ensemble.score(first, ["a"] * 5)
    found = ensemble.score(second, ["a"] * 9)
    seen = torch.cat([first, second]).mean(dim=(1, 2, 3)).double()
    z = (second.mean(dim=(1, 2, 3)) - seen.mean()) / seen.std(unbiased=False)
    torch.testing.assert_close(found.reward, torch.zeros(9), atol=1e-4, rtol=0)  # z and -z
    torch.testing.assert_close(found.std, z.abs().float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("how", "weight", "expected"),
    [
        ("mean", 0.5, 2.0),
        ("median", 0.5, 1.0),
        ("min", 0.5, 0.0),
        ("quantile", 0.25, 0.5),
        ("mean-std", 0.5, 2 - 7 / 3),
    ],
)
def test_merging(how: Any, weight: float, expected: float) -> None:
    members = [Brightness(0.0, value) for value in (0.0, 1.0, 5.0)]
    ensemble = Ensemble(members, how, weight, standardise="none")
    output = ensemble.score(pictures(2), ["a", "b"])
    assert output.reward.tolist() == pytest.approx([expected] * 2)
    assert output.std is not None
    assert output.std.tolist() == pytest.approx([np.std([0, 1, 5])] * 2)


def test_a_scorer_where_less_is_more_is_turned() -> None:
    images = pictures()
    output = Ensemble([Darkness()], standardise="none").score(images, ["a"] * 4)
    torch.testing.assert_close(output.reward, -images.mean(dim=(1, 2, 3)))


def test_prompts_are_standardised_among_themselves() -> None:
    rewards = torch.tensor([1.0, 10.0, 3.0, 30.0, 7.0])
    found = standardised_by_prompt(rewards, ["a", "b", "a", "b", "c"])
    torch.testing.assert_close(found, torch.tensor([-1.0, -1.0, 1.0, 1.0, 0.0]))


def test_weighted_sums_and_names_its_parts() -> None:
    images = pictures()
    bright = images.mean(dim=(1, 2, 3))
    scorer = Weighted({"light": (Brightness(), 2.0), "dark": (Darkness(), 0.5)}, standardise=False)
    output = scorer.score(images, ["a"] * 4)
    torch.testing.assert_close(output.reward, 1.5 * bright)
    torch.testing.assert_close(output.aspects["light"], bright)


def test_calibration_finds_the_temperature() -> None:
    rng = torch.Generator().manual_seed(0)
    differences = torch.randn(20_000, generator=rng, dtype=torch.float64)
    labels = (torch.rand(20_000, generator=rng, dtype=torch.float64) < torch.sigmoid(differences / 0.4)).double()
    scorer = Calibrated(Brightness()).fit(differences, labels)
    images = pictures()
    assert float(scorer.temperature) == pytest.approx(0.4, rel=0.03)  # type: ignore[arg-type]
    expected = images.mean(dim=(1, 2, 3)) / float(scorer.temperature)  # type: ignore[arg-type]
    torch.testing.assert_close(scorer.score(images, ["a"] * 4).reward, expected)


def test_the_cache_scores_each_picture_once() -> None:
    member = Brightness()
    cached = Cached(member)
    images = pictures()
    doubled = torch.cat([images, images[:2]])
    first = cached.score(doubled, ["a"] * 6).reward
    torch.testing.assert_close(first, doubled.mean(dim=(1, 2, 3)))
    assert member.scored == 4
    cached.score(images, ["a"] * 4)
    assert member.scored == 4
    cached.score(images, ["b"] * 4)  # another prompt is another question
    assert member.scored == 8


def test_combined_scorers_hand_pictures_of_any_sizes_on() -> None:
    class Resizing(Brightness):
        def preprocess(self, images: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.interpolate(images, size=(4, 4))

    mixed = [Image.new("RGB", (8, 8), "white"), Image.new("RGB", (9, 5)), Image.new("RGB", (3, 7), "white")]
    for scorer in (Cached(Resizing()), Ensemble([Resizing(), Resizing()], standardise="none")):
        assert scorer.score(mixed, ["a", "b", "c"]).reward.tolist() == [1, 0, 1]
