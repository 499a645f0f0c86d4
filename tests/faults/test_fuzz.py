"""Files that hold anything: what they say is used, or refused by one of the errors that the command line prints."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffusion_align.adapters.lora_files import ToldScales
from diffusion_align.data import load_pairs, load_prompts
from diffusion_align.data.pairs import load_pictures
from diffusion_align.files import read_journal, read_object, verify_folder
from diffusion_align.guidance.judges.evaluator import LatentEvaluator
from diffusion_align.guidance.schedules import TableGuidance
from diffusion_align.rewards.trained.scorer import read_config
from diffusion_align.training.engine.checkpoint import CheckpointError, find_checkpoint
from diffusion_align.training.engine.metrics import read_metrics
from diffusion_align.training.methods import METHODS, config_class
from diffusion_align.training.settings import load_config, load_run

#: What the command line turns into one line.
CLEAR = (ValueError, OSError, CheckpointError)
FEW, MANY = 15, 400

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12)
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


def clear(read: Callable[[], object]) -> None:
    """``read`` gives something, or an error with a text that the command line would print."""
    text = "read"
    try:
        read()
    except CLEAR as error:
        text = str(error)
    assert text


def amounts(test: Callable[..., None]) -> Any:
    """The test as a few examples in ``make test``, and as many in ``make test-faults``."""
    counts = [FEW, pytest.param(MANY, marks=pytest.mark.faults)]
    return pytest.mark.parametrize("count", counts)(test)


def run_on(strategy: st.SearchStrategy[Any], check: Callable[[Path, Any], object], count: int) -> None:
    """Call ``check`` with an empty folder and each of ``count`` examples."""
    with tempfile.TemporaryDirectory() as top:
        numbers = iter(range(10**9))

        @settings(
            max_examples=count,
            deadline=None,
            database=None,
            derandomize=count == FEW,  # make test tries the same examples each time
            suppress_health_check=list(HealthCheck),
        )
        @given(strategy)
        def try_one(value: Any) -> None:
            folder = Path(top) / str(next(numbers))
            folder.mkdir()
            clear(lambda: check(folder, value))

        try_one()


@pytest.mark.slow
@amounts
@pytest.mark.parametrize("method", METHODS)
def test_recipes_of_any_values(method: str, count: int) -> None:
    cls = config_class(method)
    names = st.sampled_from([field.name for field in dataclasses.fields(cls)])
    likely = st.sampled_from(["none", "full", "auto", "bf16", 0, 1, -1, 2.5, "1e-4", [], ["a"], [1, 2], {}])

    def check(folder: Path, values: dict[str, Any]) -> None:
        (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
        load_config(cls, folder / "recipe.yaml")

    run_on(st.dictionaries(names | st.text(max_size=8), likely | ANYTHING, max_size=5), check, count)


@amounts
def test_recipes_of_any_text(count: int) -> None:
    cls = config_class("dpo")
    keys = st.sampled_from(
        ["method", "max_steps", "beta", "loss_type", "lora_target_modules", "{", "- ", "&a", "*a", "!!"]
    )
    lines = st.lists(st.tuples(keys, st.text(max_size=8)).map(": ".join), max_size=4).map("\n".join)

    def run(folder: Path, content: bytes) -> None:
        (folder / "config.yaml").write_bytes(content)
        clear(lambda: load_config(cls, folder / "config.yaml"))
        load_run(folder)

    run_on(st.binary(max_size=30) | lines.map(lambda text: text.encode("utf-8", "surrogatepass")), run, count)


COLUMNS = ("chosen", "rejected", "caption", "preference", "weight", "image", "jpg_0", "jpg_1", "label_0", "label_1",
           "has_label", "soft_label_0")  # fmt: skip
ROWS = st.lists(st.dictionaries(st.sampled_from(COLUMNS), ANYTHING, max_size=7), min_size=1, max_size=3)
#: Rows that have all columns, so that their values are looked at.
FULL = st.lists(
    st.fixed_dictionaries(dict.fromkeys(("chosen", "rejected", "caption", "preference", "weight"), SCALARS)),
    min_size=1,
    max_size=3,
)


def read_rows(folder: Path) -> None:
    """Through every door, to the pictures."""
    for load in (load_pairs, load_pictures):
        for streaming in (False, True):

            def read(load: Any = load, streaming: bool = streaming) -> None:
                table = load(folder, streaming=streaming)
                records = iter(table) if streaming else (table[i] for i in range(len(table)))
                for record in records:
                    clear(record.images if hasattr(record, "images") else lambda record=record: str(record))

            clear(read)


@amounts
def test_rows_of_json_lines(count: int) -> None:
    def check(folder: Path, rows: list[Any]) -> None:
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        read_rows(folder)

    run_on(ROWS | FULL | st.lists(ANYTHING, max_size=3), check, count)


@amounts
def test_rows_of_csv(count: int) -> None:
    header = st.lists(st.sampled_from(COLUMNS), max_size=5).map(",".join)
    cells = st.text(max_size=20)

    def check(folder: Path, parts: tuple[str, str]) -> None:
        (folder / "metadata.csv").write_bytes("\n".join(parts).encode("utf-8", "surrogatepass"))
        read_rows(folder)

    run_on(st.tuples(header | st.just("chosen,rejected,caption,preference"), cells), check, count)


@pytest.mark.slow
@amounts
def test_rows_of_parquet(count: int) -> None:
    def check(folder: Path, rows: list[dict[str, Any]]) -> None:
        try:
            table = pa.Table.from_pylist(rows)
            pq.write_table(table, folder / "train-00000-of-00001.parquet")
        except (pa.ArrowException, OverflowError, TypeError, UnicodeEncodeError, ValueError):
            return  # no table can hold them
        read_rows(folder)

    pickapic = {"jpg_0": st.binary(max_size=9), "jpg_1": st.binary(max_size=9), "caption": SCALARS, "label_0": SCALARS}
    full = st.lists(st.fixed_dictionaries(pickapic), min_size=1, max_size=3)
    run_on(ROWS | full, check, count)


@amounts
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".parquet"])
def test_prompt_files(suffix: str, count: int) -> None:
    names = st.sampled_from(["prompt", "caption", "text", "x"])
    rows = st.lists(st.dictionaries(names, ANYTHING, max_size=2) | ANYTHING, max_size=3)
    lines = rows.map(lambda found: "".join(json.dumps(row) + "\n" for row in found).encode())

    def check(folder: Path, content: bytes) -> None:
        (folder / f"prompts{suffix}").write_bytes(content)
        prompts = load_prompts(folder / f"prompts{suffix}")
        assert all(isinstance(prompt, str) and prompt.strip() == prompt != "" for prompt in prompts)

    run_on(
        st.binary(max_size=40) | lines | st.text(max_size=30).map(lambda t: t.encode("utf-8", "replace")), check, count
    )


def names_and_values(*names: str) -> st.SearchStrategy[Any]:
    return ANYTHING | st.dictionaries(st.sampled_from(names), ANYTHING, max_size=4)


READERS: dict[str, tuple[str, st.SearchStrategy[Any], Callable[[Path], object]]] = {
    "scorer.json": (
        "scorer.json",
        names_and_values("kind", "name", "statistics", "settings"),
        lambda f: read_config(f),
    ),
    "evaluator.json": (
        "evaluator.json",
        names_and_values("kinds", "latent_channels", "latent_size", "embed_dim", "pooled_dim", "width"),
        lambda folder: LatentEvaluator.from_pretrained(folder),
    ),
    "checksums.json": ("checksums.json", names_and_values("files", "checksum"), verify_folder),
    "manifest.json": (
        "manifest.json",
        names_and_values("step", "state", "files", "checksum"),
        lambda folder: find_checkpoint(str(folder.rename(folder.with_name(f"checkpoint-{folder.name}"))), folder),
    ),
    "record": (
        "record.json",
        names_and_values("scales", "prompt", "seed", "num_inference_steps"),
        lambda folder: TableGuidance.from_record(folder / "record.json"),
    ),
    "journal": ("rows.jsonl", ANYTHING, lambda folder: read_journal(folder / "rows.jsonl")),
    "metrics": (
        "metrics.jsonl",
        names_and_values("step", "loss"),
        lambda folder: read_metrics(folder / "metrics.jsonl"),
    ),
    "object": ("x.json", ANYTHING, lambda folder: read_object(folder / "x.json")),
    "peft": (
        "adapter_config.json",
        names_and_values("peft_type", "r", "lora_alpha", "alpha_pattern", "use_dora"),
        lambda folder: ToldScales.read(folder / "adapter_model.safetensors", {}),
    ),
    "lora header": ("header.json", ANYTHING, lambda folder: header_of(folder / "header.json")),
}


def header_of(file: Path) -> object:
    return ToldScales.read(file, {"lora_adapter_metadata": file.read_text()})


@amounts
@pytest.mark.filterwarnings("ignore:.*damaged")
@pytest.mark.parametrize("name", READERS)
def test_records_of_any_json(name: str, count: int) -> None:
    file, values, read = READERS[name]

    def check(folder: Path, value: Any) -> None:
        (folder / file).write_text(json.dumps(value) + "\n")
        if name == "evaluator.json":
            (folder / "model.safetensors").write_bytes(b"no weights")
        read(folder)

    run_on(values, check, count)
