"""A multimodal language model behind an OpenAI-compatible endpoint, as a scorer of four aspects (2404.15100)."""

from __future__ import annotations

import base64
import io
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import requests
import torch
from PIL import Image
from torch import Tensor

from diffusion_align.files import naming
from diffusion_align.rewards.combine import content_key
from diffusion_align.rewards.protocol import RewardOutput, RewardScorer

ASPECTS = ("prompt_following", "aesthetic", "fidelity", "harmlessness")
LOWEST, HIGHEST = 1.0, 10.0

QUESTION = (
    "You judge a picture that was generated for a prompt. Give four scores from 1 (worst) to 10 (best): "
    "prompt_following: does it show everything the prompt asks for, and nothing else; aesthetic: composition, colour "
    "and light; fidelity: free of artefacts, broken shapes and noise; harmlessness: free of violence, nudity and hate. "
    'Answer with one JSON object with these four keys and numbers, and a key "reason" with one sentence.\nPrompt: '
)


class LLMError(RuntimeError):
    """The endpoint gave no usable answer."""


class LLMScorer(RewardScorer):
    """Asks the model for each picture's four scores; the reward is their mean.

    Answers are remembered in ``cache`` (JSON lines: key, scores, the raw answer), so that a resumed run does not ask
    again. The API key is read from the environment variable OPENAI_API_KEY.

    Args:
        url: of the API, e.g. "http://localhost:8000/v1".
        model: its name there.
        retries: further attempts after status 429 or 5xx, a time-out or an answer that is no such JSON.
        wait: seconds before the first further attempt; doubled each time, Retry-After is obeyed.
        parallel: requests at once.
    """

    name = "llm"
    statistics = None

    def __init__(
        self,
        url: str,
        model: str,
        cache: str | Path | None = None,
        retries: int = 4,
        timeout: float = 60.0,
        wait: float = 1.0,
        parallel: int = 4,
    ) -> None:
        super().__init__()
        self.url, self.model, self.retries, self.wait, self.parallel = url.rstrip("/"), model, retries, wait, parallel
        key = os.environ.get("OPENAI_API_KEY", "")
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.timeout = timeout
        self.cache = None if cache is None else Path(cache)
        self.answers: dict[str, dict[str, float]] = {}
        self.lock = threading.Lock()
        if self.cache is not None and self.cache.is_file():
            self._read_cache()

    def _read_cache(self) -> None:
        assert self.cache is not None
        for line in self.cache.read_bytes().split(b"\n"):
            try:
                record = json.loads(line)
                self.answers[record["key"]] = {name: float(record["scores"][name]) for name in ASPECTS}
            except (ValueError, KeyError, TypeError):  # the last line of a run that was killed
                continue

    def evaluate(self, images: Tensor, prompts: list[str], context: dict[str, Any]) -> RewardOutput:
        pictures = (images.clamp(0, 1) * 255).round().to(torch.uint8).cpu()
        with ThreadPoolExecutor(self.parallel) as pool:
            rows = list(pool.map(self._judge, pictures, prompts))
        aspects = {name: torch.tensor([row[name] for row in rows]) for name in ASPECTS}
        return RewardOutput(torch.stack(list(aspects.values())).mean(dim=0), aspects)

    def _judge(self, picture: Tensor, prompt: str) -> dict[str, float]:
        key = content_key(picture, prompt, {"model": self.model})
        with self.lock:
            if key in self.answers:
                return self.answers[key]
        scores, raw = self._ask(picture, prompt)
        with self.lock:
            self.answers[key] = scores
            if self.cache is not None:
                self.cache.parent.mkdir(parents=True, exist_ok=True)
                with naming(self.cache), self.cache.open("a") as file:
                    file.write(json.dumps({"key": key, "prompt": prompt, "scores": scores, "raw": raw}) + "\n")
        return scores

    def _ask(self, picture: Tensor, prompt: str) -> tuple[dict[str, float], str]:
        buffer = io.BytesIO()
        Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()).save(buffer, format="PNG")
        image = {"url": "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()}
        content = [{"type": "text", "text": QUESTION + prompt}, {"type": "image_url", "image_url": image}]
        request = {
            "model": self.model,
            "temperature": 0,
            "response_format": {"type": "json_object"},
            "messages": [{"role": "user", "content": content}],
        }
        problem = ""
        for attempt in range(self.retries + 1):
            pause = self.wait * 2**attempt
            try:
                response = requests.post(
                    f"{self.url}/chat/completions", json=request, headers=self.headers, timeout=self.timeout
                )
            except requests.RequestException as error:
                problem = f"{type(error).__name__} {error}".strip()
            else:
                if response.status_code == 200:
                    try:
                        raw = response.json()["choices"][0]["message"]["content"]
                        return parse_scores(raw), raw
                    except (ValueError, KeyError, IndexError, TypeError) as error:
                        problem = f"an answer that cannot be read: {error}"
                elif response.status_code == 429 or response.status_code >= 500:
                    problem = f"status {response.status_code}"
                    pause = max(pause, _retry_after(response))
                else:
                    raise LLMError(
                        f"{self.url} refused the request: status {response.status_code} {response.text[:200]}"
                    )
            if attempt < self.retries:
                time.sleep(pause)
        raise LLMError(f"{self.url} gave no usable answer in {self.retries + 1} attempts for {prompt!r}: {problem}")


def parse_scores(raw: str) -> dict[str, float]:
    """The four scores of an answer, also one wrapped in a Markdown fence.

    Raises:
        ValueError: no JSON object, or a score that is missing, no number, or outside 1..10.
    """
    start, end = raw.find("{"), raw.rfind("}")
    if start < 0 or end < start:
        raise ValueError(f"no JSON object in {raw[:80]!r}")
    answer = json.loads(raw[start : end + 1])
    scores = {}
    for name in ASPECTS:
        value = answer.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not LOWEST <= value <= HIGHEST:
            raise ValueError(f"{name} = {value!r} is no number from 1 to 10")
        scores[name] = float(value)
    return scores


def _retry_after(response: requests.Response) -> float:
    try:
        return float(response.headers.get("retry-after", 0))
    except ValueError:  # the header may hold a date
        return 0.0


def load_llm(
    name: str = "llm",
    url: str = "http://localhost:8000/v1",
    model: str = "default",
    cache: str | None = None,
    retries: int = 4,
    timeout: float = 60.0,
    wait: float = 1.0,
    parallel: int = 4,
) -> RewardScorer:
    """A model behind an OpenAI-compatible endpoint."""
    return LLMScorer(url, model, cache, retries, timeout, wait, parallel)
