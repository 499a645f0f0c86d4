"""A scorer in another process: the same scores, clear failures, and nothing for strangers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import requests
import torch
from torch import Tensor

from diffusion_align.rewards import Ensemble, RewardOutput, RewardScorer, load_scorer
from diffusion_align.rewards.remote import RemoteError, RemoteScorer
from diffusion_align.rewards.serving import ScorerServer
from diffusion_align.rewards.wire import TOKEN, WireError, answer_bytes, read_answer, read_request, request_bytes


class Darkness(RewardScorer):
    """Less is better; one aspect, features, words, and a context."""

    name = "darkness"
    needs = frozenset({"masks", "users"})
    higher_is_better = False
    statistics = (0.5, 0.25)

    def evaluate(self, images: Tensor, prompts: list[str], context: dict[str, Any]) -> RewardOutput:
        inside = (images * context["masks"]).flatten(1).mean(dim=1)
        names = torch.tensor([float(len(user)) for user in context["users"]])
        return RewardOutput(inside + names, {"names": names}, features=images.flatten(1)[:, :3])


class Failing(Darkness):
    needs = frozenset()

    def evaluate(self, images: Tensor, prompts: list[str], context: dict[str, Any]) -> RewardOutput:
        raise RuntimeError("CUDA out of memory")


@contextmanager
def served(scorer: RewardScorer, **options: Any) -> Iterator[str]:
    with ScorerServer(scorer, port=0, **options) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join(10)


def same(found: RewardOutput, expected: RewardOutput) -> None:
    assert torch.equal(found.reward, expected.reward)
    assert found.aspects.keys() == expected.aspects.keys()
    assert all(torch.equal(found.aspects[name], values) for name, values in expected.aspects.items())
    for name in ("std", "features", "words"):
        one, other = getattr(found, name), getattr(expected, name)
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


@pytest.mark.slow
def test_scores_context_and_facts_are_those_of_the_served_scorer() -> None:
    images, prompts = torch.rand(5, 3, 8, 8), ["a", "b é", "c", "d", "e"]
    context = {"masks": torch.ones(5, 1, 8, 8), "users": ["ann", "bo", "c", "d", "e"]}
    with served(Darkness(), batch_size=2) as url:
        remote = load_scorer(url)
        same(remote.score(images, prompts, **context), Darkness().score(images, prompts, **context))
    assert remote.needs == Darkness.needs
    assert (remote.higher_is_better, remote.statistics, remote.differentiable) == (False, (0.5, 0.25), False)


@pytest.mark.slow
def test_pictures_of_different_sizes_are_sent_as_they_are() -> None:
    scorer = load_scorer("scenes-vp-words")
    pictures = [torch.rand(3, 64, 64), torch.rand(3, 80, 64)]
    prompts = ["one large red star on a light background"] * 2
    with served(scorer) as url:
        same(RemoteScorer(url).score(pictures, prompts), scorer.score(pictures, prompts))


@pytest.mark.slow
def test_a_remote_member_of_an_ensemble() -> None:
    images = torch.rand(2, 3, 64, 64)
    member = load_scorer("scenes-vp-words")
    with served(member) as url:
        remote = RemoteScorer(url)
        both = Ensemble([remote, member], standardise="none")
        assert not both.elsewhere
        assert Ensemble([remote]).elsewhere
        torch.testing.assert_close(both.score(images, ["a", "b"]).reward, member.score(images, ["a", "b"]).reward)


@pytest.mark.slow
def test_what_fails_there_is_told_here() -> None:
    with served(Failing()) as url:
        remote = RemoteScorer(url)
        with pytest.raises(RemoteError, match=r"500.*CUDA out of memory"):
            remote.score(torch.rand(1, 3, 8, 8), ["a"])


def test_nobody_there(unused_port: int) -> None:
    with pytest.raises(RemoteError, match="serve-scorer"):
        load_scorer(f"http://127.0.0.1:{unused_port}")


@pytest.fixture
def unused_port() -> int:
    with ScorerServer(Failing(), port=0) as server:
        port: int = server.server_port
    return port


@pytest.mark.slow
def test_an_answer_that_takes_too_long() -> None:
    class Slow(Failing):
        def evaluate(self, images: Tensor, prompts: list[str], context: dict[str, Any]) -> RewardOutput:
            threading.Event().wait(2)
            return RewardOutput(torch.zeros(len(images)))

    with served(Slow()) as url, pytest.raises(RemoteError, match=r"within 0\.2 s"):
        load_scorer(url, timeout=0.2).score(torch.rand(1, 3, 8, 8), ["a"])


@pytest.mark.slow
def test_a_secret_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN, raising=False)
    with served(Failing(), token="secret") as url:
        with pytest.raises(RemoteError, match=TOKEN):
            RemoteScorer(url)
        monkeypatch.setenv(TOKEN, "secret")
        assert RemoteScorer(url).served == "darkness"


def test_other_machines_need_a_secret() -> None:
    with pytest.raises(ValueError, match=r"0\.0\.0\.0.*DIFFUSION_ALIGN_TOKEN"):
        ScorerServer(Failing(), host="0.0.0.0", port=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/describe", {"Host": "evil.example:80"}, 403),
        ("/etc/passwd", {}, 404),
        ("/describe", {}, 200),
    ],
)
def test_strangers_are_refused(path: str, headers: dict[str, str], status: int) -> None:
    with served(Failing()) as url:
        assert requests.get(url + path, headers=headers, timeout=5).status_code == status


@pytest.mark.slow
@pytest.mark.parametrize("body", [b"", b"\x00" * 8, b"not safetensors at all", request_bytes([], [], {})])
def test_bytes_that_are_no_request_are_one_clear_refusal(body: bytes) -> None:
    with served(Failing()) as url:
        answer = requests.post(url + "/score", data=body, timeout=5)
    assert answer.status_code == 400
    assert answer.text


def test_unknown_context_and_other_versions_are_refused() -> None:
    with pytest.raises(WireError, match="secret_sauce"):
        read_request(request_bytes(torch.rand(1, 3, 8, 8), ["a"], {"secret_sauce": ["x"]}))
    content = answer_bytes(RewardOutput(torch.zeros(2)))
    with pytest.raises(WireError, match="expected 3"):
        read_answer(content, 3)
    newer = content.replace(b'\\"version\\": 1', b'\\"version\\": 2')
    assert newer != content
    with pytest.raises(WireError, match="version 2"):
        read_answer(newer, 2)
