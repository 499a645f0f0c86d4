"""Training scorers: losses against closed forms, learning, saving, resuming, bad data."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.nn.functional import normalize
from transformers import CLIPTokenizer

from diffusion_align.data import Comparisons
from diffusion_align.evaluation.judging import evaluate_scorer
from diffusion_align.objectives.ranking import bradley_terry_loss, contrastive_loss, uncertain_difference
from diffusion_align.rewards import load_scorer
from diffusion_align.rewards.fusion import fuse
from diffusion_align.rewards.preprocess import Preprocess
from diffusion_align.rewards.published.clip import CosineScorer
from diffusion_align.rewards.trained.architectures import READERS
from diffusion_align.rewards.trained.edit import EditScore
from diffusion_align.rewards.trained.pal import PALScorer
from diffusion_align.rewards.trained.vp import VPScore
from diffusion_align.scenes.make.comparisons import preference_probability, rendered_rows
from diffusion_align.scenes.make.edits import damaged, edit_rows, sample_edit
from diffusion_align.scenes.make.pairs import encode_jpeg, judge
from diffusion_align.scenes.world.grammar import sample_prompt, sample_scene
from diffusion_align.scenes.world.oracle import score_image
from diffusion_align.scenes.world.questions import near_miss_scene
from diffusion_align.scenes.world.render import render
from diffusion_align.training.run import train
from diffusion_align.training.scorers.building import build_scorer
from diffusion_align.training.scorers.config import RewardConfig
from diffusion_align.training.scorers.job import reward_job
from tests.processes import TwoProcesses

# -- objectives -------------------------------------------------------------------------------------------------------


def test_bradley_terry_is_the_weighted_soft_cross_entropy_of_what_was_judged() -> None:
    difference = torch.tensor([2.0, -1.0, 0.3, 5.0], dtype=torch.float64)
    preferred = torch.tensor([1.0, 0.5, 0.0, torch.nan], dtype=torch.float64)
    weight = torch.tensor([1.0, 2.0, 0.5, 9.0], dtype=torch.float64)
    losses = [np.log1p(np.exp(-2.0)), 0.5 * np.log1p(np.exp(1.0)) + 0.5 * np.log1p(np.exp(-1.0)), np.log1p(np.exp(0.3))]
    expected = np.average(losses, weights=[1.0, 2.0, 0.5])
    assert float(bradley_terry_loss(difference, preferred, weight)) == pytest.approx(expected)
    assert float(bradley_terry_loss(difference[3:], preferred[3:])) == 0


@pytest.mark.parametrize(("mean", "variance"), [(0.5, 0.1), (2.0, 4.0), (-1.0, 9.0)])
def test_the_probit_form_is_the_integral(mean: float, variance: float) -> None:
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    expected = (weights / (1 + np.exp(-(mean + np.sqrt(variance) * nodes)))).sum() / weights.sum()
    logit = uncertain_difference(torch.tensor(mean), torch.tensor(variance))
    assert float(torch.sigmoid(logit)) == pytest.approx(expected, abs=0.02)


def test_the_contrastive_loss_is_that_of_clip() -> None:
    images, texts = normalize(torch.randn(3, 5), dim=-1), normalize(torch.randn(3, 5), dim=-1)
    logits = (4.0 * images @ texts.T).double().numpy()
    rows = [-np.log(np.exp(logits[i, i]) / np.exp(logits[i]).sum()) for i in range(3)]
    columns = [-np.log(np.exp(logits[i, i]) / np.exp(logits[:, i]).sum()) for i in range(3)]
    found = contrastive_loss(images, texts, torch.tensor(4.0))
    assert float(found) == pytest.approx((np.mean(rows) + np.mean(columns)) / 2, rel=1e-5)


# -- data --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_near_miss_is_one() -> None:
    rng = np.random.default_rng(0)
    for _ in range(60):
        spec = sample_prompt(rng)
        assert not score_image(render(near_miss_scene(spec, rng)), spec.text()).correct


def test_damage_costs_fidelity() -> None:
    rng = np.random.default_rng(0)
    better = 0
    for _ in range(40):
        spec = sample_prompt(rng)
        image = render(sample_scene(spec, rng))
        better += score_image(image, spec.text()).fidelity > score_image(damaged(image, rng), spec.text()).fidelity
    assert better >= 36


@pytest.mark.slow
def test_edits_follow_their_instruction_or_not() -> None:
    rng = np.random.default_rng(0)
    for _ in range(40):
        edit = sample_edit(rng)
        assert edit.right not in (edit.source, edit.wrong)
        if edit.instruction.startswith("remove"):
            shape = edit.instruction.split()[-1]
            assert shape in [o.shape for o in edit.source.objects]
            assert shape not in [o.shape for o in edit.right.objects]
            assert len(edit.right.objects) == len(edit.source.objects) - 1
        elif "background" in edit.instruction:
            assert edit.right.background == edit.instruction.split()[-1]
            assert edit.right.objects == edit.source.objects
        else:
            *_, shape, color = edit.instruction.split()
            assert [o.color for o in edit.right.objects if o.shape == shape] == [color]
    rows = edit_rows(40, 0)
    ties = [row for row in rows if row["label_0"] == 0.5]
    assert ties
    assert all({row["label_0_instruction_following"], row["label_0_visual_quality"]} == {0.0, 1.0} for row in ties)


def test_the_bayes_probability_is_the_frequency_of_the_verdicts() -> None:
    rng = np.random.default_rng(0)
    spec = sample_prompt(rng)
    scores = [score_image(render(sample_scene(spec, rng)), spec.text()) for _ in range(2)]
    verdicts = np.array([judge(scores[0], scores[1], rng).label_0 for _ in range(4000)])
    win, tie = preference_probability(scores[0], scores[1])
    assert (verdicts == 1).mean() == pytest.approx(win, abs=0.03)
    assert (verdicts == 0.5).mean() == pytest.approx(tie, abs=0.03)


@pytest.fixture(scope="module")
def renders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("renders")
    Dataset.from_list(rendered_rows(24, 1)).to_parquet(folder / "train-00000-of-00001.parquet")
    Dataset.from_list(rendered_rows(12, 2)).to_parquet(folder / "validation-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="module")
def bright(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The brighter picture is preferred by "sun", the darker one by "owl"; sources are grey."""
    folder, rng = tmp_path_factory.mktemp("bright"), np.random.default_rng(0)
    rows = []
    for i in range(120):
        levels = rng.uniform(20, 235, 2)
        files = [
            encode_jpeg(np.clip(level + rng.normal(0, 10, (64, 64, 3)), 0, 255).astype(np.uint8)) for level in levels
        ]
        brighter = float(levels[0] > levels[1])
        rows.append({
            "jpg_0": files[0], "jpg_1": files[1], "caption": "a circle", "label_0": brighter, "label_1": 1 - brighter,
            "has_label": True, "user_id": "sun", "label_0_dark": 1 - brighter,
            "label_0_instruction_following": brighter, "label_0_visual_quality": None if i % 2 else brighter,
            "source": encode_jpeg(np.full((64, 64, 3), 128, np.uint8)),
        })  # fmt: skip
    Dataset.from_list(rows[:80]).to_parquet(folder / "train-00000-of-00001.parquet")
    Dataset.from_list(rows[80:]).to_parquet(folder / "validation-00000-of-00001.parquet")
    return folder


