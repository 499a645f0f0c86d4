"""A scorer that runs in another process, perhaps on another card or machine: ``diffusion-align serve-scorer``."""

from __future__ import annotations

import os
from typing import Any

import requests
import torch
from torch import Tensor

from .protocol import RewardOutput, RewardScorer
from .wire import DESCRIBE, SCORE, TOKEN, VERSION, WireError, read_answer, request_bytes


class RemoteError(RuntimeError):
    """The scorer's process is not there, refused, or failed; the message names its address and says what it said."""


class RemoteScorer(RewardScorer):
    """Scores pictures in the process behind ``url``; rewards come back on the CPU, without gradients.

    Pictures are sent in float32, so the scores are those that the served scorer gives in this process. The secret of a
    server that asks for one is read from the environment variable DIFFUSION_ALIGN_TOKEN.

    Attributes:
        elsewhere: scoring takes nothing from this process; a rollout draws on meanwhile.

    Args:
        url: "http://HOST:PORT".
        timeout: seconds for an answer.

    Raises:
        RemoteError: nobody answers there, or it is no scorer of this version.
    """

    elsewhere = True

    def __init__(self, url: str, timeout: float = 600.0) -> None:
        super().__init__()
        self.url, self.timeout, self.name = url.rstrip("/"), timeout, url.rstrip("/")
        try:
            said = self._ask("get", DESCRIBE, None).json()
            if said["version"] != VERSION:
                raise RemoteError(f"{self.url} speaks version {said['version']}: expected {VERSION}")
            self.served = str(said["name"])
            self.needs = frozenset(map(str, said["needs"]))
            self.higher_is_better = bool(said["higher_is_better"])
            statistics = said["statistics"]
            self.statistics = None if statistics is None else (float(statistics[0]), float(statistics[1]))
        except (ValueError, KeyError, TypeError):
            raise RemoteError(f"{self.url} is no scorer: expected `diffusion-align serve-scorer` there") from None

    def _preprocessed(self, batch: Tensor | list[Tensor]) -> Any:
        return batch  # the served scorer resizes as it must

    @torch.no_grad()
    def evaluate(self, images: Any, prompts: list[str], context: dict[str, Any]) -> RewardOutput:
        content = self._ask("post", SCORE, request_bytes(images, prompts, context)).content
        try:
            return read_answer(content, len(prompts))
        except WireError as error:
            raise RemoteError(f"{self.url} gave {error}") from None

    def _ask(self, verb: str, path: str, body: bytes | None) -> requests.Response:
        token = os.environ.get(TOKEN, "")
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        try:
            answer = requests.request(verb, self.url + path, data=body, headers=headers, timeout=(10, self.timeout))
        except requests.Timeout:
            raise RemoteError(f"{self.url} gave no answer within {self.timeout:g} s") from None
        except requests.RequestException as error:
            raise RemoteError(
                f"{self.url} cannot be reached ({type(error).__name__}): "
                "expected `diffusion-align serve-scorer NAME --port PORT` there"
            ) from None
        if answer.status_code == 401:
            raise RemoteError(f"{self.url} wants another secret: set {TOKEN} to the server's")
        if not answer.ok:
            raise RemoteError(f"{self.url} failed ({answer.status_code}): {answer.text[:500]}")
        return answer


def load_remote(name: str, timeout: float = 600.0) -> RemoteScorer:
    """The scorer behind the address ``name``."""
    return RemoteScorer(name, timeout)
