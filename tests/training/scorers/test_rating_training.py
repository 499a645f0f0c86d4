"""Training scorers on rated repaintings: data, loss, learning, saving, resuming, and the simulated raters."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from open_clip.transformer import VisionTransformer
from PIL import Image
from scipy.stats import spearmanr
from torch import Tensor

from diffusion_align.adapters import load_adapter
from diffusion_align.data import RatingExamples, Ratings, collate_ratings
from diffusion_align.evaluation.rated import compared_within, evaluate_ratings, rating_features
from diffusion_align.objectives.trust import TrustWeight
from diffusion_align.rewards import RewardOutput, load_scorer
from diffusion_align.rewards.trained.repainting import RepaintingScorer
from diffusion_align.scenes.make.ratings import CRITERIA, PER_HOLE, encode_png, rated, rating_rows, worth
from diffusion_align.scenes.world.oracle import OracleScore
from diffusion_align.training.online.trust_statistics import measure
from diffusion_align.training.run import train
from diffusion_align.training.scorers.building import build_scorer
from diffusion_align.training.scorers.config import RewardConfig
from diffusion_align.training.scorers.rating_method import RatingMethod
from diffusion_align.training.scorers.trainable import TrainableScorer

CRITERION_NAMES = ["structure", "texture", "overall"]


def bright_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Three repaintings of each hole: structure is how bright the hole's filling is, texture how dark, overall 3."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        source = rng.integers(0, 256, (64, 64, 3)).astype(np.uint8)
        mask = np.zeros((64, 64, 3), np.uint8)
        top = int(rng.integers(0, 24))
        mask[top : top + 40, 8:56] = 255
        for _ in range(3):
            level = rng.uniform(0, 1)
            image = np.where(mask > 0, np.uint8(255 * level), source)
            rows.append({
                "image": encode_png(image), "source": encode_png(source), "mask": encode_png(mask),
                "score_structure": 7 * level, "score_texture": 7 - 7 * level, "score_overall": 3.0,
            })  # fmt: skip
    return rows


def write(rows: list[dict[str, Any]], folder: Path, split: str = "train") -> Path:
    Dataset.from_list(rows).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="module")
def bright(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write(bright_rows(30, 0), tmp_path_factory.mktemp("bright"))
    return write(bright_rows(10, 1), folder, "validation")


def config(dataset: Path, out: Path, **more: Any) -> RewardConfig:
    defaults: dict[str, Any] = {
        "scorer": "prefpaint", "dataset": str(dataset), "output_dir": str(out), "max_steps": 4,
        "per_device_train_batch_size": 8, "learning_rate": 1e-3, "report_to": "none", "progress": False,
        "logging_steps": 1, "dataloader_num_workers": 0,
    }  # fmt: skip
    return RewardConfig(**(defaults | more))


def examples_of(dataset: Path) -> RatingExamples:
    return RatingExamples(Ratings(dataset), lambda pictures: pictures)


# -- data --------------------------------------------------------------------------------------------------------------


def test_ratings_are_read_and_their_holes_cut(bright: Path) -> None:
    ratings = Ratings(bright)
    assert len(ratings) == 90
    assert ratings.criteria == CRITERION_NAMES
    assert ratings.statistics()["overall"] == (3.0, 1.0)
    mean, std = ratings.statistics()["structure"]
    assert mean == pytest.approx(ratings.points[:, 0].mean())
    assert std == pytest.approx(ratings.points[:, 0].std())
    batch = collate_ratings([examples_of(bright).example(i, 0, False) for i in range(4)], [0] * 4)
    assert batch.groups[0] == batch.groups[1] == batch.groups[2] != batch.groups[3]
    hole = torch.from_numpy(np.array(Image.open(io.BytesIO(ratings[0].mask))))[..., 0] > 127
    assert float(batch.left[0][:, hole].max()) == 0
    assert torch.equal(batch.left[0][:, ~hole], batch.images[0][:, ~hole])
    torch.testing.assert_close(batch.images[0][:, hole].mean() * 7, batch.points[0, 0], atol=0.03, rtol=0)


def test_ratings_may_lie_in_a_folder_of_pictures(tmp_path: Path) -> None:
    row = bright_rows(1, 0)[0]
    for name in ("image", "source", "mask"):
        (tmp_path / f"{name}.png").write_bytes(row[name])
    line = '{"image": "image.png", "source": "source.png", "mask": "mask.png", "score_overall": 4}\n'
    (tmp_path / "metadata.jsonl").write_text(line)
    rating = Ratings(tmp_path)[0]
    assert rating.image == row["image"]
    assert rating.scores == {"overall": 4.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": None}, r"column 'mask' is missing; found image, .* rated repaintings' image, source, mask"),
        (dict.fromkeys(("score_structure", "score_texture", "score_overall")), "no column score_CRITERION"),
        ({"score_texture": 7.5}, r"row 0: score_texture = 7.5 is wrong: expected points in \[0, 7\]"),
        ({"score_texture": "good"}, r"row 0: score_texture = 'good' is wrong: expected points in \[0, 7\]"),
        ({"score_texture": float("nan")}, "row 0: score_texture = nan is wrong"),
    ],
)
def test_wrong_ratings_are_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    row = bright_rows(1, 0)[0] | change
    write([{name: value for name, value in row.items() if value is not None}], tmp_path)
    with pytest.raises(ValueError, match=message):
        train(config(tmp_path, tmp_path / "out"))


def test_a_missing_score_and_another_size_are_named(tmp_path: Path) -> None:
    rows = bright_rows(1, 0)
    rows[1]["score_overall"] = None
    with pytest.raises(ValueError, match="row 1: score_overall = None is wrong"):
        Ratings(write(rows, tmp_path))
    rows = bright_rows(1, 0)
    mask = np.zeros((32, 64, 3), np.uint8)
    mask[:16] = 255
    rows[2]["mask"] = encode_png(mask)
    with pytest.raises(ValueError, match=r"row 2: expected image, source and mask of one size, .*\(32, 64\)"):
        examples_of(write(rows, tmp_path)).example(2, 0, False)


# -- the scorer and its training ---------------------------------------------------------------------------------------


def test_the_loss_is_the_mean_squared_error_of_standardised_points(bright: Path) -> None:
    scorer = build_scorer(config(bright, Path("unused")), Ratings(bright)).eval()
    assert isinstance(scorer, RepaintingScorer)
    batch = collate_ratings([examples_of(bright).example(i, 0, False) for i in range(5)], [0] * 5)
    method = RatingMethod(TrainableScorer(scorer), CRITERION_NAMES, None, Accelerator(cpu=True))
    loss, metrics = method.loss(batch)
    with torch.no_grad():
        output = scorer.score(batch.images, [""] * 5, source_images=batch.left, masks=torch.zeros(5, 1, 64, 64))
    expected = []
    for i, name in enumerate(CRITERION_NAMES):
        mean, std = scorer.criteria[name]
        wanted = (batch.points[:, i].double() - mean) / std
        expected.append(float((output.aspects[name].double() - wanted).square().mean()))
        assert float(metrics[f"loss/{name}"]) == pytest.approx(expected[-1], rel=1e-4)
    assert loss.item() == pytest.approx(np.mean(expected), rel=1e-4)


def test_the_reward_is_the_mean_of_the_criteria_and_linear_in_its_features(bright: Path) -> None:
    scorer = build_scorer(config(bright, Path("unused")), Ratings(bright)).frozen()
    assert isinstance(scorer, RepaintingScorer)
    masks = (torch.rand(3, 1, 80, 80) > 0.5).float()
    images, sources = torch.rand(3, 3, 80, 80, requires_grad=True), torch.rand(3, 3, 80, 80)
    output = scorer.score(images, ["a"] * 3, source_images=sources, masks=masks)
    assert list(output.aspects) == CRITERION_NAMES
    torch.testing.assert_close(output.reward, torch.stack(list(output.aspects.values())).mean(dim=0))
    assert output.features is not None
    torch.testing.assert_close(output.reward, (output.features @ scorer.head.last.weight.T).mean(dim=1))
    output.reward.sum().backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0
    points = scorer.points(output.aspects)
    torch.testing.assert_close(points["overall"], output.aspects["overall"] + 3)
    unmasked = torch.where(masks > 0.5, torch.rand(3, 3, 80, 80), sources)  # what was in the hole does not matter
    torch.testing.assert_close(
        scorer.score(images, ["a"] * 3, source_images=unmasked, masks=masks).reward, output.reward
    )


@pytest.mark.slow
def test_it_learns_what_raters_like_and_is_loaded_from_its_folder(bright: Path, tmp_path: Path) -> None:
    result = train(config(bright, tmp_path, max_steps=20, per_device_train_batch_size=12, eval_steps=20))
    final = result.history[-1]
    assert final["eval/spearman/structure"] > 0.9
    assert final["eval/spearman/texture"] > 0.9
    assert final["eval/mse/structure"] < 0.3
    assert result.weights is not None
    scorer = load_scorer(result.weights)
    assert isinstance(scorer, RepaintingScorer)
    again = evaluate_ratings(scorer, Ratings(bright, "validation"))
    assert {f"eval/{name}": pytest.approx(value) for name, value in again.items()} == {
        name: value for name, value in final.items() if name.startswith("eval/")
    }
    onward = train(config(bright, tmp_path / "onward", scorer=str(result.weights), max_steps=1))
    assert onward.history[0]["loss"] < 0.5
    rows = [{name: value for name, value in row.items() if name != "score_texture"} for row in bright_rows(2, 0)]
    (tmp_path / "fewer").mkdir()
    with pytest.raises(ValueError, match="the criteria structure, overall; the scorer was trained for structure, t"):
        train(config(write(rows, tmp_path / "fewer"), tmp_path / "out", scorer=str(result.weights)))


@pytest.mark.slow
def test_killed_and_resumed_is_bit_for_bit_one_run(bright: Path, tmp_path: Path) -> None:
    whole = train(config(bright, tmp_path / "whole"))
    train(config(bright, tmp_path / "parts", save_steps=2))
    (tmp_path / "parts" / "checkpoint-00000004").rename(tmp_path / "gone")
    resumed = train(config(bright, tmp_path / "parts", resume_from_checkpoint="latest"))
    assert whole.history[-1]["loss"] == resumed.history[-1]["loss"]
    one, two = (load_scorer(tmp_path / name / "scorer").state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(value, two[name]) for name, value in one.items())


class Written:
    """A scorer whose scores (N, 3) were written down before, batch after batch."""

    criteria = dict.fromkeys(CRITERION_NAMES, (3.0, 2.0))
    preprocessing = SimpleNamespace(resize=lambda pictures: pictures)
    device = torch.device("cpu")

    def __init__(self, scores: Tensor) -> None:
        self.rest = scores

    def __call__(self, images: Tensor, prompts: list[str], context: dict[str, Any]) -> RewardOutput:
        scores, self.rest = self.rest[: len(images)], self.rest[len(images) :]
        return RewardOutput(scores.mean(dim=1), dict(zip(CRITERION_NAMES, scores.unbind(dim=1), strict=True)))


def test_the_measures_are_those_of_the_formulas(bright: Path) -> None:
    ratings = Ratings(bright, "validation")
    rng = np.random.default_rng(0)
    scores = torch.from_numpy(rng.normal(size=(len(ratings), 3))).float()
    found = evaluate_ratings(Written(scores), ratings)  # type: ignore[arg-type]
    truth, predicted = (ratings.points - 3) / 2, scores.numpy()
    assert found["mse"] == pytest.approx(np.square(truth - predicted).mean(), rel=1e-4)
    assert found["mse/texture"] == pytest.approx(np.square(truth - predicted)[:, 1].mean(), rel=1e-4)
    assert found["spearman/structure"] == pytest.approx(spearmanr(truth[:, 0], predicted[:, 0]).statistic)
    assert found["spearman/overall"] == 0  # all raters gave the same
    assert "accuracy" in found


@pytest.mark.slow
def test_trust_is_measured_on_the_ratings_themselves(bright: Path, tmp_path: Path) -> None:
    scorer = build_scorer(config(bright, Path("unused")), Ratings(bright)).frozen()
    assert isinstance(scorer, RepaintingScorer)
    ratings = Ratings(bright, "validation")
    features, errors = rating_features(scorer, ratings)
    rewards = (features @ scorer.head.last.weight.T).mean(dim=1)
    lines = np.array([scorer.criteria[name] for name in ratings.criteria])
    wanted = ((ratings.points - lines[:, 0]) / lines[:, 1]).mean(axis=1)
    np.testing.assert_allclose(errors.numpy(), np.abs(rewards.numpy() - wanted), rtol=1e-3, atol=1e-4)
    statistics = measure(scorer, str(bright))
    assert statistics.count == 90
    assert float(statistics.error_line[2]) == pytest.approx(float(errors.mean()), rel=1e-5)
    weights = TrustWeight("prefpaint", statistics)(features)
    assert ((weights >= 1) & (weights <= 2.21)).all()


def test_repaintings_are_compared_with_those_of_the_same_hole() -> None:
    groups = ["a", "b", "a", "a", "c", "b", "d", "d"]
    truth = np.array([1.0, 2.0, 2.0, 3.0, 0.0, 1.0, 5.0, 5.0])
    scores = np.array([1.0, 9.0, 3.0, 2.0, 0.0, 8.0, 1.0, 2.0])  # a: one of three pairs is wrong; b: right; d: a tie
    found = compared_within(scores, truth, groups)
    assert found == {"accuracy": pytest.approx(3 / 4), "ranking/2": 1.0, "ranking/3": 0.0}
    assert compared_within(scores[:2], truth[:2], groups[:2]) == {}
    assert compared_within(scores[6:], truth[6:], groups[6:]) == {}


def test_the_published_architecture_starts_from_a_clip(
    bright: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def create_model(model: str, pretrained: str | None) -> Any:
        asked.append((model, pretrained))
        visual = VisionTransformer(224, 32, 64, 1, 1, 4, output_dim=512)
        visual.preprocess_cfg = {"size": 224, "mean": (0.5,) * 3, "std": (0.5,) * 3}
        return SimpleNamespace(visual=visual)

    monkeypatch.setattr("open_clip.create_model", create_model)  # which would fetch OpenAI's weights
    scorer = build_scorer(config(bright, Path("unused"), architecture="clip-b32"), Ratings(bright)).eval()
    assert isinstance(scorer, RepaintingScorer)
    assert asked == [("ViT-B-32-quickgelu", "openai")]
    assert scorer.head.encoder.self_attn.num_heads == 16
    images = torch.rand(2, 3, 224, 224)
    context = {"source_images": torch.rand(2, 3, 224, 224), "masks": torch.ones(2, 1, 224, 224)}
    expected = scorer.score(images, ["", ""], **context).reward
    scorer.save_pretrained(tmp_path)
    loaded = load_scorer(tmp_path)
    assert asked[1] == ("ViT-B-32-quickgelu", None)  # nothing is fetched for weights that lie in the folder
    torch.testing.assert_close(loaded.score(images, ["", ""], **context).reward, expected)
    with pytest.raises(ValueError, match="architecture = 'tiny': expected one of small, clip-b32"):
        build_scorer(config(bright, Path("unused"), architecture="tiny"), Ratings(bright))


def test_the_plan_counts_ratings(bright: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from diffusion_align.cli import main

    assert main(["train", "reward", "--scorer", "prefpaint", "--dataset", str(bright), "--dry-run"]) == 0
    assert "90 rated repaintings" in capsys.readouterr().out


# -- the embedded world's raters ---------------------------------------------------------------------------------------


def verdict(following: float, looks: float, fidelity: float) -> OracleScore:
    return OracleScore(following, looks, fidelity, (following + looks + fidelity) / 3, following == 1, {})


def test_simulated_raters_give_whole_points_that_follow_the_oracle() -> None:
    bad, good = verdict(0.2, 0.3, 0.1), verdict(1.0, 0.9, 1.0)
    assert worth(good, "structure") == pytest.approx(1.0)
    assert worth(bad, "overall") == pytest.approx(bad.overall)
    given = [rated([bad, good], np.random.default_rng(i)) for i in range(200)]
    for name in CRITERIA:
        low, high = (np.array([points[i][f"score_{name}"] for points in given]) for i in (0, 1))
        assert set(np.unique([low, high])) <= set(range(8))
        assert low.std() > 0.3
        assert low.mean() == pytest.approx(7 * worth(bad, name), abs=0.3)
        assert (high > low).mean() > 0.98


@pytest.mark.slow
def test_three_repaintings_share_a_hole_and_keep_the_rest_of_the_picture(inpaint_folder: Path) -> None:
    adapter, prompts = (
        load_adapter(inpaint_folder),
        ["a red star on a dark background", "two small blue rings on a dark background"],
    )
    rows = rating_rows(adapter, prompts, 3)
    assert len(rows) == 2 * PER_HOLE
    for i, row in enumerate(rows):
        first = rows[i // PER_HOLE * PER_HOLE]
        assert (row["source"], row["mask"]) == (first["source"], first["mask"])
        image, source, mask = (np.array(Image.open(io.BytesIO(row[name]))) for name in ("image", "source", "mask"))
        assert set(np.unique(mask)) == {0, 255}
        assert (image[mask == 0] == source[mask == 0]).all()
        assert (image[mask > 0] != source[mask > 0]).any()
        assert all(0 <= row[f"score_{name}"] <= 7 for name in CRITERIA)
    assert rows == rating_rows(adapter, prompts, 3)