# -- runs --------------------------------------------------------------------------------------------------------------


def config(dataset: Path, out: Path, **more: Any) -> RewardConfig:
    defaults: dict[str, Any] = {
        "dataset": str(dataset), "output_dir": str(out), "max_steps": 4, "per_device_train_batch_size": 6,
        "learning_rate": 1e-3, "report_to": "none", "progress": False, "logging_steps": 1, "dataloader_num_workers": 0,
    }  # fmt: skip
    return RewardConfig(**(defaults | more))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vp-score", "edit"])
def test_a_scorer_learns_what_is_preferred(kind: str, bright: Path, tmp_path: Path) -> None:
    short = {"max_steps": 16, "per_device_train_batch_size": 8, "learning_rate": 2e-3, "eval_steps": 16}
    result = train(config(bright, tmp_path, scorer=kind, **short))
    final = result.history[-1]
    assert final["eval/accuracy/overall"] >= 0.9
    if kind == "vp-score":  # an aspect that wants the opposite
        assert final["eval/accuracy/dark"] >= 0.9
    assert result.weights is not None
    scorer = load_scorer(result.weights)
    assert evaluate_scorer(scorer, Comparisons(bright, "validation"))["accuracy/overall"] == pytest.approx(
        final["eval/accuracy/overall"]
    )


