"""Training latent evaluators: they learn, are standardised, resume bit for bit, and refuse data that does not fit."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

from diffusion_align.adapters import load_adapter
from diffusion_align.data import Comparisons
from diffusion_align.guidance.judges.evaluator import BINS, HIGH, LOW, load_evaluator
from diffusion_align.process import log_snr
from diffusion_align.training.evaluators.config import EvaluatorConfig
from diffusion_align.training.evaluators.noisy_pairs import EncodedPairs, collate_noisy, noised, seeded_batches
from diffusion_align.training.run import train
from tests.brightness import Brightness


def picture(level: float, rng: np.random.Generator) -> bytes:
    """A plain grey picture with a little grain."""
    pixels = np.clip(level + rng.normal(0, 8, (64, 64, 3)), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def grey(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The brighter picture is preferred, and fits "light" better; the darker one fits "dark".

    Fifty steps teach brightness, but not the two words: only the preference is asserted below.
    """
    folder, rng = tmp_path_factory.mktemp("grey"), np.random.default_rng(0)
    for split, count in (("train", 64), ("validation", 24)):
        rows = []
        for _ in range(count):
            levels, prompt = rng.uniform(20, 235, 2), str(rng.choice(["a light square", "a dark square"]))
            bright = float(levels[0] > levels[1])
            fits = bright if "light" in prompt else 1 - bright
            rows.append(
                {"jpg_0": picture(levels[0], rng), "jpg_1": picture(levels[1], rng), "caption": prompt,
                 "label_0": bright, "label_1": 1 - bright, "label_0_prompt_following": fits}
            )  # fmt: skip
        Dataset.from_list(rows).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


def config(grey: Path, out: Path, model: Path, **options: Any) -> EvaluatorConfig:
    defaults: dict[str, Any] = {
        "model": str(model), "dataset": str(grey), "real_dataset": str(grey), "output_dir": str(out), "max_steps": 50,
        "per_device_train_batch_size": 16, "learning_rate": 6e-3, "width": 8, "features": 16, "eval_steps": 50,
        "report_to": "none", "progress": False, "lr_scheduler_type": "constant", "warmup_steps": 0,
    }  # fmt: skip
    return EvaluatorConfig(**defaults | options)


