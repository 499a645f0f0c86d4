"""Judges that are vision-language models, on tiny ones of two architectures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoProcessor

from diffusion_align.rewards import load_scorer
from diffusion_align.rewards.published.vision_language import Conversation, UnreadableAnswerError, read_score
from diffusion_align.rewards.watched import ScorerError, WatchedScorer
from tests.rewards.vision_language_models import Llava, Qwen, chat

PROMPTS = ["a red star", "two small blue rings on a dark background", "a cat"]


@pytest.fixture(scope="module", params=[Llava, Qwen], ids=["llava", "qwen2.5-vl"])
def made(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Any]:
    """The architecture, its folder and its model."""
    folder = tmp_path_factory.mktemp("model")
    return request.param, folder, request.param.save(folder)


def pictures() -> torch.Tensor:
    return torch.rand(3, 3, 60, 90, generator=torch.Generator().manual_seed(1))


@pytest.mark.slow
@torch.no_grad()
def test_vqascore_is_the_probability_of_yes(made: tuple[Any, Path, Any]) -> None:
    kind, folder, model = made
    output = load_scorer("vqascore", str(folder)).score(pictures(), PROMPTS)
    relative = load_scorer("vqascore", str(folder), relative=True).score(pictures(), PROMPTS)
    tokenizer = AutoProcessor.from_pretrained(folder).tokenizer
    yes, no = tokenizer.convert_tokens_to_ids(["Yes", "No"])
    alone = [
        kind.logits(folder, model, picture, f'Does this figure show "{prompt}"? Please answer yes or no.')
        for picture, prompt in zip(pictures(), PROMPTS, strict=True)
    ]
    chances = torch.stack([logits.exp() / logits.exp().sum() for logits in alone])
    torch.testing.assert_close(output.reward, chances[:, yes], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(output.aspects["no"], chances[:, no], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(relative.reward, chances[:, yes] / chances[:, [yes, no]].sum(dim=1), rtol=1e-4, atol=0)
    turned = load_scorer("vqascore", str(folder)).score(pictures().roll(1, dims=0), PROMPTS)
    assert ((turned.reward / output.reward).log().abs() > 1e-3).all()  # it depends on what is shown


def test_answers_that_are_no_tokens_are_named(made: tuple[Any, Path, Any]) -> None:
    _, folder, _ = made
    with pytest.raises(ValueError, match=r"the tokenizer reads 'Nope' as \['No', 'p', 'e'\]; expected one known token"):
        load_scorer("vqascore", str(folder), answers=("Yes", "Nope"))
    with pytest.raises(ValueError, match="are the same token"):
        load_scorer("vqascore", str(folder), answers=("Yes", "Yes"))
    with pytest.raises(ValueError, match=r"expected \{text_prompt\} once"):
        load_scorer("vqascore", str(folder), question="Is this good?")


def test_what_is_no_judge_is_refused(tmp_path: Path) -> None:
    Llava.save(tmp_path / "mute")
    (tmp_path / "mute" / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="LlavaProcessor has no chat template: give chat_template=, a Jinja file"):
        load_scorer("vqascore", str(tmp_path / "mute"))
    (tmp_path / "chat.jinja").write_text(chat("<image>"))
    judge = load_scorer("vqascore", str(tmp_path / "mute"), chat_template=str(tmp_path / "chat.jinja"))
    assert 0 < judge.score(pictures(), PROMPTS).reward.max() < 1
    with pytest.raises(ValueError, match="holds '<image>', the model's mark for a picture"):
        judge.score(pictures(), ["an <image> of a cat", "a", "b"])
    whole = judge.conversation.model
    whole.config.is_encoder_decoder = True
    with pytest.raises(ValueError, match="LlavaForConditionalGeneration is an encoder with a decoder"):
        Conversation("vqascore", whole, judge.conversation.processor)
    with pytest.raises(ValueError, match="CLIPImageProcessor does not read pictures and text"):
        Conversation("vqascore", whole, judge.conversation.processor.image_processor)
    with pytest.raises(FileNotFoundError, match=r"nobody/nothing is not in the local cache .*hf download"):
        load_scorer("vqascore", "nobody/nothing")


@torch.no_grad()
def test_unified_reward_reads_what_the_model_writes(made: tuple[Any, Path, Any], tmp_path: Path) -> None:
    kind, folder, model = made
    template = tmp_path / "template.txt"
    template.write_text("Score it.\nCaption: [{text_prompt}]")
    scorer = load_scorer("unified-reward", str(folder), template=str(template), longest=3)
    tokenizer = AutoProcessor.from_pretrained(folder).tokenizer
    question = f"Score it.\nCaption: [{PROMPTS[0]}]"
    first = int(kind.logits(folder, model, pictures()[0], question).argmax())
    written = scorer.conversation.answer(pictures()[0], question, 1)
    assert written == tokenizer.decode([first], skip_special_tokens=True)
    with pytest.raises(
        UnreadableAnswerError, match=r"prompt 'a red star': expected one line 'Final Score: X', found 0"
    ):
        scorer.score(pictures(), PROMPTS)
    with pytest.raises(ScorerError, match="scorer unified-reward failed: UnreadableAnswerError"):
        WatchedScorer(scorer, 0, tmp_path)(pictures(), PROMPTS)
    assert (tmp_path / "failed_batch.safetensors").is_file()


def test_scores_of_version_2_are_aspects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Llava.save(tmp_path)
    (tmp_path / "template.txt").write_text("{text_prompt}")
    scorer = load_scorer("unified-reward-2", str(tmp_path), template=str(tmp_path / "template.txt"))
    answers = iter(
        f"Alignment Score (1-5): {a}\nCoherence Score (1-5): {b}\nStyle Score (1-5): {c}\n"
        for a, b, c in ((2.5, 3, 4.25), (1, 1, 1), (5, 4.0, 3))
    )
    monkeypatch.setattr(scorer.conversation, "answer", lambda *given: next(answers))
    output = scorer.score(pictures(), PROMPTS)
    assert output.aspects["style"].tolist() == [4.25, 1, 3]
    assert output.reward.tolist() == pytest.approx([3.25, 1, 4])


@pytest.mark.parametrize(
    ("answer", "score"),
    [("cat (animal): 1\nFinal Score: 4", 4), ("**Final Score:** 3.5", 3.5), ("Final Score: 2 \n", 2)],
)
def test_a_score_is_read(answer: str, score: float) -> None:
    assert read_score(answer, "Final Score") == score


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ("", "found 0"),
        ("The final score is 4", "found 0"),
        ("Final Score: 4\nFinal Score: 2", "found 2"),
        ("Final Score: 4/5", "'4/5' is no number"),
        ("Final Score: four", "'four' is no number"),
        ("Final Score: 7", "7 is not from 1 to 5"),
        ("Final Score: ", "'' is no number"),
    ],
)
def test_a_score_that_is_none_is_an_error(answer: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        read_score(answer, "Final Score")


def test_unified_reward_asks_for_its_template() -> None:
    with pytest.raises(ValueError, match="unified-reward needs template=, a text file"):
        load_scorer("unified-reward")