@pytest.mark.slow
def test_clip_learns_to_match(renders: Path, tmp_path: Path) -> None:
    result = train(config(renders, tmp_path, scorer="clip", max_steps=20, per_device_train_batch_size=12))
    losses = [line["loss"] for line in result.history if "loss" in line]
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])
    scorer = load_scorer(tmp_path / "scorer")
    images = torch.rand(2, 3, 64, 64)
    assert scorer.score(images, ["a red star on a dark background"] * 2).reward.abs().max() <= 1


@pytest.mark.slow
def test_killed_and_resumed_is_bit_for_bit_one_run(renders: Path, tmp_path: Path) -> None:
    whole = train(config(renders, tmp_path / "whole", mixed_precision="bf16"))
    train(config(renders, tmp_path / "parts", max_steps=4, save_steps=2, mixed_precision="bf16"))
    checkpoint = tmp_path / "parts" / "checkpoint-00000002"
    assert checkpoint.is_dir()
    for later in (tmp_path / "parts").glob("checkpoint-00000004"):
        later.rename(tmp_path / "gone")
    resumed = train(config(renders, tmp_path / "parts", resume_from_checkpoint="latest", mixed_precision="bf16"))
    assert resumed.step == 4
    images = torch.rand(3, 3, 64, 64)
    prompts = ["a red star on a dark background"] * 3
    one, two = (load_scorer(tmp_path / name / "scorer").score(images, prompts).reward for name in ("whole", "parts"))
    assert torch.equal(one, two)
    assert whole.history[-1]["loss"] == resumed.history[-1]["loss"]


@pytest.mark.slow
def test_two_processes_train_a_scorer(renders: Path, two_processes: TwoProcesses, tmp_path: Path) -> None:
    recipe = config(renders, tmp_path / "run", architecture="objects", per_device_train_batch_size=3)
    history = two_processes.train(recipe)
    assert [line["step"] for line in history if "loss" in line] == [1, 2, 3, 4]
    assert all(np.isfinite(line["grad_norm"]) for line in history if "loss" in line)


def test_a_clip_is_trained_in_one_process(renders: Path, tmp_path: Path) -> None:
    two = SimpleNamespace(num_processes=2, process_index=0, device=torch.device("cpu"))
    with pytest.raises(ValueError, match="clip: train it in one process"):
        reward_job(config(renders, tmp_path / "run", scorer="scenes-clip"), two)  # type: ignore[arg-type]


@pytest.mark.slow
def test_training_goes_on_from_a_saved_scorer(renders: Path, tmp_path: Path) -> None:
    first = train(config(renders, tmp_path / "first"))
    settings = config(renders, tmp_path / "second", scorer=str(first.weights))
    loaded = build_scorer(settings, Comparisons(renders))
    fixed = {name.split(".")[0] for name, parameter in loaded.named_parameters() if not parameter.requires_grad}
    assert fixed == {"image_projection", "text_projection", "logit_scale"}
    contrasted = build_scorer(replace(settings, contrastive_weight=1.0), Comparisons(renders))
    assert all(parameter.requires_grad for parameter in contrasted.parameters())
    images, prompts = torch.rand(2, 3, 64, 64), ["a circle", "a star"]
    expected = load_scorer(tmp_path / "first" / "scorer").score(images, prompts).reward
    torch.testing.assert_close(loaded.eval().score(images, prompts).reward, expected)
    assert train(settings).step == 4


