"""Any vision-language model of transformers as a judge: VQAScore's yes-probability, and UnifiedReward's written scores.

Both take what ``AutoModelForImageTextToText`` loads and has a chat template.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms.v2.functional import to_pil_image

from diffusion_align.rewards.preprocess import in_float32
from diffusion_align.rewards.protocol import RewardOutput, RewardScorer

#: VQAScore's question (2404.01291).
QUESTION = 'Does this figure show "{text_prompt}"? Please answer yes or no.'
ANSWERS = ("Yes", "No")
#: Lines that UnifiedReward ends with, and the aspect that each one scores, by the scorer's name.
WRITTEN: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "unified-reward": {"Final Score": "final"},
        "unified-reward-2": {
            "Alignment Score (1-5)": "alignment",
            "Coherence Score (1-5)": "coherence",
            "Style Score (1-5)": "style",
        },
    }
)
LOWEST, HIGHEST = 1.0, 5.0


class UnreadableAnswerError(RuntimeError):
    """A judge's text does not hold the scores it was asked for."""


class Conversation(nn.Module):
    """A model and its processor: pictures and questions in, the next token's logits or a text out.

    Args:
        model: of ``AutoModelForImageTextToText``, decoder only.
        processor: with a tokenizer and a chat template.

    Raises:
        ValueError: there is no chat template, or the model is an encoder with a decoder.
    """

    def __init__(self, name: str, model: Any, processor: Any) -> None:
        super().__init__()
        self.name, self.model, self.processor = name, model, processor
        if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
            raise ValueError(f"scorer {name}: {type(processor).__name__} does not read pictures and text")
        if getattr(processor, "chat_template", None) is None:
            raise ValueError(
                f"scorer {name}: {type(processor).__name__} has no chat template: give chat_template=, a Jinja file, "
                "or a checkpoint that was tuned for conversations"
            )
        if model.config.is_encoder_decoder or model.config.get_text_config().is_encoder_decoder:
            raise ValueError(f"scorer {name}: {type(model).__name__} is an encoder with a decoder; expected a decoder")
        # Positions are counted from the left, and causal attention does not see what follows: padded on the right, a
        # row's numbers are those that it has alone, whatever the architecture.
        processor.tokenizer.padding_side = "right"
        if processor.tokenizer.pad_token is None:
            processor.tokenizer.pad_token = processor.tokenizer.eos_token

    def inputs(self, images: Tensor, questions: Sequence[str]) -> Any:
        """Model inputs for pictures (B, 3, H, W) in [0, 1] with one question each, up to where the answer begins.

        Raises:
            ValueError: a question holds the model's own mark for a picture.
        """
        mark = getattr(self.processor, "image_token", None)
        for question in questions:
            if isinstance(mark, str) and mark in question:
                raise ValueError(f"scorer {self.name}: {question!r} holds {mark!r}, the model's mark for a picture")
        pictures = [to_pil_image(image.clamp(0, 1).float().cpu()) for image in images]
        messages = [
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
            for question in questions
        ]
        # Models that think aloud before they answer are told not to; other templates do not know the word.
        flags = {"enable_thinking": False} if "enable_thinking" in str(self.processor.chat_template) else {}
        texts = [
            self.processor.apply_chat_template(message, add_generation_prompt=True, **flags) for message in messages
        ]
        begins = self.processor.tokenizer.bos_token
        again = not (begins and texts[0].startswith(begins))  # some templates write the first token, some leave it
        tokens = self.processor(
            text=texts,
            images=[[picture] for picture in pictures],
            padding=True,
            add_special_tokens=again,
            return_tensors="pt",
        )
        moved = tokens.to(self.model.device)
        return {
            name: value.to(self.model.dtype) if torch.is_floating_point(value) else value
            for name, value in moved.items()
        }

    def next_logits(self, images: Tensor, questions: Sequence[str]) -> Tensor:
        """Logits (B, V) float32 of the first token of each answer."""
        inputs = self.inputs(images, questions)
        last = inputs["attention_mask"].sum(dim=1) - 1
        kept, rows = torch.unique(last, return_inverse=True)
        if "logits_to_keep" in inspect.signature(self.model.forward).parameters:
            logits = self.model(**inputs, use_cache=False, logits_to_keep=kept).logits
        else:
            logits, rows = self.model(**inputs, use_cache=False).logits, last
        found: Tensor = logits[torch.arange(len(rows), device=rows.device), rows].float()
        return found

    def answer(self, image: Tensor, question: str, most: int) -> str:
        """The model's most probable text, of at most ``most`` tokens, about one picture (3, H, W)."""
        inputs = self.inputs(image[None], [question])
        written = self.model.generate(**inputs, do_sample=False, max_new_tokens=most)
        text: str = self.processor.tokenizer.decode(
            written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        return text

    def first_token(self, word: str) -> int:
        """Id of the token with which an answer of one ``word`` begins.

        Raises:
            ValueError: the tokenizer splits the word.
        """
        ids = self.processor.tokenizer.encode(word, add_special_tokens=False)
        if len(ids) != 1 or ids[0] == self.processor.tokenizer.unk_token_id:
            pieces = self.processor.tokenizer.convert_ids_to_tokens(ids)
            raise ValueError(
                f"scorer {self.name}: the tokenizer reads {word!r} as {pieces}; expected one known token: give "
                "answers=, two words that are one token each"
            )
        return int(ids[0])


class VQAScore(RewardScorer):
    """VQAScore (2404.01291): P("Yes" | picture, 'Does this figure show "prompt"? Please answer yes or no.').

    The softmax is over the whole vocabulary, as published; ``relative`` takes it over the two answers alone,
    P(yes) / (P(yes) + P(no)), which a model's habit of writing something else does not touch. Aspects: ``yes`` and
    ``no``, both probabilities among all tokens. Rewards lie in [0, 1].

    Args:
        question: holds ``{text_prompt}`` once.
        answers: the words for yes and no, one token each.

    Raises:
        ValueError: a question without its place for the prompt, or answers that the tokenizer splits or confuses.
    """

    name = "vqascore"

    def __init__(
        self,
        conversation: Conversation,
        question: str = QUESTION,
        answers: Sequence[str] = ANSWERS,
        relative: bool = False,
    ) -> None:
        super().__init__()
        self.conversation, self.question, self.relative = conversation, checked(self.name, question), relative
        if len(answers) != 2:
            raise ValueError(f"scorer {self.name}: answers {list(answers)}: expected two words, for yes and no")
        self.ids = [conversation.first_token(word) for word in answers]
        if self.ids[0] == self.ids[1]:
            raise ValueError(f"scorer {self.name}: answers {list(answers)} are the same token")

    def evaluate(self, images: Tensor, prompts: list[str], context: dict[str, Any]) -> RewardOutput:
        questions = [self.question.replace("{text_prompt}", prompt) for prompt in prompts]
        logits = self.conversation.next_logits(images, questions)
        with in_float32(logits):
            yes, no = logits.log_softmax(dim=-1)[:, self.ids].unbind(dim=-1)
            reward = torch.sigmoid(yes - no) if self.relative else yes.exp()
        return RewardOutput(reward, {"yes": yes.exp(), "no": no.exp()})


class UnifiedReward(RewardScorer):
    """UnifiedReward (2503.05236): the model writes its scores from 1 to 5, which are read strictly.

    "unified-reward" ends with "Final Score: X"; "unified-reward-2" (version 2.0) gives alignment, coherence and style.
    ``reward`` is the mean of the aspects.

    Args:
        template: the instruction the weights were trained with, holding ``{text_prompt}``.
        lines: what stands before each score, and the name of its aspect.
        longest: tokens of the answer.
    """

    def __init__(
        self, name: str, conversation: Conversation, template: str, lines: Mapping[str, str], longest: int
    ) -> None:
        super().__init__()
        self.name, self.conversation, self.lines, self.longest = name, conversation, dict(lines), longest
        self.template = checked(name, template)

    def evaluate(self, images: Tensor, prompts: list[str], context: dict[str, Any]) -> RewardOutput:
        rows = [self.judge(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
        aspects = {aspect: torch.tensor([row[aspect] for row in rows]) for aspect in self.lines.values()}
        return RewardOutput(torch.stack(list(aspects.values())).mean(dim=0), aspects if len(aspects) > 1 else {})

    def judge(self, image: Tensor, prompt: str) -> dict[str, float]:
        """Scores by aspect.

        Raises:
            UnreadableAnswerError: the answer does not hold each of them once, as a number from 1 to 5.
        """
        answer = self.conversation.answer(image, self.template.replace("{text_prompt}", prompt), self.longest)
        try:
            return {aspect: read_score(answer, line) for line, aspect in self.lines.items()}
        except ValueError as error:
            raise UnreadableAnswerError(f"scorer {self.name}, prompt {prompt!r}: {error}") from None


def read_score(answer: str, line: str) -> float:
    """The number after ``line``: and nothing else on its line, in an answer that may be marked up with asterisks.

    Raises:
        ValueError: it is not there, there more than once, no number, or outside 1 to 5; the answer's end is quoted.
    """
    plain = answer.replace("*", "")
    found = re.findall(rf"^\s*{re.escape(line)}\s*:[ \t]*(.*?)\s*$", plain, re.MULTILINE)
    shown = f"the answer ends with {answer[-200:]!r}"
    if len(found) != 1:
        raise ValueError(f"expected one line '{line}: X', found {len(found)}; {shown}")
    if not re.fullmatch(r"\d+(\.\d+)?", found[0]):
        raise ValueError(f"{line}: {found[0]!r} is no number; {shown}")
    value = float(found[0])
    if not LOWEST <= value <= HIGHEST:
        raise ValueError(f"{line}: {value:g} is not from {LOWEST:g} to {HIGHEST:g}; {shown}")
    return value


def checked(name: str, template: str) -> str:
    """Raises ``ValueError``: the template has no place for the prompt."""
    if template.count("{text_prompt}") != 1:
        raise ValueError(f"scorer {name}: {template[:60]!r}: expected {{text_prompt}} once, where the prompt stands")
    return template


def open_conversation(name: str, checkpoint: str, dtype: str, chat_template: str | None) -> Conversation:
    """Model and processor from a folder or the hub.

    Args:
        dtype: "auto" (as saved), "float32", "bfloat16" or "float16".
        chat_template: file with a Jinja template instead of the processor's own.

    Raises:
        FileNotFoundError: they are neither here nor can they be fetched.
        ValueError: no model of this kind, or no chat template.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(checkpoint)
        if chat_template is not None:
            processor.chat_template = Path(chat_template).read_text()
        model, report = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=dtype, output_loading_info=True)
    except OSError as error:
        raise FileNotFoundError(
            f"scorer {name}: {checkpoint} is not in the local cache and cannot be fetched: download it "
            f"('hf download {checkpoint}') or give checkpoint=, a folder ({str(error).splitlines()[0]})"
        ) from None
    except ValueError as error:
        raise ValueError(f"scorer {name}: {checkpoint}: {str(error).splitlines()[0]}") from None
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(f"scorer {name}: {checkpoint} lacks {len(missing)} weights (first: {missing[0]})")
    return Conversation(name, model.eval(), processor)


def load_vqascore(
    name: str = "vqascore",
    checkpoint: str = "Qwen/Qwen2.5-VL-7B-Instruct",
    question: str = QUESTION,
    answers: Sequence[str] = ANSWERS,
    relative: bool = False,
    dtype: str = "auto",
    chat_template: str | None = None,
) -> RewardScorer:
    """VQAScore with any vision-language model; see :class:`VQAScore` and :func:`open_conversation`."""
    return VQAScore(open_conversation(name, checkpoint, dtype, chat_template), question, answers, relative)


#: The authors' weights on Qwen2.5-VL.
UNIFIED = {
    "unified-reward": "CodeGoat24/UnifiedReward-qwen-7b",
    "unified-reward-2": "CodeGoat24/UnifiedReward-2.0-qwen-7b",
}


def load_unified_reward(
    name: str,
    checkpoint: str | None = None,
    template: str | None = None,
    longest: int = 512,
    dtype: str = "auto",
) -> RewardScorer:
    """UnifiedReward ("unified-reward") or its version 2.0 ("unified-reward-2").

    Args:
        checkpoint: folder or hub name; also the 3B, 32B and 72B ones, and those on Qwen3-VL.
        template: text file with the instruction the weights were trained with, ``{text_prompt}`` where the caption
            stands. It is its authors' text (UnifiedReward, inference_qwen/image_generation/
            qwen_point_score_image_generation.py, and inference_qwen/UnifiedReward-2.0-inference/
            point_score_ACS_image_generation.py) and does not come with this package.
    """
    if template is None:
        raise ValueError(
            f"scorer {name} needs template=, a text file with the instruction its weights were trained with "
            "(docs/rewards.md says where it stands)"
        )
    text = checked(name, Path(template).read_text())
    conversation = open_conversation(name, checkpoint or UNIFIED[name], dtype, None)
    return UnifiedReward(name, conversation, text, WRITTEN[name], longest)