@pytest.mark.slow
def test_it_learns_what_is_preferred_and_is_standardised(grey: Path, sdxl_folder: Path, tmp_path: Path) -> None:
    result = train(config(grey, tmp_path, sdxl_folder))
    last = [line for line in result.history if "eval/accuracy/preference/clean" in line][-1]
    assert last["eval/accuracy/preference/clean"] > 0.8
    assert result.weights is not None
    evaluator = load_evaluator(result.weights)
    adapter = load_adapter(sdxl_folder)
    held_out = EncodedPairs(adapter, Comparisons(str(grey), "validation"))
    clean = torch.stack([latents for latents in held_out.latents if latents is not None]).float().flatten(0, 1)
    prompts = [held_out.comparisons[i // 2].prompt for i in range(len(clean))]
    level = torch.tensor(LOW + 10.5 * (HIGH - LOW) / BINS)
    alpha_bar = torch.sigmoid(level)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    x_t = alpha_bar.sqrt() * clean + (1 - alpha_bar).sqrt() * noise
    scores = evaluator.scores(x_t, level.expand(len(x_t)), adapter.encode_prompts(prompts), torch.ones(len(x_t)))
    assert set(scores) == {"alignment", "fidelity", "preference"}
    for kind, values in scores.items():
        assert abs(float(values.mean())) < 0.5, kind
        assert 0.5 < float(values.std()) < 1.6, kind


@pytest.mark.slow
def test_killed_and_resumed_it_is_one_run(grey: Path, sdxl_folder: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"eval_steps": 0, "per_device_train_batch_size": 8, "max_pairs": 20}
    whole = train(config(grey, tmp_path / "whole", sdxl_folder, max_steps=6, **options))
    train(config(grey, tmp_path / "parts", sdxl_folder, max_steps=3, **options))
    parts = train(
        config(grey, tmp_path / "parts", sdxl_folder, max_steps=6, resume_from_checkpoint="latest", **options)
    )
    assert whole.weights is not None
    assert parts.weights is not None
    expected = load_evaluator(whole.weights).state_dict()
    for name, value in load_evaluator(parts.weights).state_dict().items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.slow
def test_both_pictures_of_a_pair_meet_the_same_noise(grey: Path, sdxl_folder: Path) -> None:
    adapter = load_adapter(sdxl_folder)
    examples = EncodedPairs(adapter, Comparisons(str(grey), "validation"))
    batch = next(seeded_batches(examples, adapter.path, 8))
    alpha_bar = adapter.path.at(batch.t).alpha_sq
    left = noised(adapter, batch) - alpha_bar.sqrt() * batch.pairs.images
    torch.testing.assert_close(left[0], left[1], rtol=0, atol=1e-5)
    torch.testing.assert_close(left[0], (1 - alpha_bar).sqrt() * batch.noise, rtol=0, atol=1e-5)
    rows = [examples.example(0, 0, False)]
    straight, exchanged = (collate_noisy(adapter.path, rows, [seed]) for seed in (4, 5))
    assert torch.equal(straight.pairs.images[0], exchanged.pairs.images[1])
    assert float(straight.pairs.labels[0, 0]) == 1 - float(exchanged.pairs.labels[0, 0])
    assert float(log_snr(alpha_bar.flatten()[0])) < 10


@pytest.mark.slow
def test_the_task_kind_predicts_a_scorer(grey: Path, tmp_path: Path) -> None:
    made = config(grey, tmp_path, Path("scenes-sdxl"), kinds=("task",), real_dataset=None)
    history = train(made, scorer=Brightness()).history
    losses = [line["loss/task"] for line in history if "loss/task" in line]
    assert losses[-1] < losses[0]
    assert history[-1]["eval/accuracy/task/clean"] > 0.7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"real_dataset": None}, "give real_dataset"),
        ({"kinds": ("task",)}, "kind task predicts the reward of a scorer"),
        ({"teacher": "scenes-oracle"}, "kind task predicts the reward of a scorer"),
    ],
)
def test_what_is_missing_is_named(
    options: dict[str, Any], message: str, grey: Path, sdxl_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        train(config(grey, tmp_path, sdxl_folder, **options))


@pytest.mark.slow
def test_pictures_that_cannot_be_read_are_skipped_up_to_a_limit(grey: Path, sdxl_folder: Path, tmp_path: Path) -> None:
    rows = Dataset.from_parquet(str(next(grey.glob("train*")))).to_list()
    rows[3]["jpg_1"] = rows[3]["jpg_1"][:100]
    for split in ("train", "validation"):
        Dataset.from_list(rows[:16]).to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
    options: dict[str, Any] = {"max_steps": 4, "per_device_train_batch_size": 8, "eval_steps": 0}
    assert train(config(tmp_path, tmp_path / "out", sdxl_folder, **options)).step == 4
    with pytest.raises(ValueError, match="row 3"):
        train(config(tmp_path, tmp_path / "other", sdxl_folder, max_corrupt=0, **options))


@pytest.mark.slow
def test_value_learns_which_scale_suits_which_prompt(sdxl_folder: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    for split, count in (("train", 64), ("validation", 32)):
        rows = []
        for i in range(count):
            prompt = ("a light square", "a dark square")[i % 2]
            low = float(rng.random() < 0.5)  # light squares want the low scale, whatever the pictures show
            scales = (2.0, 8.0) if low else (8.0, 2.0)
            label = low if "light" in prompt else 1 - low
            rows.append(
                {"jpg_0": picture(rng.uniform(20, 235), rng), "jpg_1": picture(rng.uniform(20, 235), rng),
                 "caption": prompt, "label_0": label, "label_1": 1 - label, "scale_0": scales[0], "scale_1": scales[1]}
            )  # fmt: skip
        Dataset.from_list(rows).to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
    options: dict[str, Any] = {"kinds": ("value",), "real_dataset": None, "learning_rate": 1e-2, "scale_penalty": 0.0}
    result = train(config(tmp_path, tmp_path / "run", sdxl_folder, **options))
    last = [line for line in result.history if "eval/accuracy/value/noisy" in line][-1]
    assert last["eval/accuracy/value/noisy"] > 0.9
    assert last["eval/accuracy/value/clean"] > 0.9
    assert result.weights is not None
    evaluator, adapter = load_evaluator(result.weights), load_adapter(sdxl_folder)
    prompts = ["a light square"] * 2 + ["a dark square"] * 2
    noise, scales = torch.randn(1, 4, 16, 16).expand(4, -1, -1, -1), torch.tensor([2.0, 8.0] * 2)
    scores = evaluator.scores(noise, torch.full((4,), -5.0), adapter.encode_prompts(prompts), scales)["value"]
    assert scores[0] > scores[1]
    assert scores[2] < scores[3]
    level, read = torch.full((4,), -5.0), evaluator.read(adapter.encode_prompts(prompts), prompts)
    judged = [evaluator.judge(torch.randn(4, 4, 16, 16), level, read, scales)["value"] for _ in range(2)]
    assert judged[0][0] > judged[0][1]
    assert judged[0][2] < judged[0][3]
    torch.testing.assert_close(judged[0], judged[1])  # of candidates only the scale counts


@pytest.mark.slow
def test_value_needs_the_scales(grey: Path, sdxl_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="columns scale_0 and scale_1 are missing"):
        train(config(grey, tmp_path, sdxl_folder, kinds=("value",), real_dataset=None))


@pytest.mark.slow
def test_towers_of_another_evaluator_stay_as_they_are(grey: Path, sdxl_folder: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "real_dataset": None, "max_steps": 2, "eval_steps": 0, "per_device_train_batch_size": 8, "max_pairs": 20,
    }  # fmt: skip
    first = train(config(grey, tmp_path / "first", sdxl_folder, kinds=("alignment",), **options))
    assert first.weights is not None
    given = {"kinds": ("preference",), "towers": str(first.weights), **options}
    second = train(config(grey, tmp_path / "second", sdxl_folder, **given))
    assert second.weights is not None
    towers, taken = load_evaluator(first.weights), load_evaluator(second.weights)
    for name in ("picture", "prompt"):
        expected = getattr(towers, name).state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in getattr(taken, name).state_dict().items())
    with pytest.raises(ValueError, match=r"towers = .*first.*: is of EvaluatorSettings"):
        train(config(grey, tmp_path / "third", sdxl_folder, **given | {"width": 16}))