def test_the_recipe_and_the_plan(renders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from diffusion_align.cli import main

    assert main(["train", "reward", "--dataset", str(renders), "--dry-run"]) == 0
    assert "24 judged pairs" in capsys.readouterr().out
    assert main(["train", "reward", "--dataset", str(renders), "--scorer", "vp-skore"]) == 2
    assert "scorer = 'vp-skore': expected one of vp-score, edit, pal, clip" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("scorer", "message"), [("edit", "column 'source' is missing"), ("pal", "column 'user_id' is missing")]
)
def test_data_that_does_not_fit_is_named(scorer: str, message: str, renders: Path, tmp_path: Path) -> None:
    rows = [{k: v for k, v in row.items() if k != "user_id"} for row in rendered_rows(3, 1)]
    Dataset.from_list(rows).to_parquet(tmp_path / "train-00000-of-00001.parquet")
    with pytest.raises(ValueError, match=message):
        train(config(tmp_path, tmp_path / "out", scorer=scorer))


@pytest.mark.slow
def test_an_edit_scorer_may_start_from_a_trained_reader(
    renders: Path, tmp_path: Path, tokenizer: CLIPTokenizer
) -> None:
    rows = edit_rows(4, 3)
    Dataset.from_list(rows).to_parquet(tmp_path / "train-00000-of-00001.parquet")
    comparisons = Comparisons(str(tmp_path), "train")
    teacher = build_scorer(RewardConfig(dataset=str(renders)), Comparisons(str(renders), "train"))
    assert isinstance(teacher, VPScore)
    teacher.save_pretrained(tmp_path / "teacher")
    scorer = build_scorer(RewardConfig(scorer="edit", reader=str(tmp_path / "teacher")), comparisons)
    assert isinstance(scorer, EditScore)
    learned = teacher.reader.state_dict()
    own = scorer.reader.state_dict()
    assert own["roles"].shape[0] == 2
    for key in learned.keys() - {"roles"}:
        torch.testing.assert_close(own[key], learned[key], rtol=0, atol=0)
    scorer.save_pretrained(tmp_path / "edit")
    with pytest.raises(ValueError, match="expected a trained vp-score, found edit"):
        build_scorer(RewardConfig(scorer="edit", reader=str(tmp_path / "edit")), comparisons)


def test_a_label_out_of_range_is_named(tmp_path: Path) -> None:
    rows = rendered_rows(3, 1)
    rows[1]["label_0_fidelity"] = 3.0
    Dataset.from_list(rows).to_parquet(tmp_path / "train-00000-of-00001.parquet")
    with pytest.raises(ValueError, match=r"row 1: label_0_fidelity = 3.0 is wrong: expected a number in \[0, 1\]"):
        Comparisons(tmp_path)[1]


