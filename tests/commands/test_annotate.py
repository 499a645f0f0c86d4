"""``diffusion-align annotate``, with local scorers and with a language model that misbehaves."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from diffusion_align.cli import main
from diffusion_align.commands.annotate import chosen_pairs, read_finished, standardise
from diffusion_align.commands.options import AnnotateOptions
from diffusion_align.data import Comparisons, load_pairs
from diffusion_align.rewards import load_scorer
from diffusion_align.rewards.published.llm import ASPECTS, LLMError, LLMScorer, parse_scores

PROMPTS = ["a large red star on a dark background", "two small blue rings on a light background"]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


def annotate(prompts: Path, out: Path, *more: str) -> int:
    return main(["annotate", str(prompts), "--out", str(out), "--num-inference-steps", "2", "--per-prompt", "3", *more])


@pytest.mark.slow
def test_pairs_are_judged_by_the_scorer_and_feed_training(prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "pairs"
    assert annotate(prompts, out, "--scorers", "scenes-oracle", "--tie-margin", "0") == 0
    comparisons = Comparisons(out)
    assert len(comparisons) == 6  # three pairs of three pictures, for two prompts
    assert set(comparisons.aspects) == {"prompt_following", "aesthetic", "fidelity", "correct"}
    oracle = load_scorer("scenes-oracle")
    pairs = load_pairs(out, keep_ties=False)
    for i in range(len(pairs)):  # type: ignore[arg-type]
        record = pairs[i]  # type: ignore[index]
        rewards = oracle.score(list(record.images()), [record.caption] * 2).reward
        assert rewards[0] > rewards[1]
    run = ["train", "dpo", "--dataset", str(out), "--max-steps", "1", "--output-dir", str(tmp_path / "run")]
    assert main([*run, "--report-to", "none", "--no-progress"]) == 0


@pytest.mark.slow
def test_a_run_that_died_draws_only_what_is_missing(prompts: Path, tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert annotate(prompts, whole, "--scorers", "scenes-oracle") == 0
    (resumed / "images").mkdir(parents=True)
    lines = (whole / "rows.jsonl").read_text().splitlines()
    header = json.dumps({k: v for k, v in json.loads(lines[0]).items() if k != "checksum"} | {"lora": None})  # as 0.1
    assert header != lines[0]
    (resumed / "rows.jsonl").write_text("\n".join([header, lines[1], lines[2][:20]]))
    for picture in (whole / "images").glob("000000-*"):
        (resumed / "images" / picture.name).write_bytes(picture.read_bytes())
    before = {path: path.stat().st_mtime_ns for path in (resumed / "images").iterdir()}
    assert annotate(prompts, resumed, "--scorers", "scenes-oracle") == 0
    assert len(before) == 3
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert (resumed / "rows.jsonl").read_text().splitlines()[1:] == lines[1:]
    first, second = (Comparisons(folder).source.table.to_list() for folder in (whole, resumed))
    assert first == second


def test_another_runs_folder_is_refused(prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "rows.jsonl").write_text('{"prompts": "other"}\n')
    assert annotate(prompts, tmp_path / "out", "--scorers", "scenes-oracle") == 2
    assert "belongs to a run with other options" in capsys.readouterr().err


def test_a_folder_is_of_its_prompts_and_options(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows are told apart by what was drawn, not by the name of the file that the prompts are in."""
    options = AnnotateOptions(prompts=str(prompts), out=str(tmp_path), scorers=("scenes-oracle",))
    rows = tmp_path / "rows.jsonl"
    assert read_finished(rows, PROMPTS, options) == []
    with rows.open("a") as file:
        file.write(json.dumps({"prompt": PROMPTS[0], "scores": [{"overall": 1.0}]}) + "\n")
    assert read_finished(rows, PROMPTS, replace(options, prompts="moved.txt")) == [[{"overall": 1.0}]]
    with pytest.raises(ValueError, match=f"prompt 1 was '{PROMPTS[0]}', is 'a star' now"):
        read_finished(rows, ["a star", *PROMPTS], options)
    with pytest.raises(ValueError, match=r"prompt 1 was .*, there is none now"):
        read_finished(rows, [], options)
    for name, value in {"guidance_scale": 2.0, "seed": 9, "variant": "fp16", "lora": ("a",)}.items():
        with pytest.raises(ValueError, match=f"{name} was "):
            read_finished(rows, PROMPTS, replace(options, **{name: value}))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scorers", "aesthetic=scenes-oracle", "aesthetic=scenes-oracle"], "two scorers for 'aesthetic'"),
        (["--scorers", "scenes-oracel"], "did you mean 'scenes-oracle'?"),
        (["--scorers", "scenes-oracle", "--per-prompt", "1"], "--per-prompt 1: expected at least 2"),
    ],
)
def test_mistakes_are_named(
    arguments: list[str], message: str, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert annotate(prompts, tmp_path / "out", *arguments) == 2
    assert message in capsys.readouterr().err


def test_the_verdict_is_the_mean_of_standardised_aspects() -> None:
    scores = [[{"a": 0.0, "b": 10.0}, {"a": 2.0, "b": 10.0}], [{"a": 5.0, "b": 30.0}, {"a": 7.0, "b": 50.0}]]
    found = standardise(scores, has_overall=False)
    assert [picture["a"] for row in found for picture in row] == pytest.approx([-1, 1, -1, 1])
    assert [picture["b"] for row in found for picture in row] == pytest.approx([0, 0, -(2**0.5), 2**0.5])
    assert found[1][1]["overall"] == pytest.approx((1 + 2**0.5) / 2)
    assert list(chosen_pairs([0.3, 0.9, -1.0], "best-worst")) == [(1, 2)]
    assert len(list(chosen_pairs([0.3, 0.9, -1.0], "all"))) == 3


# -- the language model ------------------------------------------------------------------------------------------------


class Endpoint(BaseHTTPRequestHandler):
    """Answers with what ``script`` says, one entry per request; the last one over and over."""

    script: ClassVar[list[tuple[int, str, float]]] = []
    seen: ClassVar[list[dict[str, Any]]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Endpoint.seen.append(body)
        status, text, delay = Endpoint.script.pop(0) if len(Endpoint.script) > 1 else Endpoint.script[0]
        threading.Event().wait(delay)
        content = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
        except OSError:  # the client gave up
            pass

    def log_message(self, *arguments: Any) -> None:
        """Quiet."""


@pytest.fixture
def endpoint() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Endpoint.seen.clear()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()


def answer(**scores: Any) -> str:
    return json.dumps(dict.fromkeys(ASPECTS, 5) | scores | {"reason": "so"})


@pytest.mark.slow
def test_an_endpoint_that_misbehaves_is_asked_again(endpoint: str) -> None:
    Endpoint.script = [
        (429, "", 0), (500, "", 0), (200, "no json", 0), (200, answer(), 3.0), (200, answer(aesthetic=11), 0),
        (200, f"```json\n{answer(aesthetic=9)}\n```", 0),
    ]  # fmt: skip
    scorer = load_scorer("llm", url=endpoint, wait=0.01, timeout=0.5, retries=5)
    output = scorer.score(torch.rand(1, 3, 8, 8), ["a cat"])
    assert output.aspects["aesthetic"].tolist() == [9]
    assert output.reward.tolist() == [6]
    assert len(Endpoint.seen) == 6
    content = Endpoint.seen[0]["messages"][0]["content"]
    assert content[0]["text"].endswith("Prompt: a cat")
    assert content[1]["image_url"]["url"].startswith("data:image/png;base64,iVBOR")


def test_when_it_never_answers_the_prompt_is_named(endpoint: str) -> None:
    Endpoint.script = [(503, "", 0)]
    scorer = load_scorer("llm", url=endpoint, wait=0.01, retries=2)
    with pytest.raises(LLMError, match="no usable answer in 3 attempts for 'a cat': status 503"):
        scorer.score(torch.rand(1, 3, 8, 8), ["a cat"])
    assert len(Endpoint.seen) == 3


def test_a_refusal_is_not_asked_again(endpoint: str) -> None:
    Endpoint.script = [(401, "", 0)]
    with pytest.raises(LLMError, match="refused the request: status 401"):
        load_scorer("llm", url=endpoint, wait=0.01).score(torch.rand(1, 3, 8, 8), ["a cat"])
    assert len(Endpoint.seen) == 1


def test_answers_are_kept_raw_and_not_asked_for_twice(endpoint: str, tmp_path: Path) -> None:
    Endpoint.script = [(200, answer(fidelity=8), 0)]
    cache, images = tmp_path / "llm.jsonl", torch.rand(2, 3, 8, 8)
    first = LLMScorer(endpoint, "m", cache, wait=0.01).score(images, ["a", "b"])
    with cache.open("a") as file:
        file.write('{"key": "torn')
    second = LLMScorer(endpoint, "m", cache, wait=0.01).score(images, ["a", "b"])
    assert torch.equal(first.reward, second.reward)
    assert len(Endpoint.seen) == 2
    assert json.loads(cache.read_text().splitlines()[0])["raw"] == answer(fidelity=8)


@pytest.mark.slow
def test_annotating_with_a_language_model(endpoint: str, prompts: Path, tmp_path: Path) -> None:
    Endpoint.script = [(200, answer(aesthetic=value), 0) for value in (2, 9, 5, 3, 7, 4)]
    out = tmp_path / "pairs"
    assert annotate(prompts, out, "--scorers", "llm", "--llm-url", endpoint, "--pairs", "best-worst") == 0
    comparisons = Comparisons(out)
    assert len(comparisons) == 2
    assert set(ASPECTS) <= set(comparisons.aspects)
    assert comparisons[0].labels["aesthetic"] == comparisons[0].labels["overall"]
    assert comparisons[0].labels["fidelity"] == 0.5


@pytest.mark.parametrize("raw", ["", "5", '{"aesthetic": 3}', answer(fidelity="high"), answer(fidelity=True), "{"])
def test_answers_that_are_none(raw: str) -> None:
    with pytest.raises(ValueError, match=r"no JSON object|is no number"):
        parse_scores(raw)