def test_a_saved_scorer_that_was_damaged_is_named(renders: Path, tmp_path: Path) -> None:
    folder = Path(str(train(config(renders, tmp_path, max_steps=1)).weights))
    record = json.loads((folder / "scorer.json").read_text())
    (folder / "scorer.json").write_text(json.dumps(record | {"kind": "vpp"}))
    with pytest.raises(ValueError, match="unknown kind 'vpp': expected one of edit, pal, prefpaint, vp-score"):
        load_scorer(folder)
    (folder / "scorer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"scorer.json: 'kind' is missing"):
        load_scorer(folder)


# -- scorers -----------------------------------------------------------------------------------------------------------


def test_edit_scores_say_how_sure_they_are(tokenizer: CLIPTokenizer) -> None:
    settings = json.loads(json.dumps(READERS["small"]))
    settings["text"] |= {"vocab_size": len(tokenizer), "max_position_embeddings": 64}
    scorer = EditScore(settings, tokenizer).frozen()
    images, sources = torch.rand(2, 3, 64, 64), torch.rand(2, 3, 64, 64)
    output = scorer.score(images, ["", ""], source_images=sources, instructions=["make it red"] * 2)
    assert output.std is not None
    assert (output.std > 0).all()
    torch.testing.assert_close(
        output.reward, (output.aspects["instruction_following"] + output.aspects["visual_quality"]) / 2
    )
    with pytest.raises(ValueError, match="scorer edit needs instructions: B edit instructions"):
        scorer.score(images, ["", ""], source_images=sources)


def test_fusions() -> None:
    means, stds = torch.tensor([[1.0, 4.0], [3.0, 2.0]]), torch.tensor([[3.0, 1.0], [4.0, 2.0]])
    assert [t.tolist() for t in fuse(means, stds, "sum")] == [[4.0, 6.0], [5.0, pytest.approx(5**0.5)]]
    assert fuse(means, stds, "mean")[1].tolist() == [2.5, pytest.approx(5**0.5 / 2)]
    assert [t.tolist() for t in fuse(means, stds, "min")] == [[1.0, 2.0], [3.0, 2.0]]


class Embeddings(CosineScorer):
    """Pictures of 2 x 2 pixels whose 12 values are their embedding."""

    def __init__(self) -> None:
        super().__init__("embeddings", Preprocess(2))

    def preprocess(self, images: torch.Tensor) -> torch.Tensor:
        return images[..., :2, :2]

    def encode_images(self, values: torch.Tensor) -> torch.Tensor:
        return values.flatten(1) - 0.5

    def encode_texts(self, texts: list[str]) -> torch.Tensor:
        return torch.ones(len(texts), 12)


def taste(images: torch.Tensor, user: str) -> torch.Tensor:
    """ "warm" likes the first half of the values, "cold" dislikes it."""
    value = images.flatten(1)[:, :6].mean(dim=1)
    return value if user == "warm" else -value


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["a", "b"])
def test_pal_tells_users_apart_and_meets_a_new_one(variant: Any) -> None:
    torch.manual_seed(0)
    scorer = PALScorer(Embeddings(), "embeddings", ["warm", "cold"], variant, prototypes=3, out=8)
    trained, single = scorer.head, PALScorer(Embeddings(), "embeddings", ["all"], variant, prototypes=3, out=8)
    images = torch.rand(2, 600, 3, 2, 2)
    users = ["warm" if i % 2 else "cold" for i in range(600)]
    label = torch.tensor([float(taste(a[None], u) > taste(b[None], u)) for a, b, u in zip(*images, users, strict=True)])
    for model, names in ((scorer, users), (single, ["all"] * 600)):
        model.head.train()
        optimizer = torch.optim.Adam(model.head.parameters(), lr=5e-3)
        for step in range(200):
            rows = torch.arange(step * 32 % 500, step * 32 % 500 + 64)
            batch = [names[i] for i in rows]
            outputs = [model.evaluate(side[rows], ["x"] * 64, {"users": batch}).reward for side in images]
            optimizer.zero_grad()
            bradley_terry_loss(outputs[0] - outputs[1], label[rows]).backward()
            optimizer.step()
        model.head.eval()
    test = torch.rand(2, 300, 3, 2, 2)

    def accuracy(model: PALScorer, name: str, user: str) -> float:
        with torch.no_grad():
            first, second = (model.score(side, ["x"] * 300, users=[name] * 300).reward for side in test)
        return float(((first > second) == (taste(test[0], user) > taste(test[1], user))).float().mean())

    assert min(accuracy(scorer, "warm", "warm"), accuracy(scorer, "cold", "cold")) > 0.8
    assert (accuracy(single, "all", "warm") + accuracy(single, "all", "cold")) / 2 < 0.6
    few = torch.rand(2, 20, 3, 2, 2)
    preferred = (taste(few[0], "cold") > taste(few[1], "cold")).float()
    before = {name: value.clone() for name, value in trained.state_dict().items() if name != "mixture"}
    scorer.add_user("newcomer", few[0], few[1], ["x"] * 20, preferred)
    assert accuracy(scorer, "newcomer", "cold") > 0.8
    assert all(torch.equal(value, trained.state_dict()[name]) for name, value in before.items())
    with pytest.raises(
        ValueError, match=r"unknown user 'stranger' \(of 3 known ones, e.g. 'warm'\): add a user with add_user"
    ):
        scorer.score(test[0], ["x"] * 300, users=["stranger"] * 300)
